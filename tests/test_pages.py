"""Every block of code of every page is run, or held against what it is about."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.async_api import BrowserContext, expect

from tests.support.browser import allowed_errors, browser, chromium, context, needs_chromium, open_context
from tests.support.markdown import PAGES, ROOT, indented
from tests.support.walk import walk

__all__ = ["allowed_errors", "browser", "chromium", "context", "open_context"]

SAID = {
    "README.md": ["You said: Hello.", "HELLO ", "wrote to Alan", "cost_usd"],
    "docs/clients.md": ["You said: Hello.", "You said: And once more.", "1 of 1 summarised part 1 of 1"],
}
"""What comes out of the blocks of a page, beside that none fails, where the server answers `You said: …`."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
async def test_a_page_does_what_it_says(page: Path) -> None:
    """Its blocks, from the first to the last, as a reader would type them."""
    assert indented(page) == [], "code is fenced, so that it says what it is"
    async with walk(page) as walking:
        await walking.to_the_end()
    said = "\n".join(walking.printed)
    assert [part for part in SAID.get(str(page.relative_to(ROOT)), []) if part not in said] == []


@needs_chromium
async def test_the_tutorials_page_is_the_same_visit_in_two_tabs(context: BrowserContext) -> None:
    """What is said in one tab, and what answers it, is in the other, which was opened by the first one's address."""
    async with walk(ROOT / "docs/tutorial.md") as walking:
        await walking.to("page/visit.js")
        await walking.step()
        first, second = await context.new_page(), await context.new_page()
        await first.goto(f"http://127.0.0.1:{walking.port}/visit/")
        await first.wait_for_url("**/visit/#session=sess_*")
        await second.goto(first.url)
        await first.fill("input", "My knee hurts.")
        await first.click("text=Say it")
        await expect(second.locator("p").nth(0)).to_have_text("My knee hurts.")
        await expect(second.locator("p").nth(1)).to_contain_text("You said: “My knee hurts.”")
        await first.click("text=Stop")
        await first.click("text=Draft the note")
        await expect(second.locator("p").nth(2)).to_contain_text("Subjective")
        await context.close()  # before the server ends, which its console would tell
