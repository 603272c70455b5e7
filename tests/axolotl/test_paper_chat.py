"""The paper's YAMLs: the chat of scripts/paper, and those that docs/paper.md makes of them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from axolotl.utils.chat_templates import get_chat_template

from tests.tiny import tiny_tokenizer

from .running import GPU, validate
from .test_configs import PAPER, ROOT, load

CONVERSATIONS = [
    [{"role": "user", "content": " 2 + 2? \n"}],
    [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "\n4 "}],
    [{"role": "system", "content": "Count."}, {"role": "user", "content": "2?"}],
]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_the_llama_3_chat_is_axolotls(
    conversation: list[dict[str, Any]], add_generation_prompt: bool
) -> None:
    (name,) = {load(path)["chat_template"] for path in PAPER}
    tokenizer = tiny_tokenizer()
    ours, theirs = (
        tokenizer.apply_chat_template(
            conversation,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        for template in (
            (ROOT / "scripts/paper/llama3.jinja").read_text(),
            get_chat_template(name),
        )
    )
    assert ours == theirs


def test_the_yamls_tokens_are_those_of_scripts_paper() -> None:
    code = (ROOT / "scripts/paper/chat.py").read_text()
    for path in PAPER:
        tokens = load(path)["special_tokens"]
        assert f'LLAMA3_PAD = "{tokens["pad_token"]}"' in code
        assert f'LLAMA3_END = "{tokens["eos_token"]}"' in code


def test_the_documented_command_makes_the_other_objectives_yamls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs/paper.md").read_text()
    command = text[text.index("mkdir -p runs/paper && for") :].split("\n\n")[0]
    shutil.copytree(ROOT / "axolotl_configs", tmp_path / "axolotl_configs")
    subprocess.run(["bash", "-ec", command], cwd=tmp_path, check=True)
    made = sorted((tmp_path / "runs/paper").glob("*.yaml"))
    assert len(made) == 9
    monkeypatch.chdir(ROOT)
    for path in made:
        experiment, objective = path.stem.split("-")
        cfg = validate(load(path), {**GPU, "n_gpu": 8})
        assert (cfg.deft_objective, cfg.output_dir) == (
            objective,
            f"runs/paper-{experiment}-{objective}",
        )
        same = load(ROOT / f"axolotl_configs/paper-{experiment}-deft.yaml")
        changed = {
            key for key, value in yaml.safe_load(path.read_text()).items() if same[key] != value
        }
        assert changed == {"deft_objective", "output_dir"}
