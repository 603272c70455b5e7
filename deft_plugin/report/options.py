"""What a report is to be about, and which of the options need each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .checkpoint import Placement
from .choices import DEFAULT_OBJECTIVES


@dataclass(frozen=True)
class Options:
    """What a report is to be about; the command's options.

    Args:
        output: the folder to write to.
        model: a model's folder or its name on the hub; None for a comparison of runs alone.
        data: a file, a folder or a data set on the hub, in one of TRL's formats.
        adapter: a LoRA adapter on the model, from which the report starts.
        after: a second checkpoint to measure, an adapter for the model or a model.
        rows: how many rows to draw.
        max_length: tokens to which rows are cut; 0 for no cut.
        columns: where they do not have TRL's names, "question,answer" or one name.
        split, config: of the data set.
        chat_template: a Jinja file in place of the model's.
        assistant_only: of messages, only what the assistant says is trained on.
        objectives: which to look at.
        objective: by which texts are shaded and ordered.
        run: the log of a run, for its course.
        compare: logs of runs to compare.
        seed: draws the rows.
        batch_size: rows in a forward pass.
        placement: where and in which numbers models are loaded.
    """

    output: Path
    model: str | None = None
    data: str | None = None
    adapter: str | None = None
    after: str | None = None
    rows: int = 64
    max_length: int = 1024
    columns: str | None = None
    split: str = "train"
    config: str | None = None
    chat_template: Path | None = None
    assistant_only: bool = False
    objectives: tuple[str, ...] = DEFAULT_OBJECTIVES
    objective: str = "deft"
    run: str | None = None
    compare: tuple[str, ...] = ()
    seed: int = 0
    batch_size: int = 8
    placement: Placement = field(default_factory=Placement)

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("batch_size", 1), ("max_length", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")


def check_together(options: Options) -> None:
    """Raise `ValueError` where an option lacks another one."""
    if options.model is None:
        needing = {
            "--data": options.data,
            "--adapter": options.adapter,
            "--after": options.after,
        }
        given = [f"{name} {value!r}" for name, value in needing.items() if value is not None]
        if given:
            raise ValueError(f"{given[0]} needs a MODEL: deft report MODEL --data DATA.")
        if not options.compare and options.run is None:
            raise ValueError(
                "There is nothing to report on. Name a MODEL and --data DATA, or runs with --compare or --run."
            )
    elif options.data is None:
        raise ValueError(
            f"MODEL {options.model!r} needs data to be measured on: --data with a file, a folder or a name on the hub."
        )
