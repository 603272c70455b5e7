"""Names to objectives: the built-in family and whatever a user adds."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from .base import Objective, check_needs, describe_type
from .statistics import TokenStatistics

# What trainers take beside an objective's parameters, under the same heading.
RESERVED_PARAMETERS = ("path", "tile_rows", "skip_below", "histograms", "module")

_OBJECTIVES: dict[str, type[Objective]] = {}

ObjectiveClass = TypeVar("ObjectiveClass", bound=type[Objective])
LossFunction = Callable[..., Tensor]


class UnknownParameterError(ValueError):
    """A parameter that the objective does not have."""


def register(name: str) -> Callable[[ObjectiveClass], ObjectiveClass]:
    """Class decorator: make a subclass of `Objective` available under `name`."""

    def decorator(cls: ObjectiveClass) -> ObjectiveClass:
        _add(name, cls)
        return cls

    return decorator


def objective(
    name: str, *, needs: tuple[str, ...] = (), couples_tokens: bool = True
) -> Callable[[LossFunction], LossFunction]:
    """Function decorator: make `loss(log_p, statistics, *, parameters...)` an objective.

    The function returns one loss per token, shape (N,), differentiable in `log_p`; its gate is
    taken by autograd. Keyword-only arguments with a type and a default become its parameters:

        @objective("focal", couples_tokens=False)
        def focal(log_p, statistics, *, gamma: float = 2.0):
            return -((1 - log_p.exp()) ** gamma) * log_p

    Args:
        name: what to give as `loss_type`.
        needs: optional statistics the function reads: "collision", "entropy". Others are not
            computed. (`statistics` is detached: gradients flow through `log_p` alone.)
        couples_tokens: say False when each token's loss depends on that token alone. A trainable
            lm_head then needs three matrix products a step, not four; a frozen one two either way.

    Raises:
        ValueError: the name is taken, a statistic is unknown, or the signature does not fit.
    """
    needs = check_needs(needs)
    if "top_k_entropy" in needs:
        raise ValueError(
            "needs='top_k_entropy' also needs a k: subclass deft_plugin.Objective, define its "
            "`top_k` property and decorate it with @deft_plugin.register_objective."
        )

    def decorator(function: LossFunction) -> LossFunction:
        fields = _parameters_of(function)

        def loss(self: Objective, log_p: Tensor, statistics: TokenStatistics) -> Tensor:
            parameters = {field: getattr(self, field) for field, *_ in fields}
            return function(log_p, statistics, **parameters)

        cls = dataclasses.make_dataclass(
            f"{function.__name__}_objective",
            fields,
            bases=(Objective,),
            frozen=True,
            namespace={
                "__doc__": function.__doc__,
                "__module__": function.__module__,
                "loss": loss,
                "needs": needs,
                "couples_tokens": couples_tokens,
            },
        )
        _add(name, cls)
        return function

    return decorator


def build_objective(
    spec: str | Objective, parameters: Mapping[str, Any] | None = None
) -> Objective:
    """The objective named `spec` with `parameters`, or `spec` itself when it is one already.

    Raises:
        ValueError: an unknown name or parameter, or a value outside its range. The message names
            the field, the value and the valid choices.
    """
    if parameters is not None and not isinstance(parameters, Mapping):
        raise ValueError(
            f"parameters={parameters!r} must be a mapping of names to values, or None for the defaults."
        )
    parameters = dict(parameters or {})
    if isinstance(spec, Objective):
        if parameters:
            raise ValueError(
                f"The objective {spec!r} is built already; parameters {parameters!r} would be "
                "ignored. Pass its name, or set them when you build it."
            )
        return spec
    cls = objective_class(spec)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for parameter in parameters:
        if parameter not in fields:
            names = (*fields, *(name for name in RESERVED_PARAMETERS if name != parameter))
            own = (
                f" Valid choices: {', '.join(fields)}."
                if fields
                else " It takes no parameters of its own."
            )
            raise UnknownParameterError(
                f"Objective {spec!r} has no parameter {parameter!r}.{_guess(str(parameter), names)}{own}"
            )
    return cls(**parameters)


def objective_class(name: str) -> type[Objective]:
    """The class registered under `name`, or a `ValueError` with the valid choices."""
    cls = _OBJECTIVES.get(name) if isinstance(name, str) else None
    if cls is None:
        names = objective_names()
        raise ValueError(
            f"Unknown objective {name!r}.{_guess(str(name), names)} Valid choices: {', '.join(names)}."
        )
    return cls


def objective_names() -> tuple[str, ...]:
    """Names of all registered objectives, in order of registration."""
    return tuple(_OBJECTIVES)


def summary_of(cls: type[Objective]) -> str:
    """The first line of an objective's documentation; "" where it has none."""
    return next(iter((cls.__doc__ or "").strip().splitlines()), "")


