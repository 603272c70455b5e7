"""Compile the products of path "quack" for GPUs that are not here, with the options that the code computes.

    python -m tests.ops.quack_ahead_of_time        # a table of every product

Tiles and gradients are walked as in a call, on tensors that have shapes and no memory, and each launch ends with its
compilation. In a process of its own for each target, which QuACK reads from the environment once. All that is replaced
is what asks a driver: the device guard, and how many clusters run at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .ahead_of_time import cuda_report

TARGETS = {"sm_90a": "90", "sm_100a": "100"}
# Of a kernel's arguments, by bytes and whether floating.
TYPES = {(2, True): "bf16", (4, True): "fp32", (8, False): "i64"}
OPTIONS = ("tile_M", "tile_N", "tile_K", "cluster_M", "cluster_N", "pingpong")
STATISTICS = ({}, {"collision": True}, {"entropy": True}, {"collision": True, "entropy": True})


def cases(target: str) -> Iterator[dict[str, Any]]:
    """Calls whose launches together are all that the code has, once each."""
    usual = {
        "vocab_size": 128_256,
        "hidden_size": 4_096,
        "count": 2_048,
        "statistics": STATISTICS[-1],
        "trainable": False,
        "evaluation": False,
    }
    for statistics in STATISTICS:
        yield usual | {"statistics": statistics}
    yield usual | {"evaluation": True}
    # The other two widths of a block.
    yield usual | {"vocab_size": 151_936}
    if target == "sm_90a":
        yield usual | {"vocab_size": 32_000}
        # The weight's gradient from several tiles, and, in bfloat16 and with the other width, from one.
        yield usual | {"trainable": True, "count": 8_192}
        yield usual | {"trainable": True, "hidden_size": 2_304}
    else:
        yield usual | {"vocab_size": 50_304}


def walk(case: dict[str, Any]) -> None:
    """All launches of one call: products, sums, the error, and its products."""
    import torch

    from deft_plugin import build_objective
    from deft_plugin.ops.folded_tiles import FoldedTiles
    from deft_plugin.ops.gradients import Gradients
    from deft_plugin.ops.plan import Plan
    from deft_plugin.ops.projection import LogitsTransform, Operands
    from deft_plugin.ops.sums import StatisticsRequest
    from deft_plugin.ops.tiles import default_tile_rows

    def tensor(*shape: int) -> Any:
        return torch.empty(*shape, dtype=torch.bfloat16, device="cuda")

    count, vocab_size, hidden_size = case["count"], case["vocab_size"], case["hidden_size"]
    operands = Operands(tensor(count, hidden_size), tensor(vocab_size, hidden_size))
    plan = Plan(
        objective=build_objective("nll"),
        transform=LogitsTransform(),
        request=StatisticsRequest(**case["statistics"]),
        targets=torch.zeros(count, dtype=torch.int64, device="cuda"),
        rows=None,
        vocab_size=vocab_size,
        product_dtype=torch.bfloat16,
        tile_rows=default_tile_rows(
            count, vocab_size, torch.bfloat16, torch.device("cuda"), case["trainable"]
        ),
        path="quack",
    )
    wanted = frozenset({"hidden", "weight"} if case["trainable"] else {"hidden"})
    gradients = Gradients(operands, plan, wanted)
    tiles = FoldedTiles(operands, plan)
    for tile in tiles(write_error=not case["evaluation"]):
        if not case["evaluation"]:
            gradients.add(tile, torch.ones(tile.row_factor.numel(), device="cuda"), tiles)
    tiles.statistics()


def compile_all(target: str) -> Iterator[dict[str, Any]]:
    """A report of each product, the first time that one is launched.

    Returns:
        sums: what is formed beside the result.
        stored: whether there is a result.
        strips: the function that multiplies them into the left operand; None without.
        keep: whether the result is added to.
        dtype: of the result.
        operands: shape and strides of the left and right one and of the result.
        options: tile, cluster and the like.
        registers: of a thread.
        stack: bytes of a thread that are not in registers.
        fused, multiplications: `arithmetic` of the first product that forms all sums.
        seconds: CPU time of the compilation.
    """
    import quack.gemm_runtime.host
    import torch
    from quack.epilogue.frontend import EpiMod
    from torch._subclasses.fake_tensor import FakeTensorMode

    from deft_plugin.ops import quack_sums

    quack.gemm_runtime.host.get_max_active_clusters = lambda *_, **__: 1
    torch.cuda.device = contextlib.nullcontext  # type: ignore[assignment,misc]
    folder = Path(os.environ["CUTE_DSL_DUMP_DIR"])
    reports: list[dict[str, Any]] = []
    disassembled: list[Path] = []
    launch = EpiMod.gemm

    def compile_only(self: Any, left: Any, right: Any, result: Any, **options: Any) -> Any:
        start = time.process_time()
        plan = launch(self, left, right, result, **options, _launch=False)
        seconds = time.process_time() - start
        binaries = list(folder.glob("*.cubin"))
        if binaries:
            reports.append(
                {
                    **described(self, left, right, result, options),
                    "seconds": round(seconds, 1),
                    **resources(*binaries),
                    **(arithmetic(*binaries) if len(self.sinks) == 4 and not disassembled else {}),
                }
            )
            if len(self.sinks) == 4:
                disassembled.extend(binaries)
        for file in folder.iterdir():
            file.unlink()
        return plan

    EpiMod.gemm = compile_only  # type: ignore[method-assign]
    between = BetweenProducts(quack_sums._row_kernel, target)
    quack_sums._row_kernel = between
    with FakeTensorMode(allow_non_fake_inputs=True):
        for case in cases(target):
            walk(case)
            yield from (*reports, *between.reports)
            reports.clear()
            between.reports.clear()


class BetweenProducts:
    """Stands for a Triton kernel that is compiled, the first time with these constants, where it would be launched."""

    def __init__(self, kernel: Any, target: str) -> None:
        self.kernel, self.capability = kernel, int(TARGETS[target])
        self.reports: list[dict[str, Any]] = []
        self._compiled: set[tuple[Any, ...]] = set()

    def __getitem__(self, grid: tuple[int]) -> Any:
        return self._compile

    def _compile(self, *arguments: Any, num_warps: int, **constants: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        key = (*constants.values(), num_warps)
        if key in self._compiled:
            return
        self._compiled.add(key)
        values = dict(zip(self.kernel.arg_names, arguments, strict=False))
        types = dict.fromkeys(values, "i32")
        types |= {
            name: f"*{TYPES[value.dtype.itemsize, value.dtype.is_floating_point]}"
            for name, value in values.items()
            if hasattr(value, "dtype")
        }
        constants |= {name: None for name, value in values.items() if value is None}
        types |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(self.kernel, types, constants)
        binary = triton.compile(
            source,
            target=GPUTarget("cuda", self.capability, 32),
            options={"num_warps": num_warps},
        )
        report = cuda_report(binary.asm["ptx"], self.capability)
        del report["loops"]
        self.reports.append({"kernel": "between products", **constants, **report})


def described(
    epilogue: Any, left: Any, right: Any, result: Any, options: dict[str, Any]
) -> dict[str, Any]:
    """What a launch multiplies, and how."""
    # Where strips come with an operand, they are bundled.
    tensors = (getattr(left, "blob", left), right, result)
    transform = options.get("transform_a")
    return {
        "sums": sorted(epilogue.sinks),
        "stored": result is not None,
        "strips": None if transform is None else transform.name,
        "keep": options.get("add_to_output", False),
        "dtype": None if result is None else str(result.dtype),
        "operands": [None if t is None else [list(t.shape), list(t.stride())] for t in tensors],
        "options": {name: options[name] for name in OPTIONS if name in options},
    }


def quacks_own_launches() -> Iterator[dict[str, Any]]:
    """What QuACK's own loss launches for 2,048 tokens in chunks of 1,024, with a trainable lm_head; as `compile_all`."""
    import torch
    from quack import linear_cross_entropy
    from quack.epilogue.frontend import EpiMod
    from torch._subclasses.fake_tensor import FakeTensorMode

    launches = []

    def recorded(self: Any, left: Any, right: Any, result: Any, **options: Any) -> None:
        launches.append(described(self, left, right, result, options))

    EpiMod.gemm = recorded  # type: ignore[method-assign]
    linear_cross_entropy.lce_glue = lambda *_, **__: None
    with FakeTensorMode(allow_non_fake_inputs=True):
        linear_cross_entropy.scaled_exp_linear_cross_entropy_fwd(
            torch.empty(2_048, 4_096, dtype=torch.bfloat16, device="cuda"),
            torch.empty(128_256, 4_096, dtype=torch.bfloat16, device="cuda"),
            torch.zeros(2_048, dtype=torch.int64, device="cuda"),
            1_024,
        )
    yield from launches


