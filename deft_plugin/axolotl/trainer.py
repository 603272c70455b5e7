"""Axolotl's trainer with a gated head: its normalisation, its metrics and its checks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

from axolotl.core.trainers import AxolotlTrainer
from axolotl.utils.samplers import MultipackBatchSampler
from torch.utils.data import BatchSampler
from transformers import Trainer

from ..head import GatedCausalLMOutput
from ..objectives import Objective
from ..ops import CoreSettings
from ..trainer import GatedTrainerMixin
from ..training import GatedTraining, TrainingSettings
from .context_parallel import with_shifted_labels


class _PerplexityOfTokens(Trainer):
    """Comes after AxolotlTrainer in the order of methods, so that it sees what Axolotl added to a log."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Make Axolotl's exp(loss) the exp(nll) that it stands for."""
        if self._gating is not None:
            for prefix in ("", "eval_"):
                _replace(logs, f"{prefix}ppl", f"{prefix}perplexity")
        super().log(logs, start_time)


class _AllPacks(BatchSampler):
    """The packs of Axolotl's sampler, which drops those that do not fill a batch of every rank.

    Args:
        sampler: in the data set's order, so that all ranks have the same packs.

    Attributes:
        row_count: number of packs, each of which is a row.
    """

    def __init__(self, sampler: MultipackBatchSampler) -> None:
        super().__init__(sampler.sampler, sampler.batch_size, drop_last=False)
        sampler.drop_last, sampler._batches = False, None
        self._packs = sampler.generate_batches()
        self.row_count = sum(map(len, self._packs))

    def __iter__(self) -> Iterator[Any]:
        # accelerate fills the last one up in place.
        return (list(batch) for batch in self._packs)

    def __len__(self) -> int:
        return len(self._packs)


def _replace(logs: dict[str, float], name: str, source: str) -> None:
    logs.pop(name, None)
    if source in logs:
        logs[name] = logs[source]


class DEFTTrainer(GatedTrainerMixin, AxolotlTrainer, _PerplexityOfTokens):
    """`AxolotlTrainer` whose loss is an objective, normalised by the tokens of the whole optimizer step.

    `install` gives the model its gated head; without it, nothing can be trained or evaluated.
    """

    _left_out_above = "sequence_len"
    _more_metrics = ("ppl",)

    @property
    def gating(self) -> GatedTraining:
        if self._gating is None:
            raise RuntimeError(
                "This DEFTTrainer has no gated head: DEFTPlugin gives it one when Axolotl calls "
                "add_callbacks_post_trainer. Without the plugin, call install()."
            )
        return self._gating

    def install(
        self,
        objective: Objective,
        core: CoreSettings,
        training: TrainingSettings | None = None,
        output_class: type[GatedCausalLMOutput] = GatedCausalLMOutput,
    ) -> None:
        """Give the model its gated head, and look at the data.

        Raises:
            ValueError: as in `GatedTrainerMixin`; the data cannot be trained on (see `checks.check_data`).
        """
        super().install(objective, core, training, output_class)
        self.check_data_sets()

    def _get_eval_sampler(self, eval_dataset: Any = None) -> Any:
        sampler = super()._get_eval_sampler(eval_dataset)
        return _AllPacks(sampler) if isinstance(sampler, MultipackBatchSampler) else sampler

    def check_batches(self, batches: Sequence[Any]) -> None:
        """Nothing to check: Axolotl's own context parallelism pads sequences before it cuts them."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        _ = self.gating  # Which stops a trainer without a gated head.
        parallelism = self.accelerator.parallelism_config
        parts = 1 if parallelism is None else parallelism.cp_size
        # Not before: Axolotl registers its hooks just before it calls this.
        with nullcontext() if parts == 1 else with_shifted_labels(self.model, parts):
            return super().train(*args, **kwargs)
