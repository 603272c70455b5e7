"""`deft sft`: TRL's command `trl sft`, with the objectives."""

from __future__ import annotations

import traceback

import typer
from typer.core import TyperCommand

from .errors import fail, need

_PACKAGES = ("trl", "peft", "accelerate", "datasets")
# Of transformers' Trainer: what comes after is no fault in the arguments.
_TRAINING = "_inner_training_loop"


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
    from yaml import YAMLError

    from ..trl.sft import make_parser, run

    parser = make_parser()
    # argparse would print a page of flags before it.
    parser.error = lambda message: fail("sft", f"{message.rstrip('.')}. See deft sft --help.")
    if context.args[-1:] == ["--config"]:
        fail("sft", "--config needs a YAML file.")
    try:
        parsed = parser.parse_args_and_config(args=context.args)
    except (ValueError, OSError, YAMLError) as error:
        fail("sft", str(error))
    try:
        run(parsed)
    except (ValueError, OSError) as error:
        if not _is_the_users(error):
            raise
        fail("sft", str(error))


def _is_the_users(error: Exception) -> bool:
    """Whether an error is a refusal of this package's, or of a file that is not there; both are written to be read."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, OSError):
        return not any(frame.f_code.co_name == _TRAINING for frame in frames)
    return str(frames[-1].f_globals.get("__name__")).startswith("deft_plugin.")
