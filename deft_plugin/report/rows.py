"""The rows that a trainer would train on: TRL's own SFTTrainer makes them.

Its template, its mask of what is trained on and its truncation are used by building one around a model of a
few hundred numbers, which preparing data does not look at, and reading what it has made of the data set.
"""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from jinja2 import TemplateError
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from .data import check_texts

IGNORED = -100
_NUMBER = "number_of_row"


@dataclass(frozen=True)
class Row:
    """A row of the data set as the model is trained on it.

    Args:
        number: of the row in its split, from 0.
        input_ids: the tokens.
        labels: the same, with `IGNORED` where a token is not trained on.
    """

    number: int
    input_ids: list[int]
    labels: list[int]

    @property
    def scored(self) -> list[int]:
        """Positions whose token is trained on. The first never is: nothing comes before it."""
        return [at for at, label in enumerate(self.labels) if at and label != IGNORED]


@dataclass(frozen=True)
class Sample:
    """Rows drawn from a data set.

    Args:
        rows: those with a token to train on.
        drawn: how many were drawn.
        available: how many the split has.
        unscored: numbers of the drawn rows without a token to train on.
    """

    rows: list[Row]
    drawn: int
    available: int
    unscored: list[int]

    @property
    def tokens(self) -> int:
        """How many tokens are trained on."""
        return sum(len(row.scored) for row in self.rows)


def draw_rows(data: Dataset, count: int, seed: int) -> Dataset:
    """`count` rows of the data set, or all, in its own order, with a column that numbers them."""
    chosen = np.random.default_rng(seed).permutation(len(data))[:count]
    numbers = sorted(int(number) for number in chosen)
    return data.select(numbers).add_column(_NUMBER, numbers)


def prepare_rows(
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: int,
    seed: int = 0,
    max_length: int | None = 1024,
    assistant_only: bool = False,
    name: str = "the data set",
) -> Sample:
    """A sample of a data set, as TRL would train on it without packing.

    Args:
        data: one split, in one of TRL's formats.
        tokenizer: the model's.
        rows: how many to draw.
        seed: draws them.
        max_length: `SFTConfig.max_length`, to which rows are cut; None for no cut.
        assistant_only: `SFTConfig.assistant_only_loss`.
        name: of the data set, for messages.

    Raises:
        ValueError: no rows, none with a token to train on, or something that TRL cannot prepare.
    """
    if not len(data):
        raise ValueError(f"--data {name!r} has no rows.")
    drawn = draw_rows(data, rows, seed)
    check_texts(drawn, name, drawn[_NUMBER])
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            max_length=max_length,
            assistant_only_loss=assistant_only,
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        try:
            trainer = SFTTrainer(
                model=_stand_in(),
                args=arguments,
                train_dataset=drawn,
                processing_class=tokenizer,
            )
        except (
            ValueError,
            TypeError,
            LookupError,
            RuntimeError,
            TemplateError,
        ) as error:
            if getattr(tokenizer, "chat_template", None) is None and "chat_template" in str(error):
                raise ValueError(
                    f"--data {name!r} is conversational, and the model's tokenizer has no chat template: name a "
                    "Jinja file with --chat-template."
                ) from None
            raise ValueError(
                f"--data {name!r} cannot be prepared by TRL: {textwrap.shorten(str(error), 300)}"
            ) from error
    prepared = [_row_of(trainer.data_collator, example) for example in trainer.train_dataset]
    found = [row for row in prepared if row.scored]
    if not found:
        within = "" if max_length is None else f" within --max-length {max_length}"
        raise ValueError(
            f"--data {name!r}: none of the {len(drawn)} rows drawn has a token to train on{within}."
        )
    unscored = sorted({*drawn[_NUMBER]} - {row.number for row in found})
    return Sample(found, len(drawn), len(data), unscored)


def _stand_in() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


def _row_of(collator: Any, example: dict[str, Any]) -> Row:
    # Through the collator, which has a say in the labels.
    batch = collator([{name: example[name] for name in ("input_ids", "labels")}])
    ids, labels = (_list(batch[name][0]) for name in ("input_ids", "labels"))
    return Row(example[_NUMBER], ids, labels)


def _list(tensor: Any) -> list[int]:
    values: Sequence[int] = tensor.tolist()
    return list(values)
