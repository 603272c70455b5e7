"""The files in deepspeed_configs/, with "auto" replaced as transformers.Trainer does it; what DeepSpeed need not compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

DIRECTORY = Path(__file__).parents[2] / "deepspeed_configs"
STAGES = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}


def filled(name: str, model: PreTrainedModel, **options: Any) -> Any:
    """transformers' object for a file and the training arguments `options`."""
    # Needs deepspeed.
    from transformers.integrations.deepspeed import (
        HfTrainerDeepSpeedConfig,
        unset_hf_deepspeed_config,
    )

    # Without deepspeed=path, which would start a process group.
    arguments = TrainingArguments(output_dir="unused", use_cpu=True, **options)
    config = HfTrainerDeepSpeedConfig(str(DIRECTORY / f"{name}.json"))
    # Or every model that is made later is partitioned.
    unset_hf_deepspeed_config()
    config.trainer_config_process(arguments)
    config.trainer_config_finalize(arguments, model, num_training_steps=10)
    return config


def leave_out_compiled_collectives() -> None:
    """Have DeepSpeed do without what it would first compile for a minute: collectives in shared memory. Gloo's will do."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
