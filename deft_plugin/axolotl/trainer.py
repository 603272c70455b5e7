"""Axolotl's trainer with a gated head: its normalisation, its metrics and its checks."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from axolotl.core.trainers import AxolotlTrainer
from torch import Tensor
from transformers import Trainer

from ..checks import check_data
from ..head import add_gated_head
from ..head.cpu_weights import keep_cpu_weights_unpacked
from ..objectives import Objective
from ..ops import CoreSettings
from ..training import GatedTraining, TrainingSettings, own_rows
from .context_parallel import with_shifted_labels


class _LogOfTokens(Trainer):
    """Comes after AxolotlTrainer in the order of methods, so that it sees what Axolotl added to a log."""

    _gated: GatedTraining | None = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the window, and make Axolotl's exp(loss) the exp(nll) that it stands for."""
        if self._gated is not None:
            self._gated.add_means(logs, self.args.device)
            for prefix in ("", "eval_"):
                _replace(logs, f"{prefix}ppl", f"{prefix}perplexity")
        super().log(logs, start_time)


def _replace(logs: dict[str, float], name: str, source: str) -> None:
    logs.pop(name, None)
    if source in logs:
        logs[name] = logs[source]


class DEFTTrainer(AxolotlTrainer, _LogOfTokens):
    """`AxolotlTrainer` whose loss is an objective, normalised by the tokens of the whole optimizer step.

    `install` gives the model its gated head; without it, nothing can be trained or evaluated.
    """

    def install(
        self,
        objective: Objective,
        core: CoreSettings,
        training: TrainingSettings | None = None,
    ) -> None:
        """Give the model its gated head.

        Raises:
            ValueError: the model cannot have one (see `deft_plugin.add_gated_head`), would be copied to
                several GPUs, or has NaN weights; the data cannot be trained on (see `checks.check_data`).
        """
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process with {self.args.n_gpu} GPUs would use torch.nn.DataParallel, which "
                "deft_plugin does not support. Start one process per GPU, as axolotl train does, or show "
                "one GPU: CUDA_VISIBLE_DEVICES=0."
            )
        head = add_gated_head(self.model, objective, with_entropy=True, **asdict(core))
        for name in ("train_dataset", "eval_dataset"):
            warn = self.is_world_process_zero()
            check_data(name, getattr(self, name), head.model, warn=warn)
        keep_cpu_weights_unpacked(self.model)
        # Axolotl asks the backbone, which takes no num_items_in_batch; the gated head does, and it
        # shifts labels also for a model whose loss transformers does not know.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self._gated = GatedTraining(self, head, training)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._installed()
        parallelism = self.accelerator.parallelism_config
        parts = 1 if parallelism is None else parallelism.cp_size
        # Not before: Axolotl registers its hooks just before it calls this.
        with nullcontext() if parts == 1 else with_shifted_labels(self.model, parts):
            return super().train(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        self._installed().start_step(self, batches)
        return batches, num_items_in_batch

    def training_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        with self._installed().scoring(training=True, batch=inputs):
            return super().training_step(model, inputs, *args, **kwargs)

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        labels = inputs.get("labels")
        if labels is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with self._installed().scoring(False, own_rows(self, labels), inputs):
            loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        if prediction_loss_only:
            return loss, None, None
        # Axolotl's tables of predictions and its benchmark want logits: a forward pass more.
        unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
        _, logits, _ = super().prediction_step(model, unlabelled, False, ignore_keys)
        return loss, logits, self._prepare_input(labels)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        gated = self._installed()
        with gated.evaluating(dataloader):
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        # In the output rather than in the log alone, so that metric_for_best_model: eval_nll works.
        means = gated.eval_means(metric_key_prefix, self.args.device)
        output.metrics.update({f"{metric_key_prefix}_{name}": means[name] for name in means})
        return output

    def _installed(self) -> GatedTraining:
        if self._gated is None:
            raise RuntimeError(
                "This DEFTTrainer has no gated head: DEFTPlugin gives it one when Axolotl calls "
                "add_callbacks_post_trainer. Without the plugin, call install()."
            )
        return self._gated
