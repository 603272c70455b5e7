"""Where path "quack" cannot run: refused with every reason and a way out, and never chosen by "auto"."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deft_plugin import linear_gated_loss
from deft_plugin.ops import availability

from .cases import DEVICE, gated, random_case

OBSTACLES: list[tuple[dict[str, Any], str]] = [
    ({"dtype": torch.float32}, r"multiplies in bfloat16.*torch\.float32"),
    ({"bias": True}, "lm_head has a bias"),
    ({"rank": 4}, "low-rank addition"),
    ({"logit_scale": 0.5}, r"logit_scale=0\.5"),
    ({"softcap": 30.0}, r"softcap=30\.0"),
    ({"vocab_size": 320}, "size, 320, is no multiple of 128"),
    ({"hidden_size": 12}, "hidden size, 12, is no multiple of 8"),
]


@pytest.mark.parametrize(("options", "message"), OBSTACLES)
def test_what_it_does_not_fit_is_named_with_a_way_out(
    emulated: Any, options: dict[str, Any], message: str
) -> None:
    options = {"vocab_size": 384, "hidden_size": 16, "dtype": torch.bfloat16} | options
    with pytest.raises(ValueError, match=f"path='quack' cannot run: .*{message}.*Use 'auto'"):
        gated("quack", random_case(3, **options))


def test_other_refusals(emulated: Any) -> None:
    case = random_case(3, 384, hidden_size=16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="the 20 largest logits"):
        gated("quack", case, "eaft")
    with pytest.raises(ValueError, match="skip_below would be ignored with path='quack'"):
        gated("quack", case, skip_below=0.1)
    shifted = torch.zeros(128 * 16 + 1).bfloat16()[1:].view(128, 16)
    with pytest.raises(ValueError, match="does not begin at a multiple of 16 bytes"):
        linear_gated_loss(
            torch.zeros(3, 16).bfloat16(), shifted, torch.zeros(3, dtype=torch.int64), path="quack"
        )
    hidden, weight = torch.zeros(3, 128).bfloat16(), torch.zeros(128, 128).bfloat16().t()
    with pytest.raises(ValueError, match=r"weight is not contiguous; its strides are \(1, 128\)"):
        linear_gated_loss(hidden, weight, torch.zeros(3, dtype=torch.int64), path="quack")


@pytest.mark.skipif(DEVICE.type != "cpu", reason="not on a GPU")
def test_obstacles_are_named_together() -> None:
    with pytest.raises(ValueError, match=r"'cpu' is no NVIDIA GPU.*bfloat16.*has a bias"):
        gated("quack", random_case(3, 384, hidden_size=16, dtype=torch.float32, bias=True))
    with pytest.raises(ValueError, match="path='quack' cannot run: 'cpu' is no NVIDIA GPU"):
        availability.resolve_path("quack", torch.device("cpu"))


def test_a_gpu_of_another_capability_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    with pytest.raises(ValueError, match=r"A GPU has compute capability 8\.9, and it is for 9\.x"):
        availability.resolve_path("quack", torch.device("cuda"))


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, "not installed; it comes with the extra 'quack'"),
        ("0.7.0", r"is 0\.7\.0.*>=0\.6\.5,<0\.7"),
    ],
)
def test_another_version_is_refused(
    monkeypatch: pytest.MonkeyPatch, version: str | None, message: str
) -> None:
    def installed(name: str) -> str:
        assert name == "quack-kernels"
        if version is None:
            raise availability.importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(availability.importlib.metadata, "version", installed)
    availability._quack_package.cache_clear()
    try:
        with pytest.raises(ValueError, match=message):
            availability.resolve_path("quack", torch.device("cpu"))
    finally:
        availability._quack_package.cache_clear()


def test_auto_never_chooses_it(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def launched(*args: Any) -> None:
        raise AssertionError("path='auto' launched QuACK's product")

    monkeypatch.setattr(emulated, "exponentials", launched)
    case = random_case(3, 384, hidden_size=16, dtype=torch.bfloat16)
    assert gated("auto", case).loss.isfinite()
