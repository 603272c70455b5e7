"""Two ranks under DDP, FSDP2 and ZeRO log what one process logs over the same steps."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.updates import make_rows

from .running import LORA, configuration, environment, make_trainer

ROOT = Path(__file__).parents[2]
STEPS = 3
COMPARED = ("grad_norm", "nll", "ppl", "mean_gate", "mean_focus", "objective_loss")
EVAL = {
    "test_datasets": [{"path": "rows.jsonl", "type": "chat_template", "split": "train"}],
    "eval_strategy": "no",
    "eval_batch_size": 1,
}

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
    files = [tmp_path / name for name in ("values.json", "rows.json", "log.json")]
    files[0].write_text(json.dumps(values))
    files[1].write_text(json.dumps([rows, eval_rows]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "tests.axolotl_adapter.rank", *map(str, files)]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        # DeepSpeed compiles for minutes where it has not before.
        timeout=900,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    log = json.loads(files[2].read_text())
    assert log["kind"] == kind
    assert "on 2 rank(s)" in result.stdout
    actual, expected = entries(log["entries"]), entries(alone.state.log_history)
    # Axolotl evaluates once before training too.
    assert len(expected) == STEPS + 2
    for step, (value, reference) in enumerate(zip(actual, expected, strict=True)):
        assert value == pytest.approx(reference, rel=1e-4), step
