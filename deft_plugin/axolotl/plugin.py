"""`plugins: [deft_plugin.axolotl.DEFTPlugin]`: Axolotl's hooks.

The order in which Axolotl calls them: register, get_input_args and validation, pre_model_load, get_training_args,
get_trainer_cls, add_callbacks_post_trainer. What can be refused is refused by the first two. It calls them also for a
configuration without the plugin, after one with it in the same process.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.utils.dict import DictDefault
from axolotl.utils.distributed import is_main_process
from transformers import PreTrainedModel, Trainer, TrainerCallback

from ..head import gated_head_of
from ..head.lm_head import lm_head_of
from ..metrics import is_best_smallest
from ..objectives import Objective, build_objective
from ..ops.availability import resolve_path
from .adjustments import adjust
from .args import INPUT_ARGS, DEFTSettings, is_listed
from .trainer import DEFTTrainer


class DEFTPlugin(BasePlugin):
    """Trains with the objective named by `deft_objective` and the parameters in the `deft` block."""

    def register(self, cfg: Any) -> None:
        """Switch off what the gated head takes the place of, and what cannot run here."""
        if is_listed(cfg):
            for change in adjust(cfg):
                _say(change)

    def get_input_args(self) -> str:
        """Where the schema of the plugin's keys is."""
        return INPUT_ARGS

    def pre_model_load(self, cfg: DictDefault) -> None:
        """Refuse what only shows when the other plugins have seen the configuration."""
        if not is_listed(cfg):
            return
        for name, plugin in PluginManager.get_instance().plugins.items():
            if plugin is not self and name in cfg.plugins:
                other = plugin.get_trainer_cls(cfg)
                if other is not None:
                    raise ValueError(
                        f"The plugin {name} brings a trainer of its own, {other.__name__}, with another "
                        "loss. List it or DEFTPlugin in `plugins`, not both."
                    )

    def get_training_args(self, cfg: DictDefault) -> dict[str, Any]:
        """What Axolotl's own training arguments must be set to."""
        if not is_listed(cfg):
            return {}
        # Axolotl sets False: tokens would then be counted on each rank alone.
        arguments: dict[str, Any] = {"average_tokens_across_devices": True}
        metric = str(cfg.metric_for_best_model or "")
        smallest = is_best_smallest(metric) or metric.removeprefix("eval_") == "ppl"
        # Axolotl passes only a true greater_is_better on.
        if cfg.greater_is_better is False or (cfg.greater_is_better is None and smallest):
            arguments["greater_is_better"] = False
        return arguments

    def get_trainer_cls(self, cfg: DictDefault) -> type[Trainer] | None:
        """The trainer with a gated head."""
        return DEFTTrainer if is_listed(cfg) else None

    def add_callbacks_post_trainer(
        self, cfg: DictDefault, trainer: Trainer
    ) -> list[TrainerCallback]:
        """Install the gated head, say so in one line, and have it checked when training begins."""
        if not is_listed(cfg):
            return []
        if not isinstance(trainer, DEFTTrainer):
            raise RuntimeError(
                f"The trainer is a {type(trainer).__name__}, not the {DEFTTrainer.__name__} of deft_plugin: "
                "another plugin has replaced it. Remove that plugin, or DEFTPlugin."
            )
        core, training, parameters = DEFTSettings(**(cfg.deft or {})).split()
        objective = build_objective(cfg.deft_objective, parameters)
        trainer.install(objective, core, training)
        _say(_summary(trainer, objective))
        return [_CheckAtTrainBegin(trainer)]


class _CheckAtTrainBegin(TrainerCallback):
    """Stops a run whose trainer would not use the gated head, before its first step."""

    def __init__(self, trainer: DEFTTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check what may have been changed since the trainer was made."""
        trainer = self.trainer
        model: PreTrainedModel = trainer.accelerator.unwrap_model(trainer.model)
        problems = {
            "the model has lost its gated head": gated_head_of(model) is None,
            "the trainer has a compute_loss_func": trainer.compute_loss_func is not None,
            "the trainer smooths labels": trainer.label_smoother is not None,
            "average_tokens_across_devices is off": not args.average_tokens_across_devices,
            "num_items_in_batch is not passed on": not trainer.model_accepts_loss_kwargs,
        }
        found = [problem for problem, present in problems.items() if present]
        if found:
            raise RuntimeError(
                f"Training would not use the objective as asked for: {'; '.join(found)}. Which plugin or "
                "callback did that?"
            )


def _summary(trainer: DEFTTrainer, objective: Objective) -> str:
    head = gated_head_of(trainer.model)
    assert head is not None
    trains = any(parameter.requires_grad for parameter in lm_head_of(head.model).parameters())
    path = resolve_path(head.settings.path, trainer.args.device)
    return (
        f"objective {objective!r}; gated head on {type(head.model).__name__} "
        f"({'trainable' if trains else 'frozen'} lm_head, path "
        f"{path}); loss over the tokens of the whole optimizer step on "
        f"{trainer.args.world_size} rank(s)."
    )


def _say(text: str) -> None:
    if is_main_process():
        print(f"deft_plugin: {text}", flush=True)
