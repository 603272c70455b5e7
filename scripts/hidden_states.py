"""What an lm_head is given on real text: hidden states, targets and the weight, out of any model's folder.

    python scripts/hidden_states.py MODEL                                  # on Python's own documentation
    python scripts/hidden_states.py MODEL --text a.txt --text b.md
    python scripts/hidden_states.py MODEL --dataset train.jsonl --columns question,answer --adapter runs/demo/adapter

MODEL is a folder or a name on the hub; `scripts/get_real.py` makes a folder. Plain text is read in windows of
--length tokens; a data set in any of TRL's formats is read as it would be trained on, the targets being the completion's
tokens, or all tokens of a text or a conversation. --output is a safetensors file that
`scripts/skipping.py` reads: hidden (N, H), weight (V, H), targets (N,), and a softcap in its metadata.
"""

from __future__ import annotations

import process_setup  # noqa: F401

# isort: split
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from data import load_data
from peft import PeftModel
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from tasks import FINE_TUNING_TASKS, IGNORED
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from deft_plugin import linear_gated_loss
from deft_plugin.ops.projection import LogitsTransform

console = Console()


def text_windows(
    text: str, tokenizer: PreTrainedTokenizerBase, length: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(1, length) token ids and labels, one window after the other."""
    ids = torch.tensor([tokenizer(text).input_ids], dtype=torch.long)
    for window in ids.split(length, dim=1):
        if window.numel():
            yield window, window


def example_rows(
    name: str, columns: str | None, tokenizer: PreTrainedTokenizerBase, length: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(1, length) token ids and labels of a data set's rows, the prompts' labels ignored."""
    # All rows: none is held out.
    options = {} if name in FINE_TUNING_TASKS else {"held_out_split": "train"}
    for row in load_data(name, 10**6, 1, seed, columns=columns, **options)["train"]:
        if "text" in row:
            ids, prompt = tokenizer(row["text"]).input_ids, []
        else:
            messages, prompt_messages = conversation(row)
            ids = tokenizer.apply_chat_template(messages, return_dict=False)
            prompt = (
                tokenizer.apply_chat_template(
                    prompt_messages, return_dict=False, add_generation_prompt=True
                )
                if prompt_messages
                else []
            )
        labels = [IGNORED] * len(prompt) + ids[len(prompt) :]
        yield torch.tensor([ids[:length]]), torch.tensor([labels[:length]])


def conversation(row: dict[str, Any]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """All messages of a row, and those that are its prompt."""
    if "messages" in row:
        return row["messages"], []
    prompt, completion = (
        [{"role": role, "content": text}] if isinstance(text, str) else text
        for role, text in (("user", row["prompt"]), ("assistant", row["completion"]))
    )
    return prompt + completion, prompt


@torch.no_grad()
def head_inputs(
    model: torch.nn.Module, ids: Tensor, labels: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """(n, H) hidden states that lm_head is given for the labelled positions, and their (n,) targets.

    Raises:
        ValueError: the model does more to its logits than a softcap.
    """
    lm_head = model.get_output_embeddings()
    given: list[Tensor] = []
    hook = lm_head.register_forward_hook(lambda module, inputs, output: given.append(inputs[0]))
    try:
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits
    finally:
        hook.remove()
    expected = LogitsTransform(softcap=softcap)(lm_head(given[0]).float())
    if not torch.allclose(logits.float(), expected, atol=1e-2):
        raise ValueError(
            "This model does more to its logits than a softcap; its hidden states alone do not say what."
        )
    kept = labels[0, 1:] != IGNORED
    return given[0][0, :-1][kept.to(model.device)], labels[0, 1:][kept]


def main(
    model: Annotated[str, typer.Argument(help="A model's folder, or its name on the hub.")],
    text: Annotated[
        list[Path] | None, typer.Option(exists=True, help="Text to read; may be repeated.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="In place of text: a file, folder or name on the hub, in any of TRL's formats."
        ),
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="Its columns, as in scripts/train.py.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(exists=True, help="A LoRA adapter's folder.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Targets to collect.")] = 2048,
    length: Annotated[int, typer.Option(min=2, help="Tokens that the model sees at a time.")] = 512,
    seed: Annotated[int, typer.Option(help="Draws the data set's rows.")] = 1,
    output: Annotated[Path, typer.Option(help="The safetensors file.")] = Path(
        "runs/hidden_states/plain_text.safetensors"
    ),
) -> None:
    """Run the model over text and keep what its lm_head is given."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()
    network = (
        base
        if adapter is None
        else PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    )
    softcap = getattr(network.config.get_text_config(), "final_logit_softcapping", None)
    if dataset is not None:
        rows = example_rows(dataset, columns, tokenizer, length, seed)
    else:
        whole = (
            "\n\n".join(path.read_text() for path in text)
            if text
            else "\n\n".join(pydoc_data.topics.topics.values())
        )
        rows = text_windows(whole, tokenizer, length)
    collected: list[tuple[Tensor, Tensor]] = []
    count = 0
    for ids, labels in track(rows, "reading", console=console, transient=True):
        collected.append(head_inputs(network, ids, labels, softcap))
        count += collected[-1][1].numel()
        if count >= tokens:
            break
    if not count:
        raise typer.BadParameter("there is no target in this text.")
    if count < tokens:
        console.print(f"There are no more than {count:,} targets.")
    hidden, targets = (torch.cat(parts)[:tokens] for parts in zip(*collected, strict=True))
    weight = network.get_output_embeddings().weight.detach()
    log_p = linear_gated_loss(hidden, weight, targets.to(device), "nll", softcap=softcap).log_p
    output.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"hidden": hidden, "weight": weight, "targets": targets}
    save_file(
        {name: tensor.contiguous().cpu() for name, tensor in tensors.items()},
        output,
        metadata={} if softcap is None else {"softcap": str(softcap)},
    )
    console.print(
        f"{len(targets):,} tokens, nll {-log_p.mean():.3f}, mean probability {log_p.exp().mean():.3f}: {output}"
    )


if __name__ == "__main__":
    typer.run(main)
