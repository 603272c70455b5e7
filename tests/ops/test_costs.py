"""What is computed: matrix products a step, and no tensor of the logits' size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import deft_plugin
from deft_plugin.ops import tiles

from .cases import TILED_PATHS, gated, random_case

# A multiple of 8, so that products on a GPU are not split.
COUNT, VOCAB_SIZE, HIDDEN_SIZE = 32, 504, 4
LOW_RANK = ("low_rank_hidden", "low_rank_weight")


class Recorder(TorchDispatchMode):
    """Counts matrix products and keeps the size in bytes of the largest tensor that is none of `known`."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.products = 0
        self.multiplications = 0
        self.largest = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            left, right = (args if function.overloadpacket.__name__ == "mm" else args[1:])[:2]
            self.products += 1
            self.multiplications += left.numel() * right.size(1)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._known:
                    self.largest = max(self.largest, storage.nbytes())
        return result


@pytest.fixture
def _coupled_objective(own_objectives: None) -> None:
    @deft_plugin.objective("coupled")
    def coupled(log_p: Tensor, statistics: Any) -> Tensor:
        return -log_p * statistics.p / statistics.p.mean()


@pytest.mark.usefixtures("_coupled_objective")
@pytest.mark.parametrize("path", TILED_PATHS)
@pytest.mark.parametrize(
    ("name", "trainable", "products"),
    [
        ("deft", [], 1),
        ("deft", ["hidden"], 2),
        ("deft", ["weight"], 2),
        ("deft", ["hidden", "weight"], 3),
        ("cayley_trans", [], 1),
        ("cayley_trans", ["hidden"], 2),
        ("cayley_trans", ["hidden", "weight"], 4),
        ("coupled", ["hidden"], 2),
        ("coupled", ["hidden", "weight"], 4),
    ],
)
def test_matrix_products_a_step(
    path: str, name: str, trainable: Sequence[str], products: int
) -> None:
    case = random_case(COUNT, VOCAB_SIZE, hidden_size=HIDDEN_SIZE, trainable=trainable)
    with Recorder() as recorder:
        result = gated(path, case, name, tile_rows=COUNT)
        assert recorder.products == products
        if trainable:
            result.loss.backward()
    assert recorder.products == products, "backward only scales"


@pytest.mark.parametrize("path", TILED_PATHS)
@pytest.mark.parametrize(
    ("trainable", "weights", "products"),
    [
        (["hidden"], "different", 0),
        (["hidden", "weight"], "equal", 0),
        (["hidden", "weight"], "different", 2),
    ],
)
def test_matrix_products_of_a_backward_pass_through_token_losses(
    path: str, trainable: Sequence[str], weights: str, products: int
) -> None:
    case = random_case(COUNT, VOCAB_SIZE, hidden_size=HIDDEN_SIZE, trainable=trainable)
    token_loss = gated(path, case, "deft", tile_rows=COUNT).token_loss
    upstream = torch.full_like(token_loss, 0.5)
    if weights == "different":
        upstream[0] = 2
    with Recorder() as recorder:
        token_loss.backward(upstream)
    assert recorder.products == products


@pytest.mark.parametrize("path", TILED_PATHS)
@pytest.mark.parametrize(
    ("name", "trainable", "weights", "whole", "narrow"),
    [
        ("deft", [], None, 1, 1),
        ("deft", LOW_RANK, None, 1, 3),
        ("deft", ["hidden", *LOW_RANK], None, 2, 3),
        ("deft", ["hidden", *LOW_RANK], "equal", 2, 3),
        # The logits again, and the narrow gradient.
        ("deft", ["hidden", *LOW_RANK], "different", 3, 5),
        ("deft", ["hidden", "weight", *LOW_RANK], None, 3, 3),
        ("deft", ["hidden", "weight", *LOW_RANK], "different", 5, 5),
        ("cayley_trans", ["hidden", *LOW_RANK], None, 3, 4),
    ],
)
def test_a_low_rank_has_narrow_products_beside_the_weights(
    path: str, name: str, trainable: Sequence[str], weights: str | None, whole: int, narrow: int
) -> None:
    rank = 3
    case = random_case(COUNT, VOCAB_SIZE, hidden_size=64, rank=rank, trainable=trainable)
    with Recorder() as recorder:
        result = gated(path, case, name, tile_rows=5)
        if weights is not None:
            upstream = torch.full_like(result.token_loss, 0.5)
            upstream[0] += weights == "different"
            result.token_loss.backward(upstream)
        elif trainable:
            result.loss.backward()
    assert recorder.multiplications == COUNT * VOCAB_SIZE * (whole * 64 + narrow * rank)