def resources(binary: Path) -> dict[str, Any]:
    """What a thread of the one kernel in the file uses, and which target it is for."""
    usage = re.search(r"REG:(\d+) STACK:(\d+)", _read("cuobjdump", "-res-usage", binary))
    assert usage is not None
    return {
        "registers": int(usage.group(1)),
        "stack": int(usage.group(2)),
        "target": binary.suffixes[-2].removeprefix("."),
    }


def arithmetic(binary: Path) -> dict[str, int]:
    """How many multiply-adds and how many other multiplications the code has."""
    lines = re.findall(
        r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(FFMA|FMUL)",
        _read("nvdisasm", "-c", binary),
        re.MULTILINE,
    )
    return {"fused": lines.count("FFMA"), "multiplications": lines.count("FMUL")}


def _read(tool: str, *arguments: Any) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def compiled_elsewhere(target: str) -> list[list[dict[str, Any]]]:
    """`compile_all` and `quacks_own_launches` in a process of its own, which uses no cache."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "QUACK_ARCH": TARGETS[target],
            "CUTE_DSL_ARCH": target,
            "CUTE_DSL_KEEP": "cubin",
            "CUTE_DSL_DUMP_DIR": folder,
            "QUACK_CACHE_ENABLED": "0",
        }
        environment.pop("TRITON_INTERPRET", None)
        process = subprocess.run(
            [sys.executable, "-m", "tests.ops.quack_ahead_of_time", target],
            capture_output=True,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[2],
        )
    assert process.returncode == 0, process.stderr
    ours, own = json.loads(process.stdout.splitlines()[-1])
    return [ours, own]


def main() -> None:
    """A line of JSON for each product of the target that is named, and then of QuACK's own; a table without one."""
    if len(sys.argv) > 1:
        reports, own = list(compile_all(sys.argv[1])), list(quacks_own_launches())
        print(json.dumps([reports, own]))
        return
    for target in TARGETS:
        for report in compiled_elsewhere(target)[0]:
            print(*report.values())


if __name__ == "__main__":
    main()
