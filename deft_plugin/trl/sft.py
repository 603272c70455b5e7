"""The command line of `trl sft` with objectives: the same flags and YAML files.

deft sft --model_name_or_path ... --dataset_name ... --loss_type deft
accelerate launch -m deft_plugin.trl.sft --config run.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from trl.scripts import sft

from .registration import register


def main(arguments: Sequence[str] | None = None) -> None:
    """Run TRL's SFT script on `arguments`, by default those of the process."""
    register()
    parser = sft.make_parser(prog="deft sft")
    parsed = parser.parse_args_and_config(
        args=list(sys.argv[1:] if arguments is None else arguments)
    )
    sft.main(*parsed)


if __name__ == "__main__":
    main()
