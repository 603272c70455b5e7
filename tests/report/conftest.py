"""A model that is small enough to be measured in a moment, data for it, and a browser where there is one."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from deft_plugin import report
from tests.tiny import tiny_model, tiny_tokenizer

# They need the extra `report`.
collect_ignore_glob = [] if all(map(find_spec, report.PACKAGES)) else ["test_*.py"]

ROOT = Path(__file__).parents[2]
BASE_MODEL = ROOT / "assets/base_model"
BASE_DATA = ROOT / "axolotl_configs/data/spell_backward_train.jsonl"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

Report = Callable[..., Path]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random model with a tokenizer of single characters."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Twelve prompts and completions."""
    return write_rows(
        tmp_path / "pairs.jsonl",
        [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}"} for i in range(12)],
    )


@pytest.fixture
def run(deft: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str]]:
    """`deft report` in this process: its exit status and what it says on stderr."""

    def run_report(*arguments: object) -> tuple[int, str]:
        status, _, errors = deft("report", *arguments)
        return status, errors

    return run_report


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Opens a page in a headless browser, and gives what it has become or, with a path, a picture of it."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    profile = tmp_path_factory.mktemp("profile")

    def open_page(page: Path, *, screenshot: Path | None = None, dark: bool = False) -> str:
        command = [
            found,
            *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--disable-dev-shm-usage", "--no-first-run", f"--user-data-dir={profile}"),
            # Whatever the page asks of a network fails.
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--window-size=1300,2400",
            "--virtual-time-budget=5000",
            f"--screenshot={screenshot}" if screenshot else "--dump-dom",
            page.as_uri(),
        ]
        process = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert process.returncode == 0, process.stderr
        return process.stdout

    return open_page


@pytest.fixture
def quick_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures in one dress, of few dots, and drawn once, not a second time to see how much room their texts take."""
    from matplotlib.figure import Figure

    from deft_plugin.report.figures import dress

    monkeypatch.setattr(dress, "DOTS_PER_INCH", 25)
    monkeypatch.setattr(dress, "DRESSES", (dress.LIGHT,))
    monkeypatch.setattr(Figure, "set_layout_engine", lambda *_, **__: None)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
