"""The keys that the plugin adds to an Axolotl YAML, checked before data or model are loaded."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from axolotl.integrations.base import PluginManager
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from typing_extensions import Self

from ..objectives import objective_names
from ..objectives.registry import describe_parameters, objective_class
from ..ops import PATHS, CoreSettings
from ..parallelism import check_couples_no_parts
from ..sizes import length_mistakes, size_mistakes
from ..training import TrainingSettings, build_for_trainer, split_parameters
from .adjustments import DEFAULT_OBJECTIVE
from .conflicts import find_conflicts

INPUT_ARGS = f"{__name__}.DEFTArgs"
_SIZES = ("micro_batch_size", "gradient_accumulation_steps", "eval_batch_size", "sequence_len")


def is_listed(cfg: Mapping[str, Any]) -> bool:
    """Whether the plugin is in the configuration's own list, and not only in that of an earlier one.

    Raises:
        ValueError: it is there under two names, which Axolotl takes for two plugins.
    """
    plugins = PluginManager.get_instance().plugins
    listed = [name for name in dict.fromkeys(cfg.get("plugins") or ()) if name in plugins]
    names = [name for name in listed if plugins[name].get_input_args() == INPUT_ARGS]
    if len(names) > 1:
        raise ValueError(f"plugins: {', '.join(names)} are one plugin. List one of them.")
    return bool(names)


def _signatures() -> str:
    """Every objective with its parameters and their defaults."""
    return "; ".join(
        f"{name}({describe_parameters(objective_class(name))})" for name in objective_names()
    )


class DEFTSettings(BaseModel):
    """The `deft:` block: parameters of the objective, and settings of the gated head and of training."""

    # The other keys are the objective's parameters, which the objective checks itself.
    model_config = ConfigDict(extra="allow", strict=True)

    module: str | None = Field(
        default=None,
        description="Python module to import first: one that registers an objective of your own with "
        "`deft_plugin.objective`.",
    )
    path: str = Field(
        default="auto",
        # Whether "triton" runs is a matter of the machine that trains, which need not be the one that validates:
        # `deft doctor` and training itself say it.
        description=f"How the loss is computed: {', '.join(PATHS)}. 'auto' picks the fastest that runs.",
    )
    tile_rows: int | None = Field(
        default=None,
        gt=0,
        description="Tokens whose logits are held at a time. Left out: as many as fit a fixed buffer.",
    )

    skip_below: float = Field(
        default=0.0,
        description="Share of the gradient in the logits that the gradients' products may lose, for example "
        "0.002 (2^-9), so that they take fewer vocabulary entries and tokens. 0 leaves none out.",
    )
    histograms: bool = Field(
        default=False,
        description="Whether to write histograms of target probability, focus and gate, beside the log's means, to "
        "the run's reporters and to gate_histograms.jsonl in output_dir.",
    )

    @model_validator(mode="after")
    def _valid_settings(self) -> Self:
        self.split()
        return self

    def split(self) -> tuple[CoreSettings, TrainingSettings, dict[str, Any]]:
        """The core's settings, the training's, and the objective's parameters."""
        return split_parameters(self.model_dump(exclude={"module"}))


class DEFTArgs(BaseModel):
    """Mixed into Axolotl's own schema.

    Raises:
        pydantic.ValidationError: an unknown objective or parameter or one of the wrong type; a key that
            starts with `deft` and is none of these; a key of Axolotl's under which another objective would be trained, or
            nothing.
    """

    deft: DEFTSettings = Field(
        default_factory=DEFTSettings,
        description=f"Parameters of the objective, with defaults: {_signatures()}. Beside them: module, "
        "path, tile_rows, skip_below, histograms.",
    )
    # After the block, whose module may register it.
    deft_objective: str = Field(
        default=DEFAULT_OBJECTIVE,
        description=f"The training objective: {', '.join(objective_names())}, or one that "
        "`deft.module` registers.",
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_conflicts(cls, data: Any) -> Any:
        if not is_listed(data):
            return data
        _refuse([*_unknown_keys(data), *find_conflicts(data)])
        return data

    @model_validator(mode="after")
    def _trains_something(self) -> Self:
        # Axolotl's own keys, of which its schema has made numbers.
        values = {name: getattr(self, name, None) for name in (*_SIZES, "max_steps", "plugins")}
        if not is_listed(values):
            return self
        mistakes = [
            *size_mistakes({name: values[name] for name in _SIZES}, or_none=True),
            *length_mistakes("num_epochs", getattr(self, "num_epochs", 1), values["max_steps"]),
        ]
        _refuse(mistakes)
        return self

    @field_validator("deft", mode="before")
    @classmethod
    def _empty_block(cls, block: Any) -> Any:
        # `deft:` with nothing after it is None in YAML.
        return {} if block is None else block

    @field_validator("deft")
    @classmethod
    def _import_module(cls, settings: DEFTSettings) -> DEFTSettings:
        if settings.module is not None:
            try:
                importlib.import_module(settings.module)
            except Exception as error:
                raise ValueError(
                    f"module: {settings.module!r} cannot be imported ({type(error).__name__}: {error}). "
                    f'Try: python -c "import {settings.module}"'
                ) from error
        return settings

    @field_validator("deft_objective")
    @classmethod
    def _known_objective(cls, name: str) -> str:
        objective_class(name)
        return name

    @model_validator(mode="after")
    def _valid_parameters(self) -> Self:
        try:
            objective = build_for_trainer(
                self.deft_objective,
                self.deft.split()[2],
                heading="the block deft",
                others=("module",),
            )
        except ValueError as error:
            raise ValueError(f"deft: {error}") from None
        for key in ("context_parallel_size", "sequence_parallel_degree"):
            size = getattr(self, key, None) or 1
            if size > 1:
                check_couples_no_parts(objective, f"{key}: {size}")
        return self


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise ValueError("deft_plugin: " + "\n  ".join(problems))


def _unknown_keys(data: dict[str, Any]) -> list[str]:
    """Axolotl ignores keys that it does not know; a misspelt one of ours must not be."""
    known = tuple(DEFTArgs.model_fields)
    return [
        f"unknown key {key!r}. Did you mean "
        f"{difflib.get_close_matches(key.lower(), known, n=1, cutoff=0)[0]!r}? "
        f"Keys of deft_plugin: {', '.join(known)}."
        for key in data
        if str(key).lower().startswith("deft") and key not in known
    ]
