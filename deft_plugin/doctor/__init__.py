"""`deft doctor`: whether an environment can train with objectives, and whether a file will.

`environment` asks `packages` for versions and `loss` for the loss on this device. `files` takes YAMLs to `axolotl` (with
`axolotl_keys`) or `trl` (with `trl_data`), both with `data_files`, and folders to `adapters`. Each yields `finding.Finding`s, which
`printing` prints.

Axolotl only logs a plugin that it cannot import, ignores keys that it does not know, and then trains with its
own loss. Here each of those is an error, and the exit status is 1.
"""

from .environment import check_environment
from .files import check_path, check_yaml
from .finding import Finding

__all__ = ["Finding", "check_environment", "check_path", "check_yaml"]