def describe_parameters(cls: type[Objective]) -> str:
    """Parameters with their defaults, and in brackets what else one of several kinds or choices may be."""
    hints = typing.get_type_hints(cls)
    texts = []
    for field in dataclasses.fields(cls):
        hint, default = hints[field.name], repr(field.default)
        describe = repr if typing.get_origin(hint) is typing.Literal else describe_type
        options = [describe(option) for option in typing.get_args(hint)]
        others = ", ".join(option for option in options if option != default)
        texts.append(f"{field.name}={default}" + (f" (or {others})" if others else ""))
    return ", ".join(texts)


def _add(name: str, cls: type[Objective]) -> None:
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"Objective name {name!r} must be letters, digits and underscores.")
    if not issubclass(cls, Objective):
        raise ValueError(f"{cls.__name__} must be a subclass of deft_plugin.Objective.")
    reserved = [field.name for field in _fields(cls) if field.name in RESERVED_PARAMETERS]
    if reserved:
        raise ValueError(
            f"Objective {name!r} cannot have a parameter {reserved[0]!r}: trainers take that name for a "
            f"setting. Reserved: {', '.join(RESERVED_PARAMETERS)}."
        )
    present = _OBJECTIVES.get(name)
    # Running a notebook cell or a module again defines the same class again.
    if present is not None and (present.__module__, present.__qualname__) != (
        cls.__module__,
        cls.__qualname__,
    ):
        raise ValueError(
            f"Objective name {name!r} is taken by {present.__module__}.{present.__qualname__}."
        )
    cls.name = name
    _OBJECTIVES[name] = cls


def _fields(cls: type[Objective]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()


def _parameters_of(function: LossFunction) -> list[tuple[str, Any, Any]]:
    """Keyword-only arguments of `function` as dataclass fields."""
    signature = inspect.signature(function, eval_str=True)
    positional = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(positional) != 2:
        raise ValueError(
            f"{function.__name__}{signature} must take (log_p, statistics) and its parameters after "
            "a bare *."
        )
    fields = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            continue
        if parameter.kind is not parameter.KEYWORD_ONLY or parameter.default is parameter.empty:
            raise ValueError(
                f"Parameter {parameter.name!r} of {function.__name__} must be keyword-only and have "
                "a default."
            )
        annotated = parameter.annotation is not parameter.empty
        annotation = parameter.annotation if annotated else type(parameter.default)
        fields.append((parameter.name, annotation, dataclasses.field(default=parameter.default)))
    return fields


def _guess(name: str, choices: tuple[str, ...]) -> str:
    """A question that names the nearest of the choices, also where only the case differs; "" without one."""
    lowered = {choice.lower(): choice for choice in choices}
    # Letters in another order first: "dfet" is nearer to "dft" than to "deft" otherwise.
    reordered = [choice for choice in lowered if sorted(choice) == sorted(name.lower())]
    close = reordered or difflib.get_close_matches(name.lower(), lowered, n=1)
    return f" Did you mean {lowered[close[0]]!r}?" if close else ""
