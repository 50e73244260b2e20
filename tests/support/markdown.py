"""Takes the blocks of code out of a page.

    ```python title="visit.py"

The first word is the language, which says how a block is checked; `title` is the file that a reader writes it into.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md")])
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INFO = re.compile(r'(?P<language>\w+)(?: title="(?P<title>[\w./-]+)")?')


class Block(NamedTuple):
    """A block of code: where it stands (`README.md:12`), its language, the file that it is, or "", its text."""

    place: str
    language: str
    title: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page, in their order. Raises `ValueError` for one without a language."""
    source = page.read_text()
    for fence in FENCE.finditer(source):
        place = f"{page.name}:{source.count(chr(10), 0, fence.start()) + 1}"
        info = INFO.fullmatch(fence[1])
        if info is None:
            raise ValueError(f"{place} does not say what it is: {fence[1]!r}")
        yield Block(place, info["language"], info["title"] or "", fence[2])


def indented(page: Path) -> list[str]:
    """The lines of a page that are code by their indentation alone, and so say not what they are."""
    outside = FENCE.sub("", page.read_text())
    return re.findall(r"(?:\A|\n\n) {4,}(\S.*)", outside)
