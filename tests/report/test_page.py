"""The page in a browser, with hostile text in it, and its size."""

from __future__ import annotations

import html.parser
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from deft_plugin.report import analysis
from deft_plugin.report.page import (
    PROMPT_CHARACTERS,
    _decimals,
    _percent,
    _probability,
    _shortened,
    _signed,
)
from deft_plugin.report.report import Options, make_report
from tests.runs import write_run

from .conftest import BASE_DATA, BASE_MODEL, write_rows

Run = Callable[..., tuple[int, str]]

HOSTILE = [
    "<script>document.title = 'taken over'</script>",
    "</script><script>document.title = 'taken over'</script>",
    "</div></article><img src=x onerror=\"document.title='taken over'\">",
    "{{ 7 * 7 }} {% raw %} &lt;b&gt; &amp; \"' `",
    "=HYPERLINK(1)",
    "<!--",
]
# Appended to a copy of the page: does what a reader does, and notes what comes of it.
READER = """
<script>
const found = {};
const tokens = [...document.querySelectorAll(".text i")];
const tip = document.getElementById("tip");
found.tokens = tokens.length;
found.hidden = tip.hidden;
tokens[1].dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
found.shown = !tip.hidden && tip.textContent;
document.querySelector(".text").dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));
found.moved = tokens[0].classList.contains("here");
document.querySelector(".text").dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
found.gone = tip.hidden;
const shade = document.getElementById("shade");
found.before = tokens.map((token) => token.style.getPropertyValue("--g"));
shade.value = "nll";
shade.dispatchEvent(new Event("change"));
found.after = [...new Set(tokens.map((token) => token.style.getPropertyValue("--g")))];
found.closed = document.querySelectorAll("[data-c]").length;
const out = document.createElement("pre");
out.id = "found";
out.textContent = JSON.stringify(found);
document.body.append(out);
</script>
"""


