"""`deft benchmark` measures the lm_head of a model, and says what it cannot measure."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from transformers import AutoConfig

from deft_plugin.benchmark import files, processes, shape
from deft_plugin.benchmark.contestant import Machine
from deft_plugin.benchmark.contestants import CONTESTANTS, FEWER, FORMULA, OUR_NLL, OURS
from deft_plugin.benchmark.job import Job
from tests.tiny import tiny_model

Benchmark = Callable[..., tuple[int, str, str]]
NAMES = (FORMULA, OURS, OUR_NLL, "torch cross_entropy", "QuACK chunked")


@pytest.fixture
def benchmark(deft: Benchmark) -> Benchmark:
    """`deft benchmark` in this process, on the CPU: its exit status, stdout and stderr."""
    return functools.partial(deft, "benchmark", "--device", "cpu")


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("gemma3", {}),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 16}),
    ],
)
def test_the_shape_of_a_model_is_that_of_its_lm_head(
    architecture: str, overrides: dict[str, int], tmp_path: Path
) -> None:
    if architecture == "gemma3":  # The text's are inside.
        config = AutoConfig.for_model("gemma3", text_config={"vocab_size": 130, "hidden_size": 48})
        config.save_pretrained(tmp_path)
        assert shape.shape_of_model(str(tmp_path)) == (130, 48)
        return
    model = tiny_model(architecture, **overrides)
    model.config.save_pretrained(tmp_path)
    assert shape.shape_of_model(str(tmp_path)) == tuple(model.get_output_embeddings().weight.shape)


@pytest.mark.slow
def test_a_models_head_is_measured_beside_others(benchmark: Benchmark, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `report`")
    tiny_model("llama").config.save_pretrained(tmp_path / "model")
    only = [part for name in NAMES for part in ("--only", name)]
    output = tmp_path / "out"
    arguments = (tmp_path / "model", "--tokens", 64, "--masked", 0.5, "--repetitions", 1)
    status, out, errors = benchmark(*arguments, *only, "--output", output)
    assert status == 0, errors
    assert "N=64 V=128 H=32 float32, trainable head" in out
    assert "not measured, since it needs a GPU: QuACK chunked" in out
    results = files.read_results([output / "benchmark.csv"])
    assert [job.frozen for job in results] == [False, True]
    for found in results.values():
        assert list(found) == [*NAMES]
        assert found[OURS]["error"] < 1e-4
        assert found[OURS]["seconds"] > 0
    assert (output / "benchmark.png").stat().st_size > 1000


def test_sizes_and_one_head_are_measured_without_a_model(benchmark: Benchmark) -> None:
    status, out, errors = benchmark(
        *("--vocab", 131, "--hidden", 16, "--tokens", 32, "--head", "frozen"),
        *("--only", OURS, "--repetitions", 1),
    )
    assert status == 0, errors
    assert "N=32 V=131 H=16 float32, frozen head" in out
    assert "trainable" not in out


@pytest.mark.parametrize("options", [[], ["--all"]], ids=["fewer", "all"])
def test_on_a_cpu_few_are_measured_unless_all_are_asked_for(
    options: list[str], benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def run_worker(name: str, jobs: Sequence[Job], limit: float) -> list[dict[str, str]]:
        asked.append(name)
        return [{"absent": "it was only asked for"} for _ in jobs]

    monkeypatch.setattr(processes, "run_worker", run_worker)
    sizes = ("--vocab", 131, "--hidden", 16, "--head", "frozen")
    _, out, _ = benchmark(*sizes, *options)
    job = Job(512, 131, 16, True, "float32", "trained", "cpu", 5)
    can_run = [
        name
        for name, contestant in CONTESTANTS.items()
        if contestant.needs.unmet(Machine.here("cpu"), job) is None
    ]
    left_out = re.findall("^left out on a CPU, --all measures them too: (.*)$", out, re.M)
    if options:
        assert (asked, left_out) == (can_run, [])
    else:
        assert asked == [name for name in can_run if name in FEWER]
        assert left_out == ["; ".join(name for name in can_run if name not in FEWER)]
    assert {FORMULA, OURS, "torch cross_entropy"} <= set(asked)
    assert "torch linear_cross_entropy" in can_run
    # What cannot run here is named with its reason as ever.
    assert re.search(r"not measured, since it needs a GPU: .*QuACK chunked", " ".join(out.split()))


def test_where_nothing_can_be_measured_the_status_is_one(benchmark: Benchmark) -> None:
    status, out, errors = benchmark("--vocab", 128, "--hidden", 16, "--only", "QuACK chunked")
    assert status == 1
    assert "not measured, since" in out
    assert "deft benchmark: nothing could be measured." in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Name a MODEL, or its sizes with --vocab and --hidden."),
        (["--vocab", "128"], "Name a MODEL, or its sizes"),
        (["none"], "MODEL 'none' is neither a model's folder nor a model on the hub"),
        (["none", "--only", OURS, "--all"], "--only and --all are given. Leave one of them out."),
        (["--vocab", 8, "--hidden", 8, "--output", __file__], "is a file; it must be a folder"),
        (["none", "--only", "deft"], "--only 'deft' is unknown. Choices: 'formula on full logits'"),
        (["none", "--head", "tied"], "--head 'tied' is unknown. Choices: 'both', 'trainable', 'frozen'"),
        (["none", "--dtype", "int8"], "--dtype 'int8' is unknown. Choices: 'float32'"),
        (["none", "--device", "tpu"], "--device 'tpu' is unknown. Choices: 'auto', 'cuda', 'cpu'"),
        (["none", "--repetitions", "0"], "--repetitions '0': "),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_told_in_one_line(
    arguments: list[str], message: str, benchmark: Benchmark
) -> None:
    status, out, errors = benchmark(*arguments)
    assert (status, out) == (2, "")
    assert errors.startswith("deft benchmark: ")
    assert errors.count("\n") == 1
    assert message in errors
