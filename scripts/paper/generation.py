"""Answers of a model to prompts, by vLLM or by transformers, under one interface.

A question's answers follow from its own seed, not from those before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

BACKENDS = ("auto", "vllm", "transformers")


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        samples: answers to a question.
        temperature: 0 takes the likeliest token each time.
        top_p: the smallest set of tokens with this probability is drawn from.
        max_new_tokens: an answer is cut there.
    """

    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int

    def __post_init__(self) -> None:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                f"samples={self.samples} at temperature=0 would be {self.samples} times the same answer: take a "
                "temperature above 0, or one sample."
            )


class Generator(Protocol):
    """What both back ends are."""

    def answers(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[list[str]]:
        """`samples` answers to each prompt, without special tokens; prompts are token ids."""


def choose_backend(name: str) -> str:
    """ "vllm" or "transformers"; for "auto" vLLM where it is installed and there is a GPU.

    Raises:
        ValueError: vLLM is asked for and not installed.
    """
    has_vllm = find_spec("vllm") is not None
    if name == "vllm" and not has_vllm:
        raise ValueError(
            "--backend vllm needs the package: pip install vllm, or --backend transformers."
        )
    if name != "auto":
        return name
    return "vllm" if has_vllm and torch.cuda.is_available() else "transformers"


def make_generator(
    backend: str,
    model: str,
    revision: str | None,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: list[int],
    sampling: Sampling,
    gpus: int,
) -> Generator:
    """The model, loaded by a back end of `BACKENDS` other than "auto"."""
    if backend == "vllm":
        return VLLM(model, revision, stop_ids, sampling, gpus)
    return Transformers(model, revision, tokenizer, stop_ids, sampling)


class Transformers:
    """On the GPU in bfloat16, or on the CPU in float32. Adapters of PEFT are loaded onto their base."""

    def __init__(
        self,
        model: str,
        revision: str | None,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: list[int],
        sampling: Sampling,
    ) -> None:
        on_gpu = torch.cuda.is_available()
        self.model = AutoModelForCausalLM.from_pretrained(
            model,
            revision=revision,
            dtype=torch.bfloat16 if on_gpu else torch.float32,
            device_map="auto" if on_gpu else {"": "cpu"},
        ).eval()
        # Its own settings, a temperature or a penalty, would fill in for what is not given.
        self.model.generation_config = GenerationConfig()
        self.tokenizer = tokenizer
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        self.config = GenerationConfig(
            do_sample=sampling.temperature > 0,
            num_return_sequences=sampling.samples,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=stop_ids,
            pad_token_id=tokenizer.pad_token_id,
            **(drawn if sampling.temperature > 0 else {}),
        )

    def answers(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[list[str]]:
        """See `Generator`."""
        if not self.config.do_sample:
            return [[text] for text in self._generate(prompts)]
        answers = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            torch.manual_seed(seed)
            answers.append(self._generate([prompt]))
        return answers

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[list[int]]) -> list[str]:
        inputs = self.tokenizer.pad(
            {"input_ids": list(prompts)}, padding_side="left", return_tensors="pt"
        ).to(self.model.device)
        output = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            generation_config=self.config,
        )
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        texts: list[str] = self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
        return texts


class VLLM:
    """On as many GPUs as asked for, in bfloat16."""

    def __init__(
        self, model: str, revision: str | None, stop_ids: list[int], sampling: Sampling, gpus: int
    ) -> None:
        from vllm import LLM

        if (Path(model) / "adapter_config.json").exists():
            raise ValueError(
                f"{model} is an adapter: merge it into its base model first, or take --backend transformers."
            )
        self.llm = LLM(
            model=model,
            revision=revision,
            tensor_parallel_size=gpus,
            dtype="bfloat16",
            # Not the model's own settings.
            generation_config="vllm",
        )
        self.stop_ids = stop_ids
        self.sampling = sampling

    def answers(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[list[str]]:
        """See `Generator`."""
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                n=self.sampling.samples,
                temperature=self.sampling.temperature,
                top_p=self.sampling.top_p,
                max_tokens=self.sampling.max_new_tokens,
                stop_token_ids=self.stop_ids,
                seed=seed,
            )
            for seed in seeds
        ]
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(requests, parameters, use_tqdm=False)
        return [[answer.text for answer in output.outputs] for output in outputs]
