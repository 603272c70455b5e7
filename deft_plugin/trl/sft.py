"""The command line of `trl sft` with objectives: the same flags and YAML files.

deft sft --model_name_or_path ... --dataset_name ... --loss_type deft
accelerate launch -m deft_plugin.trl.sft --config run.yaml
"""

from __future__ import annotations

from typing import Any

from trl.scripts import sft

from .arguments import Arguments, check_arguments
from .registration import register
from .yaml_values import mistyped_values

_EXAMPLE = (
    "deft sft --model_name_or_path MODEL --dataset_name DATA --output_dir FOLDER --loss_type deft"
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


def run(arguments: Arguments) -> None:
    """Train as TRL's script does, with what the parser has made of the arguments.

    Raises:
        ValueError: before anything is loaded, for a name that cannot be one.
    """
    check_arguments(arguments)
    sft.main(*arguments)


if __name__ == "__main__":
    run(Arguments(*make_parser().parse_args_and_config()))
