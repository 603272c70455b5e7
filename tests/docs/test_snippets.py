"""Python in README and docs compiles, and names what is there."""

from __future__ import annotations

import ast
import functools
import importlib
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import deft_plugin
from tests.docs.pages import PAGES, ROOT, Block, snippets, spans
from tests.tiny import tiny_model

SNIPPETS = snippets()


def _id(block: Block) -> str:
    return f"{block.page.name}: {block.text.splitlines()[0]}"


@pytest.mark.parametrize("block", SNIPPETS, ids=_id)
def test_it_compiles_and_its_imports_are_there(block: Block) -> None:
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)


def test_names_of_this_package_in_sentences_are_there() -> None:
    names = {
        (page.name, match)
        for page in PAGES
        for span in spans(page)
        for match in re.findall(r"\bdeft_plugin(?:\.[A-Za-z_]\w*)+", span)
        # Without Axolotl its adapter cannot be imported, and says so.
        if find_spec("axolotl") or "deft_plugin.axolotl" not in match
    }
    assert ("README.md", "deft_plugin.register") in names
    assert [f"{page}: {name}" for page, name in sorted(names) if not _is_there(name)] == []


def _is_there(name: str) -> bool:
    value: Any = importlib.import_module("deft_plugin")
    done = "deft_plugin"
    for part in name.split(".")[1:]:
        done = f"{done}.{part}"
        try:
            value = getattr(value, part)
        except AttributeError:
            try:
                value = importlib.import_module(done)
            except ImportError:
                return False
    return True


def _run(start: str, names: dict[str, Any]) -> dict[str, Any]:
    (block,) = (each for each in SNIPPETS if each.text.startswith(start))
    exec(compile(block.text, str(block.page), "exec"), names)
    return names


def test_a_loop_of_ones_own() -> None:
    model = tiny_model("qwen3")
    input_ids = torch.randint(5, 100, (2, 8))
    names = _run("from deft_plugin import add_gated_head", {"model": model, "input_ids": input_ids})
    assert names["output"].gate.shape == (2, 7)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert deft_plugin.gated_head_of(model) is None


def test_tensors_alone() -> None:
    hidden = torch.randn(6, 16, requires_grad=True)
    lm_head = torch.nn.Linear(16, 32)
    targets = torch.randint(0, 32, (6,))
    logits = lm_head(hidden).detach()
    names = _run(
        "from deft_plugin import gated_loss",
        {"hidden": hidden, "lm_head": lm_head, "targets": targets, "logits": logits},
    )
    assert names["result"].token_loss.shape == (6,)
    assert hidden.grad is not None


@pytest.mark.usefixtures("own_objectives", "trl_as_it_was")
def test_an_objective_of_ones_own() -> None:
    trl = pytest.importorskip("deft_plugin.trl", reason="needs the extra `trl`")
    config = functools.partial(trl.SFTConfig, use_cpu=True, bf16=False)
    _run("@deft_plugin.objective", {"deft_plugin": deft_plugin, "SFTConfig": config})
    p = torch.tensor([0.3, 0.9]).double().log().requires_grad_()
    focal = deft_plugin.build_objective("focal", {"gamma": 1.5})
    statistics = deft_plugin.TokenStatistics(p.detach(), 10)
    torch.testing.assert_close(
        focal.loss(p, statistics), -((1 - p.exp()) ** 1.5) * p, rtol=1e-12, atol=0
    )


def test_columns_are_renamed_into_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="needs the extra `trl`")
    monkeypatch.chdir(tmp_path)
    row = {"question": "So?", "answer": " No"}
    Path("mine.jsonl").write_text(json.dumps(row))
    _run("from datasets import load_dataset\n\nrows = ", {})
    (line,) = Path("data/train.jsonl").read_text().splitlines()
    assert json.loads(line) == {"prompt": "So?", "completion": " No"}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    assert len((ROOT / "docs/design.md").read_text().splitlines()) <= 100
