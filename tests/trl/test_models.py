"""Models as TRL takes them: by name, with adapters, with virtual tokens, in 4 bit, checkpointed, resumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from deft_plugin import gated_head_of
from tests.ops.formulas import formula_losses
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trl.running import LEARNING_RATE, as_dataset, config, make_trainer
from tests.updates import (
    assert_same_update,
    formula_mean,
    gradient_update,
    logged,
    make_rows,
    qwen3,
    trainable,
    update_of,
)

# A B that is not zero, so that A has a gradient too.
LORA = {"target_modules": "all-linear", "r": 4, "init_lora_weights": False}


def assert_step_is_that_of_the_formula(trainer: Any, tolerance: float = 1e-9) -> None:
    rows = list(trainer.train_dataset)
    model = reference(trainer.model)
    loss = formula_mean(model, rows, "deft")
    update = update_of(trainer.model, trainer.train)
    assert_same_update(update, gradient_update(model, loss, LEARNING_RATE), tolerance)
    assert logged(trainer, "loss") == [pytest.approx(loss.item(), rel=1e-6)]


def reference(model: PreTrainedModel) -> PreTrainedModel:
    """A copy without the gated head and whatever a trainer has set up for its steps."""
    model = copy.deepcopy(model)
    head = gated_head_of(model)
    assert head is not None
    head.remove()
    model.gradient_checkpointing_disable()
    return model


@pytest.fixture
def saved(tmp_path: Path) -> str:
    path = tmp_path / "base"
    tiny_model("qwen3", initializer_range=0.08).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora(tmp_path: Path, checkpointing: bool) -> None:
    args = config(tmp_path, gradient_checkpointing=checkpointing)
    trainer = make_trainer(args, make_rows(4), peft_config=LoraConfig(**LORA))
    assert all("lora_" in name for name in trainable(trainer.model))
    assert_step_is_that_of_the_formula(trainer)


def test_model_that_has_its_adapter_already(tmp_path: Path) -> None:
    model = get_peft_model(qwen3(), LoraConfig(**LORA, modules_to_save=["lm_head"]))
    trainer = make_trainer(config(tmp_path), make_rows(4), model)
    assert any("lm_head" in name for name in trainable(trainer.model))
    assert_step_is_that_of_the_formula(trainer)


@pytest.mark.parametrize("adapter", [{}, {"use_rslora": True, "lora_alpha": 3}], ids=str)
def test_lora_on_lm_head(tmp_path: Path, adapter: dict[str, Any]) -> None:
    lora = LoraConfig(**{**LORA, "target_modules": ["q_proj", "lm_head"], **adapter})
    trainer = make_trainer(config(tmp_path), make_rows(4), peft_config=lora)
    assert any("lm_head" in name for name in trainable(trainer.model))
    assert_step_is_that_of_the_formula(trainer)


@pytest.mark.parametrize("tied", [False, True])
def test_trainable_tokens(tmp_path: Path, tied: bool) -> None:
    model = tiny_model("llama", initializer_range=0.08, tie_word_embeddings=tied).double()
    indices = sorted({token for row in make_rows(4) for token in row["input_ids"]})[::3]
    lora = LoraConfig(**LORA, trainable_token_indices=indices)
    trainer = make_trainer(config(tmp_path), make_rows(4), model, peft_config=lora)
    assert any("trainable_tokens_delta" in name for name in trainable(trainer.model))
    assert_step_is_that_of_the_formula(trainer)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "adapter",
    [
        pytest.param(
            TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[5, 6, 7, 60]),
            marks=pytest.mark.skipif(
                Version(peft.__version__) < Version("0.21"), reason="it cannot be copied"
            ),
        ),
        LoraConfig(**{**LORA, "target_modules": ["embed_tokens"]}),
        LoraConfig(**LORA, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        LoraConfig(**LORA, modules_to_save=["embed_tokens", "lm_head"]),
    ],
    ids=["tokens", "lora", "whole and tied", "whole"],
)
def test_adapters_beside_the_lm_head(tmp_path: Path, adapter: PeftConfig, tied: bool) -> None:
    model = tiny_model("llama", initializer_range=0.08, tie_word_embeddings=tied).double()
    trainer = make_trainer(config(tmp_path), make_rows(4), model, peft_config=adapter)
    assert_step_is_that_of_the_formula(trainer)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"), reason="its own forward fails"
)
def test_router_coefficient_that_has_another_name(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 128}
    experts = {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "moe_loss_weight": 0.3}
    attention = {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}
    fields = {**sizes, "ffn_config": experts, "attn_config": attention, "initializer_range": 0.08}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("dbrx", vocab_size=128, tie_word_embeddings=False, **fields)
    ).double()
    assert_step_is_that_of_the_formula(make_trainer(config(tmp_path), make_rows(4), model))


def test_prompt_tuning(tmp_path: Path) -> None:
    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = make_trainer(config(tmp_path), make_rows(4), peft_config=virtual)
    # PEFT makes the virtual tokens in float32, and they move by less than a thousandth.
    assert_step_is_that_of_the_formula(trainer, tolerance=1e-3)


def test_prompt_tuning_of_rows_whose_first_token_has_a_label(tmp_path: Path) -> None:
    """It is predicted from the virtual tokens, and counts among those that the loss is divided by."""
    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    rows = [{**row, "labels": row["input_ids"]} for row in make_rows(4)]
    trainer = make_trainer(config(tmp_path), rows, peft_config=virtual)
    model = reference(trainer.model)
    losses = []
    for row in rows:
        tokens = torch.tensor(row["input_ids"])
        logits = model(input_ids=tokens[None]).logits[0, -len(tokens) - 1 : -1]
        losses.append(formula_losses(logits, tokens, "deft"))
    loss = torch.cat(losses).mean()
    update = update_of(trainer.model, trainer.train)
    assert_same_update(update, gradient_update(model, loss, LEARNING_RATE), tolerance=1e-3)
    assert logged(trainer, "loss") == [pytest.approx(loss.item(), rel=1e-6)]
    assert logged(trainer, "scored_tokens") == [sum(len(row["input_ids"]) for row in rows)]


def test_tied_embeddings(tmp_path: Path) -> None:
    model = tiny_model("llama", initializer_range=0.08, tie_word_embeddings=True).double()
    assert_step_is_that_of_the_formula(make_trainer(config(tmp_path), make_rows(4), model))


def test_reentrant_checkpointing(tmp_path: Path) -> None:
    args = config(
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )
    assert_step_is_that_of_the_formula(make_trainer(args, make_rows(4)))


def test_activation_offloading(tmp_path: Path) -> None:
    trainer = make_trainer(config(tmp_path), make_rows(4))
    # TRL's own context wants an accelerator; like it, this one moves saved tensors away and back.
    trainer.maybe_activation_offload_context = torch.autograd.graph.save_on_cpu()
    assert_step_is_that_of_the_formula(trainer)


def test_model_by_name_with_arguments_for_its_loading(tmp_path: Path, saved: str) -> None:
    args = config(
        tmp_path / "out",
        model_init_kwargs={"dtype": "float32", "attn_implementation": "eager", "revision": "main"},
    )
    trainer = make_trainer(
        args, make_rows(4), saved, processing_class=None, peft_config=LoraConfig(**LORA)
    )
    assert trainer.model.config._attn_implementation == "eager"
    assert_step_is_that_of_the_formula(trainer, tolerance=1e-5)


def test_trained_model_saves_loads_and_generates_as_its_own_class(tmp_path: Path) -> None:
    trainer = make_trainer(config(tmp_path), make_rows(4))
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.architectures == ["Qwen3ForCausalLM"]
    prompt = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(
        trainer.model.generate(prompt, **options), loaded.generate(prompt, **options)
    )


def test_resumed_training_ends_where_the_uninterrupted_one_does(tmp_path: Path) -> None:
    rows = make_rows(8)

    def run(output: str, resume: str | None = None) -> Any:
        args = config(
            tmp_path / output,
            per_device_train_batch_size=2,
            max_steps=4,
            optim="adamw_torch",
            learning_rate=0.01,
            save_strategy="steps",
            save_steps=2,
        )
        trainer = make_trainer(args, rows)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    resumed = run("resumed", str(tmp_path / "whole" / "checkpoint-2"))
    assert logged(resumed, "nll") == logged(whole, "nll")
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=1e-12)


def four_bit(saved: str) -> dict[str, Any]:
    """Arguments for a QLoRA run of the saved model."""
    return {
        "model": saved,
        "processing_class": None,
        "peft_config": LoraConfig(**LORA),
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
    }


def test_qlora_step_is_that_of_the_formula_on_the_4_bit_model(tmp_path: Path, saved: str) -> None:
    pytest.importorskip("bitsandbytes")
    args = config(tmp_path / "out", model_init_kwargs={"device_map": {"": "cpu"}})
    trainer = make_trainer(args, make_rows(4), **four_bit(saved))
    assert trainer.model.is_loaded_in_4bit
    # TRL trains adapters of 4-bit models in bfloat16: one rounding of a weight and of its gradient.
    for parameter in trainable(trainer.model).values():
        parameter.data = parameter.data.float()
    assert_step_is_that_of_the_formula(trainer, tolerance=1e-4)


def test_qlora_trains_the_same_with_and_without_an_evaluation_on_the_way(
    tmp_path: Path, saved: str
) -> None:
    pytest.importorskip("bitsandbytes")
    rows = make_rows(4)

    def run(**options: Any) -> Any:
        args = config(
            tmp_path / "out",
            max_steps=3,
            model_init_kwargs={"device_map": {"": "cpu"}},
            **options,
        )
        # TRL 1.9 makes the adapter before it sets the seed.
        torch.manual_seed(0)
        trainer = make_trainer(args, rows, **four_bit(saved), eval_dataset=as_dataset(rows))
        return trainer, update_of(trainer.model, trainer.train)

    without, expected = run()
    evaluated, update = run(eval_strategy="steps", eval_steps=1)
    assert len(logged(evaluated, "eval_nll")) == 3
    assert logged(evaluated, "nll") == logged(without, "nll")
    assert all(torch.equal(update[name], expected[name]) for name in expected)
    assert isinstance(evaluated.model, PeftModel)
