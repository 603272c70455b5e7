"""One contestant of the benchmark of losses, and what it needs to run: packages, a GPU, a dtype, multiples."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .job import Job

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

# Modules whose package has another name.
PACKAGES = {
    "cut_cross_entropy": "cut-cross-entropy",
    "cutlass": "nvidia-cutlass-dsl",
    "liger_kernel": "liger-kernel",
    "quack": "quack-kernels",
}
HOPPER, BLACKWELL = (9, 0), (10, 0)


class UnavailableError(Exception):
    """A contestant cannot run here; the message says why."""


@dataclass(frozen=True)
class Machine:
    """What the losses run on.

    Attributes:
        device: "cpu" or "cuda".
        capability: compute capability of an NVIDIA GPU, None for anything else.
    """

    device: str
    capability: tuple[int, int] | None = None

    @classmethod
    def here(cls, device: str) -> Machine:
        """This machine's device of that type."""
        # ROCm numbers its cards in the same way, and an MI200 is a (9, 0) as well.
        if device == "cpu" or torch.version.hip:
            return cls(device)
        return cls(device, torch.cuda.get_device_capability())


@dataclass(frozen=True)
class Needs:
    """What a contestant needs.

    Attributes:
        modules: that have to be importable.
        gpu: whether it needs any GPU.
        capability: the only compute capability it has kernels for.
        least_capability: the lowest one, where later ones do as well.
        dtypes: that it computes in; empty for all.
        tokens_multiple, vocab_multiple, hidden_multiple: what N, V and H must be multiples of.
    """

    modules: tuple[str, ...] = ()
    gpu: bool = False
    capability: tuple[int, int] | None = None
    least_capability: tuple[int, int] | None = None
    dtypes: tuple[str, ...] = ()
    tokens_multiple: int = 1
    vocab_multiple: int = 1
    hidden_multiple: int = 1

    def unmet(self, machine: Machine, job: Job) -> str | None:
        """Why a contestant with these needs cannot run the job on the machine; None if it can."""
        return self._unfit_device(machine) or self._missing_package() or self._unfit_job(job)

    def _unfit_device(self, machine: Machine) -> str | None:
        wanted = self.capability or self.least_capability
        if machine.device == "cpu":
            return "it needs a GPU" if self.gpu or wanted else None
        if wanted is None:
            return None
        wanted_name = f"an NVIDIA GPU of compute capability {wanted[0]}.{wanted[1]}"
        if self.least_capability:
            wanted_name += " or higher"
        if machine.capability is None:
            return f"it needs {wanted_name}"
        fits = machine.capability == wanted if self.capability else machine.capability >= wanted
        have = f"{machine.capability[0]}.{machine.capability[1]}"
        return None if fits else f"it needs {wanted_name}; this one's is {have}"

    def _missing_package(self) -> str | None:
        for module in self.modules:
            if importlib.util.find_spec(module) is None:
                return f"{PACKAGES.get(module, module)} is not installed"
        return None

    def _unfit_job(self, job: Job) -> str | None:
        if self.dtypes and job.dtype not in self.dtypes:
            return f"it computes in {' or '.join(self.dtypes)}, not in {job.dtype}"
        for name, size, multiple in (
            ("a number of tokens", job.tokens, self.tokens_multiple),
            ("a vocabulary", job.vocab, self.vocab_multiple),
            ("a hidden size", job.hidden, self.hidden_multiple),
        ):
            if size % multiple:
                return f"it needs {name} that is a multiple of {multiple}; {size:,} is not"
        return None


@dataclass(frozen=True)
class Contestant:
    """One loss.

    Attributes:
        objective: what it computes: "nll", "deft", "cayley_trans", "dft"; "" for no loss.
        build: makes the loss, a function from (hidden, weight, targets) to a mean over the targets that are not
            -100; may raise `UnavailableError`.
        needs: without which `build` is not called.
        remark: what a reader of its figures has to know.
    """

    objective: str
    build: Callable[[], Loss]
    needs: Needs = Needs()
    remark: str = ""
