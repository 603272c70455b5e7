"""Everything that needs the model: rows are prepared, and one or two checkpoints are run over them."""

from __future__ import annotations

import gc
import textwrap
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from ..objectives import build_objective
from .causality import check_is_causal
from .checkpoint import (
    Checkpoint,
    check_same_vocabulary,
    checkpoint_after,
    checkpoint_with,
    load_tokenizer,
    trained_on_another,
)
from .context import check_context, note_on_context
from .data import in_trl_format, load_splits, split_of
from .measurement import TokenTable, check_vocabulary, measure
from .options import Options
from .output import writing_to
from .progress import Steps
from .rows import Sample, prepare_rows


@dataclass(frozen=True)
class Measured:
    """The rows, and what one or two checkpoints make of them."""

    tokenizer: PreTrainedTokenizerBase
    sample: Sample
    label: str
    before: TokenTable
    after_label: str | None
    after: TokenTable | None
    notes: list[str]


def measure_data(options: Options, names: list[str], steps: Steps) -> Measured:
    """Everything that needs the model."""
    assert options.model is not None
    assert options.data is not None
    first = checkpoint_with(options.model, options.adapter)
    second = None if options.after is None else checkpoint_after(options.model, options.after)
    tokenizer = load_tokenizer(options.model, options.chat_template)
    if second is not None:
        check_same_vocabulary(tokenizer, options.model, second)
    with steps("preparing rows", 1) as advance:
        splits = load_splits(options.data, options.config)
        data = split_of(splits, options.split, options.data)
        sample = prepare_rows(
            in_trl_format(data, options.data, options.columns),
            tokenizer,
            rows=options.rows,
            seed=options.seed,
            max_length=options.max_length or None,
            assistant_only=options.assistant_only,
            name=options.data,
        )
        advance(1)
    # Before a model is loaded, and after all else that can be wrong.
    with writing_to(options.output):
        (options.output / "figures").mkdir(parents=True, exist_ok=True)
    notes = [
        f"{checkpoint.adapter} was trained on {base}, as its adapter_config.json says, and is measured on "
        f"{checkpoint.model}. Unless they are the same model, what it makes of the data says nothing."
        for checkpoint in (first, second)
        if checkpoint is not None and (base := trained_on_another(checkpoint)) is not None
    ]
    before = _table_of(first, options, sample, names, notes, steps)
    after = None if second is None else _table_of(second, options, sample, names, notes, steps)
    after_label = None if second is None else second.label
    return Measured(tokenizer, sample, first.label, before, after_label, after, notes)


def _table_of(
    checkpoint: Checkpoint,
    options: Options,
    sample: Sample,
    names: list[str],
    notes: list[str],
    steps: Steps,
) -> TokenTable:
    """What a checkpoint makes of the rows; `notes` get what a reader has to know of it."""
    with steps(f"loading {checkpoint.label}", 1) as advance:
        model = options.placement.load(checkpoint)
        advance(1)
    if (note := note_on_context(model, sample.rows, checkpoint.label)) is not None:
        notes.append(note)
    top_ks = {build_objective(name).top_k for name in names}
    try:
        check_vocabulary(model, sample.rows)
        check_context(model, sample.rows)
        check_is_causal(model, sample.rows)
        with steps(f"measuring {checkpoint.label}", len(sample.rows)) as advance:
            return measure(
                model,
                sample.rows,
                batch_size=options.batch_size,
                top_ks=sorted(k for k in top_ks if k is not None),
                advance=advance,
            )
    except ValueError as error:
        raise ValueError(f"{checkpoint.option} {checkpoint.label!r}: {error}") from None
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{checkpoint.option} {checkpoint.label!r}: out of memory (--batch-size {options.batch_size}, --max-length "
            f"{options.max_length}; --dtype bfloat16, --four-bit): {textwrap.shorten(str(error), 120)}"
        ) from None
    finally:
        # A GPU need not hold the next checkpoint beside this one.
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
