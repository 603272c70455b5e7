"""Whether a LoRA configuration puts an adapter on lm_head, seen before a model is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable


def targets_lm_head(target_modules: str | Iterable[str] | None) -> bool:
    """Whether PEFT's `target_modules` (or `target_parameters`) has the output layer of a causal LM.

    Args:
        target_modules: a list of names or ends of names, or a text, which PEFT takes as a regular
            expression on whole names unless it is "all-linear", which leaves the output layer out.
    """
    if isinstance(target_modules, str):
        if target_modules == "all-linear":
            return False
        try:
            return any(re.fullmatch(target_modules, name) for name in ("lm_head", "lm_head.weight"))
        except re.error as error:
            raise ValueError(
                f"target_modules={target_modules!r} is no regular expression: {error}. Give a list of names."
            ) from None
    if isinstance(target_modules, Iterable):
        return any("lm_head" in str(name).split(".") for name in target_modules)
    return False  # None, or what the trainer's own schema refuses.
