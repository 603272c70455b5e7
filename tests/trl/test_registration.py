"""Which classes take the objectives' names, and that TRL's own losses stay as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl

import deft_plugin
from deft_plugin.trl import SFTConfig, SFTTrainer
from tests.tiny import tiny_model
from tests.trl.running import as_dataset, config, make_trainer
from tests.updates import logged, make_rows, qwen3, update_of

NAMES = sorted(set(deft_plugin.objective_names()) - {"nll", "dft"})
TRL_OWN = ["nll", "dft", "chunked_nll"]


@pytest.fixture
def registered() -> Iterator[None]:
    deft_plugin.register()
    yield
    deft_plugin.unregister()


def attributes(cls: type) -> dict[str, Any]:
    """What a class itself defines, apart from what the interpreter keeps there."""
    return {name: value for name, value in vars(cls).items() if name != "__static_attributes__"}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_works_in_the_package_s_classes(tmp_path: Path, name: str) -> None:
    args = SFTConfig(output_dir=str(tmp_path), loss_type=name, bf16=False, use_cpu=True)
    assert args.loss_type == name
    assert args.loss_kwargs is None


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", NAMES)
def test_every_name_works_in_trls_classes_after_register(tmp_path: Path, name: str) -> None:
    args = config(tmp_path, trl.SFTConfig, loss_type=name)
    trainer = make_trainer(args, make_rows(2), trainer_class=trl.SFTTrainer)
    trainer.train()
    ours = make_trainer(config(tmp_path, loss_type=name), make_rows(2))
    ours.train()
    assert logged(trainer, "loss") == logged(ours, "loss")
    assert logged(trainer, "mean_gate") == logged(ours, "mean_gate") != []


@pytest.mark.usefixtures("registered")
def test_parameters_go_through_trls_config_after_register(tmp_path: Path) -> None:
    args = config(tmp_path, trl.SFTConfig, loss_type="alpha", loss_kwargs={"a": 0.0})
    trainer = make_trainer(args, make_rows(2), trainer_class=trl.SFTTrainer)
    trainer.train()
    assert logged(trainer, "mean_gate") == [pytest.approx(1.0)]


@pytest.mark.usefixtures("registered")
def test_package_s_trainer_trains_the_same_while_trls_is_extended_too(tmp_path: Path) -> None:
    trainer = make_trainer(config(tmp_path), make_rows(2))
    trainer.train()
    deft_plugin.unregister()
    alone = make_trainer(config(tmp_path), make_rows(2))
    alone.train()
    assert logged(trainer, "loss") == logged(alone, "loss")
    assert logged(trainer, "nll") == logged(alone, "nll") != []


@pytest.mark.usefixtures("registered")
def test_package_s_trainer_takes_parameters_while_trls_is_extended_too(tmp_path: Path) -> None:
    args = config(tmp_path, loss_type="alpha", loss_kwargs={"a": 0.0})
    trainer = make_trainer(args, make_rows(2))
    trainer.train()
    assert logged(trainer, "mean_gate") == [pytest.approx(1.0)]


class Looking(trl.SFTTrainer):
    """A subclass that was there before anything is registered."""

    saw: str = ""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.saw = self.args.loss_type
        return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize("trainer_class", [trl.SFTTrainer, Looking])
def test_a_trainer_is_one_of_the_class_that_made_it_and_outlives_unregister(
    tmp_path: Path, trainer_class: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    deft_plugin.register()
    calls = []
    init = trl.SFTTrainer.__init__

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(type(self).__name__)
        init(self, *args, **kwargs)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(trl.SFTTrainer, "__init__", wrapped)
            args = config(tmp_path, trl.SFTConfig)
            trainer = make_trainer(args, make_rows(2), trainer_class=trainer_class)
            own = config(tmp_path, trl.SFTConfig, loss_type="nll")
            assert type(make_trainer(own, make_rows(2), trainer_class=trainer_class)) is (
                trainer_class
            )
    finally:
        deft_plugin.unregister()
    name = trainer_class.__name__
    # What others put around TRL's constructor runs once.
    assert calls == [name, name]
    assert isinstance(trainer, trainer_class)
    assert (type(trainer).__name__, type(trainer).__module__) == (name, trainer_class.__module__)
    trainer.train()
    assert logged(trainer, "nll") != []
    if trainer_class is Looking:
        # Its method comes before those that show TRL a loss type of its own.
        assert trainer.saw == "deft"


@pytest.mark.usefixtures("registered")
def test_subclasses_of_trls_classes_take_the_names_too(tmp_path: Path) -> None:
    @dataclasses.dataclass
    class OwnConfig(trl.SFTConfig):
        own: int = 3

    class OwnTrainer(trl.SFTTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().compute_loss(*args, **kwargs)

    args = config(tmp_path, OwnConfig, loss_type="alpha", loss_kwargs={"a": 1.0}, own=4)
    trainer = make_trainer(args, make_rows(2), trainer_class=OwnTrainer)
    trainer.train()
    assert args.own == 4
    with pytest.raises(ValueError, match=r"'alpha'.*'b'"):
        config(tmp_path, OwnConfig, loss_type="alpha", loss_kwargs={"b": 1.0})
    assert logged(trainer, "loss") == [
        pytest.approx(2 * logged(trainer, "objective_loss")[0], rel=1e-6)
    ]


def test_register_twice_and_unregister_leave_trls_classes_as_they_were(tmp_path: Path) -> None:
    class OwnTrainer(trl.SFTTrainer):
        pass

    @dataclasses.dataclass
    class OwnConfig(trl.SFTConfig):
        own: int = 3

    classes = (trl.SFTTrainer, trl.SFTConfig, OwnTrainer, OwnConfig)
    before = [attributes(cls) for cls in classes]
    fields = dataclasses.fields(trl.SFTConfig)
    deft_plugin.register()
    deft_plugin.register()
    assert attributes(trl.SFTTrainer) != before[0]
    deft_plugin.unregister()
    assert [attributes(cls) for cls in classes] == before
    assert dataclasses.fields(trl.SFTConfig) == fields
    deft_plugin.unregister()
    with pytest.raises(ValueError, match="Invalid `loss_type` deft"):
        make_trainer(
            config(tmp_path, OwnConfig, loss_type="deft"), make_rows(2), trainer_class=OwnTrainer
        )
    with pytest.raises(TypeError, match="loss_kwargs"):
        config(tmp_path, trl.SFTConfig, loss_kwargs={})


@pytest.mark.parametrize("loss_type", TRL_OWN)
def test_trls_own_losses_are_unchanged_to_the_last_bit(tmp_path: Path, loss_type: str) -> None:
    def run(trainer_class: Any, config_class: Any) -> tuple[list[dict[str, float]], Any]:
        args = config(
            tmp_path,
            config_class,
            loss_type=loss_type,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=2,
            eval_strategy="steps",
            eval_steps=1,
        )
        model = tiny_model("qwen3")
        trainer = make_trainer(
            args,
            make_rows(8),
            model,
            trainer_class,
            eval_dataset=make_trainer_dataset(),
        )
        update = update_of(model, trainer.train)
        timing = ("runtime", "per_second", "preparation_time")
        log = [
            {k: v for k, v in entry.items() if not k.endswith(timing)}
            for entry in trainer.state.log_history
        ]
        return log, update

    before_log, before = run(trl.SFTTrainer, trl.SFTConfig)
    assert any("eval_loss" in entry for entry in before_log)
    deft_plugin.register()
    try:
        after = [run(trl.SFTTrainer, trl.SFTConfig), run(SFTTrainer, SFTConfig)]
    finally:
        deft_plugin.unregister()
    for log, update in after:
        assert log == before_log
        assert all(torch.equal(update[name], before[name]) for name in before)


def make_trainer_dataset() -> Any:
    from datasets import Dataset

    return Dataset.from_list(make_rows(3, seed=1))


def test_trls_own_default_is_untouched(tmp_path: Path) -> None:
    default = {field.name: field.default for field in dataclasses.fields(trl.SFTConfig)}
    ours = {field.name: field.default for field in dataclasses.fields(SFTConfig)}
    assert ours == {**default, "loss_kwargs": None}


def test_model_of_an_earlier_trainer_trains_with_what_the_next_one_asks_for(tmp_path: Path) -> None:
    model = qwen3().float()
    rows = make_rows(2)
    # bfloat16 wraps the model's forward.
    make_trainer(config(tmp_path, bf16=True, learning_rate=0.0), rows, model).train()
    for loss_type in ("cayley", "nll", "deft"):
        again = make_trainer(config(tmp_path, loss_type=loss_type), rows, model)
        update = update_of(model, again.train)
        model.load_state_dict(qwen3().float().state_dict())
        fresh = make_trainer(config(tmp_path, loss_type=loss_type), rows, qwen3().float())
        expected = update_of(fresh.model, fresh.train)
        assert all(torch.equal(update[name], expected[name]) for name in expected)
        assert logged(again, "loss") == logged(fresh, "loss")
        assert logged(again, "mean_gate") == logged(fresh, "mean_gate")


def test_settings_of_the_core_reach_the_head_and_the_log(tmp_path: Path) -> None:
    settings = {"path": "chunked", "tile_rows": 3, "skip_below": 0.5}
    args = config(tmp_path, loss_type="alpha", loss_kwargs={"a": 0.3, **settings})
    trainer = make_trainer(args, make_rows(4))
    head = deft_plugin.gated_head_of(trainer.model)
    assert head is not None
    assert head.objective == deft_plugin.build_objective("alpha", {"a": 0.3})
    assert dataclasses.asdict(head.settings) == settings
    trainer.train()
    assert 0 <= trainer.state.log_history[0]["skipped_share"] <= 1


def test_methods_that_others_have_patched_under_another_name_are_extended_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation_loop = transformers.Trainer.evaluation_loop

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        return evaluation_loop(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "evaluation_loop", patched)
    before = attributes(trl.SFTTrainer)
    deft_plugin.register()
    try:
        args = config(tmp_path, trl.SFTConfig)
        rows = make_rows(2)
        trainer = make_trainer(
            args, rows, trainer_class=trl.SFTTrainer, eval_dataset=as_dataset(rows)
        )
        assert "eval_nll" in trainer.evaluate()
    finally:
        deft_plugin.unregister()
    assert attributes(trl.SFTTrainer) == before
