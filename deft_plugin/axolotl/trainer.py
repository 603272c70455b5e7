"""Axolotl's trainer with a gated head: its normalisation, its metrics and its checks."""

from __future__ import annotations

from typing import Any

from axolotl.core.trainers import AxolotlTrainer
from torch import Tensor
from transformers import Trainer

from ..head import add_gated_head
from ..objectives import Objective
from ..quantization import keep_cpu_weights_unpacked
from ..training import GatedTraining


class _LogOfTokens(Trainer):
    """Comes after AxolotlTrainer in the order of methods, so that it sees what Axolotl added to a log."""

    _gated: GatedTraining | None = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the window, and make Axolotl's exp(loss) the exp(nll) that it stands for."""
        if self._gated is not None:
            # Trainer's own training log, which every rank writes: the means are collective.
            if self.model.training and "loss" in logs:
                logs.update(self._gated.train_means(self.args.device))
                _replace(logs, "ppl", "perplexity")
            if "eval_ppl" in logs:
                _replace(logs, "eval_ppl", "eval_perplexity")
        super().log(logs, start_time)


def _replace(logs: dict[str, float], name: str, source: str) -> None:
    if source in logs:
        logs[name] = logs[source]
    else:
        logs.pop(name, None)


class DEFTTrainer(AxolotlTrainer, _LogOfTokens):
    """`AxolotlTrainer` whose loss is an objective, normalised by the tokens of the whole optimizer step.

    `install` gives the model its gated head; before that, no loss can be computed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"One process with {self.args.n_gpu} GPUs would use torch.nn.DataParallel, whose copies of "
                "the model have no gated head. Start one process per GPU: axolotl train does, and so do "
                "accelerate launch and torchrun. Or show one GPU: CUDA_VISIBLE_DEVICES=0."
            )
        # Axolotl asks the backbone, which takes no num_items_in_batch; the gated head does.
        self.model_accepts_loss_kwargs = True
        # The gated head shifts labels, also of a model whose loss type transformers does not know.
        self._loss_shifts_labels = True

    def install(self, objective: Objective, path: str, tile_rows: int | None) -> GatedTraining:
        """Give the model its gated head.

        Raises:
            ValueError: the model cannot have one; see `deft_plugin.add_gated_head`.
        """
        head = add_gated_head(
            self.model, objective, with_entropy=True, path=path, tile_rows=tile_rows
        )
        keep_cpu_weights_unpacked(self.model)
        self._gated = GatedTraining(head)
        return self._gated

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        with self._installed().scoring(self.model.training):
            return super().compute_loss(
                model,
                inputs,
                return_outputs=return_outputs,
                num_items_in_batch=num_items_in_batch,
            )

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        gated = self._installed()
        gated.start_evaluation()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        # In the output rather than in the log alone, so that metric_for_best_model: eval_nll works.
        means = gated.eval_means(self.args.device)
        output.metrics.update({f"{metric_key_prefix}_{name}": means[name] for name in means})
        return output

    def _installed(self) -> GatedTraining:
        if self._gated is None:
            raise RuntimeError(
                "This DEFTTrainer has no gated head: DEFTPlugin gives it one when Axolotl calls "
                "add_callbacks_post_trainer. Without the plugin, call install()."
            )
        return self._gated
