"""Ranks under DDP, FSDP2 and ZeRO, and ranks that share rows, log what one process logs over the same steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_ranks
from tests.tiny import tiny_model, tiny_tokenizer
from tests.updates import make_rows

from . import gathered_attention
from .rank import train
from .running import LORA, PLUGIN, configuration, make_trainer

ROOT = Path(__file__).parents[2]
STEPS = 3
COMPARED = ("grad_norm", "nll", "ppl", "mean_gate", "mean_focus", "objective_loss")
EVAL = {
    "test_datasets": [{"path": "rows.jsonl", "type": "chat_template", "split": "train"}],
    "eval_strategy": "no",
    "eval_batch_size": 1,
}

EXPERTS = "axolotl.integrations.expert_parallel.ExpertParallelPlugin"
GLOBAL = {"deft_objective": "cayley_trans", "deft": {"scope": "global"}}


def fsdp2() -> dict[str, Any]:
    """Keys that shard the model."""
    return {
        "fsdp_version": 2,
        "fsdp_config": {
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": "Qwen3DecoderLayer",
            "state_dict_type": "FULL_STATE_DICT",
            "reshard_after_forward": True,
        },
        "dp_shard_size": 2,
    }


def ddp() -> dict[str, Any]:
    """No keys: what Axolotl does with several ranks."""
    return {}


def zero(stage: str) -> dict[str, Any]:
    """The repository's DeepSpeed configuration, for an optimizer that DeepSpeed has not been tested with."""
    config = json.loads((ROOT / f"deepspeed_configs/zero{stage}.json").read_text())
    # With offload it would insist on its own AdamW, which it compiles first.
    own = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return {"deepspeed": {**config, **own}}


needs_deepspeed = pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed not installed")


def entries(log: list[dict[str, float]]) -> list[dict[str, float]]:
    """What is compared of each step and each evaluation."""
    compared = ["loss", *COMPARED, *(f"eval_{name}" for name in COMPARED)]
    entries = [{name: entry[name] for name in compared if name in entry} for entry in log]
    return [entry for entry in entries if entry]


def log_of_ranks(
    tmp_path: Path, ranks: int, values: dict[str, Any], rows: list[Any], unchecked: dict[str, Any]
) -> dict[str, Any]:
    """What the first of this number of ranks logs; `rows` to train and to evaluate on."""

    def on(rank: int) -> dict[str, Any]:
        return train(values, unchecked, *rows)

    # By Axolotl, in its own order: what torch does with the ranks' tensors depends on it.
    log: dict[str, Any] = run_ranks(on, tmp_path, ranks, initialised=False)[0]
    assert f"on {ranks} rank(s)" in log["printed"]
    return log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "distribution", "training"),
    [
        pytest.param("MULTI_CPU", ddp, {}, id="ddp"),
        pytest.param("MULTI_CPU", ddp, GLOBAL, id="ddp-global"),
        pytest.param("FSDP", fsdp2, GLOBAL, id="fsdp2-global"),
        pytest.param("FSDP", fsdp2, LORA, id="fsdp2-lora"),
        pytest.param("DEEPSPEED", partial(zero, "1"), {}, id="zero1", marks=needs_deepspeed),
        pytest.param("DEEPSPEED", partial(zero, "2"), {}, id="zero2", marks=needs_deepspeed),
        pytest.param(
            "DEEPSPEED", partial(zero, "3"), GLOBAL, id="zero3-global", marks=needs_deepspeed
        ),
        pytest.param(
            "DEEPSPEED", partial(zero, "3_offload"), LORA, id="offload-lora", marks=needs_deepspeed
        ),
    ],
)
def test_two_ranks_log_what_one_process_logs(
    base_model: Path,
    tmp_path: Path,
    kind: str,
    distribution: Callable[[], dict[str, Any]],
    training: dict[str, Any],
) -> None:
    # Every step has all rows, so that it does not matter which rank gets which.
    rows = make_rows(4)
    # Three, so that one rank's last batch is filled up.
    eval_rows = make_rows(3, seed=9)
    common = {**EVAL, "max_steps": STEPS, "num_epochs": STEPS, "learning_rate": 0.1, **training}
    values = configuration(base_model, tmp_path, micro_batch_size=4, **common)
    alone = make_trainer(values, rows, eval_rows)
    alone.train()
    alone.evaluate()

    values = configuration(
        base_model,
        tmp_path,
        micro_batch_size=1,
        gradient_accumulation_steps=2,
        **common,
        **distribution(),
    )
    log = log_of_ranks(tmp_path, 2, values, [rows, eval_rows], {})
    assert log["kind"] == kind
    actual, expected = entries(log["entries"]), entries(alone.state.log_history)
    # Axolotl evaluates once before training too.
    assert len(expected) == STEPS + 2
    for step, (value, reference) in enumerate(zip(actual, expected, strict=True)):
        assert value == pytest.approx(reference, rel=1e-4), step


