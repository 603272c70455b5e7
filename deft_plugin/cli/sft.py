"""`deft sft`: TRL's command `trl sft`, with the objectives."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from typer.core import TyperCommand

from ..paths import NEEDED
from .errors import fail, need

if TYPE_CHECKING:
    from ..trl.arguments import Arguments

_PACKAGES = ("trl", "peft", "accelerate", "datasets")
# Of transformers' Trainer: what comes after is no fault in the arguments.
_TRAINING = "_inner_training_loop"
# Of these, errors before training are about what they were asked for.
_WRITTEN = ("accelerate.", "datasets.", "huggingface_hub.", "peft.", "transformers.", "trl.")
# Functions that make something of settings alone, by module and name, and what those are.
_MAKERS = {
    ("transformers.trainer", "get_train_dataloader"): "a loader of the data with --dataloader_*",
    ("transformers.trainer", "create_optimizer"): (
        "an optimizer with --optim, --optim_args, --learning_rate, --weight_decay and --adam_*"
    ),
    ("transformers.trainer", "create_scheduler"): (
        "a scheduler with --lr_scheduler_type, --lr_scheduler_kwargs and --warmup_steps"
    ),
    ("transformers.trainer_utils", "set_seed"): "random numbers with --seed",
    ("peft.mapping_func", "get_peft_model"): "an adapter with --lora_*",
}


class PassedOn(TyperCommand):
    """A command that reads none of its arguments, `--help` included: TRL's parser does."""

    def parse_args(self, ctx, args):  # type: ignore[no-untyped-def]
        """Leave all of them in the context."""
        ctx.args = list(args)
        return []


def sft(context: typer.Context) -> None:
    """Fine-tune: `trl sft` with the objectives as --loss_type, its flags and its YAML files.

    \b
        deft sft --model_name_or_path Qwen/Qwen3-0.6B-Base --dataset_name trl-lib/Capybara --loss_type deft
    """
    need("sft", "trl", _PACKAGES)
    if not context.args:
        fail("sft", f"{NEEDED} See deft sft --help.")
    if context.args[-1:] == ["--config"]:
        fail("sft", "--config needs a YAML file.")
    from yaml import YAMLError

    from ..trl.arguments import remedy_without_gpu
    from ..trl.sft import make_parser, parse, run

    parser = make_parser()
    # argparse would print a page of flags before it.
    parser.error = lambda message: fail("sft", f"{message.rstrip('.')}. See deft sft --help.")
    try:
        arguments, names_loss = parse(parser, context.args)
    except (ValueError, OSError, YAMLError) as error:
        remedy = remedy_without_gpu(error, in_yaml="--config" in context.args)
        fail("sft", f"{error}{remedy}")
    except (TypeError, AttributeError) as error:
        # Of values in a YAML file that their fields' types let pass.
        fail("sft", f"A value of --config has another type than is needed: {error}.")
    try:
        run(arguments, names_loss)
    except Exception as error:
        message = _as_the_users(error, arguments)
        if message is None or arguments.training.log_level == "debug":
            raise
        fail("sft", message)


def _as_the_users(error: Exception, arguments: Arguments) -> str | None:
    """What to say of a mistake in the arguments or the data; None for what may be a fault of the code's, or of the user's code.

    Refusals, this package's and those that TRL and the packages below it raise before training, are written to be read;
    of data that cannot be loaded the data's reader says why.
    """
    from datasets.exceptions import DatasetsError

    from ..trl.data_errors import unreadable, without_split

    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, ValueError | TypeError | ImportError):
        for frame in frames:
            made = _MAKERS.get((str(frame.f_globals.get("__name__")), frame.f_code.co_name))
            if made:
                return f"Cannot make {made}: {error}"
    if any(frame.f_code.co_name == _TRAINING for frame in frames):
        return None
    modules = [str(frame.f_globals.get("__name__")) for frame in frames]
    raiser = modules[-1]
    has_no_rows = isinstance(error, StopIteration) and raiser.startswith("datasets.")
    if has_no_rows or (isinstance(error, DatasetsError) and not isinstance(error, OSError)):
        return unreadable(error, arguments)
    if isinstance(error, KeyError) and frames[-1].f_code.co_name in ("__getitem__", "main"):
        splits = (arguments.script.dataset_train_split, arguments.script.dataset_test_split)
        return without_split(error.args[0], arguments) if error.args[0] in splits else None
    if raiser.startswith("deft_plugin.") and isinstance(error, ValueError | OSError):
        return str(error)
    raised_by = frames[-1].f_code.co_name
    folder = Path(arguments.training.output_dir)
    # Not a cache of datasets' or the hub's.
    if (
        isinstance(error, OSError)
        and raised_by == "makedirs"
        and Path(error.filename) in (folder, *folder.parents)
    ):
        return f"--output_dir {str(folder)!r} cannot be made: {error.strerror}."
    if isinstance(error, TypeError) and raised_by == "from_pretrained":
        return _why_no_init(error, arguments)
    # A reporter that is not installed.
    if type(error) is RuntimeError and raiser == "transformers.integrations.integration_utils":
        return str(error)
    if not isinstance(error, ValueError | OSError | ImportError) or not raiser.startswith(_WRITTEN):
        return None
    while_loading_data = any(module.startswith("datasets.") for module in modules)
    return (
        _why_no_model(error, arguments)
        or (_why_no_data(error, arguments) if while_loading_data else None)
        or str(error)
    )


def _why_no_init(error: TypeError, arguments: Arguments) -> str | None:
    """Which of --model_init_kwargs the model's class does not take."""
    given = arguments.training.model_init_kwargs or {}
    if any(f"unexpected keyword argument {name!r}" in str(error) for name in given):
        return f"--model_init_kwargs: {error}."
    return None


def _why_no_model(error: Exception, arguments: Arguments) -> str | None:
    """What is wrong with the name of the model, where something is; code that comes with one is not run for it."""
    from ..model_config import config_of_model

    if "trust_remote_code" in str(error):
        name = arguments.model.model_name_or_path
        return f"--model_name_or_path {name!r} has code of its own. --trust_remote_code True runs it, if you trust it."
    if arguments.training.trust_remote_code or arguments.model.model_revision != "main":
        return None
    try:
        config_of_model(arguments.model.model_name_or_path, "--model_name_or_path")
    except ValueError as reason:
        return str(reason)
    return None


def _why_no_data(error: Exception, arguments: Arguments) -> str | None:
    """What is wrong with the name of the data, where they could not be found, or with a file, where it could not be read."""
    from ..trl.data_errors import why_unread

    name = arguments.script.dataset_name
    if not isinstance(error, OSError):
        return why_unread(arguments)
    if arguments.mixture.datasets or Path(name).is_dir():
        return None
    return f"{arguments.data}: there is no such folder here, and from the hub it cannot be had: {error}."
