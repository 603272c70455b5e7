"""What would keep the objective from being what trains is refused before data or weights are touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from accelerate.parallelism_config import ParallelismConfig
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import LabelSmoother

from deft_plugin.trl import SFTTrainer
from deft_plugin.trl.config import HAS_FUSED_HEAD
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trl.running import config, make_trainer
from tests.updates import make_rows, qwen3, update_of


class Untouchable:
    """A data set that fails a test as soon as it is looked at."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"the data set's {name} was asked for")


def refuse(
    args: Any, message: str, model: PreTrainedModel | str | None = None, **arguments: Any
) -> None:
    """Assert that the trainer cannot be made, with a message, and has not come to the data."""
    arguments.setdefault("processing_class", tiny_tokenizer())
    with pytest.raises(ValueError, match=message):
        SFTTrainer(
            model=qwen3() if model is None else model,
            args=args,
            train_dataset=Untouchable(),  # type: ignore[arg-type]
            **arguments,
        )


def test_unknown_loss_type_in_a_config_that_does_not_check_it(tmp_path: Path) -> None:
    args = config(tmp_path, trl.SFTConfig, loss_type="nll")
    args.loss_type = "deftt"
    refuse(args, r"(?s)'deftt'.*deft.*TRL's own: 'nll'")


def test_unknown_parameter_in_a_config_that_does_not_check_it(tmp_path: Path) -> None:
    args = config(tmp_path)
    args.loss_kwargs = {"a": 0.5}
    refuse(args, "'deft'.*'a'")


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            LoraConfig(target_modules=["q_proj", "lm_head"], use_dora=True),
            r"target_modules=.*lm_head.* puts DoRA on lm_head",
        ),
        (
            LoraConfig(target_modules=r".*(q_proj|lm_head)", use_dora=True),
            r"target_modules=.*lm_head.* puts DoRA on lm_head",
        ),
        (
            LoraConfig(target_modules=["q_proj"], target_parameters=["lm_head.weight"]),
            r"target_parameters=\['lm_head.weight'\]",
        ),
        (IA3Config(target_modules=["lm_head"], feedforward_modules=[]), "puts IA3 on lm_head"),
    ],
)
def test_adapter_on_lm_head_that_is_not_plain_lora(
    tmp_path: Path, adapter: PeftConfig, message: str
) -> None:
    refuse(config(tmp_path), rf"{message}.*loss_type='deft'.*modules_to_save", peft_config=adapter)
    refuse(config(tmp_path), "lm_head.*modules_to_save", get_peft_model(qwen3(), adapter))


@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*(_proj|lm_head)", "exclude_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "use_dora": True},
    ],
    ids=str,
)
def test_adapter_elsewhere_is_welcome(tmp_path: Path, adapter: dict[str, Any]) -> None:
    trainer = make_trainer(config(tmp_path), make_rows(2), peft_config=LoraConfig(**adapter))
    update = update_of(trainer.model, trainer.train)
    assert all(change.abs().max() > 0 for name, change in update.items() if "lora_A" not in name)


def test_label_smoothing(tmp_path: Path) -> None:
    args = config(tmp_path, label_smoothing_factor=0.1)
    refuse(args, r"label_smoothing_factor=0.1.*loss_type='deft'.*Set it to 0")


def test_compute_loss_func(tmp_path: Path) -> None:
    refuse(
        config(tmp_path),
        r"compute_loss_func would replace loss_type='deft'.*deft_plugin\.objective",
        compute_loss_func=lambda *args, **kwargs: None,
    )


COUPLED = {"loss_type": "cayley_trans", "loss_kwargs": {"scope": "micro_batch"}}


@pytest.mark.parametrize("size", ["cp_size", "sp_size"])
def test_coupled_tokens_of_parts_of_sequences(tmp_path: Path, size: str) -> None:
    args = config(tmp_path, **COUPLED)
    args.parallelism_config = ParallelismConfig(**{size: 2})
    refuse(args, rf"parallelism_config\.{size}=2 .*scope='micro_batch'.*'ema' or 'global'")


@pytest.mark.parametrize("size", ["CP_SIZE", "SP_SIZE"])
def test_coupled_tokens_of_parts_of_sequences_by_accelerate_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    args = config(tmp_path, **COUPLED)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{size}", "2")
    refuse(args, rf"parallelism_config\.{size.lower()}=2 ")


def test_model_without_an_lm_head(tmp_path: Path) -> None:
    refuse(config(tmp_path), "lm_head", tiny_model("qwen2").model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: setattr(t.args, "label_smoothing_factor", 0.1), "label_smoothing_factor=0.1"),
        (
            lambda t: setattr(t, "label_smoother", LabelSmoother(0.1)),
            "label_smoother would replace",
        ),
        (lambda t: setattr(t, "compute_loss_func", len), "compute_loss_func would replace"),
        (lambda t: setattr(t.args, "loss_type", "nll"), "changed from 'deft' to 'nll'"),
        (lambda t: setattr(t.args, "loss_type", "cayley"), "changed from 'deft' to 'cayley'"),
    ],
)
def test_another_loss_set_after_the_start_stops_training(
    tmp_path: Path, change: Any, message: str
) -> None:
    trainer = make_trainer(config(tmp_path), make_rows(2))
    change(trainer)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_trainer_that_never_asks_the_gated_head_stops_at_its_first_step(tmp_path: Path) -> None:
    class Constant(SFTTrainer):
        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            return sum(parameter.square().mean() for parameter in model.parameters())

    trainer = make_trainer(config(tmp_path), make_rows(2), trainer_class=Constant)

    def train() -> None:
        with pytest.raises(RuntimeError, match="not computed by the gated head"):
            trainer.train()

    assert all(change.abs().max() == 0 for change in update_of(trainer.model, train).values())


@pytest.mark.skipif(not HAS_FUSED_HEAD, reason="TRL 1.9 has no add_fused_lm_head")
def test_fused_head_put_over_the_gated_one_stops_training(tmp_path: Path) -> None:
    from trl.trainer.utils import add_fused_lm_head

    trainer = make_trainer(config(tmp_path), make_rows(2))
    add_fused_lm_head(trainer.model, outputs=("log_probs", "entropy", "is_top1"))
    with pytest.raises(RuntimeError, match="not computed by the gated head"):
        trainer.train()


def test_arguments_have_their_loss_type_back_when_trl_refuses_something(tmp_path: Path) -> None:
    args = config(tmp_path)
    with pytest.raises(ValueError, match="train_dataset"):
        SFTTrainer(model=qwen3(), args=args, processing_class=tiny_tokenizer())
    assert args.loss_type == "deft"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs Triton")
def test_a_path_that_cannot_run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for path in ("triton", "quack"):
        refuse(config(tmp_path, loss_kwargs={"path": path}), f"path='{path}' cannot run.*'auto'")
