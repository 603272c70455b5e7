"""The tiny models of the scripts."""

from tests.scripts.conftest import SCRIPTS

__all__ = ["SCRIPTS"]
