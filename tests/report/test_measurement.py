"""What is measured of each token, against full logits in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from deft_plugin import build_objective
from deft_plugin.report import measurement
from deft_plugin.report.measurement import (
    TokenTable,
    check_vocabulary,
    measure,
    statistics_of_logits,
)
from deft_plugin.report.rows import IGNORED, Row
from tests.tiny import VOCAB_SIZE, tiny_model


def make_rows(lengths: tuple[int, ...] = (9, 3, 17, 2, 12)) -> list[Row]:
    """Rows of random tokens whose first third is a prompt."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(5, VOCAB_SIZE, (length,), generator=generator).tolist()
        prompt = max(length // 3, 1)
        rows.append(Row(number, ids, [IGNORED] * prompt + ids[prompt:]))
    return rows


@torch.no_grad()
def expected(model: PreTrainedModel, rows: list[Row]) -> dict[str, Tensor]:
    """The definitions, a row at a time."""
    columns: dict[str, list[Any]] = {
        name: []
        for name in ("log_p", "collision", "entropy", "error_norm", "rank", "choice", "choice_p")
    }
    for row in rows:
        logits = model(torch.tensor([row.input_ids])).logits[0].double()
        for at in row.scored:
            p = logits[at - 1].softmax(0)
            target = row.labels[at]
            one_hot = torch.nn.functional.one_hot(torch.tensor(target), len(p))
            columns["log_p"].append(logits[at - 1].log_softmax(0)[target].item())
            columns["collision"].append(p.square().sum().item())
            columns["entropy"].append(torch.special.entr(p).sum().item())
            columns["error_norm"].append((p - one_hot).norm().item())
            columns["rank"].append(int((p > p[target]).sum()) + 1)
            columns["choice"].append(int(p.argmax()))
            columns["choice_p"].append(p.max().item())
    return {name: torch.tensor(values) for name, values in columns.items()}


def columns_of(table: TokenTable) -> dict[str, Tensor]:
    return {
        "log_p": table.statistics.log_p,
        "collision": table.collision,
        "entropy": table.entropy,
        "error_norm": table.error_norm,
        "rank": table.rank,
        "choice": table.choice,
        "choice_p": table.choice_p,
    }


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite", "cohere", "mixtral"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_token_s_numbers_are_those_of_the_definition(
    architecture: str, batch_size: int
) -> None:
    model, rows = tiny_model(architecture).eval(), make_rows()
    table = measure(model, rows, batch_size=batch_size)
    for name, values in expected(model, rows).items():
        torch.testing.assert_close(
            columns_of(table)[name].double(), values.double(), rtol=2e-4, atol=1e-6, msg=name
        )
    places = [(row.number, at) for row in rows for at in row.scored]
    assert list(zip(table.row.tolist(), table.position.tolist(), strict=True)) == places


@pytest.mark.parametrize("most", [1, 4, 10**6])
def test_long_rows_are_measured_in_parts(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model("llama").eval(), make_rows()
    whole = columns_of(measure(model, rows, top_ks=[4]))
    monkeypatch.setattr(measurement, "LOGITS_BYTES", most * 4 * VOCAB_SIZE)
    monkeypatch.setattr(measurement, "FOLDED_BYTES", 2 * 4 * VOCAB_SIZE)
    largest = 0

    def watch(module: Any, inputs: Any, output: Tensor) -> None:
        nonlocal largest
        largest = max(largest, output.numel() // VOCAB_SIZE)

    model.lm_head.register_forward_hook(watch)
    done: list[int] = []
    in_parts = columns_of(measure(model, rows, top_ks=[4], advance=done.append))
    assert largest <= most
    assert sum(done) == len(rows)
    for name, values in whole.items():
        torch.testing.assert_close(in_parts[name], values, rtol=1e-4, atol=1e-6)


def test_a_model_that_takes_neither_a_mask_nor_positions() -> None:
    class Plain(LlamaForCausalLM):
        def forward(self, input_ids: Tensor) -> Any:  # type: ignore[override]
            return super().forward(input_ids=input_ids)

    model, rows = tiny_model("llama").eval(), make_rows()
    model.__class__ = Plain
    table = measure(model, rows, batch_size=2)
    log_p = expected(model, rows)["log_p"]
    torch.testing.assert_close(table.statistics.log_p, log_p, rtol=2e-4, atol=1e-6)


def test_a_certain_token_still_has_the_length_of_its_gradient() -> None:
    """C2 - 2 p + 1 itself would be 0 in float32, or less."""
    logits = torch.zeros(1, 50)
    logits[0, 7] = 20.0
    tokens = statistics_of_logits(logits, torch.tensor([7]))
    p = logits.double().softmax(1)
    p[0, 7] -= 1
    assert tokens.error_norm.item() == pytest.approx(p.norm().item(), rel=1e-5)
    assert 0 < tokens.error_norm.item() < 1e-6


def test_gates_are_the_objectives_own() -> None:
    table = measure(tiny_model("llama").eval(), make_rows(), top_ks=[20])
    p, c2 = table.p, table.collision
    assert torch.equal(table.gate(build_objective("nll")), torch.ones_like(p))
    torch.testing.assert_close(table.gate(build_objective("deft")), p**c2)
    # The mean of p in the floor is the table's.
    floor = 0.5 * p.mean()
    a = (floor + (1 - floor) * p / (2 - p)).clamp(min=0.001)
    torch.testing.assert_close(table.gate(build_objective("cayley_trans")), p**a)
    weight = table.top_k_entropies[20] / 3
    torch.testing.assert_close(table.gate(build_objective("eaft")), weight)


def test_a_damaged_model_and_unknown_tokens_are_refused() -> None:
    model, rows = tiny_model("llama").eval(), make_rows()
    large = [Row(0, [5, 6], [IGNORED, VOCAB_SIZE + 3])]
    with pytest.raises(ValueError, match=r"token 131, outside the model's vocabulary \[0, 128\)"):
        check_vocabulary(model, large)
    # Of a prompt too: a tokenizer may have more tokens than the model.
    with pytest.raises(ValueError, match=r"token 128, outside the model's vocabulary \[0, 128\)"):
        check_vocabulary(model, [Row(0, [VOCAB_SIZE, 6], [IGNORED, 6])])
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match=r"logits are NaN at .* of .* tokens"):
        measure(model, rows)
