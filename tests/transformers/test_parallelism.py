"""Parts of sequences on two ranks: a training, its evaluations and its predictions are those of one process.

All of it is the libraries' own but for the attention to other ranks' parts, which torch has for GPUs alone.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedSequenceParallelConfig
from torch.nn import functional
from transformers import DataCollatorForSeq2Seq

from deft_plugin.metrics import METRICS
from tests.distributed.as_on_gpus import as_on_gpus, attend_to_all_parts
from tests.distributed.deepspeed_files import DIRECTORY
from tests.distributed.ranks import run_ranks
from tests.distributed.steps import whole_parameters
from tests.tiny import tiny_model, tiny_tokenizer
from tests.transformers.running import arguments, make_trainer
from tests.updates import make_rows

# Labels at its beginning alone, in a batch of its own.
LAST_ROW = {"input_ids": [*range(5, 25)], "labels": [*range(5, 9), *[-100] * 16]}
ATTENTION = functional.scaled_dot_product_attention


class WithPositions(DataCollatorForSeq2Seq):
    """Pads to what two ranks can cut, and says where in a sequence a token is: its part does not."""

    def __call__(self, features: Any, return_tensors: Any = None) -> Any:
        batch = super().__call__(features, return_tensors)
        positions = torch.arange(batch["input_ids"].size(1))
        return {**batch, "position_ids": positions.expand_as(batch["input_ids"]).contiguous()}


def run(output_dir: Path, *, predicts: bool = True, **options: Any) -> Any:
    """Log, predictions of the labelled positions, and whole parameters."""
    AcceleratorState._reset_state(reset_partial_state=True)
    model = tiny_model("llama", initializer_range=0.08, num_key_value_heads=2)
    args = arguments(
        output_dir,
        **{
            "per_device_train_batch_size": 4,
            "max_steps": 3,
            "max_grad_norm": 1.0,
            "train_sampling_strategy": "sequential",
            "eval_strategy": "steps",
            "eval_steps": 2,
            "per_device_eval_batch_size": 2,
            **options,
        },
    )
    trainer = make_trainer(
        args,
        make_rows(12),
        model,
        data_collator=WithPositions(tiny_tokenizer(), pad_to_multiple_of=32),
        eval_dataset=[*make_rows(4, seed=1), LAST_ROW],
    )
    trainer.train()
    prediction = trainer.predict(make_rows(4, seed=2)) if predicts else None
    if trainer.args.deepspeed:
        trainer.model_wrapped.empty_partition_cache()
    return trainer.state.log_history, prediction, whole_parameters(trainer.model)


def compare(ranks: Any, expected: Any) -> None:
    expected_log, prediction, parameters = expected
    for log, predicted, whole in ranks:
        compared = 0
        for entry, reference in zip(log, expected_log, strict=True):
            for name in {"loss", "grad_norm", *METRICS, *(f"eval_{n}" for n in METRICS)}:
                if name in reference:
                    assert entry[name] == pytest.approx(reference[name], rel=1e-4), name
                    compared += 1
        # Three steps and two evaluations.
        assert compared == 3 * (2 + len(METRICS)) + 2 * len(METRICS)
        for name, value in parameters.items():
            torch.testing.assert_close(whole[name], value, rtol=1e-4, atol=1e-6, msg=name)
        if predicted is not None:
            # Whole, if each twice.
            labels = [np.unique(each.label_ids, axis=0) for each in (predicted, prediction)]
            np.testing.assert_array_equal(*labels)
            assert predicted.predictions.shape[:2] == predicted.label_ids.shape
            for name in METRICS:
                assert predicted.metrics[f"test_{name}"] == pytest.approx(
                    prediction.metrics[f"test_{name}"], rel=1e-4
                )


def test_context_parallelism(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def on(rank: int) -> Any:
        as_on_gpus()
        attend_to_all_parts(whole_or_part)
        results = run(
            tmp_path,
            use_cpu=False,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            parallelism_config=ParallelismConfig(cp_size=2),
            fsdp=True,
            fsdp_config={
                "fsdp_version": 2,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            },
        )
        # Of parts of a sequence that is nothing to tell.
        assert "scored no token" not in caplog.text
        return results

    compare(run_ranks(on, tmp_path), run(tmp_path))


def whole_or_part() -> Any:
    """The ranks that have the other parts of a sequence; None where it is whole."""
    # Which torch replaces for as long as sequences are cut.
    if functional.scaled_dot_product_attention is ATTENTION:
        return None
    return AcceleratorState().device_mesh["cp"].get_group()


@pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed not installed")
def test_sequence_parallelism_of_deepspeed(tmp_path: Path) -> None:
    def on(rank: int) -> Any:
        from deepspeed import init_distributed

        # Which transformers leaves out with use_cpu.
        init_distributed(dist_backend="gloo")
        handler = DeepSpeedSequenceParallelConfig(
            sp_seq_length_is_variable=True, sp_attn_implementation="sdpa"
        )
        return run(
            tmp_path,
            predicts=False,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            parallelism_config=ParallelismConfig(sp_size=2, sp_handler=handler),
            deepspeed=str(DIRECTORY / "zero1.json"),
        )

    compare(run_ranks(on, tmp_path), run(tmp_path))
