"""The same optimizer steps on one process and on many, under each kind of data parallelism.

Every step has four micro-batches of unequal lengths and label counts, dealt to the ranks in turn. In the second
step the last rank has no label at all; in the third a single micro-batch has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from deft_plugin import add_gated_head

from ..head.oracle import Batch, make_batch
from ..tiny import tiny_model
from ..updates import trainable
from .deepspeed_files import STAGES, filled

STEPS = 4
MICRO_BATCHES = 4
# Gradients are clipped in some of the steps.
MAX_GRAD_NORM = 2.0
Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class Run:
    """A model and an objective to train it with.

    Args:
        model: "full", "tied" (embeddings and lm_head are one), "lora" (a frozen lm_head) or "lora-head" (an
            lm_head that trains beside the adapters).
        weighted: whether tokens have unequal weights beside their gates: upstream gradients that differ.
    """

    objective: str
    parameters: dict[str, Any] = field(default_factory=dict, hash=False)
    model: str = "full"
    weighted: bool = False


def make_model(kind: str) -> nn.Module:
    """A tiny Llama, the same on every rank."""
    model = tiny_model("llama", initializer_range=0.08, tie_word_embeddings=kind == "tied")
    if not kind.startswith("lora"):
        return model
    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        target_modules="all-linear",
        init_lora_weights=False,
        modules_to_save=["lm_head"] if kind == "lora-head" else None,
    )
    return get_peft_model(model, config)


def make_steps() -> list[list[Batch]]:
    """The micro-batches of every step."""
    batches = [
        [make_batch(length=8 + 2 * index, seed=4 * step + index) for index in range(MICRO_BATCHES)]
        for step in range(STEPS)
    ]
    for index in (1, 3):
        batches[1][index]["labels"].fill_(-100)
    batches[2][0]["labels"].fill_(-100)
    return batches


def label_count(micro_batches: Iterable[Batch]) -> int:
    """How many tokens are scored."""
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro_batches)


class OneProcess:
    """Plain PyTorch: what the others are compared with."""

    def __init__(self, model: nn.Module, learning_rate: float = 0.2) -> None:
        self.model = self.wrapped(model)
        parameters = [value for value in model.parameters() if value.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, learning_rate, momentum=0.9)

    def wrapped(self, model: nn.Module) -> nn.Module:
        return model

    def accumulate(self, batch: Batch, count: int, last: bool, weighted: bool = False) -> None:
        """Add the gradient of one micro-batch, of a step with `count` labels on all ranks."""
        # Data parallelism averages the ranks' gradients, and their sum is wanted.
        scale = distributed.get_world_size() if distributed.is_initialized() else 1
        with self.synchronised(last):
            output = self.model(**batch, num_items_in_batch=count)
            loss = output.loss
            if weighted:
                weights = torch.linspace(0, 2, output.token_loss.size(1))
                loss = (weights * output.token_loss).sum() / count
            self.backward(loss * scale)

    def synchronised(self, last: bool) -> Any:
        """A context for the micro-batches of a step."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        """Clip and update."""
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()


class DDP(OneProcess):
    def wrapped(self, model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model)

    def synchronised(self, last: bool) -> Any:
        return nullcontext() if last else self.model.no_sync()


class FSDP2(OneProcess):
    """As accelerate shards: the decoder layers, and all else with the root. (On a CPU it does not itself.)"""

    def wrapped(self, model: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        for module in [*model.modules()]:
            if type(module).__name__ == "LlamaDecoderLayer":
                fully_shard(module, mesh=mesh)
        return fully_shard(model, mesh=mesh)


class DeepSpeed(OneProcess):
    """DeepSpeed's engine with one of the repository's configurations."""

    file = ""
    # Instead of the file's own.
    zero_options: ClassVar[dict[str, Any]] = {}

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        import deepspeed

        config = filled(
            self.file,
            model,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=MICRO_BATCHES // distributed.get_world_size(),
            max_grad_norm=MAX_GRAD_NORM,
        ).config
        config["zero_optimization"].update(self.zero_options)
        self.model, *_ = deepspeed.initialize(
            model=model,
            optimizer=self.optimizer,
            config={**config, "zero_allow_untested_optimizer": True},
        )

    def backward(self, loss: Tensor) -> None:
        # As accelerate calls it: the loss is over the tokens of the whole step already.
        self.model.backward(loss, scale_wrt_gas=False)
        # Once per micro-batch: the engine counts them.
        self.model.step()

    def step(self) -> None:
        pass


KINDS: dict[str, type[OneProcess]] = {
    "ddp": DDP,
    "fsdp2": FSDP2,
    **{name: type(name, (DeepSpeed,), {"file": name}) for name in STAGES},
}


def train(run: Run, kind: type[OneProcess], rank: int = 0, world_size: int = 1) -> Parameters:
    """The parameters after all steps, of which this rank takes its share of micro-batches."""
    model = make_model(run.model)
    add_gated_head(model, run.objective, run.parameters)
    trainer = kind(model)
    for micro_batches in make_steps():
        count = label_count(micro_batches)
        own = micro_batches[rank::world_size]
        for index, batch in enumerate(own):
            trainer.accumulate(batch, count, index == len(own) - 1, run.weighted)
        trainer.step()
    return whole_parameters(model)


def whole_parameters(model: nn.Module) -> Parameters:
    """The parameters that train, gathered from all ranks."""
    parameters = list(model.parameters())
    gathered: Any = nullcontext()
    # ZeRO-3's are partitioned.
    if hasattr(parameters[0], "ds_id"):
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(parameters)
    with gathered:
        return {
            name: value.full_tensor() if isinstance(value, DTensor) else value.detach().clone()
            for name, value in trainable(model).items()
        }


def assert_same_parameters(actual: Parameters, expected: Parameters, run: Run) -> None:
    """To 1e-5. Training moves them by between 1e-3 and 0.5."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        difference = (actual[name] - value).abs().max().item()
        assert difference < 1e-5, f"{run}: {name} differs by {difference}"


Rank = Callable[[int], list[Parameters]]


def train_all(runs: list[Run], kind: str, world_size: int) -> Rank:
    """A function for `run_ranks` that trains one run after the other."""

    def on(rank: int) -> list[Parameters]:
        return [train(run, KINDS[kind], rank, world_size) for run in runs]

    return on
