"""The command line of `trl sft` with objectives: the same flags and YAML files.

deft sft --model_name_or_path ... --dataset_name ... --loss_type deft
accelerate launch -m deft_plugin.trl.sft --config run.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from trl.scripts import sft

from .arguments import Arguments, check_arguments
from .registration import register
from .resumption import find_checkpoint, resuming_from
from .unknown_names import refuse_unknown_names
from .yaml_values import mistyped_values

_EXAMPLE = (
    "deft sft --model_name_or_path MODEL --dataset_name DATA --output_dir FOLDER --loss_type deft"
)
_NO_LOSS_TYPE = (
    "deft sft: --loss_type is not given, so that TRL's own loss is trained, 'nll'. Add --loss_type deft (`deft objectives` "
    "lists all), or --loss_type nll if that is meant."
)


def make_parser() -> Any:
    """TRL's parser, of which `--loss_type` takes the objectives too."""
    register()
    parser = sft.make_parser(prog="deft sft")
    parser.description = "TRL's SFTTrainer with the objectives that `deft objectives` lists. Flags may stand in a YAML file: --config FILE."
    parser.epilog = f"Example: {_EXAMPLE}"
    take = parser.set_defaults_with_config

    def take_checked(**values: Any) -> Any:
        for mistake in mistyped_values(values, parser.dataclass_types):
            raise ValueError(mistake)
        return take(**values)

    # What is in a YAML file comes through it.
    parser.set_defaults_with_config = take_checked
    return parser


def parse(parser: Any, given: Sequence[str] | None = None) -> tuple[Arguments, bool]:
    """What a parser makes of the command line, and whether that names a loss.

    Args:
        parser: of `make_parser`.
        given: the arguments, by default the process's.

    Raises:
        ValueError: a flag or a key of the YAML file is unknown, or a value none that it can have.
    """
    refuse_unknown_names(parser)
    read, default = parser.parse_known_args, parser.get_default("loss_type")
    names_loss = False

    def read_and_look(args: Any = None, namespace: Any = None) -> Any:
        nonlocal names_loss
        found, unread = read(args, namespace)
        names_loss = found.loss_type is not None
        if not names_loss:
            found.loss_type = default
        return found, unread

    # Or the default could not be told from the same loss, asked for.
    parser.set_defaults(loss_type=None)
    parser.parse_known_args = read_and_look
    return Arguments(*parser.parse_args_and_config(args=given)), names_loss


def run(arguments: Arguments, names_loss: bool = True) -> None:
    """Train as TRL's script does, with what the parser has made of the arguments.

    Args:
        arguments: of `parse`.
        names_loss: whether the command line does; where it does not, a line on stderr names TRL's own.

    Raises:
        ValueError: before anything is loaded, for a name that cannot be one, or a checkpoint that is not there.
    """
    check_arguments(arguments)
    training = arguments.training
    training.resume_from_checkpoint = find_checkpoint(training)
    if not names_loss and training.process_index == 0:
        print(_NO_LOSS_TYPE, file=sys.stderr)
    with resuming_from(training.resume_from_checkpoint):
        sft.main(*arguments)


if __name__ == "__main__":
    run(*parse(make_parser()))
