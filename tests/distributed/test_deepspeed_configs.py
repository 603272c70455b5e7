"""Every file in deepspeed_configs/ is read by transformers and by DeepSpeed, and is what its name says."""

from __future__ import annotations

import json

import pytest
import torch

from ..tiny import tiny_model
from .deepspeed_files import DIRECTORY, STAGES, filled

pytest.importorskip("deepspeed")


def test_there_is_a_file_for_each_stage() -> None:
    assert {path.stem for path in DIRECTORY.glob("*.json")} == set(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_the_trainers_arguments_fill_every_auto(name: str) -> None:
    config = filled(
        name,
        tiny_model("llama"),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=4,
        max_grad_norm=0.25,
        bf16=True,
    )

    assert "auto" not in json.dumps(config.config)
    assert config.dtype() == torch.bfloat16
    assert config.get_value("train_micro_batch_size_per_gpu") == 3
    assert config.get_value("gradient_accumulation_steps") == 4
    assert config.get_value("train_batch_size") == 12
    assert config.get_value("gradient_clipping") == 0.25


@pytest.mark.parametrize("name", STAGES)
def test_deepspeed_reads_the_stage_and_where_things_are_kept(name: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = DeepSpeedConfig(filled(name, tiny_model("llama")).config)

    assert not config.bfloat16_config.enabled
    zero = config.zero_config
    assert zero.stage == STAGES[name]
    for offload in (zero.offload_param, zero.offload_optimizer):
        assert (offload is not None) == name.endswith("offload")
        assert offload is None or offload.device == "cpu"
    # Else a model trained under ZeRO-3 is saved without its weights.
    assert zero.gather_16bit_weights_on_model_save == (STAGES[name] == 3)
