"""Which kind of file a path is: a YAML of Axolotl, a YAML of `trl sft`, or an adapter's folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .adapters import ADAPTER_CONFIG, check_adapter, notes_on_peft_deft
from .axolotl import check_axolotl
from .finding import Finding
from .trl import check_trl

_SUFFIXES = (".yaml", ".yml")
_NO_RUN = (
    "is no YAML of a run, nor an adapter's folder; for data there is `deft report MODEL --data`"
)


def check_path(path: Path) -> Iterator[Finding]:
    """What there is to say of a YAML, or of the folder of an adapter; no model is loaded."""
    if path.is_dir():
        yield from check_adapter(path / ADAPTER_CONFIG)
    elif path.name == ADAPTER_CONFIG:
        yield from check_adapter(path)
    else:
        yield from check_yaml(path)


def check_yaml(path: Path) -> Iterator[Finding]:
    """Whether a training run with this file would train with an objective; no model is loaded."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        yield Finding("error", f"cannot be read: {error}")
        return
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        yield _no_run(path, f"cannot be read: {error}")
        return
    if not isinstance(values, dict):
        yield _no_run(path, "is not a YAML mapping of keys to values")
        return
    yield from notes_on_peft_deft(values)
    if "base_model" in values:
        yield from check_axolotl(values)
    elif "model_name_or_path" in values:
        yield from check_trl(path, values)
    else:
        yield _no_run(
            path, "has neither base_model (Axolotl) nor model_name_or_path (trl sft) in it"
        )


def _no_run(path: Path, why: str) -> Finding:
    """Of a file that is not named as a YAML, data say, where a parser stops is no help."""
    return Finding("error", why if path.suffix in _SUFFIXES else _NO_RUN)
