"""Names that are no model's: each is told in one line, with what is expected."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import LlamaConfig

from deft_plugin.model_config import config_of_model

EXPECTED = "Expected: a folder with config.json, or a name on the hub such as 'Qwen/Qwen3-0.6B'."


class Hub(BaseHTTPRequestHandler):
    """What the hub answers for a model that it does not have, and for one that it does not give to everyone."""

    def do_HEAD(self) -> None:
        is_gated = self.path.startswith("/owner/gated/")
        self.send_response(403 if is_gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if is_gated else "RepoNotFound")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    """A hub on this machine, and nothing downloaded before."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def message(name: object, **options: bool) -> str:
    with pytest.raises(ValueError, match="is neither") as raised:
        config_of_model(str(name), "MODEL", **options)
    assert raised.value.__suppress_context__
    return str(raised.value)


def test_a_models_folder(tmp_path: Path) -> None:
    LlamaConfig(hidden_size=64).save_pretrained(tmp_path)
    assert config_of_model(str(tmp_path), "MODEL").hidden_size == 64


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "the folder is empty"),
        ({"model.safetensors": ""}, "the folder has no config.json"),
        ({"config.json": "{"}, "its config.json cannot be used (It looks like the config file at"),
        ({"config.json": '{"model_type": "none"}'}, "its config.json cannot be used (The checkpoint you"),
        ({"config.json": '{"model_type": "llama", "hidden_size": 48}'}, "its config.json cannot be used (Class validation error"),
        ({"adapter_config.json": "{}"}, "the folder has an adapter, and no config.json: name the model"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_models(files: dict[str, str], reason: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    told = message(tmp_path)
    assert told.startswith(
        f"MODEL {str(tmp_path)!r} is neither a model's folder nor a model on the hub: {reason}"
    )
    assert told.endswith(EXPECTED)
    assert len(told) < 400 + 2 * len(str(tmp_path))


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    assert "hub: it is a file that holds no model's configuration. Exp" in message(
        tmp_path / "rows.jsonl"
    )


@pytest.mark.parametrize("name", ["./none", "/no/such/folder", "runs/a/b", "a name"])
def test_what_can_be_no_name_on_the_hub(name: str) -> None:
    assert message(name) == (
        f"MODEL {name!r} is neither a model's folder nor a model on the hub: there is no such folder. {EXPECTED}"
    )


def test_a_name_while_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert message("owner/none") == (
        "MODEL 'owner/none' is neither a model's folder nor a model on the hub: it was not downloaded before, and the hub may "
        f"not be asked (HF_HUB_OFFLINE is set). {EXPECTED}"
    )


def test_a_hub_that_cannot_be_reached(
    hub: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.shutdown()
    hub.server_close()
    # The hub's client tries again and again.
    monkeypatch.setattr(time, "sleep", lambda _: None)
    # Of older versions of transformers the second half too.
    assert re.search(
        r"it was not downloaded before, and the hub cannot be reached( or has none of that name)?\. Exp",
        message("owner/none"),
    )


@pytest.mark.usefixtures("hub")
def test_what_the_hub_does_not_have_or_give() -> None:
    assert "hub: the hub has none of that name, or keeps it private (hf auth login). Exp" in (
        message("owner/none")
    )
    assert "hub: the hub gives it only to those whom its owner lets in (hf auth login). Exp" in (
        message("owner/gated")
    )


def test_where_an_adapter_would_do_too(tmp_path: Path) -> None:
    told = message(tmp_path, or_adapter=True)
    assert "is neither an adapter nor a model's folder nor a model on the hub: the folder" in told
    assert "Expected: a folder with config.json or adapter_config.json, or a name" in told
