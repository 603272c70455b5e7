"""One rank of an Axolotl run without a GPU, for `run_ranks`.

What the configuration says on FSDP, DeepSpeed and parallelism is what accelerate does: without the replacements
below it quietly trains each rank on its own, since it looks for GPUs alone.
"""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any

from accelerate import PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from axolotl.train import execute_training
from axolotl.utils import distributed as axolotl_distributed
from transformers import Trainer

from tests.distributed.deepspeed_files import leave_out_compiled_collectives
from tests.updates import Rows

from . import gathered_attention
from .running import make_trainer

build_device_mesh = ParallelismConfig.build_device_mesh


def train(
    values: dict[str, Any], unchecked: dict[str, Any], rows: Rows, eval_rows: Rows
) -> dict[str, Any]:
    """The kind of the run, the trainer's log and what was printed.

    Args:
        values: a configuration.
        unchecked: keys to set when it has been validated.
        rows: to train on.
        eval_rows: to evaluate on.
    """
    # That of the process this one was forked from.
    axolotl_distributed.distributed_state = None
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    os.environ["DS_ACCELERATOR"] = "cpu"
    if "deepspeed" in values:
        leave_out_compiled_collectives()
    # FSDP is for GPUs, as far as accelerate knows.
    kind = "MULTI_GPU" if {"fsdp_config", "tensor_parallel_size"} & values.keys() else "MULTI_CPU"
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType[kind])
    ParallelismConfig.build_device_mesh = lambda self, _: build_device_mesh(self, "cpu")
    if "tensor_parallel_size" in values:
        # Taken for the log, it stops Axolotl's tensor parallelism, with or without a GPU, with or without the plugin.
        Trainer._get_grad_norm = lambda *_, **__: None
    gathered_attention.register()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        trainer = make_trainer(values, rows, eval_rows, **unchecked)
        execute_training(trainer.axolotl_cfg, trainer, None)
        if "context_parallel_size" not in unchecked:
            # Axolotl cuts sequences in training alone.
            trainer.evaluate()
    return {
        "kind": trainer.accelerator.distributed_type.value,
        "entries": trainer.state.log_history,
        "printed": printed.getvalue(),
    }
