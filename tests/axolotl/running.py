"""What `axolotl train` does, step by step and in this process, on rows of token ids."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from axolotl.cli.config import plugin_set_cfg, prepare_plugins
from axolotl.common.datasets import TrainDatasetMeta
from axolotl.train import setup_model_and_trainer
from axolotl.utils.config import normalize_config, validate_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.trainer import prepare_optim_env
from datasets import Dataset

from tests.updates import Rows

PLUGIN = "deft_plugin.axolotl.DEFTPlugin"
# The same class.
DEFINING = "deft_plugin.axolotl.plugin.DEFTPlugin"
CUT = "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"
LIGER = "axolotl.integrations.liger.LigerPlugin"
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
QLORA = {**LORA, "adapter": "qlora", "load_in_4bit": True}

# What check and training need to know of the machine; a GPU's, for configurations meant for one.
CPU = {"bf16": False, "fp8": False, "tf32": False, "n_gpu": 1, "compute_capability": None}
GPU = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"}


def environment() -> dict[str, str]:
    """For a subprocess: this environment's programs by name, and a place for what DeepSpeed compiles."""
    binaries = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions"),
    }


def configuration(base_model: Path, output: Path, **overrides: Any) -> dict[str, Any]:
    """A YAML's content: full fine-tuning by plain SGD, one step over four rows, with the plugin.

    A key whose override is None is left out.
    """
    values = {
        "base_model": str(base_model),
        "plugins": [PLUGIN],
        # Tests give the rows themselves.
        "datasets": [{"path": "rows.jsonl", "type": "chat_template"}],
        "output_dir": str(output),
        "sequence_len": 64,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "max_steps": 1,
        "optimizer": "sgd",
        "learning_rate": 100.0,
        "lr_scheduler": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "dataloader_num_workers": 0,
        "dataset_num_proc": 1,
        **overrides,
    }
    return {key: value for key, value in values.items() if value is not None}


def validate(values: dict[str, Any], capabilities: dict[str, Any] = CPU) -> DictDefault:
    """Register the plugins and check the configuration, as Axolotl does before it loads anything."""
    cfg = DictDefault(values)
    prepare_plugins(cfg)
    return validate_config(
        cfg,
        capabilities=dict(capabilities),
        env_capabilities={"torch_version": torch.__version__.split("+")[0]},
    )


def make_trainer(
    values: dict[str, Any], rows: Rows, eval_rows: Rows | None = None, **unchecked: Any
) -> Any:
    """Axolotl's trainer for a configuration, with the model loaded.

    Args:
        values: the configuration.
        rows: to train on.
        eval_rows: to evaluate on.
        unchecked: keys that Axolotl refuses for want of a GPU, set when it has validated the others.
    """
    # For the adapters' random weights.
    torch.manual_seed(0)
    cfg = validate(values)
    cfg.update(unchecked)
    prepare_optim_env(cfg)
    normalize_config(cfg)
    # With several ranks Axolotl names the device by the rank alone, which needs an accelerator.
    cfg.device_map = {"": "cpu"}
    plugin_set_cfg(cfg)
    evaluation = None if eval_rows is None else Dataset.from_list(eval_rows)
    data = TrainDatasetMeta(Dataset.from_list(rows), evaluation, cfg.max_steps)
    return setup_model_and_trainer(cfg, data)[0]
