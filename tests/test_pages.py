"""Every block of code of every page is run, or held against what it is about."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.markdown import PAGES, ROOT, indented
from tests.support.walk import walk


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
async def test_a_page_does_what_it_says(page: Path) -> None:
    """Its blocks, from the first to the last, as a reader would type them."""
    assert indented(page) == [], "code is fenced, so that it says what it is"
    async with walk(page) as walking:
        await walking.to_the_end()
