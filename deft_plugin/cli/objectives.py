"""`deft objectives`: what can be trained with, and the parameters."""

from __future__ import annotations


def objectives() -> None:
    """List the objectives, each with its parameters and their defaults.

    \b
        deft objectives
    """
    from ..objectives import objective_names
    from ..objectives.registry import describe_parameters, objective_class, summary_of

    for name in objective_names():
        cls = objective_class(name)
        summary = summary_of(cls)
        parameters = describe_parameters(cls)
        print(f"{name:14} {summary}" + (f"\n{'':14} {parameters}" if parameters else ""))
