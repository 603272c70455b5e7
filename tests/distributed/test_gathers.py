"""What is sent for the lm_head: it is gathered once a forward pass, not once a tile, and let go of again."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from deft_plugin import add_gated_head

from .ranks import run_ranks
from .steps import FSDP2, DeepSpeed, OneProcess, label_count, make_model, make_steps

needs_deepspeed = pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed not installed")


class AllGathers(TorchDispatchMode):
    """The sizes of what all-gathers have filled, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if "c10d::_allgather_base_" in function.name():
            self.sizes.append(math.prod(args[0].shape))
        return function(*args, **(kwargs or {}))


class ZeRO3(DeepSpeed):
    """Stage 3 where parameters are let go of as early as DeepSpeed can."""

    file = "zero3"
    zero_options: ClassVar[dict[str, Any]] = {
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 0,
    }


@pytest.mark.parametrize("kind", [FSDP2, pytest.param(ZeRO3, marks=needs_deepspeed)])
def test_every_weight_is_gathered_once_for_all_tiles(
    kind: type[OneProcess], tmp_path: Path
) -> None:
    def on(rank: int) -> tuple[list[int], list[int]]:
        model = make_model("full")
        add_gated_head(model, tile_rows=1)
        trainer = kind(model)
        # The first step sets DeepSpeed and FSDP up.
        for batch, *_ in make_steps()[-2:]:
            forward, backward = AllGathers(), AllGathers()
            with forward:
                loss = trainer.model(**batch, num_items_in_batch=label_count([batch])).loss
            with backward:
                trainer.backward(loss)
        return forward.sizes, backward.sizes

    sizes = [parameter.numel() for parameter in make_model("full").parameters()]
    for forward, backward in run_ranks(on, tmp_path):
        assert sum(forward) == sum(sizes)
        assert sum(backward) <= sum(sizes)


@needs_deepspeed
@pytest.mark.parametrize("kind", ["full", "lora", "lora-head"])
def test_zero3_does_not_hold_the_lm_head_while_the_layers_run(kind: str, tmp_path: Path) -> None:
    def on(rank: int) -> list[str]:
        model = make_model(kind)
        add_gated_head(model)
        trainer = ZeRO3(model)
        weights = [value for name, value in model.named_parameters() if "lm_head" in name]
        held: list[str] = []

        def note(*_: Any) -> None:
            held.extend(weight.ds_status.name for weight in weights)

        layers = [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]
        for layer in layers:
            layer.register_forward_hook(note)
            layer.register_full_backward_hook(note)
        for batch, *_ in make_steps()[-2:]:
            loss = trainer.model(**batch).loss
            note()
            trainer.backward(loss)
        assert len(held) == 2 * (2 * len(layers) + 1) * len(weights)
        return held

    for held in run_ranks(on, tmp_path):
        assert set(held) == {"NOT_AVAILABLE"}
