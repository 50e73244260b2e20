"""The demo page to whoever reads it: by keyboard, on a phone, in the dark, with a screen reader; and hostile text."""

import re
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.async_api import BrowserContext, Page, ViewportSize, expect

from realtime.responders.base import Request
from tests.end_to_end import echo
from tests.end_to_end.page import Paced, answered, ask, visit
from tests.support.browser import OpenContext, allowed_errors, browser, chromium, context, needs_chromium, open_context
from tests.support.event_sources import NODE_FOLDER, node_with_packages
from tests.support.server import running_server

__all__ = ["allowed_errors", "browser", "chromium", "context", "open_context"]
pytestmark = needs_chromium

PHONE: ViewportSize = {"width": 360, "height": 720}
VIEWS = ("Visit", "Note", "Underneath")
EVIL = (
    "<script>window.ran = 1</script><img src=x onerror='window.ran = 2'><b onclick=alert(3)>bold</b>"
    "<style>body { display: none }</style></div></li><a href='javascript:window.ran = 4'>&lt;&amp;\u202e</a>"
)
OVERFLOW = """() => Math.max(...[...document.querySelectorAll("body *:not(.unseen):not(.name)")]
    .filter((part) => part.checkVisibility() && !["SPAN", "CODE"].includes(part.tagName))
    .map((part) => part.scrollWidth - part.getBoundingClientRect().width))"""
"""By how many pixels something is wider than its place (less than one is rounding)."""
OUT_OF_SIGHT = """() => [...document.querySelectorAll("button, select, textarea, summary, input")]
    .filter((control) => control.checkVisibility())
    .map((control) => [control.id || control.textContent.trim(), control.getBoundingClientRect()])
    .filter(([, { left, right, width, height }]) => left < 0 || right > innerWidth || !width || !height)
    .map(([name]) => name)"""
"""The controls that a finger can't get at."""
FOLD: ViewportSize = {"width": 1280, "height": 800}
ESSENTIAL = [
    "#state",
    "#presence",
    ".answer:last-child .text",
    "#input",
    "#send",
    "#stop",
    "#note-words",
    "#note-progress",
    "#note-stop",
    "#note-text section:last-child",
    "#fact-transport",
    "#waits",
    "#fact-median",
    "#fact-first-token",
    "#fact-p95",
    "#fact-written",
    "#fact-cost",
    "#fact-saved",
    "#fact-saved-more",
    "#fact-reconnects",
    "#fact-positions",
    "#events li:nth-child(1)",
    "#events li:nth-child(4)",
]
UNSEEN = """(selectors) => selectors.filter((selector) => {
    const part = document.querySelector(selector);
    const { left, top, right, bottom } = part.getBoundingClientRect();
    const [x, y] = [(left + right) / 2, (top + bottom) / 2];
    const ends = [[left + 2, y], [right - 2, y], [x, top + 2], [x, bottom - 2]];
    return !ends.every(([x, y]) => part.contains(document.elementFromPoint(x, y)));
})"""
"""Which of them are not in sight, from one end to the other."""
PAGE_SIZE = "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
VIOLATIONS = """async () => (await axe.run(document, { resultTypes: ["violations"] })).violations
    .map(({ id, nodes }) => [id, ...nodes.map(({ target, failureSummary }) => `${target}: ${failureSummary}`)])"""


async def violations(page: Page) -> Any:
    """What axe finds on the page as it is now."""
    await page.evaluate((NODE_FOLDER / "node_modules/axe-core/axe.min.js").read_text())
    # What fades in has less contrast for the time being.
    await page.evaluate("Promise.all(document.getAnimations().map((one) => one.finish() ?? one.finished))")
    return await page.evaluate(VIOLATIONS)


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_nothing_keeps_anybody_out(open_context: OpenContext, scheme: str) -> None:
    """axe finds nothing: at the start, with an answer and a note, with the invitation open; in either scheme."""
    await node_with_packages()
    async with (
        running_server(echo) as server,
        await open_context(color_scheme=scheme, reduced_motion="reduce") as window,
    ):
        page = await visit(window, server.url)
        assert await violations(page) == []
        await ask(page, "I have a headache.")
        await answered(page)
        await page.get_by_role("button", name="Draft the note").click()
        await expect(page.locator("#note")).to_have_attribute("data-status", "complete")
        assert await violations(page) == []
        await page.get_by_role("button", name="Invite").click()
        assert await violations(page) == []
        await page.keyboard.press("Escape")
        await page.set_viewport_size({"width": 390, "height": 780})
        assert await violations(page) == []


