"""Writes FigFont, the word-reading data of arXiv 2602.11424, as chat messages in JSON lines.

    python scripts/make_figfont.py                     # data/figfont/train.jsonl and test.jsonl

A question is a word of 2 to 5 letters drawn in one of some four hundred ASCII-art fonts, the answer is the
word: reasoning_gym's task `figlet_font` with seed 42, indices 0 to 39,999 for training and 40,000 to 44,999
for the test. reasoning_gym lists the fonts in the order of a directory, which differs between file
systems; sorted, the files are the same everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import reasoning_gym
import typer
from reasoning_gym.cognition import figlet_fonts
from reasoning_gym.dataset import ProceduralDataset
from rich.progress import track


def make_dataset(size: int, seed: int) -> ProceduralDataset:
    """The task's first `size` questions, with fonts in alphabetical order."""
    figlet_fonts.OK_FONTS.sort()
    return reasoning_gym.create_dataset(
        "figlet_font", seed=seed, size=size, min_word_len=2, max_word_len=5, space_letters=True
    )


def write_messages(path: Path, dataset: ProceduralDataset, indices: Iterable[int]) -> None:
    """Write one conversation a line: `{"messages": [user, assistant], "font": ...}`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for index in indices:
            entry = dataset[index]
            question = {"role": "user", "content": entry["question"]}
            answer = {"role": "assistant", "content": entry["answer"]}
            row = {"messages": [question, answer], "font": entry["metadata"]["font"]}
            file.write(json.dumps(row) + "\n")


def main(
    output: Path = typer.Option(Path("data/figfont"), help="Folder of the two files."),
    train: int = typer.Option(40_000, min=1, help="Training questions."),
    test: int = typer.Option(5_000, min=1, help="Test questions, which come after those."),
    seed: int = typer.Option(42, help="Seed of the task."),
) -> None:
    """Write the two files."""
    dataset = make_dataset(train + test, seed)
    splits = {"train": range(train), "test": range(train, train + test)}
    for split, indices in splits.items():
        path = output / f"{split}.jsonl"
        write_messages(path, dataset, track(indices, description=str(path)))


if __name__ == "__main__":
    typer.run(main)
