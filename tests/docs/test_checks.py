"""Messages that docs/checks.md quotes are those that the package gives."""

from __future__ import annotations

import re

from tests.docs.pages import ROOT


def test_what_is_quoted_is_said() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "deft_plugin").rglob("*.py"))
    # A message over several lines is one text.
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)
    quoted = re.findall(r'"([^"]+)"', (ROOT / "docs/checks.md").read_text())
    assert len(quoted) > 10
    assert [text for text in quoted if text not in sources] == []
