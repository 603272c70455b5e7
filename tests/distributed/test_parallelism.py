"""TRL's trainer with parts of sequences, of matrices and of mixtures on several ranks does what one process does.

All of it is the libraries' own, from loading the model to the optimizer's step, but for the attention to
other ranks' parts under context parallelism: torch has it for GPUs alone.
"""

from __future__ import annotations

import functools
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedSequenceParallelConfig
from torch import distributed
from torch.nn import functional
from transformers.distributed import DistributedConfig

from ..updates import make_rows, trainable
from .as_on_gpus import as_on_gpus, attend_to_all_parts
from .deepspeed_files import DIRECTORY
from .ranks import run_ranks
from .steps import Parameters, Run, assert_same_parameters

if not find_spec("trl"):
    pytest.skip("TRL is needed", allow_module_level=True)

from deft_plugin.trl.config import HAS_FUSED_HEAD

from .trl_runs import STEPS, assert_same_log, make_trained, parameters_of, save_models

DEFT, MIXTURE = Run("deft"), Run("deft", model="mixture")
GLOBAL, EMA = (Run("cayley_trans", {"scope": scope}) for scope in ("global", "ema"))
# Sequences of one length on all ranks, which gloo's gathers need, and parts of equal lengths.
PADDED = {"pad_to_multiple_of": 32, "gradient_accumulation_steps": 2}
# From transformers 5.20 on accelerate is told what a model has been shared out as when it was loaded.
LOADS_IN_PARTS = pytest.mark.skipif(
    not hasattr(DistributedConfig, "efsdp_size"), reason="this transformers' Trainer cannot"
)
ATTENTION = functional.scaled_dot_product_attention
Log = list[dict[str, float]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    save_models(directory)
    return directory


@functools.cache
def alone(run: Run, models: Path) -> tuple[Log, Parameters]:
    """The log and the parameters of one process."""
    trainer = make_trained(run, models, per_device_train_batch_size=4)
    return trainer.state.log_history, parameters_of(trainer)


def compare(run: Run, models: Path, ranks: list[tuple[Log, Parameters]]) -> None:
    """Every rank's log and parameters with those of one process."""
    expected_log, expected = alone(run, models)
    for log, parameters in ranks:
        assert_same_log(log, expected_log)
        assert_same_parameters(parameters, expected, run)


def whole_or_part() -> Any:
    """The ranks that have the other parts of a sequence; None where it is whole, as in TRL's evaluations."""
    # Which torch replaces for as long as sequences are cut.
    if functional.scaled_dot_product_attention is ATTENTION:
        return None
    return AcceleratorState().device_mesh["cp"].get_group()


@pytest.mark.parametrize(
    ("run", "parts", "ranks"),
    [
        (DEFT, 2, 2),
        (EMA, 2, 4),
        pytest.param(GLOBAL, 2, 2, marks=pytest.mark.slow),
        pytest.param(Run("deft", model="lora"), 4, 4, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_context_parallelism(
    run: Run, parts: int, ranks: int, models: Path, tmp_path: Path
) -> None:
    def on(rank: int) -> tuple[Log, Parameters]:
        as_on_gpus()
        attend_to_all_parts(whole_or_part)
        trainer = make_trained(
            run,
            models,
            per_device_train_batch_size=2 * parts // ranks,
            parallelism_config=ParallelismConfig(cp_size=parts, dp_shard_size=ranks // parts),
            **fsdp("LlamaDecoderLayer"),
            **PADDED,
        )
        return trainer.state.log_history, parameters_of(trainer)

    compare(run, models, run_ranks(on, tmp_path, ranks))


def test_context_parallelism_of_unequal_parts_and_of_other_rows_is_refused(
    models: Path, tmp_path: Path
) -> None:
    def on(rank: int) -> None:
        as_on_gpus()
        options = {
            "per_device_train_batch_size": 2,
            "parallelism_config": ParallelismConfig(cp_size=2),
            **fsdp("LlamaDecoderLayer"),
        }
        rows = make_rows(4, shortest=13, longest=13)
        with pytest.raises(ValueError, match=r"cp_size=2 .*pad_to_multiple_of=4"):
            make_trained(DEFT, models, rows, **options)
        options["accelerator_config"] = {"dispatch_batches": True}
        with pytest.raises(ValueError, match=r"dispatch_batches=True .*2 ranks share a row"):
            make_trained(DEFT, models, **options, **PADDED)

    run_ranks(on, tmp_path)


def fsdp(layer: str) -> dict[str, Any]:
    """accelerate's FSDP2, which context parallelism asks for."""
    return {
        "use_cpu": False,
        "fsdp": True,
        "fsdp_config": {
            "fsdp_version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": [layer],
        },
    }


ULYSSES = pytest.mark.skipif(
    not find_spec("deepspeed") or not HAS_FUSED_HEAD,
    reason="needs DeepSpeed, and a TRL whose collator gives position_ids",
)


@ULYSSES
@pytest.mark.parametrize(
    ("run", "file", "ranks"),
    [
        (DEFT, "zero1", 2),
        (GLOBAL, "zero2", 2),
        (Run("deft", model="lora"), "zero3", 2),
        pytest.param(EMA, "zero1", 4, marks=pytest.mark.slow),
        pytest.param(DEFT, "zero3", 4, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_sequence_parallelism_of_deepspeed(
    run: Run, file: str, ranks: int, models: Path, tmp_path: Path
) -> None:
    def on(rank: int) -> tuple[Log, Parameters]:
        trainer = trained_with_ulysses(run, models, ranks, str(DIRECTORY / f"{file}.json"))
        return trainer.state.log_history, parameters_of(trainer)

    compare(run, models, run_ranks(on, tmp_path, ranks))


@ULYSSES
def test_a_mixtures_auxiliary_loss_is_a_mean_over_micro_batches(
    models: Path, tmp_path: Path
) -> None:
    # Without padding, of a part of which the auxiliary loss would be a mean of nothing.
    options = {"rows": make_rows(4 * STEPS, shortest=32, longest=32), "router_aux_loss_coef": 0.3}

    def on(rank: int) -> Log:
        trainer = trained_with_ulysses(MIXTURE, models, 2, str(DIRECTORY / "zero1.json"), **options)
        return trainer.state.log_history

    for log in run_ranks(on, tmp_path):
        steps = [entry for entry in log if "grad_norm" in entry]
        assert steps
        for entry in steps:
            whole = entry["objective_loss"] + 0.3 * entry["aux_loss"]
            assert entry["loss"] == pytest.approx(whole, rel=1e-5)


@ULYSSES
def test_zero3_that_averages_some_gradients_and_sums_others_is_refused(
    models: Path, tmp_path: Path
) -> None:
    config = json.loads((DIRECTORY / "zero3.json").read_text())
    config["zero_optimization"]["reduce_scatter"] = False

    def on(rank: int) -> None:
        with pytest.raises(ValueError, match=r"sp_size=2 .*zero_optimization\.reduce_scatter"):
            trained_with_ulysses(DEFT, models, 2, config)

    run_ranks(on, tmp_path)


def trained_with_ulysses(
    run: Run, models: Path, ranks: int, deepspeed: str | dict[str, Any], **options: Any
) -> Any:
    """A trainer after training where two ranks each share a sequence."""
    from deepspeed import init_distributed

    # Which transformers leaves out with use_cpu.
    init_distributed(dist_backend="gloo")
    handler = DeepSpeedSequenceParallelConfig(
        sp_seq_length_is_variable=True, sp_attn_implementation="sdpa"
    )
    return make_trained(
        run,
        models,
        # Each rank's batch becomes one of as many micro-batches as ranks share a sequence.
        per_device_train_batch_size=4 // ranks,
        parallelism_config=ParallelismConfig(
            sp_size=2, sp_handler=handler, dp_shard_size=ranks // 2
        ),
        deepspeed=deepspeed,
        **PADDED,
        **options,
    )


@LOADS_IN_PARTS
@pytest.mark.parametrize(
    ("run", "sizes", "ranks"),
    [
        (GLOBAL, {"tp_size": 2}, 2),
        pytest.param(Run("deft", model="tied"), {"tp_size": 2}, 2, marks=pytest.mark.slow),
        pytest.param(EMA, {"tp_size": 2, "fsdp_size": 2}, 4, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_tensor_parallelism(
    run: Run, sizes: dict[str, int], ranks: int, models: Path, tmp_path: Path
) -> None:
    compare(run, models, run_ranks(loaded_in_parts(run, sizes, models), tmp_path, ranks))


@pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed not installed")
@pytest.mark.parametrize("run", [GLOBAL, Run("deft", model="tied")], ids=str)
def test_tensor_parallelism_of_deepspeed(run: Run, models: Path, tmp_path: Path) -> None:
    config = json.loads((DIRECTORY / "zero1.json").read_text())
    config["tensor_parallel"] = {"autotp_size": 2}

    def on(rank: int) -> tuple[Log, Parameters]:
        from deepspeed import init_distributed
        from deepspeed.module_inject.layers import GatherReplacedLayerParams

        # Which transformers leaves out with use_cpu.
        init_distributed(dist_backend="gloo")
        trainer = make_trained(
            run,
            models,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            deepspeed=config,
        )
        parameters = {}
        for name, value in trainable(trainer.model).items():
            with GatherReplacedLayerParams([value], trainer.model):
                parameters[name] = value.detach().clone()
        return trainer.state.log_history, parameters

    compare(run, models, run_ranks(on, tmp_path))


@LOADS_IN_PARTS
@pytest.mark.parametrize(
    ("sizes", "ranks"),
    [
        pytest.param({"tp_size": 2, "ep_size": 2}, 2, marks=pytest.mark.slow),
        ({"fsdp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"}, 2),
        ({"tp_size": 2, "fsdp_size": 2, "ep_size": 4, "ep_implementation": "all_to_all"}, 4),
    ],
    ids=str,
)
def test_expert_parallelism(
    sizes: dict[str, Any], ranks: int, models: Path, tmp_path: Path
) -> None:
    compare(MIXTURE, models, run_ranks(loaded_in_parts(MIXTURE, sizes, models), tmp_path, ranks))


def loaded_in_parts(run: Run, sizes: dict[str, Any], models: Path) -> Any:
    """A function for `run_ranks` that trains what transformers has shared out among the ranks as it loaded it."""

    def on(rank: int) -> tuple[Log, Parameters]:
        as_on_gpus()
        batch = 4 * sizes.get("tp_size", 1) // distributed.get_world_size()
        trainer = make_trained(
            run,
            models,
            per_device_train_batch_size=batch // 2 or 1,
            gradient_accumulation_steps=min(batch, 2),
            use_cpu=False,
            model_init_kwargs={
                "dtype": "float32",
                "distributed_config": DistributedConfig(**sizes),
            },
        )
        return trainer.state.log_history, parameters_of(trainer)

    return on
