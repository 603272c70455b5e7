"""Links of README and docs lead to files and headings that are there; nothing is asked over a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, anchors, links

# A trailing slash or "docs/": what a code host takes, and the site's strict build does not.
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: there is no {target}"
        assert target.is_relative_to(ROOT), f"{link} leaves the repository"
        if anchor:
            assert anchor in anchors(target), f"{link}: choices are {sorted(anchors(target))}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        targets = [(page.parent / link.partition("#")[0]).resolve() for link in links(page)]
        waiting += [target for target in targets if target in PAGES]
    assert reached == set(PAGES)


def test_links_are_found() -> None:
    assert "docs/trl.md" in links(ROOT / "README.md")
    assert "docs/gates.png" in links(ROOT / "README.md")
    assert "theory.md" in links(ROOT / "docs/faq.md")
    assert "is-this-pefts-deft" in anchors(ROOT / "docs/faq.md")
