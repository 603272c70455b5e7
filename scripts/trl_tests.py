"""TRL's own tests of supervised fine-tuning, without the plugin and with an objective as their default loss.

python scripts/trl_tests.py CHECKOUT            # a folder with TRL's tests/, of about the installed version
python scripts/trl_tests.py CHECKOUT -k vlm     # more arguments are pytest's

The models, processors and data sets that the tests load from the hub are made here (local_hub.py), tiny and
random, in a temporary cache. Tests that need an accelerator are skipped by TRL. Vision-language processors for video
need torchvision: `pip install --no-deps --target FOLDER torchvision`, and FOLDER in PYTHONPATH, also for CUDA beside
a torch for the CPU. Exit status 1 where a test passes without the plugin and not with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from local_hub import make_hub

FILE = "tests/test_sft_trainer.py"


def run(checkout: Path, cache: Path, loss: str, arguments: list[str]) -> dict[str, tuple[str, str]]:
    """Outcome and reason of each test, by name, with `loss` as the default or, if empty, without the plugin."""
    results = cache / "results.json"
    results.unlink(missing_ok=True)
    scripts = Path(__file__).resolve().parent
    paths = [str(scripts), str(scripts.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(cache),
        "HF_MODULES_CACHE": str(cache / "modules"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TRL_TESTS_LOSS": loss,
        "TRL_TESTS_RESULTS": str(results),
    }
    options = ["-p", "no:cacheprovider", "-p", "trl_tests_plugin", "-W", "ignore", "--tb", "line"]
    command = [sys.executable, "-m", "pytest", *options, FILE, *arguments]
    # What fails is told afterwards, from the results.
    subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.DEVNULL, check=False)
    if not results.exists():
        raise SystemExit(f"pytest wrote no results: {' '.join(command)}")
    return {
        name: (outcome, why) for name, (outcome, why) in json.loads(results.read_text()).items()
    }


def main(
    context: typer.Context,
    checkout: Annotated[Path, typer.Argument(help="A folder with TRL's tests/.")],
    loss: Annotated[str, typer.Option(help="The default loss_type.")] = "deft",
    failures: Annotated[
        bool, typer.Option(help="Print why tests fail without the plugin.")
    ] = False,
) -> None:
    """Compare the outcomes of TRL's own tests without the plugin and with it."""
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        for name, why in make_hub(cache).items():
            print(f"not made: {name} ({why})")
        plain = run(checkout, cache, "", context.args)
        gated = run(checkout, cache, loss, context.args)
    print(f"TRL {version('trl')}, transformers {version('transformers')}, {FILE} of {checkout}")
    for title, outcomes in (("without the plugin", plain), (f"loss_type={loss!r}", gated)):
        counts = Counter(outcome for outcome, _ in outcomes.values())
        print(f"{title}: " + ", ".join(f"{counts[key]} {key}" for key in sorted(counts)))
    if failures:
        for name, (outcome, why) in plain.items():
            if outcome == "failed":
                print(f"fails without the plugin: {name}: {why}")
    broken = [name for name, (outcome, _) in plain.items() if outcome == "passed" != gated[name][0]]
    for name in broken:
        print(f"passes without the plugin only: {name}: {gated[name][1]}")
    mended = [name for name, (outcome, _) in plain.items() if gated[name][0] == "passed" != outcome]
    for name in mended:
        print(f"passes with the plugin only: {name}: without it {plain[name][1]}")
    raise SystemExit(bool(broken))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(main)
    app()
