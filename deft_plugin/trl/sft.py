"""The command line of `trl sft` with objectives: the same flags and YAML files.

deft sft --model_name_or_path ... --dataset_name ... --loss_type deft
accelerate launch -m deft_plugin.trl.sft --config run.yaml
"""

from __future__ import annotations

from typing import Any

from trl.scripts import sft

from .registration import register

_EXAMPLE = (
    "deft sft --model_name_or_path MODEL --dataset_name DATA --output_dir FOLDER --loss_type deft"
)


def make_parser() -> Any:
    """TRL's parser, of which `--loss_type` takes the objectives too."""
    register()
    parser = sft.make_parser(prog="deft sft")
    parser.description = "TRL's SFTTrainer with the objectives that `deft objectives` lists. Flags may stand in a YAML file: --config FILE."
    parser.epilog = f"Example: {_EXAMPLE}"
    return parser


def run(parsed: tuple[Any, ...]) -> None:
    """Train as TRL's script does, with what the parser has made of the arguments."""
    sft.main(*parsed)


if __name__ == "__main__":
    run(make_parser().parse_args_and_config())