@pytest.mark.parametrize("path", TILED_PATHS)
@pytest.mark.parametrize("name", ["deft", "cayley_trans"])
@pytest.mark.parametrize("weights", ["equal", "different"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_low_rank_on_a_frozen_weight_builds_nothing_of_its_size(
    path: str, name: str, weights: str, dtype: torch.dtype
) -> None:
    case = random_case(
        COUNT, VOCAB_SIZE, hidden_size=64, rank=2, dtype=dtype, trainable=["hidden", *LOW_RANK]
    )
    with Recorder(case.weight) as recorder:
        token_loss = gated(path, case, name, tile_rows=4).token_loss
        upstream = torch.ones_like(token_loss)
        upstream[0] += weights == "different"
        token_loss.backward(upstream)
    assert case.low_rank_weight is not None
    assert case.low_rank_weight.grad is not None
    assert recorder.largest < case.weight.nbytes / 3


VIEWS = (
    "slice",
    "select",
    "t",
    "transpose",
    "view",
    "unsqueeze",
    "squeeze",
    "detach",
    "alias",
    "split",
)


class Launches(TorchDispatchMode):
    """Counts the operations that launch a kernel on an accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name not in VIEWS and not name.startswith(("empty", "new_empty")):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("trainable", "masked_share", "most"),
    # The kernel that folds a tile, which is no operation of PyTorch's, comes on top. A trainable weight needs a tile's
    # gate before its product, about 35 operations on a number a token.
    [(["hidden"], 0.0, 2), (["hidden"], 0.3, 4), (["hidden", "weight"], 0.0, 40)],
)
@pytest.mark.parametrize("name", ["nll", "deft"])
def test_launches_a_tile(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    trainable: list[str],
    masked_share: float,
    most: int,
) -> None:
    monkeypatch.setattr(
        "deft_plugin.ops.triton_fold.triton_fold_", lambda *arguments, **options: None
    )
    monkeypatch.setattr("deft_plugin.ops.linear.resolve_path", lambda path, device: "triton")

    def launches(count: int) -> list[str]:
        """With tiles of 4 tokens."""
        case = random_case(count, 64, trainable=trainable, masked_share=masked_share)
        with Launches() as launched:
            gated("auto", case, name, with_entropy=True, tile_rows=4)
        return launched.names

    assert len(launches(4 * 20)) - len(launches(4 * 10)) <= 10 * most


@pytest.mark.parametrize("path", TILED_PATHS)
@pytest.mark.parametrize("name", ["deft", "cayley_trans", "eaft"])
def test_logits_are_never_there_as_a_whole(path: str, name: str) -> None:
    case = random_case(
        COUNT, VOCAB_SIZE, hidden_size=HIDDEN_SIZE, bias=True, softcap=5.0, masked_share=0.2
    )
    tile_rows = 4
    with Recorder() as recorder:
        gated(path, case, name, with_entropy=True, tile_rows=tile_rows).loss.backward()
    inputs = max(leaf.nbytes for leaf in case.leaves())
    # Triton's rows are padded to 64 logits.
    row_size = -(-VOCAB_SIZE // 64) * 64 if path == "triton" else VOCAB_SIZE
    assert recorder.largest == max(tile_rows * row_size * 8, inputs)
    assert recorder.largest < COUNT * VOCAB_SIZE * 8 / 4


def test_given_logits_are_not_copied_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    for budget in ("CPU_TILE_BYTES", "GPU_TILE_BYTES"):
        monkeypatch.setattr(tiles, budget, 0)
    case = random_case(COUNT, VOCAB_SIZE, hidden_size=HIDDEN_SIZE)
    logits = case.logits().detach().bfloat16().requires_grad_()
    with Recorder() as recorder:
        deft_plugin.gated_loss(logits, case.targets, with_entropy=True).loss.backward()
    assert recorder.largest == logits.nbytes


@pytest.mark.parametrize("count", [1, 17, 1000, 2048, 100_000])
@pytest.mark.parametrize("vocab_size", [2, 32_768, 262_144])
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_default_tiles_are_as_few_as_fit_the_buffer(
    count: int, vocab_size: int, trainable: bool, device: str
) -> None:
    rows = tiles.default_tile_rows(
        count, vocab_size, torch.float32, torch.device(device), trainable
    )
    budget = tiles.CPU_TILE_BYTES if device == "cpu" else tiles.GPU_TILE_BYTES
    most_rows = max(budget // (4 * vocab_size), tiles.SMALLEST_TILE_ROWS)
    if device == "cuda" and not trainable:
        most_rows = min(most_rows, tiles.FROZEN_TILE_ROWS)
    assert 1 <= rows <= most_rows
    assert -(-count // rows) == -(-count // most_rows)
    assert rows <= 128 or rows % 128 == 0 or rows in (count, most_rows) or device == "cpu"
