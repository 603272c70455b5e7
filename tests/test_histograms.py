"""Histograms are numpy's of the tokens' values, and their counts are sums over a window and all ranks."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from deft_plugin import GatedLoss
from deft_plugin.histograms import EDGES, LINEAR_EDGES, POWERS_OF_TEN, QUANTITIES, Histogram
from deft_plugin.metrics import TokenMetrics
from tests.formula_metrics import formula_counts, numpy_counts
from tests.ops.test_costs import Launches
from tests.test_metrics import micro_batch, score, valid_tokens

Counts = dict[str, tuple[int, ...]]


def counts_of(metrics: TokenMetrics) -> Counts:
    metrics.means()
    return {name: histogram.counts for name, histogram in metrics.histograms.items()}


def counted(*passes: GatedLoss, rows: int | None = None) -> Counts:
    metrics = TokenMetrics(histograms=True)
    for gated in passes:
        metrics.add(gated, rows)
    return counts_of(metrics)


def gated_of(gate: Tensor, **values: Tensor) -> GatedLoss:
    """Tokens with these gates, and else of p = 1/2 and focus 1/3."""
    same = torch.ones_like(gate)
    gated = score(*micro_batch(1, 0, seed=0))
    fields = {
        "token_loss": same,
        "mask": same.bool(),
        "log_p": same * math.log(0.5),
        "focus": same / 3,
        "entropy": None,
        "is_top1": same.bool(),
    }
    return dataclasses.replace(gated, gate=gate, **{**fields, **values})


@pytest.mark.parametrize("name", ["deft", "p", "eaft", "dft"])
def test_counts_are_numpys_over_the_scored_tokens_of_all_micro_batches(name: str) -> None:
    batches = [micro_batch(30, 5, seed=0), micro_batch(170, 1, seed=1), micro_batch(0, 4, seed=2)]
    expected = formula_counts(*valid_tokens(*batches), name)
    assert counted(*(score(*batch, name) for batch in batches)) == expected
    assert ("focus" in expected) == (name in ("deft", "p"))
    assert {sum(counts) for counts in expected.values()} == {200}
    assert min(sum(count > 0 for count in expected[k]) for k in ("target_probability", "gate")) > 5


def test_counts_do_not_depend_on_the_split_into_micro_batches() -> None:
    logits, targets = (
        torch.cat(parts)
        for parts in zip(*[micro_batch(20, 3, seed) for seed in range(8)], strict=True)
    )
    splits = [8, 1], [2, 4], [1, 8]
    results = [
        [score(logits[i : i + rows], targets[i : i + rows]) for i in range(0, 8, rows)]
        for rows, _ in splits
    ]
    assert [len(passes) for passes in results] == [number for _, number in splits]
    first, *others = [counted(*passes) for passes in results]
    assert others == [first] * 2
    assert sum(first["gate"]) == 160


def test_only_the_first_rows_count_where_told_so() -> None:
    logits, targets = (
        torch.cat(parts)
        for parts in zip(*[micro_batch(40, 1, seed) for seed in (0, 1)], strict=True)
    )
    gated = score(logits, targets)
    assert counted(gated, rows=1) == formula_counts(
        *valid_tokens((logits[:1], targets[:1])), "deft"
    )
    assert counted(gated, rows=0) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_from_the_silenced_end_to_above_one_are_where_numpy_has_them(
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = 50 * torch.rand(3000, generator=generator, dtype=torch.float64) - 48
    gate = torch.cat((10**exponents, torch.rand(3000, generator=generator).double())).to(dtype)
    counts = counted(gated_of(gate))["gate"]
    assert counts == numpy_counts(gate.double().numpy())
    assert min(counts[0], counts[-1]) > 50
    assert all(counts)


def test_an_edge_belongs_to_the_bin_below_it() -> None:
    gate = torch.tensor([0.0, 1.0, 0.5, math.nextafter(0.5, 1), -1.0, 2.0], dtype=torch.float64)
    counts = counted(gated_of(gate))["gate"]
    bins = {edge: count for edge, count in zip(EDGES, counts, strict=True) if count}
    assert bins == {0.0: 2, 0.95: 1, 0.45: 1, 0.5: 1, 1.0: 1}


def test_tokens_without_a_number_are_in_no_bin() -> None:
    counts = counted(gated_of(torch.tensor([0.3, math.nan, 0.7])))
    assert {name: sum(values) for name, values in counts.items()} == {
        "target_probability": 3,
        "focus": 3,
        "gate": 2,
    }


def test_without_being_asked_for_and_without_tokens_there_are_none() -> None:
    metrics = TokenMetrics()
    metrics.add(score(*micro_batch(3, 0, seed=0)))
    assert metrics.means()
    assert metrics.histograms == {}
    assert counted() == {}
    assert counted(score(*micro_batch(0, 4, seed=0))) == {}


def test_a_new_window_starts_from_nothing() -> None:
    metrics = TokenMetrics(histograms=True)
    metrics.add(score(*micro_batch(30, 0, seed=0)))
    metrics.reset()
    batch = micro_batch(40, 0, seed=1)
    metrics.add(score(*batch))
    assert counts_of(metrics) == formula_counts(*valid_tokens(batch), "deft")
    metrics.reset()
    assert counts_of(metrics) == {}


def test_means_are_the_same_with_histograms() -> None:
    metrics, plain = TokenMetrics(histograms=True), TokenMetrics()
    for each in (metrics, plain):
        each.add(score(*micro_batch(30, 2, seed=0)))
    assert metrics.means() == plain.means()


def test_both_axes_are_numpys() -> None:
    values = np.concatenate(
        (10 ** np.random.default_rng(0).uniform(-30, 0, 1000), np.linspace(0.0013, 0.9987, 500))
    )
    histogram = Histogram(numpy_counts(values))
    for (edges, counts), expected in (
        (histogram.linear(), np.histogram(values, LINEAR_EDGES)),
        (histogram.log10(), np.histogram(np.log10(values).clip(-20.5), range(-21, 1))),
    ):
        np.testing.assert_array_equal(edges, expected[1])
        np.testing.assert_array_equal(counts, expected[0])
    assert {*LINEAR_EDGES, *POWERS_OF_TEN} == {*EDGES}


def test_values_above_one_have_a_bin_of_their_own_on_both_axes() -> None:
    histogram = Histogram(numpy_counts(np.array([0.97, 1.0, 1.2, 3.0])))
    assert [axis()[1][-2:] for axis in (histogram.linear, histogram.log10)] == [[2, 2], [2, 2]]
    assert [axis()[0][-2:] for axis in (histogram.linear, histogram.log10)] == [
        [1.0, 1.05],
        [0.0, 1.0],
    ]
    assert histogram.total == 4


def _count_own_batches(rank: int, store: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    metrics = TokenMetrics(histograms=True)
    batches = [micro_batch(30, 2, seed=0)], [micro_batch(11, 0, seed=1), micro_batch(20, 0, seed=2)]
    for batch in batches[rank]:
        metrics.add(score(*batch))
    expected = formula_counts(*valid_tokens(*batches[0], *batches[1]), "deft")
    assert counts_of(metrics) == expected
    # A rank whose window is empty takes part, also one that never had a batch.
    metrics.reset()
    empty = TokenMetrics(histograms=True)
    if rank == 0:
        metrics.add(score(*batches[0][0], "eaft"))
        empty.add(score(*batches[0][0], "eaft"))
    expected = formula_counts(*valid_tokens(batches[0][0]), "eaft")
    assert counts_of(metrics) == counts_of(empty) == expected
    torch.distributed.destroy_process_group()


def test_counts_are_those_of_all_ranks(tmp_path: Path) -> None:
    arguments = (str(tmp_path / "store"),)
    torch.multiprocessing.start_processes(_count_own_batches, arguments, 2, start_method="fork")


def test_one_collective_has_means_and_histograms(monkeypatch: pytest.MonkeyPatch) -> None:
    reduced: list[Tensor] = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", reduced.append)
    metrics = TokenMetrics(histograms=True)
    metrics.add(score(*micro_batch(3, 0, seed=0)))
    assert metrics.means()
    assert len(reduced) == 1
    assert len(metrics.histograms) == len(QUANTITIES)


@pytest.mark.parametrize("name", ["deft", "eaft"])
def test_launches_a_micro_batch(name: str) -> None:
    def launches(metrics: TokenMetrics) -> list[str]:
        gated = score(*micro_batch(30, 2, seed=0), name)
        # What is done once, for the first micro-batch: the edges are brought to the device.
        metrics.add(gated)
        with Launches() as launched:
            metrics.add(gated)
        return launched.names

    plain, both = launches(TokenMetrics()), launches(TokenMetrics(histograms=True))
    for operation in plain:
        both.remove(operation)
    # p, the values side by side, the mask and its complement, the comparison, the sum, and the sums side by side.
    fill = ["full_like"] if name == "eaft" else []
    assert len(both) == 7 + len(fill), both


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this PyTorch knows no CUDA tensors")
def test_counting_reads_nothing_from_the_device() -> None:
    with FakeTensorMode():
        values: Any = torch.empty(2, 8, device="cuda")
        mask = torch.empty(2, 8, device="cuda", dtype=torch.bool)
        gated = GatedLoss(values.sum(), values, mask, values, values, values, values, mask)
        metrics = TokenMetrics(histograms=True)
        for rows in (None, 1):
            metrics.add(gated, rows)
        # So that this test would notice.
        with pytest.raises(DataDependentOutputException):
            metrics.means()
