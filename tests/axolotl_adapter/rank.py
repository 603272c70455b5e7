"""One rank of an Axolotl run without a GPU.

python -m torch.distributed.run --nproc_per_node 2 -m tests.axolotl_adapter.rank VALUES ROWS LOG

VALUES (a configuration, and keys to set when it has been validated) and ROWS (to train and to evaluate on) are JSON
files; rank 0 writes the trainer's log to LOG. What the configuration says on FSDP, DeepSpeed and parallelism is what
accelerate does: without the replacements below it quietly trains each rank on its own, since it looks for GPUs alone.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from accelerate import PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from axolotl.train import execute_training
from transformers import Trainer

from . import gathered_attention
from .running import make_trainer

build_device_mesh = ParallelismConfig.build_device_mesh


def main() -> None:
    """Train and write the log."""
    values, rows, log = (Path(argument) for argument in sys.argv[1:])
    configuration, unchecked = json.loads(values.read_text())
    # FSDP is for GPUs, as far as accelerate knows.
    kind = (
        "MULTI_GPU"
        if {"fsdp_config", "tensor_parallel_size"} & configuration.keys()
        else "MULTI_CPU"
    )
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType[kind])
    ParallelismConfig.build_device_mesh = lambda self, _: build_device_mesh(self, "cpu")
    if "tensor_parallel_size" in configuration:
        # Taken for the log, it stops Axolotl's tensor parallelism, with or without a GPU, with or without the plugin.
        Trainer._get_grad_norm = lambda *_, **__: None
    gathered_attention.register()
    trainer = make_trainer(configuration, *json.loads(rows.read_text()), **unchecked)
    execute_training(trainer.axolotl_cfg, trainer, None)
    if "context_parallel_size" not in unchecked:
        # Axolotl cuts sequences in training alone.
        trainer.evaluate()
    if trainer.args.process_index == 0:
        kind = trainer.accelerator.distributed_type.value
        log.write_text(json.dumps({"kind": kind, "entries": trainer.state.log_history}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
