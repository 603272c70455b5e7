"""YAMLs of `trl sft`, as `deft sft` takes them."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from .data_files import missing_files_of_trl
from .finding import Finding, quiet
from .loss import path_problems
from .packages import is_installed
from .trl_data import data_problems, is_folder_here

if TYPE_CHECKING:
    from ..trl.arguments import Arguments

_NOT_SET = (
    "loss_type is not set: TRL's own loss would be trained. Add loss_type: deft (`deft objectives` lists all), or "
    "loss_type: nll if that is meant"
)
# Of TRL's own losses, by name, what trains the same here.
_WITH_ALL_METRICS = {
    "nll": "alpha with loss_kwargs {a: 0} is nll with all metrics",
    "dft": "p has the gradient of dft, with all metrics",
}


def check_trl(path: Path, values: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether `deft sft` would train with an objective from this file, whose content is `values`."""
    if not is_installed("trl"):
        yield Finding("error", "is a file of `trl sft`, and trl is not installed here")
        return
    with quiet():
        from ..trl.config import objective_of, own_loss_of
        from ..trl.sft import make_parser

        parser = make_parser()
    problems = [*_unknown_trl_keys(values, parser)]
    loss_type = values.get("loss_type")
    loss = SimpleNamespace(loss_type=loss_type, loss_kwargs=values.get("loss_kwargs"))
    # The other keys are checked with a loss that is right.
    flags = ["--loss_type", "deft", "--loss_kwargs", "{}"]
    try:
        objective = objective_of(loss)
    except ValueError as error:
        problems.append(str(error))
    else:
        flags = []
        if loss_type is None:
            problems.append(_NOT_SET)
    try:
        arguments = _parse(parser, ["--config", str(path), *flags])
    except ValueError as error:
        problems.append(str(error))
        unseen = ""
    else:
        problems += _trl_problems(arguments, loss_type)
        unseen = _not_looked_at(arguments)
    found = [*missing_files_of_trl(values), *(Finding("error", problem) for problem in problems)]
    yield from found
    if any(finding.level == "error" for finding in found):
        return
    if objective is None:
        instead = _WITH_ALL_METRICS[own_loss_of(loss)]
        yield Finding("note", f"loss_type: {loss_type} trains TRL's own loss; {instead}{unseen}")
    else:
        yield Finding("ok", f"trains with {objective!r} under `deft sft`{unseen}")


def _unknown_trl_keys(values: Mapping[str, Any], parser: Any) -> Iterator[str]:
    # TrlParser itself takes env.
    known = {field.name for cls in parser.dataclass_types for field in dataclasses.fields(cls)}
    for key in values:
        if key not in {*known, "env"}:
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.75)
            guess = f" Did you mean {close[0]!r}?" if close else ""
            yield f"unknown key {key!r}, which `deft sft` refuses.{guess}"


def _parse(parser: Any, options: list[str]) -> Arguments:
    """What the parser makes of options, or a `ValueError` with what it refuses."""
    from ..trl.arguments import Arguments, remedy_without_gpu

    errors = io.StringIO()
    try:
        with quiet(), contextlib.redirect_stderr(errors):
            return Arguments(
                *parser.parse_args_and_config(args=options, fail_with_unknown_args=False)
            )
    except (Exception, SystemExit) as error:
        # The parser writes its usage first, and what is wrong in the last line.
        said = (errors.getvalue().strip().splitlines() or [str(error)])[-1]
        raise ValueError(f"{said}{remedy_without_gpu(error, in_yaml=True)}") from None


def _trl_problems(arguments: Arguments, loss_type: Any) -> list[str]:
    """What `deft sft` would refuse, apart from keys that it does not know."""
    from trl import get_peft_config

    from ..trl.arguments import find_mistakes
    from ..trl.config import objective_of, settings_of
    from ..trl.conflicts import find_conflicts

    training = arguments.training
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            problems = [
                *find_mistakes(arguments),
                *_resumption_problems(training),
                *data_problems(arguments),
            ]
            if objective_of(training) is None:
                return problems
            return [
                *problems,
                *path_problems(settings_of(training)[0].path, training.device),
                *find_conflicts(training, get_peft_config(arguments.model), loss_type),
            ]
    except Exception as error:
        return [str(error)]


def _resumption_problems(training: Any) -> list[str]:
    """What `deft sft` would refuse in the checkpoint that it is to go on from."""
    from ..trl.resumption import find_checkpoint

    try:
        find_checkpoint(training)
    except ValueError as error:
        return [str(error)]
    return []


def _not_looked_at(arguments: Arguments) -> str:
    """A clause on the model and the data, where they are not in a folder here."""
    is_here = {
        "model": os.path.isdir(arguments.model.model_name_or_path or ""),
        "data": is_folder_here(arguments),
    }
    unseen = [name for name, here in is_here.items() if not here]
    were = "was" if unseen == ["model"] else "were"
    return f"; {' and '.join(unseen)} {were} not looked at" if unseen else ""