class Elements(html.parser.HTMLParser):
    """Every element's name and attributes, and what is open at the end."""

    VOID = ("meta", "img", "source", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a random model."""
    folder = tmp_path_factory.mktemp("page")
    rows = [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}"} for i in range(12)]
    data = write_rows(folder / "pairs.jsonl", rows)
    return make_report(Options(output=folder, model=str(model), data=str(data)))


def test_the_page_is_whole_and_asks_for_nothing(page: Path) -> None:
    elements = Elements(page.read_text(encoding="utf-8"))
    assert elements.open == []
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len({*ids})
    for tag, attributes in elements.found:
        for name in ("src", "srcset", "href"):
            value = attributes.get(name) or ""
            if tag in ("img", "source"):
                assert not value or value.startswith("data:image/png;base64,")
            elif value.startswith("#"):
                assert value[1:] in ids
            else:
                assert value in ("", "tokens.csv", "rows.csv")
        assert tag != "link"
        if tag == "img":
            assert attributes["alt"]
    for asking in ("@import", "url(", "fetch(", "XMLHttpRequest", "http://", "https://"):
        assert asking not in page.read_text(encoding="utf-8")


def test_a_reader_points_at_tokens_and_changes_the_shade(
    page: Path, browser: Callable[..., str], tmp_path: Path
) -> None:
    with_reader = tmp_path / "read.html"
    text = page.read_text(encoding="utf-8")
    with_reader.write_text(text.replace("</body>", READER + "</body>"), encoding="utf-8")
    dom = browser(with_reader)
    note = re.search(r'<pre id="found">(.*?)</pre>', dom)
    assert note is not None
    found = json.loads(html.unescape(note.group(1)))
    numbers = json.loads((page.parent / "report.json").read_text(encoding="utf-8"))
    assert found["tokens"] == numbers["standing"]["tokens"]
    assert found["hidden"]
    for word in ("p", "focus", "gate", "(deft)", "rank", "model's choice", "eaft"):
        assert word in found["shown"]
    assert found["moved"]
    assert found["gone"]
    assert len({*found["before"]}) > 3
    assert found["after"] == ["1"]
    assert found["closed"] == 0


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_is_drawn_light_and_dark(
    dark: bool, page: Path, browser: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "page.png"
    browser(page, screenshot=path, dark=dark)
    with Image.open(path) as image:
        picture = image.convert("L")
        assert picture.size == (1300, 2400)
        assert (picture.getpixel((5, 5)) < 60) == dark
        levels = picture.histogram()
    # Text and figures cover a part of it, in many shades.
    assert sum(count > 50 for count in levels) > 30
    assert max(levels) < 0.95 * 1300 * 2400


@pytest.mark.usefixtures("quick_drawing")
@pytest.mark.parametrize(
    ("options", "sections", "missing"),
    [
        (["--compare", "a", "b"], ["runs", "words"], ["deft report MODEL --data DATA", "--run RUN"]),
        (["--run", "a"], ["figures", "words"], ["deft report MODEL --data DATA", "--compare RUN RUN"]),
        (["--run", "a", "--compare", "a", "b"], ["runs", "figures", "words"], ["deft report MODEL --data DATA"]),
    ],
    ids=["compare", "run", "both"],
)  # fmt: skip
def test_without_a_model_the_page_begins_with_what_it_has(
    options: list[str],
    sections: list[str],
    missing: list[str],
    tmp_path: Path,
    run: Run,
    browser: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_run(tmp_path / name, objective="deft")
    status, errors = run(*options, "--output", "out")
    assert status == 0, errors
    dom = browser(tmp_path / "out" / "report.html")
    assert Elements((tmp_path / "out" / "report.html").read_text(encoding="utf-8")).open == []
    assert re.findall(r'<section id="(\w+)"', dom) == sections
    assert re.findall(r'<li><a href="#(\w+)"', dom) == sections
    # What the page has not got is told below it.
    hints = re.findall(r'<p class="hint">[^<]*<code>(.*?)</code>', dom)
    assert hints == missing
    assert dom.index('<p class="hint">') > dom.rindex("</section>")


@pytest.mark.usefixtures("quick_drawing")
def test_hostile_text_stays_text(
    model: Path, tmp_path: Path, run: Run, browser: Callable[..., str]
) -> None:
    rows = [{"prompt": text, "completion": text} for text in HOSTILE]
    data = write_rows(tmp_path / "<b>data.jsonl", rows)
    names = ("<script>run", "<script>other")
    runs = [write_run(tmp_path / name, objective="</td><script>") for name in names]
    output = tmp_path / "out"
    status, errors = run(
        model, "--data", data, "--output", output, "--run", runs[0], "--compare", *runs
    )
    assert status == 0, errors
    page = output / "report.html"
    elements = Elements(page.read_text(encoding="utf-8"))
    assert elements.open == []
    assert [tag for tag, _ in elements.found].count("script") == 2
    assert not any("onerror" in attributes for _, attributes in elements.found)
    dom = browser(page)
    assert "<title>What the gate does to your data</title>" in dom
    shown = "".join(re.findall(r'<div class="text".*?</div>', dom, re.DOTALL))
    text = html.unescape(re.sub(r"<[^>]*>", "", shown))
    for each in HOSTILE:
        assert text.count(each) >= 2, "in the prompt and in what is trained on"
    for line in (output / "tokens.csv").read_text(encoding="utf-8").splitlines()[1:]:
        assert not re.search(r",[=+\-@]", line.replace(",-", ",")), "a spreadsheet's formula"


@pytest.mark.usefixtures("quick_drawing")
def test_the_own_study_stands_beside_the_papers_findings(tmp_path: Path) -> None:
    for name, own in (("strong prior", "mean focus 0.98"), ("weak prior", "mean focus 0.36")):
        data = str(BASE_DATA)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(analysis, "regime_of", lambda _, name=name: Named(name))
            page = make_report(Options(output=tmp_path, model=str(BASE_MODEL), data=data, rows=2))
        text = page.read_text(encoding="utf-8")
        assert text.count("own study found") == text.count(own) == 1
        assert text.count("docs/which-objective.md") == 1


@dataclass(frozen=True)
class Named:
    """A regime, as far as the standing goes."""

    name: str


@pytest.mark.slow
def test_ten_thousand_tokens_are_below_five_megabytes(
    tmp_path: Path, run: Run, browser: Callable[..., str]
) -> None:
    runs = [write_run(tmp_path / f"run{index}", nll=[1.0] * 50) for index in range(3)]
    output = tmp_path / "out"
    status, errors = run(
        BASE_MODEL, "--data", BASE_DATA, "--rows", 170, "--after", BASE_MODEL, "--batch-size", 64,
        "--run", runs[0], "--compare", *runs, "--output", output,
    )  # fmt: skip
    assert status == 0, errors
    page = output / "report.html"
    tokens = page.read_text(encoding="utf-8").count("<i ")
    assert 9_900 <= tokens <= 10_000
    assert page.stat().st_size < 5e6
    assert "most silenced rows of 170" in browser(page)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (_decimals(None), "\u2013"),
        (_decimals(1234.5, 1), "1,234.5"),
        (_signed(None), "\u2013"),
        (_signed(-0.001), "0.00"),
        (_signed(-1.5), "\u22121.50"),
        (_percent(None), "\u2013"),
        (_percent(0.001), "<1\u00a0%"),
        (_percent(0.25), "25\u00a0%"),
        (_probability(None), "\u2013"),
        (_probability(0.0), "0.000"),
    ],
)
def test_numbers_as_they_are_read(written: str, expected: str) -> None:
    assert written == expected


def test_a_long_prompt_keeps_its_ends() -> None:
    text = "a" * PROMPT_CHARACTERS + "b" * 5_000 + "c" * PROMPT_CHARACTERS
    shortened = _shortened(text)
    assert shortened.startswith("a" * PROMPT_CHARACTERS + " [")
    assert shortened.endswith("] " + "c" * PROMPT_CHARACTERS)
    assert "5,000 characters left out" in shortened
    assert _shortened(text[: 2 * PROMPT_CHARACTERS]) == text[: 2 * PROMPT_CHARACTERS]
