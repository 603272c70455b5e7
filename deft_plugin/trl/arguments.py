"""What `deft sft` is told, and what is wrong with it, seen before a model or a data set is loaded."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer

from ..metrics import METRICS, is_of_evaluations
from ..paths import NEEDED, TILDE, is_missing
from ..sizes import length_mistakes
from .config import objective_of

_TEMPLATES = (".jinja", ".j2")


class Arguments(NamedTuple):
    """What TRL's parser makes of the command line."""

    script: Any
    training: Any
    model: Any
    mixture: Any

    @property
    def data(self) -> str:
        """What the user has named the data with."""
        return (
            "datasets" if self.mixture.datasets else f"--dataset_name {self.script.dataset_name!r}"
        )


def check_arguments(arguments: Arguments) -> None:
    """Raise `ValueError` where there is no model, or something is wrong with what is given."""
    for mistake in find_mistakes(arguments):
        raise ValueError(mistake)
    if not arguments.model.model_name_or_path:
        raise ValueError(f"--model_name_or_path is missing. {NEEDED}")
    _check_chat_template(arguments.training.chat_template_path)


def find_mistakes(arguments: Arguments) -> Iterator[str]:
    """What is wrong with what is given, a sentence each; nothing is loaded."""
    script, training = arguments.script, arguments.training
    for option, name in (
        ("--model_name_or_path", arguments.model.model_name_or_path),
        ("--dataset_name", script.dataset_name),
        ("--chat_template_path", training.chat_template_path),
        ("--dataset_train_split", script.dataset_train_split),
        ("--dataset_test_split", script.dataset_test_split),
        *((f"datasets[{i}].path", each.path) for i, each in enumerate(arguments.mixture.datasets)),
    ):
        may_be_none = not option.endswith("_split")
        if not isinstance(name, str) and not (name is None and may_be_none):
            yield f"{option} {name!r} is no text."
        elif name and name.startswith("~"):
            yield f"{option} {name!r}: {TILDE}."
    if isinstance(script.dataset_name, str) and Path(script.dataset_name).is_file():
        yield (
            f"--dataset_name {script.dataset_name!r} is a file. Name its folder; the file's name says the split, as train.jsonl "
            "does."
        )
    yield from length_mistakes("num_train_epochs", training.num_train_epochs, training.max_steps)
    if not 0 < training.learning_rate < math.inf:
        yield f"learning_rate={training.learning_rate!r} must be a finite number above 0: nothing would be trained."
    yield from _unknown_metric(training)
    if not script.dataset_name and not arguments.mixture.datasets:
        yield f"--dataset_name is missing. {NEEDED}"


def remedy_without_gpu(error: BaseException, *, in_yaml: bool) -> str:
    """What transformers does not say: how to do without the GPU that TRL's default precision needs.

    Args:
        error: what the arguments are refused with.
        in_yaml: whether they stand in a YAML file.

    Returns:
        A sentence to put behind the error's; "" for another error.
    """
    if "bf16" not in str(error) or torch.cuda.is_available():
        return ""
    values = "`use_cpu: true` and `bf16: false`" if in_yaml else "--use_cpu True --bf16 False"
    return f" Without a GPU add {values}."


def _unknown_metric(training: Any) -> Iterator[str]:
    """A `metric_for_best_model` that no evaluation will have, since the command adds no metrics of the user's own."""
    is_known = is_of_evaluations(training.metric_for_best_model)
    if not is_known and training.eval_strategy != "no" and objective_of(training) is not None:
        yield (
            f"metric_for_best_model={training.metric_for_best_model!r} is no metric of an evaluation. Choices: loss, "
            f"{', '.join(METRICS)}."
        )


def _check_chat_template(name: str | None) -> None:
    """Look for the template where TRL does, which does so once the model is loaded."""
    if not name or (Path(name).is_file() and name.endswith(_TEMPLATES)):
        return
    why = "there is no such file or folder"
    if not is_missing(name):
        try:
            AutoTokenizer.from_pretrained(name).get_chat_template()
            return
        except (OSError, ValueError, KeyError) as error:
            said = textwrap.shorten(str(error), 160).rstrip(".")
        is_here = Path(name).exists()
        why = said if is_here else f"{why} here, and from the hub it cannot be had ({said})"
    raise ValueError(
        f"--chat_template_path {name!r}: {why}. Expected: a Jinja file ({', '.join(_TEMPLATES)}), or a folder or name on the "
        "hub with a tokenizer that has a chat template."
    )
