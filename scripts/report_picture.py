"""docs/report.png: parts of a real report, as a browser draws them.

    python scripts/report_picture.py                    # SmolLM2-135M-Instruct on word problems, both out of packages
    python scripts/report_picture.py --data gsm8k/train.jsonl --columns question,answer    # the page in the docs

Chromium or Chrome has to be installed. The report itself stays in --report, as `deft report` writes it; of a copy of its page all
but `SHOWN` is hidden.
"""

from __future__ import annotations

import process_setup  # noqa: F401

# isort: split
import io
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from bad_values import as_bad_parameters
from PIL import Image, ImageChops
from real_data import get_real_data
from real_model import get_real_model

from deft_plugin.report.report import Options, make_report

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTH, HEIGHT = 1080, 4000
MARGIN = 24
# Elements of the page, a section's heading with what is in it.
SHOWN = (
    "header",
    "#data",
    "#data > :is(h2, .lead, .tiles, #figure-regimes, #figure-gates)",
    "#tokens",
    "#tokens > :is(h2, .warning, #rows, #rows ~ .controls)",
    "#tokens > article:nth-of-type(-n+2)",
)
STYLE = f"""<style>
nav, main > *, section > *, figcaption {{ display: none !important; }}
body {{ display: block; }}
{", ".join(SHOWN)} {{ display: block !important; }}
#data#data > .tiles {{ display: grid !important; }}
</style>
"""
MOST_BYTES = 300_000


def picture_of(page: Path, browser: str) -> Image.Image:
    """What the browser draws of the shown parts, cut to them."""
    with tempfile.TemporaryDirectory() as folder:
        copy, drawn = Path(folder, "page.html"), Path(folder, "page.png")
        text = page.read_text(encoding="utf-8")
        copy.write_text(text.replace("</head>", f"{STYLE}</head>"), encoding="utf-8")
        subprocess.run(
            [
                browser,
                *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *("--disable-dev-shm-usage", "--no-first-run", f"--user-data-dir={folder}/profile"),
                *("--blink-settings=preferredColorScheme=1", f"--window-size={WIDTH},{HEIGHT}"),
                *("--virtual-time-budget=5000", f"--screenshot={drawn}", copy.as_uri()),
            ],
            check=True,
            capture_output=True,
        )
        with Image.open(drawn) as image:
            whole = image.convert("RGB")
    background = Image.new("RGB", whole.size, whole.getpixel((1, 1)))
    found = ImageChops.difference(whole, background).getbbox()
    assert found is not None
    return whole.crop((0, 0, WIDTH, min(found[3] + MARGIN, HEIGHT)))


def as_png(image: Image.Image) -> bytes:
    """With a palette, a third of the size."""
    buffer = io.BytesIO()
    image.quantize(255).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main(
    model: Annotated[str | None, typer.Option(help="By default SmolLM2-135M-Instruct.")] = None,
    data: Annotated[str | None, typer.Option(help="By default the word problems of ASDiv.")] = None,
    columns: Annotated[str | None, typer.Option(help="As of `deft report`.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to draw.")] = 48,
    report: Annotated[Path, typer.Option(help="Folder for the report.")] = ROOT / "runs/report",
    output: Annotated[Path, typer.Option(help="The picture.")] = ROOT / "docs/report.png",
) -> None:
    """Make a report and a picture of it."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        raise typer.BadParameter(f"no browser: none of {', '.join(BROWSERS)} is installed.")
    with as_bad_parameters():
        page = make_report(
            Options(
                output=report,
                model=model or str(get_real_model()),
                data=data or str(get_real_data("asdiv") / "train.jsonl"),
                columns=columns,
                rows=rows,
            )
        )
    png = as_png(picture_of(page, browser))
    if len(png) > MOST_BYTES:
        typer.echo(f"{len(png):,} bytes are more than {MOST_BYTES:,}; fewer parts in SHOWN.")
        raise typer.Exit(1)
    output.write_bytes(png)
    typer.echo(f"{output} ({len(png) / 1000:.0f} kB)")


if __name__ == "__main__":
    typer.run(main)
