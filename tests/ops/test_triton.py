"""What is Triton's alone: the choice of the path, buffers full of NaN, large offsets, and the hot path on a GPU.

That the path equals the formula is tested with the others, in test_gradients.py and beside it. Without a GPU all of
it runs in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from typing import Any

import pytest
import torch

from deft_plugin import linear_gated_loss
from deft_plugin.ops import availability, tiles
from deft_plugin.ops.projection import LogitsTransform
from deft_plugin.ops.sums import StatisticsRequest, empty_sums

from .cases import (
    DEVICE,
    TILED_PATHS,
    gated,
    gradients,
    largest_error,
    random_case,
    relative_error,
    with_objectives,
)

runs = pytest.mark.skipif(
    "triton" not in TILED_PATHS, reason="neither a GPU nor TRITON_INTERPRET=1"
)
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU"),
]


@pytest.fixture(autouse=True)
def fresh_choice() -> Any:
    """Nothing is remembered of what an earlier test was told."""
    availability._tell_once.cache_clear()
    yield
    availability._tell_once.cache_clear()


@runs
@pytest.mark.parametrize("trainable", [["hidden"], ["hidden", "weight", "bias"]])
@with_objectives
def test_nothing_of_an_uninitialised_buffer_gets_into_a_result(
    monkeypatch: pytest.MonkeyPatch, name: str, parameters: dict[str, Any], trainable: list[str]
) -> None:
    case = random_case(7, 33, bias=True, masked_share=0.2, trainable=trainable)
    expected = gated("reference", case, name, parameters=parameters, with_entropy=True)
    expected_gradients = gradients(expected.loss, case)

    def poisoned(function: Any) -> Any:
        def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = function(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocate

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    result = gated("triton", case, name, parameters=parameters, with_entropy=True, tile_rows=3)
    actual_gradients = gradients(result.loss, case)
    assert relative_error(result.token_loss, expected.token_loss) < 1e-10
    assert result.entropy is not None
    assert expected.entropy is not None
    assert relative_error(result.entropy, expected.entropy) < 1e-10
    assert largest_error(actual_gradients, expected_gradients) < 1e-10


@runs
@pytest.mark.parametrize("vocab_size", [16384, 16385, 40000])
def test_a_row_longer_than_the_kernels_block_is_folded_whole(vocab_size: int) -> None:
    case = random_case(4, vocab_size, softcap=12.0, bias=True)
    expected = gated("reference", case, "deft", with_entropy=True)
    result = gated("triton", case, "deft", with_entropy=True)
    assert relative_error(result.token_loss, expected.token_loss) < 1e-10
    assert result.entropy is not None
    assert expected.entropy is not None
    assert relative_error(result.entropy, expected.entropy) < 1e-10
    actual, exact = gradients(result.loss, case), gradients(expected.loss, case)
    assert largest_error(actual, exact) < 1e-10


@runs
def test_an_evaluation_writes_no_error() -> None:
    from deft_plugin.ops.triton_fold import triton_fold_

    logits = torch.randn(3, 64, device=DEVICE)
    before = logits.clone()
    targets = torch.tensor([0, 7, 49], device=DEVICE)
    sums = empty_sums(3, logits.dtype, DEVICE)
    transform, request = LogitsTransform(), StatisticsRequest()
    triton_fold_(logits, 50, None, transform, targets, request, sums, write_error=False)
    assert torch.equal(logits, before)


@runs
def test_the_kernel_is_launched_with_the_logits_device_as_the_current_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from deft_plugin.ops import triton_fold

    current: list[torch.device] = []
    launched: list[Any] = []

    @contextlib.contextmanager
    def entered(device: torch.device) -> Any:
        current.append(device)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **kwargs: launched.append((grid, list(current)))

    monkeypatch.setattr(triton_fold, "current_device", entered)
    monkeypatch.setattr(triton_fold, "_fold_kernel", Kernel())
    logits = torch.zeros(3, 64, device=DEVICE)
    targets = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    sums = empty_sums(3, logits.dtype, DEVICE)
    transform, request = LogitsTransform(), StatisticsRequest()
    triton_fold.triton_fold_(logits, 50, None, transform, targets, request, sums)
    assert launched == [((3,), [logits.device])]


def test_a_cpu_takes_the_chunked_path_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert availability.resolve_path("auto", torch.device("cpu")) == "chunked"
    assert not caplog.records


def test_a_gpu_without_triton_says_once_why_it_runs_the_chunked_path(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(availability, "_obstacle", lambda device: "Triton cannot be imported.")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert availability.resolve_path("auto", torch.device("cuda")) == "chunked"
    assert [record.getMessage() for record in caplog.records] == [
        "Losses run on the chunked PyTorch path: Triton cannot be imported."
    ]
    monkeypatch.undo()


def test_triton_by_name_where_it_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"path='triton' cannot run: a tensor on 'cpu'.*'chunked'"):
        linear_gated_loss(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]), path="triton")


class TestOnAGPU:
    """The hot path: what an interpreter cannot show."""

    pytestmark = gpu

    def test_auto_is_triton(self) -> None:
        assert availability.resolve_path("auto", DEVICE) == "triton"

    def test_a_forward_synchronises_with_the_host_once_and_a_backward_never(self) -> None:
        case = random_case(300, 1000, dtype=torch.bfloat16, masked_share=0.3)
        gradients(gated("triton", case).loss, case)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                loss = gated("triton", case).loss
                forward = len(caught)
                gradients(loss, case)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert forward == 1, [str(warning.message) for warning in caught]
        assert len(caught) == 1, [str(warning.message) for warning in caught]

    def test_offsets_beyond_two_to_the_31(self) -> None:
        count, vocab_size = 8320, 262_144
        hidden = torch.randn(count, 8, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(vocab_size, 8, device=DEVICE, dtype=torch.bfloat16)
        targets = torch.randint(vocab_size, (count,), device=DEVICE)
        whole = linear_gated_loss(hidden, weight, targets, "deft", tile_rows=count)
        (gradient,) = torch.autograd.grad(whole.loss, hidden)
        tiled = linear_gated_loss(hidden, weight, targets, "deft", tile_rows=512)
        (expected,) = torch.autograd.grad(tiled.loss, hidden)
        assert torch.equal(whole.log_p, tiled.log_p)
        assert relative_error(gradient, expected) < 1e-2

    @pytest.mark.parametrize("frozen", [True, False])
    def test_peak_memory_is_the_buffer_and_the_gradients(self, frozen: bool) -> None:
        count, vocab_size, hidden_size = 65_536, 128_256, 1024
        hidden = torch.randn(
            count, hidden_size, device=DEVICE, dtype=torch.bfloat16, requires_grad=True
        )
        weight = torch.randn(vocab_size, hidden_size, device=DEVICE, dtype=torch.bfloat16)
        weight.div_(hidden_size**0.5).requires_grad_(not frozen)
        targets = torch.randint(vocab_size, (count,), device=DEVICE)
        linear_gated_loss(hidden[:256], weight, targets[:256]).loss.backward()
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_gated_loss(hidden, weight, targets).loss.backward()
        extra = torch.cuda.max_memory_allocated() - before
        allowed = hidden.numel() * 2 + 100 * 2**20
        # The weight's gradient in float32 beside its last conversion to bfloat16.
        allowed += (
            tiles.FROZEN_TILE_ROWS * vocab_size * 2
            if frozen
            else tiles.GPU_TILE_BYTES + weight.numel() * (4 + 2)
        )
        assert extra <= allowed
