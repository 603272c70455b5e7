"""Models that see what they are to predict, and rows that are too long for a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

from deft_plugin.report.causality import check_is_causal
from deft_plugin.report.context import learned_positions, positions_made_for
from deft_plugin.report.rows import Row
from tests.runs import write_run
from tests.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer

from .conftest import write_rows

Run = Callable[..., tuple[int, str]]

ROWS = [Row(0, [5, 9, 33, 70, 21, 60, 8, 44, 12], [-100, 9, 33, 70, 21, 60, 8, 44, 12])]
BIDIRECTIONAL = ("bert", "roberta", "electra", "camembert", "rembert", "roformer", "xlm-roberta")
# What makes each of them tiny.
OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "mamba": {},
    "bloom": {},
    "xglm": {"d_model": 32, "num_layers": 2, "ffn_dim": 64, "attention_heads": 2},
}


def saved(folder: Path, architecture: str, **overrides: Any) -> Path:
    """A random model's folder, with the tokenizer of single characters."""
    tiny_model(architecture, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", BIDIRECTIONAL)
def test_a_model_that_sees_the_target_is_refused(architecture: str, dtype: torch.dtype) -> None:
    model = tiny_model(architecture).eval().to(dtype)
    with pytest.raises(ValueError, match="is not a causal language model"):
        check_is_causal(model, ROWS)
    if dtype == torch.float32:
        untrained = tiny_model(architecture, initializer_range=0.02).eval()
        with pytest.raises(ValueError, match="is not a causal language model"):
            check_is_causal(untrained, ROWS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", BIDIRECTIONAL)
def test_such_a_model_as_a_decoder_is_measured(architecture: str, dtype: torch.dtype) -> None:
    if architecture in ("rembert", "roformer") and Version(transformers.__version__) < Version(
        "5.24"
    ):
        pytest.skip("in this transformers it sees what follows as a decoder too")
    check_is_causal(tiny_model(architecture, is_decoder=True).eval().to(dtype), ROWS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *OTHERS])
def test_a_causal_model_is_measured(architecture: str, dtype: torch.dtype) -> None:
    model = tiny_model(architecture, **OTHERS.get(architecture, {})).eval().to(dtype)
    check_is_causal(model, ROWS)
    # Rows in which nothing can be changed.
    check_is_causal(model, [Row(0, [0, 0], [-100, 0])])


def test_the_command_says_which_model_it_is(pairs: Path, tmp_path: Path, run: Run) -> None:
    folder = saved(tmp_path / "bert", "bert")
    status, errors = run(folder, "--data", pairs, "--output", tmp_path / "out")
    last = errors.strip().splitlines()[-1]
    assert status == 2
    assert last.startswith(f"deft report: MODEL '{folder.name}': BertLMHeadModel is not a causal")


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("gpt2", {}),
        ("opt", OTHERS["opt"]),
        ("bert", {"is_decoder": True}),
        ("roberta", {"is_decoder": True}),
        ("xlm-roberta", {"is_decoder": True}),
        ("biogpt", {}),
    ],
)
def test_learned_positions_are_as_many_as_the_forward_takes(
    architecture: str, overrides: dict[str, Any]
) -> None:
    model = tiny_model(architecture, max_position_embeddings=24, **overrides).eval()
    most = learned_positions(model)
    assert most is not None
    # No token is padding, whose position some skip.
    ids = torch.full((1, most), 7)
    with torch.inference_mode():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
        ids = torch.full((1, most + 1), 7)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("architecture", ["llama", "mamba", "bloom"])
def test_positions_that_are_not_learned_have_no_end(architecture: str) -> None:
    assert learned_positions(tiny_model(architecture)) is None


LONG = [{"text": "x" * 60}, {"text": "a short one"}]


def test_rows_longer_than_the_learned_positions_are_refused(tmp_path: Path, run: Run) -> None:
    folder = saved(tmp_path / "gpt", "gpt2", max_position_embeddings=24)
    data = write_rows(tmp_path / "long.jsonl", LONG)
    arguments = (folder, "--data", data, "--output", tmp_path / "out", "--max-length")
    status, errors = run(*arguments, 0)
    assert status == 2
    assert (
        "1 of the 2 rows are longer (up to 61 tokens) than the 24 positions that the model has learned: --max-length 24"
        in errors
    )
    assert run(*arguments, 24)[0] == 0


def test_rows_longer_than_a_model_was_made_for_are_noted(tmp_path: Path, run: Run) -> None:
    folder = saved(tmp_path / "llama", "llama", max_position_embeddings=24)
    data = write_rows(tmp_path / "long.jsonl", LONG)
    output = tmp_path / "out"
    assert run(folder, "--data", data, "--output", output, "--max-length", 0)[0] == 0
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "1 of the 2 rows are longer than the 24 positions that llama was made for" in page


def test_a_forward_that_fails_is_told_with_the_rows_length(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "llama", "llama", max_position_embeddings=24)
    data = write_rows(tmp_path / "long.jsonl", LONG)
    forward = nn.Linear.forward

    def with_a_limit(layer: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.size(1) > 24:
            raise RuntimeError("The size of tensor a must match the size of tensor b")
        return forward(layer, inputs)

    monkeypatch.setattr(nn.Linear, "forward", with_a_limit)
    arguments = (folder, "--data", data, "--output", tmp_path / "out", "--max-length", 0)
    status, errors = run(*arguments)
    assert status == 2
    assert (
        "the model fails on rows of 61 tokens, more than the 24 of its max_position_embeddings (--max-length 24): The size"
        in errors
    )


def test_comparisons_that_compare_nothing_are_refused(tmp_path: Path, run: Run) -> None:
    one = write_run(tmp_path / "one")
    status, errors = run("--compare", one, "--output", tmp_path / "out")
    assert status == 2
    assert "is one run, and two are needed to compare. Of one run: --run" in errors
    own = tmp_path / "own"
    own.mkdir()
    (own / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 2}]}))
    status, errors = run("--compare", own, own, "--output", tmp_path / "out")
    assert status == 2
    assert "has logged one of nll, mean_token_accuracy" in errors


@pytest.mark.parametrize("after", [["--output", "out"], []])
def test_compare_without_a_run_is_told(after: list[str], run: Run) -> None:
    status, errors = run("--compare", *after)
    assert status == 2
    assert errors == (
        "deft report: --compare needs runs after it: folders, or trainer_state.json files.\n"
    )


def test_a_model_without_a_limit_has_none() -> None:
    """XLNet's configuration says -1."""
    config = transformers.XLNetConfig(d_model=16, n_layer=1, n_head=2, d_inner=16, vocab_size=32)
    assert positions_made_for(transformers.XLNetLMHeadModel(config)) is None
    assert (
        positions_made_for(tiny_model("llama"))
        == tiny_model("llama").config.max_position_embeddings
    )
