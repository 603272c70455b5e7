"""Flags and keys of a YAML file that TRL's parser has no field for, told with the closest that it has.

The parser tells them last, once it has made configurations of all others, which may fail for another reason.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

_CONFIG = "--config"
_YAML = (".yaml", ".yml")
# What `trl sft` hands on to accelerate.
_OF_LAUNCHER = ("num_processes", "accelerate_config")
_LAUNCHERS = (
    "is for accelerate, and deft sft starts one process. Leave it out; for several there is accelerate launch --num_processes N "
    "-m deft_plugin.trl.sft --config FILE."
)
# And no negative number.
_FLAG = re.compile(r"-+[A-Za-z]")


def refuse_unknown_names(parser: Any) -> None:
    """Let `parser`, a TrlParser, raise `ValueError` for unknown flags and keys before it makes anything of the others."""
    read, take = parser.parse_known_args, parser.set_defaults_with_config

    def read_known(args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, unread = read(args, namespace)
        if unread:
            is_first = args is not None and args[0] == unread[0]
            raise ValueError(_unread(unread, [*parser._option_string_actions, _CONFIG], is_first))
        return found, unread

    def take_known(**values: Any) -> list[str]:
        # Each with a value after it.
        untaken: list[str] = take(**values)
        if untaken:
            keys = [flag.removeprefix("--") for flag in untaken[::2]]
            raise ValueError(_untaken(keys, [action.dest for action in parser._actions]))
        return untaken

    parser.parse_known_args, parser.set_defaults_with_config = read_known, take_known


def _unread(arguments: Sequence[str], flags: Sequence[str], is_first: bool) -> str:
    """What is wrong with arguments that the parser has left over; `is_first` where they begin the command line."""
    first, _, file = arguments[0].partition("=")
    if first == _CONFIG:
        return (
            f"{arguments[0]} needs a space in place of =: {_CONFIG} {file}."
            if file
            else f"{_CONFIG} is given twice, and one file can be."
        )
    if not _FLAG.match(first):
        guess = is_first or first.endswith(_YAML)
        return f"{arguments[0]!r} is neither a flag nor the value of one." + (
            f" Did you mean deft sft {_CONFIG} {arguments[0]}?" if guess else ""
        )
    # Between them are their values.
    names = [argument.partition("=")[0] for argument in arguments if _FLAG.match(argument)]
    return " ".join(
        f"{name} {_LAUNCHERS}"
        if name.lstrip("-").replace("-", "_") in _OF_LAUNCHER
        else f"{name} is no flag of deft sft.{_guess(name, flags)}"
        for name in names
    )


def _untaken(keys: Sequence[str], known: Iterable[str]) -> str:
    """What is wrong with keys of a YAML file that no field has."""
    quoted = [repr(name) for name in known]
    return " ".join(
        f"{_CONFIG}: {key} {_LAUNCHERS}"
        if key in _OF_LAUNCHER
        else f"{_CONFIG} has a key {key!r}, which deft sft does not know.{_guess(repr(key), quoted)}"
        for key in keys
    )


def _guess(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""
