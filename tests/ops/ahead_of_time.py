"""Compile the fold for GPUs that are not there, and read what came of it: registers, spills, loads, instructions.

    python -m tests.ops.ahead_of_time        # a table of every case and target

In a process of its own, since Triton compiles nothing where its interpreter is on.
"""

from __future__ import annotations

import collections
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CUDA = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "sm_120": 120}
ROCM = ("gfx90a", "gfx942")
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
# Short and long rows, each a multiple of 16 and not.
VOCABULARIES = (32_000, 32_001, 128_256, 128_257)
STATISTICS = {
    "none": {},
    "collision": {"collision": True},
    "all": {"collision": True, "entropy": True},
}


def cases(every: bool = False) -> Iterator[dict[str, Any]]:
    """Combinations that the code can launch: every one, or those that differ in what a compiler makes of them."""
    options = itertools.product(
        DTYPES, VOCABULARIES, STATISTICS, (False, True), (None, 30.0, 1e4), (True, False)
    )
    names = ("dtype", "vocab_size", "statistics", "has_bias", "softcap", "write_error")
    for values in options:
        case = dict(zip(names, values, strict=True))
        # Departures from what is usual: bfloat16, a long row, all statistics, nothing else, training.
        departures = (
            case["dtype"] != "bfloat16",
            case["vocab_size"] != 128_256,
            case["statistics"] != "all",
            case["has_bias"],
            case["softcap"] is not None,
            not case["write_error"],
        )
        if every or sum(departures) <= 1:
            yield case


def launch_options(case: dict[str, Any], target: str) -> dict[str, Any]:
    """The constants and the number of warps that the code computes for the case."""
    import torch

    from deft_plugin.ops import triton_fold
    from deft_plugin.ops.projection import LogitsTransform
    from deft_plugin.ops.sums import StatisticsRequest

    return triton_fold.launch_options(
        case["vocab_size"],
        getattr(torch, case["dtype"]),
        case["has_bias"],
        LogitsTransform(softcap=case["softcap"]),
        StatisticsRequest(**STATISTICS[case["statistics"]]),
        case["write_error"],
        rocm=target in ROCM,
    )


def compiled(case: dict[str, Any], target: str) -> dict[str, Any]:
    """What a compiler makes of the case for "sm_90", "gfx942" and the like.

    Returns:
        registers: of a thread.
        spilled: bytes, or registers on ROCm, that do not fit.
        loops: for each loop how often it has each instruction; CUDA alone.
        assembly: ROCm alone.
        elements: logits that a thread handles in one turn of a loop.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from deft_plugin.ops import triton_fold

    kernel = triton_fold._fold_kernel
    constants = launch_options(case, target)
    warps = constants.pop("num_warps")
    threads = 32
    if target in CUDA:
        gpu = GPUTarget("cuda", CUDA[target], 32)
    else:
        gpu, threads = GPUTarget("hip", target, 64), 64
    element = DTYPES[case["dtype"]]
    sums = "fp64" if element == "fp64" else "fp32"
    signature = {
        "logits_pointer": f"*{element}",
        "row_stride": "i32",
        "targets_pointer": "*i64",
        "bias_pointer": f"*{element}",
        "sums_pointer": f"*{sums}",
        "sums_stride": "i32",
        "vocab_size": "i32",
        "padded_size": "i32",
    }
    if not case["has_bias"]:
        constants["bias_pointer"] = None
    signature.update(dict.fromkeys(constants, "constexpr"))
    # What Triton finds out of the arguments of a launch: the buffer, its padded rows and a new bias are aligned.
    aligned = ["logits_pointer", "row_stride", "padded_size"]
    aligned += ["bias_pointer"] if case["has_bias"] else []
    aligned += ["vocab_size"] if case["vocab_size"] % 16 == 0 else []
    divisible = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    binary = triton.compile(
        ASTSource(kernel, signature, constants, divisible),
        target=gpu,
        options={"num_warps": warps},
    )
    result: dict[str, Any] = {"elements": constants["BLOCK"] // (warps * threads)}
    if target in CUDA:
        return result | cuda_report(binary.asm["ptx"], CUDA[target])
    assembly = binary.asm["amdgcn"]
    return result | {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", assembly).group(1)),  # type: ignore[union-attr]
        "spilled": int(re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly).group(1)),  # type: ignore[union-attr]
        "assembly": assembly,
    }


def cuda_report(ptx: str, capability: int) -> dict[str, Any]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    assembler = tools / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    architecture = re.search(r"\.target\s+(\w+)", ptx).group(1)  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "fold.ptx"), Path(folder, "fold.cubin")
        source.write_text(ptx)
        command = [assembler, "-v", f"--gpu-name={architecture}", source, "-o", binary]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        disassembler = [tools / "nvdisasm", "-c", binary]
        listing = subprocess.run(disassembler, capture_output=True, text=True, check=True).stdout
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", usage)
    assert spills is not None
    return {
        "registers": int(re.search(r"Used (\d+) registers", usage).group(1)),  # type: ignore[union-attr]
        "spilled": int(spills.group(1)) + int(spills.group(2)),
        "loops": list(_loops(listing)),
    }


def _loops(listing: str) -> Iterator[dict[str, int]]:
    """Instructions between a label and a branch back to it."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in listing.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        instruction = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(.*?);", line)
        if label:
            labels[label.group(1)] = len(instructions)
        elif instruction:
            text = instruction.group(1)
            instructions.append(text.split()[0])
            branch = re.match(r"BRA\b.*`\((\.L_x_\d+)\)", text)
            # A program ends with a branch to itself, which is no loop.
            if branch and labels.get(branch.group(1), len(instructions)) < len(instructions) - 1:
                yield dict(collections.Counter(instructions[labels[branch.group(1)] :]))


def compiled_elsewhere(jobs: list[tuple[dict[str, Any], str]]) -> list[dict[str, Any]]:
    """`compiled` of every (case, target), in a process without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(jobs)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


def main() -> None:
    """A line of JSON for every job of the first argument; a table of everything without one."""
    if len(sys.argv) > 1:
        for case, target in json.loads(sys.argv[1]):
            print(json.dumps(compiled(case, target)), flush=True)
        return
    for target, case in itertools.product([*CUDA, *ROCM], cases(every=True)):
        report = compiled(case, target)
        per_element = [
            round(sum(loop.values()) / report["elements"], 1) for loop in report.get("loops", [])
        ]
        print(target, *case.values(), report["registers"], report["spilled"], *per_element)


if __name__ == "__main__":
    main()
