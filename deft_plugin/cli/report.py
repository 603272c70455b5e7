"""`deft report`: what the gates do to your data, as a page."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from ..report import PACKAGES
from ..report.choices import DEFAULT_OBJECTIVES, DTYPES
from .errors import fail, need, usage_errors


class Report(TyperCommand):
    """A command whose `--compare` takes several runs."""

    def parse_args(self, ctx, args):  # type: ignore[no-untyped-def]
        """Read the arguments, with `--compare` before each run."""
        return super().parse_args(ctx, several_to_an_option(args))


def report(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A model's folder, or its name on the hub. May be left out with --compare.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A file (.jsonl, .json, .csv, .parquet), the folder of a saved data set, or a name on the hub, in any of "
            "TRL's formats."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("deft-report"),
    adapter: Annotated[
        str | None, typer.Option(help="A LoRA adapter on MODEL, to start from.")
    ] = None,
    after: Annotated[
        str | None,
        typer.Option(
            help="A second checkpoint on the same rows: an adapter for MODEL, or a model."
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to draw.")] = 64,
    max_length: Annotated[
        int,
        typer.Option(min=0, help="Tokens to which rows are cut, as in training; 0: not at all."),
    ] = 1024,
    columns: Annotated[
        str | None,
        typer.Option(
            help="Columns without TRL's names: 'question,answer' for prompt and completion, or one of texts or messages."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    config: Annotated[str | None, typer.Option(help="Configuration of a hub data set.")] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="A Jinja file in place of the model's chat template.")
    ] = None,
    assistant_only: Annotated[
        bool, typer.Option(help="Of messages, train on what the assistant says.")
    ] = False,
    objectives: Annotated[
        str,
        typer.Option(
            help="Objectives to look at, with commas between; `deft objectives` lists them."
        ),
    ] = ",".join(DEFAULT_OBJECTIVES),
    objective: Annotated[
        str, typer.Option(help="Objective by which texts are shaded and ordered.")
    ] = "deft",
    run: Annotated[
        str | None,
        typer.Option(help="A run's folder or trainer_state.json, for its course over training."),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUN...", help="Runs to compare: folders, or trainer_state.json files."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws the rows.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a forward pass.")] = 8,
    four_bit: Annotated[
        bool,
        typer.Option("--four-bit", help="Load the base model in 4 bit, as QLoRA trains on it."),
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:1, ...; by default GPUs where there are any."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help=f"Numbers of the model ({', '.join(DTYPES)}); by default bfloat16 on a GPU, float32 elsewhere.",
        ),
    ] = None,
) -> None:
    """Show what the gates do to your data: one HTML page, with its figures and numbers as files beside it.

    \b
        deft report MODEL --data train.jsonl --columns question,answer --output reports/mine
        deft report MODEL --data train.jsonl --after out/checkpoint-500 --run out
        deft report --compare runs/nll runs/deft
    """
    need("report", "report", PACKAGES)
    _keep_quiet()
    from rich.console import Console

    from ..report.checkpoint import Placement
    from ..report.report import Options, make_report

    start = time.monotonic()
    with usage_errors("report"):
        options = Options(
            output=output,
            model=model,
            data=data,
            adapter=adapter,
            after=after,
            rows=rows,
            max_length=max_length,
            columns=columns,
            split=split,
            config=config,
            chat_template=chat_template,
            assistant_only=assistant_only,
            objectives=tuple(name.strip() for name in objectives.split(",") if name.strip()),
            objective=objective,
            run=run,
            compare=tuple(compare or ()),
            seed=seed,
            batch_size=batch_size,
            placement=Placement(device, dtype, four_bit),
        )
        page = make_report(options, Console(stderr=True))
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB, {time.monotonic() - start:.0f} seconds)")


def _keep_quiet() -> None:
    """Keep from the console what a reader cannot act on."""
    # They warn while they are imported, of an optional kernel and of a missing GPU.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # A filter, since DeepSpeed sets its own level then.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def several_to_an_option(arguments: Sequence[str]) -> list[str]:
    """`--compare a b` as `--compare a --compare b`; it ends the process where `--compare` has no run."""
    spread: list[str] = []
    comparing, is_first = False, False
    for argument in [*arguments, "--"]:
        if argument.startswith("-"):
            if comparing and is_first:
                fail(
                    "report", "--compare needs runs after it: folders, or trainer_state.json files."
                )
            option, _, value = argument.partition("=")
            comparing, is_first = option == "--compare", not value
            spread.append(argument)
            continue
        if comparing and not is_first:
            spread.append("--compare")
        is_first = False
        spread.append(argument)
    return spread[:-1]
