"""What only saves memory is switched off, said in one line, and the run is what it would be without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from axolotl.integrations.base import BasePlugin
from transformers import AutoModelForCausalLM

from tests.updates import assert_same_update, formula_mean, gradient_update, make_rows, update_of

from .running import CUT, GPU, LIGER, LORA, PLUGIN, configuration, make_trainer, validate

NO_FILES = Path("nothing-is-read")
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


class SubclassOfCutCrossEntropy(BasePlugin):
    """A plugin of another name with the same keys, true by default."""

    def get_input_args(self) -> str:
        return "axolotl.integrations.cut_cross_entropy.CutCrossEntropyArgs"


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What the plugin printed."""
    lines = capsys.readouterr().out.splitlines()
    return [line.removeprefix("deft_plugin: ") for line in lines if "deft_plugin: " in line]


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    ("other", "keys"),
    [
        (CUT, {}),
        (CUT, {"cut_cross_entropy": True}),
        (CUT, {"cut_cross_entropy": "true"}),
        (f"{__name__}.SubclassOfCutCrossEntropy", {}),
        (LIGER, {"liger_fused_linear_cross_entropy": True}),
        (LIGER, {"liger_fused_linear_cross_entropy": "yes"}),
        (LIGER, {"liger_cross_entropy": True}),
        (LIGER, {"chunked_cross_entropy": True}),
        (LIGER, {"flash_attn_cross_entropy": True}),
        # Axolotl itself refuses two of them.
        (CUT, {"cut_cross_entropy": True, "chunked_cross_entropy": True}),
        (LIGER, {"liger_cross_entropy": True, "liger_fused_linear_cross_entropy": True}),
    ],
    ids=lambda value: "-".join(value) or "default" if isinstance(value, dict) else None,
)
def test_another_cross_entropy_is_switched_off_wherever_its_plugin_is_listed(
    capsys: pytest.CaptureFixture[str], other: str, keys: dict[str, Any], first: bool
) -> None:
    plugins = [other, PLUGIN] if first else [PLUGIN, other]
    cfg = validate(configuration(NO_FILES, NO_FILES, plugins=plugins, **keys))
    names = list(keys) or ["cut_cross_entropy"]
    assert [cfg[name] for name in names] == [False] * len(names)
    (line,) = said(capsys)
    assert all(name in line for name in names)
    assert ("other kernels stay" in line) == any("liger" in name for name in names)


@pytest.mark.parametrize(
    "keys",
    [
        {"plugins": [CUT, PLUGIN], "cut_cross_entropy": False},
        {"plugins": [PLUGIN, CUT], "cut_cross_entropy": "false"},
        {"plugins": [LIGER, PLUGIN], "liger_rope": True, "liger_cross_entropy": False},
        # Axolotl ignores the keys of plugins that are not listed.
        {"cut_cross_entropy": True, "liger_fused_linear_cross_entropy": True},
    ],
    ids=str,
)
def test_nothing_is_said_where_nothing_is_switched_off(
    capsys: pytest.CaptureFixture[str], keys: dict[str, Any]
) -> None:
    cfg = validate(configuration(NO_FILES, NO_FILES, **keys))
    assert not said(capsys)
    assert cfg.liger_rope == keys.get("liger_rope")


def test_a_value_that_is_no_truth_value_is_axolotls_to_refuse() -> None:
    keys = {"plugins": [CUT, PLUGIN], "cut_cross_entropy": "often", "bf16": True}
    with pytest.raises(ValueError, match=r"cut_cross_entropy\n +Input should be a valid boolean"):
        validate(configuration(NO_FILES, NO_FILES, **keys), GPU)


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [(["perplexity", "chrf"], (True, ["chrf"])), (["perplexity"], (False, ["perplexity"]))],
)
def test_perplexity_of_the_objective_is_not_computed(
    capsys: pytest.CaptureFixture[str], metrics: list[str], expected: tuple[bool, list[str]]
) -> None:
    cfg = validate(
        configuration(NO_FILES, NO_FILES, do_causal_lm_eval=True, eval_causal_lm_metrics=metrics)
    )
    assert (cfg.do_causal_lm_eval, cfg.eval_causal_lm_metrics) == expected
    (line,) = said(capsys)
    assert "eval_perplexity" in line


def test_lora_kernels_are_off_without_an_accelerator_unless_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert not torch.accelerator.is_available()
    cfg = validate(configuration(NO_FILES, NO_FILES, **LORA))
    assert [cfg[name] for name in KERNELS] == [False] * 4
    (line,) = said(capsys)
    assert "lora_*_kernel" in line
    asked = validate(configuration(NO_FILES, NO_FILES, **LORA, lora_mlp_kernel=True))
    assert asked.lora_mlp_kernel is True


# --- what trains ---


@pytest.mark.parametrize(
    "keys",
    [
        {"plugins": [CUT, PLUGIN]},
        {"plugins": [PLUGIN, CUT], "cut_cross_entropy": True},
        {"plugins": [LIGER, PLUGIN], "liger_fused_linear_cross_entropy": True},
        {"plugins": [PLUGIN, LIGER], "liger_cross_entropy": True, "chunked_cross_entropy": True},
        {"chunked_cross_entropy": True},
        {"flash_attn_cross_entropy": True, "is_llama_derived_model": True},
    ],
    ids=str,
)
def test_the_update_is_that_of_the_formula(
    base_model: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    rows = make_rows(4)
    trainer = make_trainer(configuration(base_model, tmp_path, **keys), rows)
    update = update_of(trainer.model, trainer.train)
    model = AutoModelForCausalLM.from_pretrained(base_model)
    loss = formula_mean(model, rows, "deft")
    assert_same_update(update, gradient_update(model, loss, 100.0), 2e-5)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
