"""A plugin for pytest that runs TRL's tests offline: data sets made here, and objectives as the default loss.

Environment: TRL_TESTS_LOSS is the default of SFTConfig's loss_type, one of deft_plugin's names, or empty to leave TRL
as it is; TRL_TESTS_RESULTS is the file that outcomes are written to, as JSON.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import datasets
import local_hub
import pytest
import torch
import trl
from transformers.utils import import_utils as transformers_utils
from trl import import_utils
from trl.trainer import base_config, sft_trainer

import deft_plugin

datasets.load_dataset = local_hub.load_dataset  # Before the tests import it.

_outcomes: dict[str, list[str]] = {}


def _absent(name: str) -> Any:
    """What tests of another version import and this one does not have: skips a test, or says that a package is not there."""
    if name.startswith("__") or name == "add_fused_lm_head":  # Asked for to tell versions apart.
        raise AttributeError(name)
    if name.startswith("is_"):
        return lambda: False
    return lambda *args, **kwargs: pytest.skip(f"this version of TRL has no {name}")


def _train_on_the_cpu() -> None:
    """What configurations of some versions have to be told, since they ask for bfloat16 by default."""
    original: Any = base_config._BaseConfig.__post_init__

    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        self.use_cpu = True
        original(self)

    base_config._BaseConfig.__post_init__ = __post_init__


def _make_default(loss_type: str) -> None:
    """Let SFTConfig have this loss_type where none is given, and SFTTrainer such a one where it would make its own."""
    deft_plugin.register()
    make_config: Any = trl.SFTConfig.__init__
    make_trainer: Any = trl.SFTTrainer.__init__

    @functools.wraps(make_config)
    def init_config(self: Any, *args: Any, **kwargs: Any) -> None:
        make_config(self, *args, **{"loss_type": loss_type, **kwargs})

    @functools.wraps(make_trainer)
    def init_trainer(self: Any, model: Any, args: Any = None, **kwargs: Any) -> None:
        if not isinstance(args, trl.SFTConfig):
            fields = {"output_dir": "trained"} if args is None else args.to_dict()
            args = trl.SFTConfig(**fields)
        make_trainer(self, model, args, **kwargs)

    trl.SFTConfig.__init__ = init_config
    trl.SFTTrainer.__init__ = init_trainer


for module in (import_utils, sft_trainer):
    vars(module)["__getattr__"] = _absent
if not torch.accelerator.is_available():
    _train_on_the_cpu()
    # Packages whose kernels run on a GPU only.
    vars(import_utils)["is_liger_kernel_available"] = lambda *args, **kwargs: False
    vars(transformers_utils)["is_flash_linear_attention_available"] = lambda: False
if os.environ.get("TRL_TESTS_LOSS"):
    _make_default(os.environ["TRL_TESTS_LOSS"])


@pytest.fixture
def lazy_shared_datadir() -> Path:
    """The files of TRL's tests, which a plugin of its own would give."""
    return Path("tests/data").resolve()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep the outcome, and the last line of what went wrong."""
    if report.when != "call" and report.outcome == "passed":
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    reason = crash.message.strip().splitlines()[0][:200] if crash is not None else ""
    _outcomes[report.nodeid.partition("::")[2]] = [report.outcome, reason]


def pytest_sessionfinish() -> None:
    """Write the outcomes."""
    Path(os.environ["TRL_TESTS_RESULTS"]).write_text(json.dumps(_outcomes))
