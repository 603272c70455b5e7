"""MkDocs' hooks: the same Markdown for a code host and for the site.

- The README, and other pages of the repository's root, are pages of the site.
- Links out of docs, to a script or a folder, lead to a page with that file's text: the site needs no other host.
- Formulas between dollar signs become MathML, which browsers draw themselves; the font for it comes along.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

import ziamath
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# Repository files that are pages: path in the repository, and on the site.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
SOURCE = "source"
MATH_FONT = Path(ziamath.__file__).parent / "fonts" / "STIXTwoMath-Regular.ttf"
LANGUAGES = {".py": "python", ".json": "json", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}

_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
_CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\(\(|\[)(.*?)\\(?:\)|\])</\1>', re.DOTALL)

_NORM = "&#x02016;"


def on_files(files: Files, config: Any) -> Files:
    """Add the root's pages, a page for every file and folder outside docs that a page links to, and the font."""
    files.append(File.generated(config, f"assets/{MATH_FONT.name}", abs_src_path=str(MATH_FONT)))
    for path, uri in PAGES.items():
        if (ROOT / path).exists():
            _add(files, config, uri, (ROOT / path).read_text(encoding="utf-8"))
    texts = [
        (_repository_path(file.src_uri), file.content_string)
        for file in files.documentation_pages()
    ]
    linked = {
        target
        for path, text in texts
        for target in map(lambda link, base=path: _resolve(link, base), _links(text))
        if not _is_in_docs(target) and target not in PAGES and (ROOT / target).exists()
    }
    for target in sorted(linked):
        _add_source(files, config, target)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links at the pages of this site."""
    here = page.file.src_uri
    if here.startswith(f"{SOURCE}/"):
        return markdown
    base = _repository_path(here)

    def rewritten(match: re.Match[str]) -> str:
        link, anchor = match[1], match[2] or ""
        if _is_elsewhere(link):
            return match[0]
        return (
            posixpath.relpath(_site_path(_resolve(link, base)), posixpath.dirname(here) or ".")
            + anchor
        )

    return _outside_code(markdown, lambda text: _LINK.sub(rewritten, text))


def on_page_content(content: str, **_: Any) -> str:
    """Write formulas as MathML.

    Raises:
        ValueError: a formula has a command that is not known.
    """

    def as_mathml(match: re.Match[str]) -> str:
        formula = html.unescape(match[3])
        text = convert(
            formula.replace(r"\arg", r"\mathrm{arg}\,"),
            display="inline" if match[2] == "(" else "block",
        )
        if "\\" in text:
            raise ValueError(f"{formula!r} cannot be written as MathML: {text}")
        # Norms do not grow with what stands between them.
        return text.replace(f"<mo>{_NORM}", f'<mo stretchy="false">{_NORM}')

    return _FORMULA.sub(as_mathml, content)


def _add(files: Files, config: Any, uri: str, text: str) -> None:
    files.append(File.generated(config, uri, content=text))


def _add_source(files: Files, config: Any, target: str) -> None:
    """A page with a file's text, or for a folder with those of all its files."""
    path = ROOT / target
    uri = _site_path(target)
    if files.get_file_from_path(uri) is not None:
        return
    if path.is_file():
        language = LANGUAGES.get(path.suffix, "text")
        body = f"````{language}\n{path.read_text(encoding='utf-8')}\n````"
    else:
        inside = sorted(each for each in path.iterdir() if _is_shown(each))
        for each in inside:
            _add_source(files, config, f"{target}/{each.name}")
        body = "\n".join(
            f"- [`{each.name}`]({posixpath.relpath(_site_path(f'{target}/{each.name}'), posixpath.dirname(uri))})"
            for each in inside
        )
    _add(files, config, uri, f"---\nsearch: {{exclude: true}}\n---\n\n# `{target}`\n\n{body}\n")


def _is_shown(path: Path) -> bool:
    if path.name.startswith((".", "__pycache__")):
        return False
    return path.is_dir() or path.suffix in (
        *LANGUAGES,
        ".txt",
        ".md",
        ".jinja",
        ".jsonl",
        ".html",
        ".css",
        ".js",
    )


def _links(markdown: str) -> list[str]:
    found: list[str] = []

    def collect(text: str) -> str:
        found.extend(match[1] for match in _LINK.finditer(text) if not _is_elsewhere(match[1]))
        return text

    _outside_code(markdown, collect)
    return found


def _outside_code(markdown: str, change: Any) -> str:
    """`change` of what stands between pieces of code; links' texts may hold code, links do not."""
    parts, end = [], 0
    for match in _CODE.finditer(markdown):
        parts += [change(markdown[end : match.start()]), match[0]]
        end = match.end()
    return "".join([*parts, change(markdown[end:])])


def _is_elsewhere(link: str) -> bool:
    return re.match(r"[a-z]+:", link) is not None


def _is_in_docs(target: str) -> bool:
    return target.startswith("docs/")


def _resolve(link: str, base: str) -> str:
    """A link of the page at `base`, as a path in the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(base), link))


def _repository_path(uri: str) -> str:
    """Where a page of the site stands in the repository."""
    by_uri = {page: path for path, page in PAGES.items()}
    return by_uri.get(uri, f"docs/{uri}")


def _site_path(target: str) -> str:
    """Where a file of the repository stands on the site."""
    if target in PAGES:
        return PAGES[target]
    if _is_in_docs(target):
        return target.removeprefix("docs/")
    return f"{SOURCE}/{target}.md" if (ROOT / target).is_file() else f"{SOURCE}/{target}/index.md"
