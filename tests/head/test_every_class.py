"""The gated head on every causal LM and every multi-modal language model of the installed transformers.

`python -m tests.head.model_table docs/models.md` writes what comes of it into a table.
"""

from __future__ import annotations

import pytest

from .every_class import CLASSES, verdict_on


@pytest.mark.parametrize(
    ("model_type", "class_name"), CLASSES, ids=[f"{name}-{kind}" for kind, name in CLASSES]
)
def test_loss_and_gradients_are_the_classs_own_or_it_is_refused(
    model_type: str, class_name: str
) -> None:
    verdict_on(model_type, class_name)