async def test_markup_shows_as_text(context: BrowserContext) -> None:
    """Whatever people and models say, and wherever it is split, in the talk and in the note, the page only shows it."""

    async def responder(request: Request) -> AsyncIterator[str]:
        for start in range(0, len(EVIL), 7):
            yield EVIL[start : start + 7]

    async with running_server(responder=responder) as server, context:
        page = await visit(context, server.url)
        await ask(page, EVIL)
        await answered(page)
        for text in (page.locator(".user .text"), page.locator(".answer .text")):
            assert await text.text_content() == EVIL
            await expect(text.locator("*")).to_have_count(0)
        await page.get_by_role("button", name="Draft the note").click()
        await expect(page.locator("#note")).to_have_attribute("data-status", "complete")
        for section in await page.locator("#note-text section p").all():
            assert await section.text_content() == EVIL
        await expect(page.locator("#note-text :is(script, img, style, a, section b)")).to_have_count(0)
        await page.reload()
        await answered(page)
        assert await page.locator(".answer .text").text_content() == EVIL
        assert await page.evaluate("window.ran") is None


async def test_the_policy_is_strict_and_the_page_keeps_to_its_own_host(context: BrowserContext) -> None:
    """No inline script could run even if it got in, and nothing is loaded from elsewhere."""
    asked: set[str] = set()
    async with running_server() as server, context:
        context.on("request", lambda request: asked.add(urlsplit(request.url).netloc))
        page = await visit(context, server.url)
        answer = await page.reload()
        assert answer is not None
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert asked == {urlsplit(server.url).netloc}


async def test_a_visit_by_keyboard_alone(context: BrowserContext) -> None:
    """Speak, cut the connection, stop, invite, go on: nothing needs a mouse, and the focus is never lost."""
    paced = Paced()

    async def tab_to(page: Page, name: str) -> None:
        for _ in range(40):
            await page.keyboard.press("Tab")
            if await page.evaluate("document.activeElement.id") == name:
                return
        pytest.fail(f"Tab does not lead to {name}")

    async with running_server(responder=paced) as server, context:
        page = await visit(context, server.url)
        await page.keyboard.type("Go on")
        await page.keyboard.press("Enter")
        await paced.let(5)
        await expect(page.locator(".answer .text")).to_contain_text("word4")
        await tab_to(page, "drop")
        await page.keyboard.press("Enter")
        await expect(page.locator("body")).to_have_attribute("data-state", "waiting")
        await paced.let(50)
        await expect(page.locator(".answer .text")).to_contain_text("word49")
        assert await page.evaluate("document.activeElement.id") == "drop"
        await page.keyboard.press("Escape")
        await expect(page.locator(".answer .mark")).to_have_text("Stopped")
        await tab_to(page, "share")
        await page.keyboard.press("Enter")
        await expect(page.locator("dialog")).to_be_visible()
        await page.keyboard.press("Escape")
        await expect(page.locator("dialog")).to_be_hidden()
        assert await page.evaluate("document.activeElement.id") == "share"
        for name in (
            "new",
            "theme",
            "scroller",
            "input",
            "seat",
            "ask",
            "voice",
            "talk",
            "send",
            "draft",
            "underneath",
        ):
            await tab_to(page, name)
        await tab_to(page, "draft")
        await page.keyboard.press("Enter")
        await expect(page.locator("#note-stop")).to_be_focused()
        await page.keyboard.press("Enter")
        await expect(page.locator("#draft")).to_be_focused()
        await paced.let()