@pytest.mark.slow
@pytest.mark.parametrize("eval_packing", [False, True], ids=["rows", "packs"])
@pytest.mark.parametrize(("batch_size", "count"), [(1, 9), (2, 9), (8, 9), (2, 1)])
def test_an_evaluation_beside_packed_training_has_every_row(
    base_model: Path, tmp_path: Path, eval_packing: bool, batch_size: int, count: int
) -> None:
    """Axolotl drops the last batch, of rows or of packs, where it is not a whole one for every rank."""

    def packed(rows: list[Any]) -> list[Any]:
        lengths = [len(row["input_ids"]) for row in rows]
        return [
            {**row, "length": length, "position_ids": list(range(length))}
            for row, length in zip(rows, lengths, strict=True)
        ]

    eval_rows = make_rows(count, seed=9)
    alone = make_trainer(
        configuration(base_model, tmp_path, **{**EVAL, "eval_batch_size": 9}),
        make_rows(4),
        eval_rows,
    )
    expected = alone.evaluate()
    assert expected["eval_scored_tokens"] == sum(
        label != -100 for row in eval_rows for label in row["labels"][1:]
    )
    packing = {
        "sample_packing": True,
        "eval_sample_packing": eval_packing,
        "attn_implementation": "sdpa",
        # Packs a batch.
        "micro_batch_size": min(batch_size, 2),
        "eval_batch_size": batch_size,
        # The weights stay as they are.
        "learning_rate": 0.0,
    }
    values = configuration(base_model, tmp_path, **{**EVAL, **packing})
    log = log_of_ranks(
        tmp_path, 2, values, [packed(make_rows(8, shortest=22, longest=32)), packed(eval_rows)], {}
    )
    evaluations = [entry for entry in log["entries"] if "eval_runtime" in entry]
    assert evaluations
    for entry in evaluations:
        for name in ("eval_nll", "eval_mean_gate", "eval_scored_tokens"):
            assert entry[name] == pytest.approx(expected[name], rel=1e-4)


# --- ranks that share a row ---


def cut_sequences(**more: Any) -> dict[str, Any]:
    """Keys of context parallelism, and attention that does without a GPU."""
    return {"context_parallel_size": 2, "attn_implementation": gathered_attention.NAME, **more}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "accumulation", "keys", "unchecked", "training"),
    [
        pytest.param(2, 4, {}, cut_sequences(), {}, id="context"),
        pytest.param(2, 4, {}, cut_sequences(), GLOBAL, id="context-global"),
        # Lengths that are no multiple of the number of ranks.
        pytest.param(
            3,
            4,
            {"pad_to_multiple_of": 1},
            cut_sequences(context_parallel_size=3),
            {},
            id="context-of-three",
        ),
        pytest.param(4, 2, fsdp2(), cut_sequences(), LORA, id="context-fsdp2-lora"),
        # With several micro-batches transformers' tensor parallelism adds some gradients up wrongly.
        pytest.param(2, 1, {"tensor_parallel_size": 2, "micro_batch_size": 4}, {}, {}, id="tensor"),
        # Without DeepEP, for GPUs alone, Axolotl leaves the experts whole, and all else as with it.
        pytest.param(
            2, 2, {"expert_parallel_size": 2, "plugins": [PLUGIN, EXPERTS]}, {}, {}, id="expert"
        ),
    ],
)
def test_ranks_that_share_rows_log_what_one_process_logs(
    tmp_path: Path,
    ranks: int,
    accumulation: int,
    keys: dict[str, Any],
    unchecked: dict[str, Any],
    training: dict[str, Any],
) -> None:
    base_model = tmp_path / "base_model"
    # Two key heads, one a rank.
    tiny_model("qwen3", num_key_value_heads=2).save_pretrained(base_model)
    tiny_tokenizer().save_pretrained(base_model)
    rows, eval_rows = make_rows(4), make_rows(3, seed=9)
    common = {**EVAL, "max_steps": STEPS, "num_epochs": STEPS, "learning_rate": 0.1, **training}
    # Batches of one row, whose losses transformers takes the mean of.
    common |= {"eval_strategy": "steps", "eval_steps": 1}
    values = configuration(base_model, tmp_path, **common)
    alone = make_trainer(values, rows, eval_rows)
    alone.train()
    if "context_parallel_size" not in unchecked:
        alone.evaluate()

    keys = {"micro_batch_size": 1, "gradient_accumulation_steps": accumulation, **keys}
    values = configuration(base_model, tmp_path, **{**common, **keys})
    log = log_of_ranks(tmp_path, ranks, values, [rows, eval_rows], unchecked)
    metrics = ("nll", "objective_loss", "scored_tokens")
    compared = {"loss", "grad_norm", *metrics, *(f"eval_{name}" for name in metrics)}
    if "tensor_parallel_size" in keys:
        compared -= {"grad_norm"}
    if ranks == unchecked.get("context_parallel_size"):
        compared |= {"eval_loss"}
    actual, expected = (
        [{name: entry[name] for name in compared & entry.keys()} for entry in entries]
        for entries in (log["entries"], alone.state.log_history)
    )
    assert len(expected) >= 2 * STEPS + 2
    for step, (value, reference) in enumerate(zip(actual, expected, strict=True)):
        assert value == pytest.approx(reference, rel=1e-4), step
