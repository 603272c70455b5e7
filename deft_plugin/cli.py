"""The command `deft`."""

from __future__ import annotations

import sys


def main() -> None:
    """`deft sft ...` is `trl sft ...` with objectives, which `deft objectives` lists; `deft doctor` checks."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command == "sft":
        from .trl.sft import main as sft

        sft(arguments)
    elif command == "objectives" and not arguments:
        _list_objectives()
    elif command == "doctor":
        from .doctor import main as doctor

        doctor(arguments)
    elif command in ("-h", "--help", "help", "objectives"):
        print(
            "usage: deft sft [flags and YAML of `trl sft`, with --loss_type deft]\n"
            "       deft objectives\n"
            "       deft doctor [YAML of Axolotl or `trl sft` ...]"
        )
    else:
        print(
            f"deft: unknown command {command!r}. Choices: sft, objectives, doctor.", file=sys.stderr
        )
        raise SystemExit(2)


def _list_objectives() -> None:
    from dataclasses import fields

    from .objectives import objective_names
    from .objectives.registry import objective_class

    for name in objective_names():
        cls = objective_class(name)
        summary = (cls.__doc__ or "").strip().splitlines()[0]
        parameters = ", ".join(f"{field.name}={field.default!r}" for field in fields(cls))
        print(f"{name:14} {summary}" + (f"\n{'':14} {parameters}" if parameters else ""))


if __name__ == "__main__":
    main()
