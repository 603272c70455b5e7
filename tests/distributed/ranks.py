"""Functions run on several processes of one gloo group, which fail when one of them hangs."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import distributed


def run_ranks(
    function: Callable[[int], Any],
    directory: Path,
    world_size: int = 2,
    timeout: float = 300,
    initialised: bool = True,
) -> list[Any]:
    """What `function(rank)` returns on each rank.

    The processes are forked, since new ones would import everything again. Their environment is that of
    torchrun.

    Args:
        function: returns what torch.save can write.
        directory: an empty one, for the ranks' results.
        timeout: seconds after which the ranks are ended, and the test fails.
        initialised: whether torch.distributed is, with gloo; else the function has it done.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def run(rank: int) -> None:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
        torch.set_num_threads(1)
        # What accelerate has found out about the process that this one was forked from.
        AcceleratorState._reset_state(reset_partial_state=True)
        # DeepSpeed collects garbage for every engine, and spends it on what imports left behind.
        gc.freeze()
        try:
            if initialised:
                distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout))
            torch.save(function(rank), directory / f"{rank}.pt")
            distributed.destroy_process_group()
        except BaseException:
            (directory / f"{rank}.txt").write_text(traceback.format_exc())
            raise

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(rank,)) for rank in range(world_size)]
    for process in processes:
        process.start()
    end = time.monotonic() + timeout
    # One rank that fails leaves the others waiting for it.
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        if any(process.exitcode for process in processes):
            break
        time.sleep(0.05)
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()
    errors = "\n".join(path.read_text() for path in sorted(directory.glob("*.txt")))
    codes = [process.exitcode for process in processes]
    assert codes == [0] * world_size, f"Exit codes {codes} within {timeout} s.\n{errors}"
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(world_size)]
