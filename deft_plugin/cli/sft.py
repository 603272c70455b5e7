"""`deft sft`: TRL's command `trl sft`, with the objectives."""

from __future__ import annotations

import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import typer
from typer.core import TyperCommand

from .errors import fail, need

_PACKAGES = ("trl", "peft", "accelerate", "datasets")
# Of transformers' Trainer: what comes after is no fault in the arguments.
_TRAINING = "_inner_training_loop"
_NEEDED = "A model (a folder, or a name on the hub) and data (a folder with train.jsonl, or a name on the hub) are needed."


class PassedOn(TyperCommand):
    """A command that reads none of its arguments, `--help` included: TRL's parser does."""

    def parse_args(self, ctx, args):  # type: ignore[no-untyped-def]
        """Leave all of them in the context."""
        ctx.args = list(args)
        return []


def sft(context: typer.Context) -> None:
    """Fine-tune: `trl sft` with the objectives as --loss_type, its flags and its YAML files.

    \b
        deft sft --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/Capybara --loss_type deft
    """
    need("sft", "trl", _PACKAGES)
    if not context.args:
        fail("sft", f"{_NEEDED} See deft sft --help.")
    if context.args[-1:] == ["--config"]:
        fail("sft", "--config needs a YAML file.")
    from yaml import YAMLError

    from ..trl.sft import make_parser, run

    parser = make_parser()
    # argparse would print a page of flags before it.
    parser.error = lambda message: fail("sft", f"{message.rstrip('.')}. See deft sft --help.")
    try:
        parsed = parser.parse_args_and_config(args=context.args)
    except (ValueError, OSError, YAMLError) as error:
        fail("sft", f"{error}{_remedy(error)}")
    _check_names(*parsed)
    try:
        run(parsed)
    except Exception as error:
        message = _as_the_users(error, script=parsed[0], model=parsed[2])
        if message is None:
            raise
        fail("sft", message)


def _remedy(error: Exception) -> str:
    """What transformers does not say: how to do without the GPU that TRL's default precision needs."""
    import torch

    wants_gpu = "bf16" in str(error) and not torch.cuda.is_available()
    return " Without a GPU add --use_cpu True --bf16 False." if wants_gpu else ""


def _check_names(script: Any, training: Any, model: Any, mixture: Any) -> None:
    """Fail where there is no model or no data set."""
    if not model.model_name_or_path:
        fail("sft", f"--model_name_or_path is missing. {_NEEDED}")
    if not script.dataset_name and not mixture.datasets:
        fail("sft", f"--dataset_name is missing. {_NEEDED}")
    if script.dataset_name and Path(script.dataset_name).is_file():
        fail(
            "sft",
            f"--dataset_name {script.dataset_name!r} is a file. Name its folder; the file's name says the split, as train.jsonl "
            "does.",
        )


def _as_the_users(error: Exception, script: Any, model: Any) -> str | None:
    """What to say of a mistake in the arguments or the data; None for what is no such thing.

    Refusals of this package's and of files that are not there are written to be read; of data that cannot be loaded
    the data's reader says why.
    """
    from datasets.exceptions import DatasetsError

    from ..model_config import config_of_model

    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if any(frame.f_code.co_name == _TRAINING for frame in frames):
        return None
    data = f"--dataset_name {script.dataset_name!r}"
    if isinstance(error, StopIteration) and _module(frames[-1]).startswith("datasets."):
        return f"{data} cannot be read: a file has no rows."
    if isinstance(error, DatasetsError) and not isinstance(error, OSError):
        return f"{data} cannot be read: {_innermost(error)}"
    if isinstance(error, KeyError) and _module(frames[-1]).startswith("datasets.dataset_dict"):
        return (
            f"{data} has no split {error.args[0]!r}. Add it ({error.args[0]}.jsonl in a folder), or name another with "
            "--dataset_train_split and --dataset_test_split. Only with --eval_strategy is one to test on needed."
        )
    if not isinstance(error, ValueError | OSError):
        return None
    if _module(frames[-1]).startswith("deft_plugin."):
        return str(error)
    try:
        config_of_model(model.model_name_or_path, "--model_name_or_path")
    except ValueError as reason:
        return str(reason)
    return str(error) if isinstance(error, OSError) else None


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))


def _innermost(error: BaseException) -> str:
    """The cause that is farthest down, which knows the file's line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"
