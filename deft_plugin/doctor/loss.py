"""The loss on the device that training would use, against its definition."""

from __future__ import annotations

from typing import Literal

import torch

from ..ops import linear_gated_loss
from ..ops.availability import resolve_path
from .finding import Finding


def device_here() -> torch.device:
    """The accelerator that can be used, or the CPU."""
    # PyTorch built for a GPU names it also where there is none.
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def path_problems(path: str, device: torch.device) -> list[str]:
    """What keeps the loss from being computed on this path here."""
    try:
        resolve_path(path, device)
    except ValueError as error:
        return [f"On this machine, {error}"]
    return []


def check_loss(device: torch.device) -> Finding:
    """The fused loss and its gradients on `device` against the definition on full logits."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(48, 32, generator=generator)
    weight = torch.randn(1000, 32, generator=generator)
    targets = torch.randint(1000, (48,), generator=generator)

    def run(path: Literal["auto", "reference"]) -> list[torch.Tensor]:
        inputs = [tensor.to(device, copy=True).requires_grad_() for tensor in (hidden, weight)]
        loss = linear_gated_loss(inputs[0], inputs[1], targets.to(device), "deft", path=path).loss
        return [loss, *torch.autograd.grad(loss, inputs)]

    try:
        for actual, expected in zip(run("auto"), run("reference"), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
    except Exception as error:
        return Finding("error", f"the loss differs from its definition on this device: {error}")
    return Finding("ok", "loss and gradients agree with the definition on full logits")
