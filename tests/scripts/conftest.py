"""The scripts import each other by name, as they do when they are run."""

import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))


@pytest.fixture
def scripts() -> Path:
    """The folder of the scripts."""
    return SCRIPTS
