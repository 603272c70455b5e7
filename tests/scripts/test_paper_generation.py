"""The back ends: what is drawn follows from the question's seed and the options alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from tests.tiny import tiny_model, tiny_tokenizer

pytest.importorskip("typer", reason="needs the extra `paper`")
from paper.chat import load_tokenizer, prompt_ids, stop_ids
from paper.generation import Generator, Sampling, choose_backend, make_generator

HAS_VLLM = importlib.util.find_spec("vllm") is not None
BASE_MODEL = str(Path(__file__).parents[2] / "assets/base_model")
QUESTIONS = ["2?", "How many letters are in hello?", "Sort 3, 1, 2.", "abc"]
GREEDY = Sampling(samples=1, temperature=0.0, top_p=1.0, max_new_tokens=6)
# The tiny model is nearly certain of a few tokens.
DRAWN = Sampling(samples=4, temperature=4.0, top_p=1.0, max_new_tokens=6)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A tiny model whose own generation settings would change every answer."""
    model = tiny_model("llama")
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.01, top_k=1, top_p=0.1, repetition_penalty=3.0, max_new_tokens=1,
        eos_token_id=[5, 6, 7],
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def transformers(folder: str, sampling: Sampling, stop: list[int] | None = None) -> Generator:
    tokenizer = load_tokenizer(folder)
    stop = stop_ids(tokenizer) if stop is None else stop
    return make_generator("transformers", folder, None, tokenizer, stop, sampling, gpus=1)


def ids(folder: str, questions: list[str] = QUESTIONS) -> list[list[int]]:
    tokenizer = load_tokenizer(folder)
    return [prompt_ids(tokenizer, question) for question in questions]


def test_greedy_answers_are_the_likeliest_tokens(folder: str) -> None:
    answers = transformers(folder, GREEDY, stop=[2]).answers(ids(folder), seeds=[0] * 4)
    model, tokenizer = tiny_model("llama").eval(), load_tokenizer(folder)
    for prompt, (answer,) in zip(ids(folder), answers, strict=True):
        sequence = list(prompt)
        for _ in range(GREEDY.max_new_tokens):
            with torch.inference_mode():
                sequence.append(int(model(torch.tensor([sequence])).logits[0, -1].argmax()))
            if sequence[-1] == 2:
                break
        assert answer == tokenizer.decode(sequence[len(prompt) :], skip_special_tokens=True)


def test_greedy_answers_do_not_depend_on_the_batch(folder: str) -> None:
    generator = transformers(folder, GREEDY)
    together = generator.answers(ids(folder), [0] * 4)
    assert together == [generator.answers([prompt], [0])[0] for prompt in ids(folder)]


def test_drawn_answers_follow_from_the_questions_seed(folder: str) -> None:
    generator = transformers(folder, DRAWN)
    together = generator.answers(ids(folder), [1, 2, 3, 4])
    assert [len(answers) for answers in together] == [4] * 4
    assert len({answer for answers in together for answer in answers}) > 8
    assert generator.answers(ids(folder)[2:], [3, 4]) == together[2:]
    assert generator.answers(ids(folder)[2:], [4, 3]) != together[2:]


def test_all_tokens_can_be_drawn_whatever_the_models_own_settings(folder: str) -> None:
    hot = Sampling(samples=400, temperature=100.0, top_p=1.0, max_new_tokens=1)
    (answers,) = transformers(folder, hot, stop=[]).answers(ids(folder)[:1], [0])
    # transformers' own default would be the 50 likeliest.
    assert len(set(answers)) > 80


def test_a_colder_temperature_is_nearer_to_greedy(folder: str) -> None:
    cold = Sampling(samples=8, temperature=1e-3, top_p=1.0, max_new_tokens=6)
    greedy = transformers(folder, GREEDY).answers(ids(folder), [0] * 4)
    for answers, (likeliest,) in zip(
        transformers(folder, cold).answers(ids(folder), [1, 2, 3, 4]), greedy, strict=True
    ):
        assert set(answers) == {likeliest}


def test_an_answer_ends_at_a_stop_token(folder: str) -> None:
    """The likeliest next token of the first answer, as one to stop at."""
    long = transformers(folder, GREEDY, stop=[]).answers(ids(folder)[:1], [0])[0][0]
    third = load_tokenizer(folder).convert_tokens_to_ids(long[2])
    short = transformers(folder, GREEDY, stop=[third]).answers(ids(folder)[:1], [0])[0][0]
    assert short == long[: long.index(long[2]) + 1]


def test_several_greedy_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="samples=4 at temperature=0"):
        Sampling(samples=4, temperature=0.0, top_p=1.0, max_new_tokens=1)


def test_the_back_end_that_is_there_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("transformers") == "transformers"
    monkeypatch.setattr("paper.generation.find_spec", lambda _: None)
    assert choose_backend("auto") == "transformers"
    with pytest.raises(ValueError, match="--backend vllm needs the package"):
        choose_backend("vllm")
    monkeypatch.setattr("paper.generation.find_spec", lambda _: object())
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert choose_backend("auto") == "transformers"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert choose_backend("auto") == "vllm"


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_VLLM or not torch.cuda.is_available(), reason="needs vLLM and a GPU")
def test_vllm_gives_the_answers_of_transformers() -> None:
    tokenizer, prompts = load_tokenizer(BASE_MODEL), ids(BASE_MODEL)
    by_vllm, by_transformers = (
        make_generator(backend, BASE_MODEL, None, tokenizer, stop_ids(tokenizer), GREEDY, gpus=1)
        for backend in ("vllm", "transformers")
    )
    assert by_vllm.answers(prompts, [0] * 4) == by_transformers.answers(prompts, [0] * 4)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_VLLM or not torch.cuda.is_available(), reason="needs vLLM and a GPU")
def test_vllm_draws_by_the_questions_seed() -> None:
    tokenizer, prompts = load_tokenizer(BASE_MODEL), ids(BASE_MODEL)
    generator = make_generator("vllm", BASE_MODEL, None, tokenizer, stop_ids(tokenizer), DRAWN, 1)
    together = generator.answers(prompts, [1, 2, 3, 4])
    assert [len(answers) for answers in together] == [4] * 4
    assert generator.answers(prompts[:1], [1]) == together[:1]
