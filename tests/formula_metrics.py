"""What the metrics of scored tokens have to be, from full logits and autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops.formulas import formula_losses, shannon_entropy


def formula_metrics(logits: Tensor, targets: Tensor, name: str) -> dict[str, float]:
    """Every metric of logits (n, V) and targets (n,) by its name in the log, in float64."""
    logits = logits.detach().double().requires_grad_()
    losses = formula_losses(logits, targets, name)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    tokens = torch.arange(len(targets))
    probabilities = logits.detach().softmax(1)
    p = probabilities[tokens, targets]
    # The gradient at the target is gate * (p - 1).
    gates = gradient[tokens, targets] / (p - 1)
    nll = -p.log().mean()
    metrics = {
        "objective_loss": losses.mean(),
        "nll": nll,
        "perplexity": nll.exp(),
        "entropy": shannon_entropy(probabilities).mean(),
        "mean_token_accuracy": (logits.argmax(1) == targets).double().mean(),
        "mean_target_probability": p.mean(),
        "mean_gate": gates.mean(),
        "closed_gate_share": (gates < 0.1).double().mean(),
    }
    if name == "deft":
        metrics["mean_focus"] = probabilities.square().sum(1).mean()
    if name == "p":
        metrics["mean_focus"] = torch.ones(())
    return {name: value.item() for name, value in metrics.items()}
