"""README.md and docs/ lead nowhere that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors_of(page: Path) -> set[str]:
    """As GitHub makes them of headings, and those that are written out."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    written = set(re.findall(r'<a id="([^"]+)">', text))
    return written | {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_image_leads_to_a_file(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r"(?:src|srcset|href)=[\"']([^\"'\s]+)", text)
    dead = []
    for link in links:
        if re.match(r"[a-z]+:", link):  # another site
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors_of(target)):
            dead.append(link)
    assert not dead
    assert links or page.name != "README.md", "it has links, or the pattern is wrong"