async def test_a_phone_shows_one_thing_at_a_time(open_context: OpenContext) -> None:
    """Nothing is wider than a small screen, not even a word without an end, and every control is in reach."""

    async def responder(request: Request) -> AsyncIterator[str]:
        yield "endless" * 100

    window = await open_context(viewport=PHONE, is_mobile=True, has_touch=True, device_scale_factor=2)
    async with running_server(responder=responder) as server, window:
        page = await visit(window, server.url)
        await ask(page, "unbroken" * 100)
        await answered(page)
        for view in VIEWS:
            await page.get_by_role("button", name=view, exact=True).tap()
            shown = page.get_by_role("region", name=view, exact=True)
            await expect(shown).to_be_visible()
            assert await page.evaluate(OVERFLOW) < 1
            assert await page.evaluate(OUT_OF_SIGHT) == []
            assert await page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [360, 360]
        await page.get_by_role("button", name="Note", exact=True).tap()
        await page.get_by_role("button", name="Draft the note").tap()
        await expect(page.locator("#note")).to_have_attribute("data-status", "complete")
        assert await page.evaluate(OVERFLOW) < 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_what_matters_is_above_the_fold(open_context: OpenContext, scheme: str) -> None:
    """In the middle of a visit on a small laptop the talk, the note and the figures are in sight, and nothing scrolls
    but what is inside of them."""
    paced = Paced()
    window = await open_context(viewport=FOLD, color_scheme=scheme, reduced_motion="reduce")
    async with running_server(responder=paced, prices=("*=3/15",)) as server, window:
        page = await visit(window, server.url)
        other = await visit(window, f"{page.url}&seat=patient")
        await ask(page, "To be stopped")
        await paced.let(20)
        await expect(page.locator(".answer .text")).to_contain_text("word19")
        await page.keyboard.press("Escape")
        await expect(page.locator(".answer .mark")).to_have_text("Stopped")
        await page.get_by_role("button", name="Draft the note").click()
        await ask(other, "And this goes on")
        await paced.let(40)
        for place in (".answer:last-child .text", "#note-text section"):
            await expect(page.locator(place)).to_contain_text("word39")
        await expect(page.locator("#fact-saved")).to_contain_text("tokens")
        assert await page.evaluate(UNSEEN, ESSENTIAL) == []
        assert await page.evaluate(PAGE_SIZE) == [FOLD["width"], FOLD["height"]]
        await paced.let()
        await answered(page)


@pytest.mark.parametrize("size", [FOLD, PHONE])
async def test_a_long_talk_lengthens_no_page(open_context: OpenContext, size: ViewportSize) -> None:
    """It scrolls inside of its place, also where somebody says much, and is not named with each message."""
    async with running_server(echo) as server, await open_context(viewport=size) as window:
        page = await visit(window, server.url)
        await page.get_by_label("Assistant answers").uncheck()
        for number in range(25):
            await ask(page, f"Message {number}")
        await expect(page.locator(".user:not(.unsent)")).to_have_count(25)
        assert await page.evaluate(PAGE_SIZE) == [size["width"], size["height"]]
        assert await page.locator("#scroller").evaluate("(one) => one.scrollHeight > one.clientHeight")


@pytest.mark.parametrize(("scheme", "other"), [("light", "dark"), ("dark", "light")])
async def test_the_page_is_as_light_as_the_system_or_as_one_likes(
    open_context: OpenContext, scheme: str, other: str
) -> None:
    """Dark and light follow the system's choice, until somebody presses the button; a reload keeps that."""

    async def shown(page: Page) -> str:
        color = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        return "light" if all(int(part) > 128 for part in re.findall(r"\d+", color)) else "dark"

    async with running_server() as server, await open_context(color_scheme=scheme) as window:
        page = await visit(window, server.url)
        assert await shown(page) == scheme
        await page.get_by_role("button", name="Dark colours").click()
        assert await shown(page) == other
        await page.reload()
        await expect(page.get_by_role("button", name="Dark colours")).to_have_attribute(
            "aria-pressed", str(other == "dark").lower()
        )
        assert await shown(page) == other
