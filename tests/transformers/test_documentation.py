"""The page's script runs as it stands, on a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_model, tiny_tokenizer
from tests.updates import logged

PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"


def test_the_script_trains_and_keeps_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model("qwen3").save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    rows = [{"prompt": f"{a} + {a} =", "completion": f" {2 * a}"} for a in range(20)]
    Path("rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    script: Any = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(script[1].replace("Qwen/Qwen3-0.6B-Base", "model"), names)
    values = logged(names["trainer"], "eval_nll")
    assert len(values) == 3
    assert names["trainer"].state.best_metric == min(values)
