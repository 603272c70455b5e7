"""With `use_liger_kernel=True` Liger's cross-entropies are off and its other kernels on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.models.qwen3 import modeling_qwen3

from tests.tiny import tiny_model
from tests.trl.running import as_dataset, config, make_trainer
from tests.updates import assert_same_update, logged, make_rows, update_of

pytest.importorskip("liger_kernel")

# The one kernel of its that Triton's interpreter runs.
SWIGLU = {"rope": False, "rms_norm": False}


@pytest.fixture(autouse=True)
def _models_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger replaces classes in transformers' module for good."""
    for name in ("Qwen3MLP", "Qwen3RMSNorm", "apply_rotary_pos_emb"):
        monkeypatch.setattr(modeling_qwen3, name, getattr(modeling_qwen3, name))


@pytest.mark.parametrize(
    "kernels",
    [{}, {"fused_linear_cross_entropy": True}, {"cross_entropy": True}],
    ids=str,
)
def test_step_and_evaluation_are_those_without_liger(
    tmp_path: Path, kernels: dict[str, bool], caplog: pytest.LogCaptureFixture
) -> None:
    def run(**options: Any) -> tuple[Any, Any]:
        args = config(tmp_path, eval_strategy="steps", eval_steps=1, **options)
        model = tiny_model("qwen3", initializer_range=0.08)
        rows = make_rows(4)
        trainer = make_trainer(args, rows, model, eval_dataset=as_dataset(rows))
        return trainer, update_of(trainer.model, trainer.train)

    plain, expected = run()
    trainer, update = run(use_liger_kernel=True, liger_kernel_config={**SWIGLU, **kernels})
    forwards = {layer.mlp.forward.__func__.__module__ for layer in trainer.model.model.layers}
    assert forwards == {"liger_kernel.transformers.swiglu"}
    assert_same_update(update, expected, tolerance=1e-4)
    for name in ("loss", "nll", "mean_gate", "eval_nll", "eval_mean_token_accuracy"):
        assert logged(trainer, name) == pytest.approx(logged(plain, name), rel=1e-4)
    (told,) = [r.getMessage() for r in caplog.records if "Liger" in r.getMessage()]
    assert "loss_type='deft' takes the place of Liger's fused cross-entropy" in told
    # Nothing else of the user's is lost.
    assert trainer.args.use_liger_kernel
    assert trainer.args.liger_kernel_config.items() >= SWIGLU.items()
