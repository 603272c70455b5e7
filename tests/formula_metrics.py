"""What the metrics of scored tokens have to be, from full logits and autograd."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from deft_plugin.histograms import EDGES

from .ops.formulas import formula_losses, shannon_entropy


def formula_tokens(logits: Tensor, targets: Tensor, name: str) -> dict[str, Tensor]:
    """Target probability, gate and, of the deformed-log family, focus of logits (n, V) and targets (n,), in float64."""
    logits = logits.detach().double().requires_grad_()
    (gradient,) = torch.autograd.grad(formula_losses(logits, targets, name).sum(), logits)
    tokens = torch.arange(len(targets))
    probabilities = logits.detach().softmax(1)
    p = probabilities[tokens, targets]
    # The gradient at the target is gate * (p - 1).
    values = {"target_probability": p, "gate": gradient[tokens, targets] / (p - 1)}
    if name == "deft":
        values["focus"] = probabilities.square().sum(1)
    if name == "p":
        values["focus"] = torch.ones_like(p)
    return values


def formula_counts(logits: Tensor, targets: Tensor, name: str) -> dict[str, tuple[int, ...]]:
    """numpy's histograms of `formula_tokens` between the package's edges."""
    values = formula_tokens(logits, targets, name)
    return {quantity: numpy_counts(values[quantity].numpy()) for quantity in values}


def numpy_counts(values: np.ndarray) -> tuple[int, ...]:
    """Numbers of values above each edge up to the next; numpy's own bins have their lower edge and not the upper."""
    upper = np.array((*EDGES[1:], np.inf))
    counts, _ = np.histogram(-values, [*-upper[::-1], np.inf])
    return tuple(counts[::-1].tolist())


def formula_metrics(logits: Tensor, targets: Tensor, name: str) -> dict[str, float]:
    """Every metric of logits (n, V) and targets (n,) by its name in the log, in float64."""
    logits = logits.detach().double()
    values = formula_tokens(logits, targets, name)
    p, gates = values["target_probability"], values["gate"]
    nll = -p.log().mean()
    metrics = {
        "scored_tokens": targets.new_tensor(len(targets)),
        "objective_loss": formula_losses(logits, targets, name).mean(),
        "nll": nll,
        "perplexity": nll.exp(),
        "entropy": shannon_entropy(logits.softmax(1)).mean(),
        "mean_token_accuracy": (logits.argmax(1) == targets).double().mean(),
        "mean_target_probability": p.mean(),
        "mean_gate": gates.mean(),
        "closed_gate_share": (gates < 0.1).double().mean(),
    }
    if "focus" in values:
        metrics["mean_focus"] = values["focus"].mean()
    return {name: value.item() for name, value in metrics.items()}
