"""Nothing in a forward pass makes the host wait for the device, once the targets are counted.

Shown on tensors without data: whatever has to read one raises.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from deft_plugin import CountedTargets, add_gated_head, linear_gated_loss
from deft_plugin.ops import availability, products, triton_fold

from ..tiny import tiny_model
from .cases import random_case

COUNT, VOCAB_SIZE, HIDDEN_SIZE, VALID = 24, 96, 16, 10


def made_up_counts(monkeypatch: pytest.MonkeyPatch) -> list[CountedTargets]:
    """The counts that are read from now on, whose numbers are made up."""
    reads: list[CountedTargets] = []

    def read(self: CountedTargets) -> tuple[int, int, int]:
        reads.append(self)
        return VALID, 0, 1

    monkeypatch.setattr(CountedTargets, "read", read)
    return reads


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU that is not there would be asked for."""
    monkeypatch.setattr(products, "_accumulates_in_float32", lambda *_: True)
    monkeypatch.setattr(availability, "_obstacle", lambda device_type: None)
    monkeypatch.setattr(triton_fold, "triton_fold_", lambda *arguments, **options: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())


class Event:
    def record(self) -> None:
        pass


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this PyTorch knows no CUDA tensors")
@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("path", ["chunked", "triton"])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("objective", ["deft", "cayley_trans", "eaft"])
def test_the_core_reads_nothing(
    monkeypatch: pytest.MonkeyPatch, path: Any, trainable: bool, objective: str
) -> None:
    if trainable and path == "triton" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("before 2.13 tensors without data cannot be added to in float32")
    reads = made_up_counts(monkeypatch)
    with FakeTensorMode():
        options: Any = {"device": "cuda", "dtype": torch.bfloat16}
        hidden = torch.empty(COUNT, HIDDEN_SIZE, **options, requires_grad=True)
        weight = torch.empty(VOCAB_SIZE, HIDDEN_SIZE, **options, requires_grad=trainable)
        targets = torch.empty(COUNT, dtype=torch.long, device="cuda")
        result = linear_gated_loss(
            hidden,
            weight,
            CountedTargets.start(targets),
            objective,
            with_entropy=True,
            num_items_in_batch=torch.empty((), device="cuda"),
            path=path,
            tile_rows=4,
        )
        assert result.loss.requires_grad
        # So that this test would notice.
        with pytest.raises(DataDependentOutputException):
            result.loss.item()
    assert len(reads) == 1


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite"])
def test_a_models_forward_and_backward_read_nothing_but_the_count_from_before_the_backbone(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = tiny_model(name).train()
    add_gated_head(model, with_entropy=True)
    reads = made_up_counts(monkeypatch)
    started: list[bool] = []
    backbone_has_run: list[bool] = []
    model.base_model.register_forward_hook(lambda *_: backbone_has_run.append(True))
    start = CountedTargets.start.__func__  # type: ignore[attr-defined]

    def noted(cls: Any, *arguments: Any) -> CountedTargets:
        started.append(bool(backbone_has_run))
        return start(cls, *arguments)

    monkeypatch.setattr(CountedTargets, "start", classmethod(noted))
    with FakeTensorMode(allow_non_fake_inputs=True):
        ids = torch.ones(2, 12, dtype=torch.long)
        output = model(input_ids=ids, labels=ids, num_items_in_batch=torch.ones(()))
        output.loss.backward()
    assert len(reads) == 1
    assert started == [False]
    assert backbone_has_run == [True]


def test_targets_that_were_counted_give_the_same_loss() -> None:
    case = random_case(masked_share=0.3)
    options: Any = {"softcap": None}
    given = linear_gated_loss(case.hidden, case.weight, case.targets, **options)
    counted = linear_gated_loss(
        case.hidden, case.weight, CountedTargets.start(case.targets), **options
    )
    assert torch.equal(given.token_loss, counted.token_loss)
    with pytest.raises(
        ValueError, match="ignore_index is 7, and the targets were counted with -100"
    ):
        linear_gated_loss(
            case.hidden, case.weight, CountedTargets.start(case.targets), ignore_index=7
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("trainable", [False, True])
def test_the_core_does_not_wait_on_a_gpu(trainable: bool) -> None:
    hidden = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(512, 128, device="cuda", dtype=torch.bfloat16, requires_grad=trainable)
    targets = torch.randint(512, (64,), device="cuda")
    targets[:8] = -100
    linear_gated_loss(hidden, weight, targets).loss.backward()  # What is looked up once.
    counted = CountedTargets.start(targets)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_gated_loss(hidden, weight, counted).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
