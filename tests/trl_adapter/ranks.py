"""A training run on two CPU processes, as torch.multiprocessing starts them."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import torch


def train_on_two_ranks(output_dir: Path, rows: Any, eval_rows: Any, **options: Any) -> Any:
    """Log and updates of a run whose options are those of `running.config`, from rank 0."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = (port, output_dir, rows, eval_rows, options)
    torch.multiprocessing.spawn(_train, arguments, nprocs=2)
    return torch.load(output_dir / "result.pt", weights_only=False)


def _train(
    rank: int, port: int, output_dir: Path, rows: Any, eval_rows: Any, options: dict[str, Any]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    from tests.updates import update_of

    from .running import as_dataset, config, make_trainer

    trainer = make_trainer(config(output_dir, **options), rows, eval_dataset=as_dataset(eval_rows))
    update = update_of(trainer.model, trainer.train)
    if rank == 0:
        torch.save((trainer.state.log_history, update), output_dir / "result.pt")
    torch.distributed.destroy_process_group()
