"""The picture in the docs shows parts of a page that `deft report` has written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.report.conftest import BASE_DATA, BASE_MODEL

picture = pytest.importorskip("report_picture", reason="needs the extra `scripts`")


@pytest.mark.skipif(not any(map(shutil.which, picture.BROWSERS)), reason="no browser")
def test_parts_of_a_report_are_drawn(tmp_path: Path) -> None:
    import typer

    app = typer.Typer()
    app.command()(picture.main)
    output = tmp_path / "report.png"
    arguments = ["--model", str(BASE_MODEL), "--data", str(BASE_DATA), "--rows", "4"]
    arguments += ["--report", str(tmp_path / "report"), "--output", str(output)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "report" / "report.html").exists()
    assert 10_000 < output.stat().st_size < picture.MOST_BYTES
    with Image.open(output) as image:
        width, height = image.size
        assert width == picture.WIDTH
        # All that is shown, and no empty end.
        assert 1000 < height < picture.HEIGHT


def test_the_picture_in_the_docs_is_small(scripts: Path) -> None:
    path = scripts.parent / "docs" / "report.png"
    assert path.stat().st_size <= picture.MOST_BYTES
