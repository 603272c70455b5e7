"""Metrics are means over the tokens of a window and of all ranks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deft_plugin import GatedLoss, gated_loss, linear_gated_loss
from deft_plugin.metrics import METRICS, TokenMetrics
from tests.formula_metrics import formula_metrics

VOCAB_SIZE = 7


def micro_batch(valid: int, ignored: int, seed: int) -> tuple[Tensor, Tensor]:
    """Logits (1, n, V) and targets (1, n) with the ignored ones in front."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(1, ignored + valid, VOCAB_SIZE, generator=generator).double()
    targets = torch.randint(VOCAB_SIZE, (1, ignored + valid), generator=generator)
    targets[:, :ignored] = -100
    return logits, targets


def score(logits: Tensor, targets: Tensor, name: str = "deft") -> GatedLoss:
    return gated_loss(logits, targets, name, with_entropy=True)


def valid_tokens(*batches: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return (
        torch.cat([logits[targets != -100] for logits, targets in batches]),
        torch.cat([targets[targets != -100] for _, targets in batches]),
    )


@pytest.mark.parametrize("name", ["deft", "p", "eaft", "nll"])
def test_micro_batches_of_unequal_length_count_by_their_tokens(name: str) -> None:
    batches = [micro_batch(3, 5, seed=0), micro_batch(17, 1, seed=1), micro_batch(0, 4, seed=2)]
    metrics = TokenMetrics()
    for batch in batches:
        metrics.add(score(*batch, name))
    expected = formula_metrics(*valid_tokens(*batches), name)
    if name == "nll":
        expected["mean_focus"] = 0.0
    assert metrics.means() == pytest.approx(expected, abs=1e-9)


def test_log_has_the_documented_names() -> None:
    metrics = TokenMetrics()
    metrics.add(score(*micro_batch(3, 0, seed=0)))
    assert list(metrics.means()) == list(METRICS)


def test_only_the_first_rows_count_where_told_so() -> None:
    logits, targets = (
        torch.cat(parts)
        for parts in zip(*[micro_batch(4, 1, seed) for seed in (0, 1)], strict=True)
    )
    metrics = TokenMetrics()
    metrics.add(score(logits, targets), rows=1)
    metrics.add(score(logits, targets), rows=0)
    expected = formula_metrics(*valid_tokens((logits[:1], targets[:1])), "deft")
    assert metrics.means() == pytest.approx(expected, abs=1e-9)


def test_window_without_tokens_has_no_means() -> None:
    metrics = TokenMetrics()
    assert metrics.means() == {}
    metrics.add(score(*micro_batch(0, 4, seed=0)))
    assert metrics.means() == {}


def test_reset_starts_a_new_window() -> None:
    metrics = TokenMetrics()
    metrics.add(score(*micro_batch(3, 0, seed=0)))
    metrics.reset()
    batch = micro_batch(4, 0, seed=1)
    metrics.add(score(*batch))
    assert metrics.means() == pytest.approx(formula_metrics(*valid_tokens(batch), "deft"), abs=1e-9)


def test_gate_of_a_token_that_is_ignored_is_not_a_closed_one() -> None:
    logits = torch.tensor([[[0.0, 0.0], [0.0, 30.0], [0.0, 30.0]]])
    metrics = TokenMetrics()
    metrics.add(score(logits, torch.tensor([[-100, 0, 1]])))
    means = metrics.means()
    assert means["closed_gate_share"] == 0.5
    assert means["mean_token_accuracy"] == 0.5


def test_entropy_that_was_not_computed_and_a_focus_that_does_not_exist_are_left_out() -> None:
    metrics = TokenMetrics()
    metrics.add(gated_loss(*micro_batch(3, 0, seed=0), "eaft"))
    assert set(METRICS) - set(metrics.means()) == {"entropy", "mean_focus"}


def test_nan_and_overflow_are_shown() -> None:
    logits = torch.tensor([[[0.0, 1e4]]])
    metrics = TokenMetrics()
    metrics.add(score(logits, torch.tensor([[0]])))
    assert metrics.means()["perplexity"] == math.inf
    metrics.add(score(logits * torch.nan, torch.tensor([[0]])))
    means = metrics.means()
    assert math.isnan(means["nll"])
    assert math.isnan(means["perplexity"])


def test_half_precision_logits_are_counted_in_full() -> None:
    # 4097 is no bfloat16, and 1 / 3 of it no float16.
    logits = torch.zeros(1, 4097, 3, dtype=torch.bfloat16)
    metrics = TokenMetrics()
    metrics.add(score(logits, torch.zeros(1, 4097, dtype=torch.long)))
    assert metrics.means()["mean_target_probability"] == pytest.approx(1 / 3, rel=1e-6)


def _add_own_batches(rank: int, store: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    metrics = TokenMetrics()
    # The ranks' numbers of micro-batches and of tokens differ.
    batches = [micro_batch(3, 2, seed=0)], [micro_batch(11, 0, seed=1), micro_batch(2, 0, seed=2)]
    for batch in batches[rank]:
        metrics.add(score(*batch))
    expected = formula_metrics(*valid_tokens(*batches[0], *batches[1]), "deft")
    assert metrics.means() == pytest.approx(expected, abs=1e-9)
    # A rank whose window is empty takes part.
    metrics.reset()
    if rank == 0:
        metrics.add(score(*batches[0][0]))
    expected = formula_metrics(*valid_tokens(batches[0][0]), "deft")
    assert metrics.means() == pytest.approx(expected, abs=1e-9)
    # Tokens that both ranks score count once.
    metrics = TokenMetrics(histograms=True)
    metrics.add(score(*batches[0][0]))
    assert metrics.means(copies=2) == pytest.approx(expected, abs=1e-9)
    assert metrics.histograms["gate"].total == expected["scored_tokens"]
    torch.distributed.destroy_process_group()


def test_means_are_over_the_tokens_of_all_ranks(tmp_path: Path) -> None:
    arguments = (str(tmp_path / "store"),)
    torch.multiprocessing.start_processes(_add_own_batches, arguments, 2, start_method="fork")


def test_the_share_that_was_skipped_is_of_tokens_times_vocabulary() -> None:
    # Two tokens that are learnt, one that is not, and one that does not count.
    hidden = torch.tensor([[30.0, 0.0], [30.0, 0.0], [0.0, 0.0], [30.0, 0.0]])
    targets = torch.tensor([0, 0, 1, -100])
    gated = linear_gated_loss(
        hidden.requires_grad_(), torch.eye(2), targets, "nll", skip_below=2**-9
    )
    metrics = TokenMetrics()
    metrics.add(gated)
    assert metrics.means()["skipped_share"] == pytest.approx(2 / 3)


def test_passes_without_gradients_are_no_part_of_the_skipped_share() -> None:
    hidden = torch.tensor([[30.0, 0.0], [30.0, 0.0], [0.0, 0.0]])
    metrics = TokenMetrics()
    for requires_grad in (False, True, False):
        leaf = hidden.clone().requires_grad_(requires_grad)
        targets = torch.tensor([0, 0, 1])
        metrics.add(linear_gated_loss(leaf, torch.eye(2), targets, "nll", skip_below=2**-9))
    assert metrics.means()["skipped_share"] == pytest.approx(2 / 3)
