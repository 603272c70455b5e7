"""The keys of the plugin, and the keys of Axolotl's that it refuses: all before data or a model are loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from axolotl.integrations.base import PluginManager
from axolotl.monkeypatch.loss.eaft import eaft_loss
from pydantic import ValidationError

from deft_plugin import gated_loss
from deft_plugin.axolotl.args import DEFTArgs
from deft_plugin.objectives import build_objective
from deft_plugin.objectives.registry import RESERVED_PARAMETERS

from .running import DEFINING, LIGER, PLUGIN, configuration, validate

NO_FILES = Path("nothing-is-read")


def error_of(**overrides: Any) -> str:
    """What validation says about a configuration with these keys."""
    with pytest.raises(ValidationError) as error:
        validate(configuration(NO_FILES, NO_FILES, **overrides))
    return str(error.value)


def test_one_line_means_deft() -> None:
    cfg = validate(configuration(NO_FILES, NO_FILES))
    assert cfg.deft_objective == "deft"


@pytest.mark.parametrize(
    ("objective", "block"),
    [
        ("cayley_trans", {"floor_coefficient": 0.3, "minimum": 0.01}),
        ("eaft", {"k": 5}),
        ("alpha", {"a": 0.2, "path": "chunked", "tile_rows": 64, "skip_below": 0.001}),
        ("deft", {"histograms": True}),
        ("deft", {}),
    ],
)
def test_parameters_reach_the_configuration(objective: str, block: dict[str, Any]) -> None:
    cfg = validate(configuration(NO_FILES, NO_FILES, deft_objective=objective, deft=block))
    assert cfg.deft_objective == objective
    assert {name: cfg.deft[name] for name in block} == block


def test_an_empty_block_is_no_block() -> None:
    values = configuration(NO_FILES, NO_FILES)
    values["deft"] = None
    assert validate(values).deft_objective == "deft"


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"deft_objective": "dfet"}, ["deft_objective", "'dfet'", "cayley_trans, deft."]),
        ({"deft_objective": 3}, ["deft_objective", "3", "string"]),
        ({"deft": {"a": 0.5}}, ["deft", "'a'", "It takes no parameters"]),
        (
            {"deft_objective": "cayley_trans", "deft": {"flor_coefficient": 0.3}},
            ["deft", "'flor_coefficient'", "'floor_coefficient'"],
        ),
        (
            {"deft_objective": "cayley_trans", "deft": {"floor_coefficient": 1.5}},
            ["'floor_coefficient'", "1.5", "[0, 1]"],
        ),
        (
            {"deft_objective": "cayley_trans", "deft": {"floor_coefficient": "high"}},
            ["deft:", "'floor_coefficient'", "'high'", "number"],
        ),
        (
            {"deft_objective": "cayley_trans", "deft": {"scope": "batch"}},
            ["'scope'", "'batch'", "micro_batch"],
        ),
        (
            {"deft": {"alpha": 1.0}},
            [
                "deft: Objective 'deft' has no parameter 'alpha'. It takes no parameters of its own. For every "
                "objective the block deft also takes: path, tile_rows, skip_below, histograms, module."
            ],
        ),
        ({"deft": {"path": "cuda"}}, ["deft", "path='cuda'", "chunked"]),
        ({"deft": {"tile_rows": 0}}, ["deft.tile_rows", "0", "greater than 0"]),
        ({"deft": {"tile_rows": "64"}}, ["deft.tile_rows", "'64'", "integer"]),
        ({"deft": {"histograms": "yes"}}, ["deft.histograms", "'yes'", "boolean"]),
        ({"deft": {"histogram": True}}, ["'histogram'. Did you mean 'histograms'?"]),
        ({"deft": "cayley_trans"}, ["deft", "'cayley_trans'", "dictionary"]),
        ({"deft_objectve": "nll"}, ["'deft_objectve'", "'deft_objective'"]),
        ({"DEFT": {}}, ["'DEFT'", "'deft'"]),
        ({"deft_objective": "DEFT"}, ["'DEFT'. Did you mean 'deft'?"]),
        ({"deft": {"tile_row": 5}}, ["'tile_row'. Did you mean 'tile_rows'?"]),
        ({"deft": {"Path": "auto"}}, ["'Path'. Did you mean 'path'?"]),
        ({"deft": {"module": "no_such_module"}}, ["deft\n", "module: 'no_such_module' cannot be"]),
        ({"deft": {"module": ".relative"}}, ["deft\n", "module: '.relative' cannot be"]),
    ],
)
def test_a_wrong_key_or_value_is_named_with_the_choices(
    keys: dict[str, Any], named: list[str]
) -> None:
    message = error_of(**keys)
    assert [text for text in named if text not in message] == []


@pytest.mark.parametrize(
    ("keys", "instead"),
    [
        ({"use_eaft": True}, "deft_objective: eaft"),
        ({"use_eaft": "yes", "eaft_k": 5}, "k: 5, exponent: 1.0"),
        ({"use_eaft": True, "eaft_alpha": 2.0}, "k: 20, exponent: 2.0"),
        ({"label_smoothing_factor": 0.1}, "remove it"),
        ({"rl": "dpo", "beta": 0.1}, "or the plugin"),
        ({"rl": "orpo", "orpo_alpha": 0.1}, "or the plugin"),
        ({"rl": "kto", "remove_unused_columns": False}, "or the plugin"),
        ({"rl": "grpo"}, "or the plugin"),
        ({"reward_model": True}, "or the plugin"),
        ({"reward_model": "true"}, "or the plugin"),
        ({"kd_trainer": 0.5}, "or the plugin"),
        ({"kd_trainer": "yes"}, "or the plugin"),
        ({"label_smoothing_factor": "0.1"}, "remove it"),
        ({"process_reward_model": True}, "or the plugin"),
        ({"kd_trainer": True}, "or the plugin"),
        ({"model_type": "AutoModelForSequenceClassification"}, "or the plugin"),
        ({"type_of_model": "AutoModelForTokenClassification"}, "or the plugin"),
        ({"trainer_cls": "transformers.Trainer"}, "or the plugin"),
        (
            {"peft_use_dora": True, "lora_target_modules": ["q_proj", "lm_head"]},
            "lora_modules_to_save: [lm_head]",
        ),
        (
            {"peft_use_dora": True, "lora_target_modules": "q_proj|lm_head"},
            "lora_modules_to_save: [lm_head]",
        ),
        ({"lora_target_parameters": ["lm_head.weight"]}, "lora_modules_to_save: [lm_head]"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_would_train_another_objective_is_refused_with_what_to_do_instead(
    keys: dict[str, Any], instead: str
) -> None:
    message = error_of(**keys)
    assert "deft_plugin" in message
    assert next(iter(keys)) in message
    assert instead in message


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"micro_batch_size": 0}, "micro_batch_size=0 must be a whole number of at least 1"),
        ({"micro_batch_size": "-2"}, "micro_batch_size=-2 must be"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 must be"),
        ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps=-1 must be"),
        ({"eval_batch_size": -1}, "eval_batch_size=-1 must be"),
        ({"sequence_len": 0}, "sequence_len=0 must be"),
        (
            {"num_epochs": 0, "max_steps": None},
            "num_epochs=0.0 must be a finite number above 0, or max_steps",
        ),
        (
            {"num_epochs": float("nan"), "max_steps": -1},
            "num_epochs=nan must be a finite number above 0",
        ),
    ],
    ids=str,
)
def test_what_would_train_nothing_is_refused(keys: dict[str, Any], message: str) -> None:
    assert f"deft_plugin: {message}" in error_of(**keys)


def test_all_conflicts_are_named_at_once() -> None:
    message = error_of(use_eaft=True, rl="dpo", deft_objectiv="nll")
    for key in ("use_eaft", "rl", "deft_objectiv"):
        assert f"`{key}" in message or f"'{key}'" in message


def test_token_scaling_is_the_objective_dft() -> None:
    keys = {"liger_use_token_scaling": True, "liger_fused_linear_cross_entropy": True}
    assert "deft_objective: dft" in error_of(**keys, plugins=[LIGER, PLUGIN])
    assert "deft_objective: dft" in error_of(**keys, plugins=[PLUGIN, LIGER])
    cfg = validate(
        configuration(NO_FILES, NO_FILES, **keys, plugins=[LIGER, PLUGIN], deft_objective="dft")
    )
    assert [cfg[key] for key in keys] == [False, False]


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_the_way_out_of_axolotls_eaft_is_its_loss(alpha: float) -> None:
    logits = (
        4 * torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    ).requires_grad_()
    labels = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    labels[0, :4] = -100
    own = eaft_loss(SimpleNamespace(logits=logits), labels, alpha=alpha, k=5)
    parameters = {"k": 5, "exponent": alpha, "normalizer": 1.0}
    loss = gated_loss(logits[:, :-1], labels[:, 1:], "eaft", parameters=parameters).loss
    torch.testing.assert_close(loss, own)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, own)))


def test_a_configuration_without_the_plugin_is_left_alone_after_one_with_it() -> None:
    validate(configuration(NO_FILES, NO_FILES))
    values = configuration(NO_FILES, NO_FILES, plugins=[LIGER], use_eaft=True, deft_objectiv="nll")
    cfg = validate({**values, "liger_cross_entropy": True, "gradient_accumulation_steps": -1})
    assert cfg.liger_cross_entropy is True
    manager = PluginManager.get_instance()
    assert PLUGIN in manager.plugins
    manager.pre_model_load(cfg)
    assert manager.get_trainer_cls(cfg) is None
    assert manager.get_training_args(cfg) == {}
    assert manager.add_callbacks_post_trainer(cfg, None) == []


@pytest.mark.parametrize(
    "keys",
    [
        {"liger_rope": True, "liger_rms_norm": True, "liger_glu_activation": True},
        {"adapter": "lora", "lora_target_linear": True, "lora_r": 4, "lora_alpha": 8},
        {"adapter": "lora", "lora_target_modules": "all-linear", "lora_r": 4, "lora_alpha": 8},
        {"adapter": "lora", "lora_target_modules": ["lm_head"], "lora_r": 4, "lora_alpha": 8},
        {"eaft_k": 5, "eaft_alpha": 2.0},
        {"reward_model": "false", "process_reward_model": "no", "use_eaft": "false"},
        {"kd_trainer": "false", "label_smoothing_factor": "0", "peft_use_dora": "false"},
        {"label_smoothing_factor": "0.0"},
        {"qat": {"weight_dtype": "int4", "activation_dtype": "int8"}},
        {"processor_type": "AutoProcessor"},
        {
            "adapter": "lora",
            "lora_target_modules": ["q_proj"],
            "lora_modules_to_save": ["lm_head"],
            "lora_r": 4,
            "lora_alpha": 8,
        },
        {"tensor_parallel_size": 2},
        {"sample_packing": True, "gradient_checkpointing": True},
        {"num_epochs": 0, "max_steps": 5},
        {"eval_batch_size": 2},
    ],
    ids="-".join,
)
def test_what_does_not_touch_the_loss_is_accepted(keys: dict[str, Any]) -> None:
    cfg = validate(configuration(NO_FILES, NO_FILES, **keys))
    assert cfg.model_type is None


@pytest.mark.parametrize("plugins", [[PLUGIN, DEFINING], [DEFINING, PLUGIN]])
def test_the_plugin_under_both_of_its_names_is_refused(plugins: list[str]) -> None:
    with pytest.raises(ValueError, match=f"{', '.join(plugins)} are one plugin. List one"):
        validate(configuration(NO_FILES, NO_FILES, plugins=plugins))
    PluginManager.get_instance().plugins.clear()
    validate(configuration(NO_FILES, NO_FILES, plugins=[DEFINING, DEFINING]))


@pytest.mark.usefixtures("own_objectives")
def test_a_module_with_an_objective_of_ones_own_is_imported_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_objective_for_axolotl.py").write_text(
        "import deft_plugin\n"
        "@deft_plugin.objective('own_for_axolotl', couples_tokens=False)\n"
        "def own(log_p, statistics, *, gamma: float = 2.0):\n"
        "    return -((1 - log_p.exp()) ** gamma) * log_p\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    block = {"module": "own_objective_for_axolotl", "gamma": 1.5}
    values = configuration(NO_FILES, NO_FILES, deft_objective="own_for_axolotl", deft=block)
    cfg = validate(values)
    assert build_objective(cfg.deft_objective, {"gamma": cfg.deft.gamma}).gamma == 1.5  # type: ignore[attr-defined]
    del sys.modules["own_objective_for_axolotl"]


def test_every_key_has_a_description_with_the_choices() -> None:
    properties = DEFTArgs.model_json_schema()["properties"]
    assert "cayley_trans" in properties["deft_objective"]["description"]
    assert "floor_coefficient=0.5" in properties["deft"]["description"]
    assert [
        name for name in RESERVED_PARAMETERS if name not in properties["deft"]["description"]
    ] == []
