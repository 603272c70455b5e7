"""Two ranks under DDP, FSDP2 and ZeRO log what one process logs over the same steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.updates import make_rows

from .running import configuration, make_trainer

ROOT = Path(__file__).parents[2]
STEPS = 3
COMPARED = ("loss", "grad_norm", "nll", "ppl", "mean_gate", "mean_focus", "objective_loss")

FSDP2 = {
    "fsdp_version": 2,
    "fsdp_config": {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "Qwen3DecoderLayer",
        "state_dict_type": "FULL_STATE_DICT",
        "reshard_after_forward": True,
    },
    # Needs an optimizer that knows sharded tensors, as Axolotl's adamw does.
    "dp_shard_size": 2,
}
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
needs_deepspeed = pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed not installed")


def zero(stage: int) -> dict[str, Any]:
    """The repository's DeepSpeed configuration, for an optimizer that it has not been tested with."""
    config = json.loads((ROOT / f"deepspeed_configs/zero{stage}.json").read_text())
    return {"deepspeed": {**config, "zero_allow_untested_optimizer": True}}


def entries(log: list[dict[str, float]]) -> list[dict[str, float]]:
    """What is compared of each step's log."""
    return [{name: step[name] for name in COMPARED} for step in log if "loss" in step]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("MULTI_CPU", dict),
        ("FSDP", lambda: FSDP2),
        ("FSDP", lambda: FSDP2 | LORA),
        pytest.param("DEEPSPEED", lambda: zero(2), marks=needs_deepspeed),
        pytest.param("DEEPSPEED", lambda: zero(3), marks=needs_deepspeed),
        pytest.param("DEEPSPEED", lambda: zero(3) | LORA, marks=needs_deepspeed),
    ],
    ids=["ddp", "fsdp2", "fsdp2-lora", "zero2", "zero3", "zero3-lora"],
)
def test_two_ranks_log_what_one_process_logs(
    base_model: Path, tmp_path: Path, kind: str, overrides: Any
) -> None:
    # Every step has all rows, so that it does not matter which rank gets which.
    rows = make_rows(4)
    distributed = overrides()
    common = {
        "max_steps": STEPS,
        "num_epochs": STEPS,
        "learning_rate": 0.1,
        **{key: value for key, value in distributed.items() if key in LORA},
    }
    alone = make_trainer(configuration(base_model, tmp_path, micro_batch_size=4, **common), rows)
    alone.train()

    values = configuration(
        base_model,
        tmp_path,
        micro_batch_size=1,
        gradient_accumulation_steps=2,
        **common | distributed,
    )
    files = [tmp_path / name for name in ("values.json", "rows.json", "log.json")]
    files[0].write_text(json.dumps(values))
    files[1].write_text(json.dumps(rows))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "tests.axolotl_adapter.rank", *map(str, files)]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    log = json.loads(files[2].read_text())
    assert log["kind"] == kind
    assert "on 2 rank(s)" in result.stdout
    actual, expected = entries(log["entries"]), entries(alone.state.log_history)
    assert len(expected) == STEPS
    for step, (value, reference) in enumerate(zip(actual, expected, strict=True)):
        assert value == pytest.approx(reference, rel=1e-4), step
