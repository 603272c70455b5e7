"""`loss_type` and `loss_kwargs` on an SFTConfig class."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import trl
from trl.trainer import sft_trainer

from ..metrics import METRICS, is_best_smallest
from ..objectives import Objective, build_objective, objective_names
from ..ops import CoreSettings
from ..sizes import BATCH_SIZES, check_sizes
from ..training import (
    TrainingSettings,
    build_for_trainer,
    parse_parameters,
    split_parameters,
)

# TRL >= 1.15 scores with a fused head under "nll" and reads log-probabilities off the output. Before, it
# did so under "chunked_nll" and read the loss and sums.
HAS_FUSED_HEAD = hasattr(sft_trainer, "add_fused_lm_head")
# These names stay TRL's own. None is TRL 1.9's default; since 1.15 "chunked_nll" is an old name of "nll".
TRL_LOSS_TYPES = (None, "nll", "dft", "chunked_nll")
# Sizes that may be None.
_LENGTHS = ("max_length", "pad_to_multiple_of")
# Metrics that come with an objective, and not with TRL's own loss.
_OWN_METRICS = tuple(
    f"_{name}" for name in METRICS if name not in ("entropy", "mean_token_accuracy")
)

LOSS_KWARGS_HELP = (
    "Parameters of the objective given by `loss_type`, as a dict or JSON text, for example "
    '\'{"floor_coefficient": 0.5}\' with `loss_type="cayley_trans"`. For every objective also path, '
    "tile_rows and skip_below: how the loss is computed (see deft_plugin.linear_gated_loss), and histograms: "
    "true for histograms of probability, focus and gate beside the log's means."
)


def loss_types() -> tuple[str, ...]:
    """The names that `loss_type` accepts beside TRL's own."""
    return tuple(name for name in objective_names() if name not in TRL_LOSS_TYPES)


def objective_of(args: Any) -> Objective | None:
    """The objective that training arguments ask for; None where the loss is TRL's own.

    Raises:
        ValueError: an unknown `loss_type`, or parameters which it does not take.
    """
    name: Any = getattr(args, "loss_type", None)
    parameters = parse_parameters(getattr(args, "loss_kwargs", None))
    if name not in TRL_LOSS_TYPES:
        if name not in objective_names():
            own = ", ".join(repr(choice) for choice in TRL_LOSS_TYPES if choice)
            try:
                build_objective(name)
            except ValueError as error:
                raise ValueError(f"loss_type={name!r}: {error} TRL's own: {own}.") from None
        return build_for_trainer(name, split_parameters(parameters)[2])
    if parameters:
        raise ValueError(
            f"loss_kwargs={parameters!r} would be ignored: loss_type={name!r} is TRL's own loss and takes "
            f"no parameters. Loss types with parameters are among {', '.join(loss_types())}."
        )
    return None


def own_loss_of(args: Any) -> str:
    """The name of TRL's own loss that training arguments ask for, where they do: "nll" or "dft"."""
    return "dft" if args.loss_type == "dft" else "nll"


def settings_of(args: Any) -> tuple[CoreSettings, TrainingSettings]:
    """How training arguments want the objective to be computed, and what else of its training."""
    core, training, _ = split_parameters(parse_parameters(getattr(args, "loss_kwargs", None)))
    return core, training


def check_metric_for_best_model(args: Any) -> None:
    """Raise `ValueError` for one of this package's metrics with TRL's own loss, whose first evaluation lacks it."""
    metric = f"_{getattr(args, 'metric_for_best_model', None)}"
    if not metric.endswith(_OWN_METRICS) or args.eval_strategy == "no":
        return
    instead = (
        "loss_type='p', which has the gradient of 'dft'"
        if args.loss_type == "dft"
        else "loss_type='alpha', loss_kwargs={'a': 0}, which is 'nll'"
    )
    raise ValueError(
        f"metric_for_best_model={args.metric_for_best_model!r} comes with the objectives of deft_plugin, and "
        f"loss_type={args.loss_type!r} is TRL's own loss, without it. Set it to 'eval_loss', or keep it with {instead}."
    )


def extend_config_class(cls: type) -> Callable[[], None]:
    """Let `cls`, an SFTConfig class, take the objectives' names and `loss_kwargs`, in place.

    The command line's choices for `loss_type` are extended too, and both are checked when a
    configuration is made. Returns a function that undoes it all.
    """
    original_init: Any = cls.__init__  # type: ignore[misc]
    original_post_init: Any = cls.__post_init__  # type: ignore[attr-defined]
    original_fields = cls.__dataclass_fields__  # type: ignore[attr-defined]
    original_annotations = cls.__annotations__

    @functools.wraps(original_init)
    def __init__(self: Any, *args: Any, loss_kwargs: Any = None, **kwargs: Any) -> None:
        self.loss_kwargs = loss_kwargs
        original_init(self, *args, **kwargs)

    # Not in __init__, which a subclass that is a dataclass does not call.
    @functools.wraps(original_post_init)
    def __post_init__(self: Any) -> None:
        check_sizes(self, BATCH_SIZES, _LENGTHS)
        if self.loss_kwargs is not None:
            self.loss_kwargs = parse_parameters(self.loss_kwargs)
        if objective_of(self) is not None and self.greater_is_better is None:
            self.greater_is_better = False if is_best_smallest(self.metric_for_best_model) else None
        original_post_init(self)

    loss_kwargs: Any = dataclasses.field(default=None, metadata={"help": LOSS_KWARGS_HELP})
    loss_kwargs.name = "loss_kwargs"
    loss_kwargs.type = dict | str | None
    loss_kwargs._field_type = dataclasses._FIELD  # type: ignore[attr-defined]
    cls.__init__ = __init__  # type: ignore[misc]
    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    cls.loss_kwargs = None  # type: ignore[attr-defined]
    cls.__annotations__ = {**original_annotations, "loss_kwargs": loss_kwargs.type}
    # A new dict: a subclass shares its parent's.
    cls.__dataclass_fields__ = {  # type: ignore[attr-defined]
        **original_fields,
        "loss_type": _with_choices(original_fields["loss_type"]),
        "loss_kwargs": loss_kwargs,
    }

    def undo() -> None:
        cls.__init__ = original_init  # type: ignore[misc]
        cls.__post_init__ = original_post_init  # type: ignore[attr-defined]
        del cls.loss_kwargs  # type: ignore[attr-defined]
        cls.__annotations__ = original_annotations
        cls.__dataclass_fields__ = original_fields  # type: ignore[attr-defined]

    return undo


def _with_choices(field: dataclasses.Field[Any]) -> Any:
    """A copy of the `loss_type` field whose choices and help text hold the objectives' names."""
    extended: Any = dataclasses.field(default=field.default)
    for name in dataclasses.Field.__slots__:
        setattr(extended, name, getattr(field, name))
    metadata = dict(field.metadata)
    if "choices" in metadata:
        metadata["choices"] = [*metadata["choices"], *loss_types()]
    metadata["help"] = (
        f"{metadata.get('help', '')} With deft_plugin also: {', '.join(loss_types())}. Without one TRL's own 'nll' is trained."
    )
    extended.metadata = MappingProxyType(metadata)
    return extended


class SFTConfig(trl.SFTConfig):
    """`trl.SFTConfig` whose `loss_type` also takes the objectives' names.

    Args:
        loss_type: `"deft"`, `"cayley_trans"`, ... or one of TRL's own.
        loss_kwargs: the objective's parameters, a dict or JSON text.
    """


extend_config_class(SFTConfig)
