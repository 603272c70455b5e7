"""TRL's SFTTrainer with the repository's DeepSpeed configurations does on two processes what it does on one.

The processes are started as torchrun starts them, and load the model as users do, by its name.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from packaging.version import Version
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from ..tiny import tiny_model, tiny_tokenizer
from .deepspeed_files import DIRECTORY
from .ranks import run_ranks
from .steps import Parameters, Run, assert_same_parameters

if not find_spec("trl") or not find_spec("deepspeed"):
    pytest.skip("TRL and DeepSpeed are needed", allow_module_level=True)

from .trl_runs import assert_same_log, make_trained, parameters_of, save_models

RUNS = [
    Run("deft"),
    Run("cayley_trans", {"scope": "fixed", "mean_probability": 0.3}),
    Run("cayley_trans", {"scope": "global"}),
    Run("cayley_trans", {"scope": "ema"}),
    Run("deft", model="tied"),
    Run("deft", model="lora"),
]


def on_two_ranks(function: Callable[[], Any], directory: Path, timeout: float = 300) -> list[Any]:
    """What the function returns on each of two ranks of DeepSpeed on a CPU."""

    def on(rank: int) -> Any:
        import deepspeed

        # Which transformers leaves out with use_cpu, and loading under ZeRO-3 needs.
        deepspeed.init_distributed(dist_backend="gloo")
        return function()

    return run_ranks(on, directory, timeout=timeout)


def distributed_options(file: str) -> dict[str, Any]:
    """What a run on two processes has instead of a batch of four."""
    return {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "deepspeed": str(DIRECTORY / f"{file}.json"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("file", ["zero1", "zero2", "zero3"])
def test_two_processes_have_the_log_and_the_parameters_of_one(file: str, tmp_path: Path) -> None:
    save_models(tmp_path)

    def train_all() -> list[tuple[list[dict[str, float]], Parameters]]:
        trainers = (make_trained(run, tmp_path, **distributed_options(file)) for run in RUNS)
        return [(t.state.log_history, parameters_of(t)) for t in trainers]

    ranks = on_two_ranks(train_all, tmp_path)
    for index, run in enumerate(RUNS):
        expected = make_trained(run, tmp_path, per_device_train_batch_size=4)
        for results in ranks:
            log, parameters = results[index]
            assert_same_log(log, expected.state.log_history)
            assert_same_parameters(parameters, parameters_of(expected), run)


@pytest.mark.slow
def test_with_offload_adamw_on_the_cpu_has_the_parameters_of_one(tmp_path: Path) -> None:
    save_models(tmp_path)
    run = Run("deft")
    # An epsilon with which AdamW does not make large updates of rounding errors.
    options = {"optim": "adamw_torch", "learning_rate": 0.01, "adam_epsilon": 1e-3}

    def trained() -> Parameters:
        trainer = make_trained(run, tmp_path, **distributed_options("zero3_offload"), **options)
        assert "CPUAdam" in repr(type(trainer.model_wrapped.optimizer.optimizer))
        return parameters_of(trainer)

    # DeepSpeed compiles its AdamW first.
    ranks = on_two_ranks(trained, tmp_path, timeout=500)
    expected = make_trained(run, tmp_path, per_device_train_batch_size=4, **options)
    for parameters in ranks:
        assert_same_parameters(parameters, parameters_of(expected), run)


@pytest.mark.slow
def test_adapters_of_a_4_bit_model_are_those_of_one_process(tmp_path: Path) -> None:
    save_models(tmp_path)
    run = Run("deft", model="lora")

    def options(device_map: Any) -> dict[str, Any]:
        four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        kwargs = {"dtype": "float32", "device_map": device_map, "quantization_config": four_bit}
        return {"model_init_kwargs": kwargs, "eval_strategy": "no"}

    def train_all() -> list[Parameters]:
        zero2 = {**distributed_options("zero2"), **options({"": "cpu"})}
        zero3 = {**distributed_options("zero3"), **options(None)}
        return [parameters_of(make_trained(run, tmp_path, **each)) for each in (zero2, zero3)]

    (zero2, zero3), _ = on_two_ranks(train_all, tmp_path)
    alone = make_trained(run, tmp_path, per_device_train_batch_size=4, **options({"": "cpu"}))
    assert any(isinstance(module, Linear4bit) for module in alone.model.modules())
    for name, expected in parameters_of(alone).items():
        for actual in (zero2[name], zero3[name]):
            # TRL trains them in bfloat16; what the steps have rounded differs in the last place.
            assert actual.dtype == expected.dtype == torch.bfloat16
            torch.testing.assert_close(actual, expected, rtol=2**-7, atol=1e-3, msg=name)


needs_transformers_5_20 = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"),
    reason="its configuration refuses its own default",
)
UNLIKE_LLAMA = {
    # A dense layer and a norm between backbone and lm_head; another softcap; another backbone.
    "modernbert-decoder": {"global_attn_every_n_layers": 1, "local_attention": 8},
    "recurrent_gemma": {
        "lru_width": 32,
        "attention_window_size": 8,
        "block_types": ["recurrent", "attention"],
        "logits_soft_cap": 5.0,
    },
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16, "dropout": 0.0},
}


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param("modernbert-decoder", marks=needs_transformers_5_20),
        "recurrent_gemma",
        "opt",
    ],
)
def test_zero3_trains_the_models_own_loss_whatever_its_forward_does(
    architecture: str, tmp_path: Path
) -> None:
    """The weights are partitioned while they are loaded: no rank could look at them beforehand."""
    model = tiny_model(architecture, initializer_range=0.2, **UNLIKE_LLAMA[architecture])
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    ids = torch.randint(5, 100, (4, 12), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids.tolist()]
    with torch.no_grad():
        own = model.eval()(input_ids=ids, labels=ids, use_cache=False).loss.item()

    def first_nll() -> float:
        from ..trl.running import config, make_trainer

        options = {**distributed_options("zero3"), "gradient_checkpointing": False}
        args = config(
            tmp_path,
            model_init_kwargs={"dtype": "float32", "device_map": None},
            train_sampling_strategy="sequential",
            **options,
        )
        trainer = make_trainer(args, rows, str(tmp_path / "model"))
        trainer.train()
        return trainer.state.log_history[0]["nll"]

    for nll in on_two_ranks(first_nll, tmp_path):
        assert nll == pytest.approx(own, rel=1e-4)


def test_zero3_saves_the_whole_model_in_its_own_class(tmp_path: Path) -> None:
    save_models(tmp_path)

    def trained() -> Parameters:
        trainer = make_trained(Run("deft"), tmp_path, **distributed_options("zero3"))
        trainer.save_model(str(tmp_path / "saved"))
        return parameters_of(trainer)

    parameters, _ = on_two_ranks(trained, tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(saved) is LlamaForCausalLM
    assert saved.config.architectures == ["LlamaForCausalLM"]
    for name, value in saved.named_parameters():
        assert torch.equal(value, parameters[name]), name
