"""One step of SGD against the formula on full logits, for every trainer that an adapter serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from .ops.formulas import formula_losses
from .tiny import tiny_model

Rows = list[dict[str, list[int]]]
Update = dict[str, Tensor]


def qwen3() -> PreTrainedModel:
    """A tiny float64 Qwen3; its gates on random tokens are anything between 0 and 1."""
    return tiny_model("qwen3", initializer_range=0.08).double()


def make_rows(count: int, seed: int = 0, shortest: int = 6, longest: int = 20) -> Rows:
    """Rows of random ids and very unequal numbers of labels, the first at least one token in."""
    generator = torch.Generator().manual_seed(seed)

    def random(low: int, high: int, size: int = 1) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    rows = []
    for _ in range(count):
        (length,) = random(shortest, longest + 1)
        (prompt,) = random(1, length - 1)
        ids = random(5, 100, length)
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def label_logits(model: PreTrainedModel, rows: Rows) -> tuple[Tensor, Tensor]:
    """Logits (n, V) of every labelled position and its targets (n,).

    Row by row, so that nothing in it knows of padding, micro-batches or ranks.
    """
    logits, targets = [], []
    for row in rows:
        labels = torch.tensor(row["labels"][1:])
        scored = labels != -100
        # Prompt tuning's virtual tokens come first.
        own = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, -len(row["labels"]) :]
        logits.append(own[:-1][scored])
        targets.append(labels[scored])
    return torch.cat(logits), torch.cat(targets)


def formula_mean(model: PreTrainedModel, rows: Rows, name: str, **parameters: Any) -> Tensor:
    """The mean of an objective over the rows' labels."""
    return formula_losses(*label_logits(model, rows), name, **parameters).mean()


def gradient_update(model: nn.Module, loss: Tensor, learning_rate: float) -> Update:
    """What a step of SGD on `loss` does to each parameter that trains."""
    names, parameters = zip(*trainable(model).items(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    return {
        name: -learning_rate * gradient for name, gradient in zip(names, gradients, strict=True)
    }


def update_of(model: nn.Module, step: Callable[[], object]) -> Update:
    """How far each parameter that trains is moved by `step`."""
    before = {name: value.detach().clone() for name, value in trainable(model).items()}
    step()
    return {name: value.detach() - before[name] for name, value in trainable(model).items()}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def assert_same_update(actual: Update, expected: Update, tolerance: float) -> None:
    """Compare updates; `tolerance` is relative to the largest entry of all."""
    assert actual.keys() == expected.keys()
    scale = max(value.abs().max().item() for value in expected.values())
    assert scale > 0
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=tolerance * scale, msg=name)


def logged(trainer: Any, name: str) -> list[float]:
    """The values of `name` in the trainer's log, in order."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class StopAtStep(TrainerCallback):
    """Ends a training between two checkpoints."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt
