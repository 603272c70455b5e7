"""SFTConfig with objectives is a TrainingArguments like any other: printed, saved, copied and parsed."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from transformers import HfArgumentParser
from trl import TrlParser

import deft_plugin
from deft_plugin.objectives.registry import RESERVED_PARAMETERS
from deft_plugin.trl import SFTConfig

PARAMETERS = {"floor_coefficient": 0.25, "scope": "fixed", "mean_probability": 0.5}


@pytest.fixture(params=["package", "registered"])
def config_class(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The package's SFTConfig, and TRL's own after `register`."""
    if request.param == "package":
        yield SFTConfig
        return
    deft_plugin.register()
    yield trl.SFTConfig
    deft_plugin.unregister()


def make(config_class: Any, output_dir: Path, **values: Any) -> Any:
    defaults: dict[str, Any] = {"loss_type": "cayley_trans", "loss_kwargs": PARAMETERS}
    return config_class(
        output_dir=str(output_dir), bf16=False, use_cpu=True, **{**defaults, **values}
    )


def test_dicts_and_json_have_loss_type_and_parameters(config_class: Any, tmp_path: Path) -> None:
    args = make(config_class, tmp_path)
    for written in (args.to_dict(), json.loads(args.to_json_string()), dataclasses.asdict(args)):
        assert written["loss_type"] == "cayley_trans"
        assert written["loss_kwargs"] == PARAMETERS
    assert args.to_sanitized_dict()["loss_kwargs"] == str(PARAMETERS)
    assert "floor_coefficient" in str(args)


def test_saved_and_pickled_arguments_come_back(config_class: Any, tmp_path: Path) -> None:
    args = make(config_class, tmp_path)
    torch.save(args, tmp_path / "training_args.bin")
    for loaded in (
        torch.load(tmp_path / "training_args.bin", weights_only=False),
        pickle.loads(pickle.dumps(args)),
    ):
        assert type(loaded) is config_class
        assert (loaded.loss_type, loaded.loss_kwargs) == ("cayley_trans", PARAMETERS)


def test_replace_keeps_the_parameters_and_checks_new_ones(
    config_class: Any, tmp_path: Path
) -> None:
    args = make(config_class, tmp_path)
    replaced = dataclasses.replace(args, learning_rate=1e-3)
    assert (replaced.loss_type, replaced.loss_kwargs) == ("cayley_trans", PARAMETERS)
    with pytest.raises(ValueError, match="'a'"):
        dataclasses.replace(args, loss_kwargs={"a": 0.5})


def test_json_text_is_read(config_class: Any, tmp_path: Path) -> None:
    args = make(config_class, tmp_path, loss_kwargs=json.dumps(PARAMETERS))
    assert args.loss_kwargs == PARAMETERS


def test_argument_parser_takes_names_and_json(config_class: Any, tmp_path: Path) -> None:
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
    flags += ["--loss_type", "cayley_trans", "--loss_kwargs", json.dumps(PARAMETERS)]
    for parser in (HfArgumentParser(config_class), TrlParser(config_class)):
        (args,) = parser.parse_args_into_dataclasses(flags)
        assert (args.loss_type, args.loss_kwargs) == ("cayley_trans", PARAMETERS)
        (args,) = parser.parse_args_into_dataclasses(flags[:5])
        # Not all of TRL's versions have the same default.
        assert args.loss_type in ("nll", "chunked_nll")
        assert args.loss_kwargs is None


def test_help_names_every_objective(config_class: Any) -> None:
    text = " ".join(HfArgumentParser(config_class).format_help().split())
    assert "loss_kwargs" in text
    assert [name for name in deft_plugin.objective_names() if name not in text] == []
    settings = [name for name in RESERVED_PARAMETERS if name != "module"]
    assert [name for name in settings if name not in text] == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss_type": "deftt"}, r"(?s)loss_type='deftt'.*deft.*cayley_trans.*TRL's own: 'nll'"),
        ({"loss_type": "DEFT"}, r"'DEFT'. Did you mean 'deft'\?"),
        ({"loss_type": "deft", "loss_kwargs": {"tile_row": 5}}, r"Did you mean 'tile_rows'\?"),
        ({"loss_type": "alpha", "loss_kwargs": {"b": 1}}, "'b'"),
        ({"loss_type": "alpha", "loss_kwargs": {"a": -1}}, "'a'.*-1"),
        (
            {"loss_type": "deft", "loss_kwargs": {"alpha": 0.5}},
            r"'deft' has no parameter 'alpha'\. It takes no parameters of its own\. For every objective loss_kwargs "
            r"also takes: path, tile_rows, skip_below, histograms\.",
        ),
        (
            {"loss_type": "eaft", "loss_kwargs": {"alpha": 2}},
            r"'eaft' has no parameter 'alpha'\. Valid choices: entropy, k, normalizer, exponent\. For every objective loss_kwargs also takes: path",
        ),
        ({"loss_type": "nll", "loss_kwargs": {"a": 0.5}}, r"'a': 0.5.*would be ignored.*'nll'"),
        ({"loss_type": "deft", "loss_kwargs": {"path": "cuda"}}, "path='cuda'.*'chunked'"),
        ({"loss_type": "deft", "loss_kwargs": {"skip_below": 2}}, r"skip_below is 2.*\[0, 1\)"),
        (
            {"loss_type": "deft", "loss_kwargs": {"histograms": "yes"}},
            "histograms is 'yes'; it must be true",
        ),
        ({"loss_type": "deft", "loss_kwargs": {"histogram": True}}, r"Did you mean 'histograms'\?"),
        ({"loss_type": "nll", "loss_kwargs": {"histograms": True}}, "would be ignored.*'nll'"),
        ({"loss_type": "alpha", "loss_kwargs": "a=1"}, "loss_kwargs='a=1' is not JSON"),
        ({"loss_type": "alpha", "loss_kwargs": "[1]"}, "loss_kwargs.*must be a dict"),
        ({"loss_type": "alpha", "loss_kwargs": [1]}, "loss_kwargs.*must be a dict"),
        # TRL would train on answers without their ends.
        ({"loss_type": "deft", "max_length": -5}, "max_length=-5 must be a whole number of at"),
        ({"loss_type": "nll", "max_length": 0}, "max_length=0 must be a whole number of at least"),
        ({"loss_type": "deft", "pad_to_multiple_of": 0}, "pad_to_multiple_of=0 must be a whole"),
    ],
    ids=str,
)
def test_wrong_name_or_parameter_is_refused_when_the_configuration_is_made(
    config_class: Any, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(config_class, tmp_path, **{"loss_kwargs": None, **values})


@pytest.mark.parametrize(
    "values", [{"max_length": None}, {"pad_to_multiple_of": None}, {"pad_to_multiple_of": 8}]
)
def test_lengths_may_be_left_open(
    config_class: Any, tmp_path: Path, values: dict[str, Any]
) -> None:
    args = make(config_class, tmp_path, **values)
    assert {name: getattr(args, name) for name in values} == values
