"""The demo page where things are not as they should be: a server that has lost the visit, a crowd, a low screen."""

from __future__ import annotations

import asyncio
import re
from contextlib import AsyncExitStack

import pytest
from playwright.async_api import BrowserContext, Route, expect

from tests.end_to_end import echo
from tests.end_to_end.page import Paced, answered, ask, session_of, visit
from tests.support.browser import OpenContext, allowed_errors, browser, chromium, context, needs_chromium, open_context
from tests.support.client import attached
from tests.support.server import running_server
from tests.support.tcp_proxy import TcpProxy

__all__ = ["allowed_errors", "browser", "chromium", "context", "open_context"]
pytestmark = needs_chromium

ENDLESS = """() => document.getAnimations()
    .filter((one) => one.effect.getComputedTiming().endTime === Infinity).length"""


async def test_a_server_that_was_started_anew_is_told(context: BrowserContext) -> None:
    """It has lost the visit: the page says so, keeps what is there, promises nothing more of it, and starts another."""
    paced = Paced()
    async with context, AsyncExitStack() as first:
        server = await first.enter_async_context(running_server(responder=paced))
        proxy = await first.enter_async_context(TcpProxy("127.0.0.1", server.port))
        page = await visit(context, f"http://127.0.0.1:{proxy.port}")
        await ask(page, "Go on")
        await page.get_by_role("button", name="Draft the note").click()
        await paced.let(9)
        await expect(page.locator(".answer .text")).to_contain_text("word8")
        await expect(page.locator("#note-text")).to_contain_text("word8")
        await page.get_by_label("Message").focus()
        async with running_server(echo) as other:
            proxy.target = "127.0.0.1", other.port
            await proxy.reset()
            await expect(page.locator("#notice")).to_contain_text("was lost when the server was started anew")
            await expect(page.locator(".answer .mark")).to_have_text("The connection ended here")
            await expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")
            await expect(page.locator(".answer .text")).to_contain_text("word8")
            await expect(page.locator("#note-words")).to_have_text("The connection ended here")
            await expect(page.locator("#note-stop")).to_be_hidden()
            await expect(page.locator("#share")).to_have_attribute("aria-disabled", "true")
            await page.locator("#share").evaluate("(one) => one.click()")
            await expect(page.locator("dialog")).to_be_hidden()
            await expect(page.get_by_role("button", name="New visit")).to_be_focused()
            await page.keyboard.press("Enter")
            await ask(page, "Hello")
            await answered(page)
            await expect(page.locator("#note-words")).to_be_empty()
            await page.close()


async def test_what_was_not_taken_before_the_end_says_so(context: BrowserContext) -> None:
    """What waited for a connection that does not come back does not look as if it was said."""
    async with running_server(echo) as server, TcpProxy("127.0.0.1", server.port) as proxy, context:
        page = await visit(context, f"http://127.0.0.1:{proxy.port}")
        await ask(page, "Taken")
        await answered(page)
        async with attached(server, session_of(page)) as other:
            await proxy.blackhole()
            await ask(page, "Not taken")
            await other.send("session.close")
            await other.until("session.closed")
        await proxy.reset()
        await proxy.resume()
        await expect(page.locator("#state")).to_have_text("Closed")
        await expect(page.locator(".unsent.lost .text")).to_have_text("Not taken")
        await page.get_by_role("button", name="New visit").click()
        await expect(page.get_by_label("Message")).to_have_value("Not taken")


async def test_while_the_server_is_away_the_page_says_so(context: BrowserContext) -> None:
    """It counts down to the next attempt, and shows no connection that there is not."""
    async with running_server(echo) as server, TcpProxy("127.0.0.1", server.port) as proxy, context:
        page = await visit(context, f"http://127.0.0.1:{proxy.port}")
        await expect(page.locator("#fact-transport")).to_have_text("WebSocket")
        await page.evaluate(
            "globalThis.told = new Set();"
            "new MutationObserver(() => told.add(document.getElementById('state').textContent))"
            ".observe(document.getElementById('state'), { childList: true, characterData: true, subtree: true })"
        )
        await page.get_by_role("button", name="Drop connection").click()
        await expect(page.locator("#fact-transport")).to_have_text("not connected")
        await expect(page.locator("#fact-connection")).to_be_empty()
        await expect(page.locator("#state [aria-hidden=true]")).to_have_text(re.compile(r", back in \d\.\d s"))
        await expect(page.locator("#state")).to_have_text("Back")
        waits = [words for words in await page.evaluate("[...told]") if "back in" in words]
        assert len(waits) > 2
        assert waits == sorted(waits, reverse=True)


async def test_nothing_moves_for_ever_where_motion_is_not_wanted(open_context: OpenContext) -> None:
    """Nor does it flicker, as a movement that is only made short would."""
    paced = Paced()
    async with running_server(responder=paced) as server:
        for motion in ("no-preference", "reduce"):
            async with await open_context(reduced_motion=motion) as window:
                page = await visit(window, server.url)
                await ask(page, "Go on")
                await expect(page.locator(".answer")).to_have_attribute("aria-busy", "true")
                assert (await page.evaluate(ENDLESS) > 0) == (motion == "no-preference")


async def test_a_crowd_finds_room(context: BrowserContext) -> None:
    """Who sits here stands first, and from the sixth on they are counted."""
    async with running_server() as server, context, AsyncExitStack() as crowd:
        page = await visit(context, server.url)
        height = await page.locator(".bar").evaluate("(bar) => bar.offsetHeight")
        for _ in range(7):
            await crowd.enter_async_context(attached(server, session_of(page)))
        await expect(page.locator("#presence .others")).to_have_text("+3")
        await expect(page.locator("#presence li").first).to_have_class("own")
        await expect(page.locator("#present-count")).to_have_text("8 present")
        assert await page.locator(".bar").evaluate("(bar) => bar.offsetHeight") == height


@pytest.mark.parametrize("size", [(844, 390), (640, 400)])
async def test_a_low_screen_has_room_for_the_talk(open_context: OpenContext, size: tuple[int, int]) -> None:
    """A phone on its side, and a page that is enlarged to twice its size: most of it is the conversation's."""
    width, height = size
    window = await open_context(viewport={"width": width, "height": height})
    async with running_server(echo) as server, window:
        page = await visit(window, server.url)
        await ask(page, "Hello")
        await answered(page)
        for part in ("#drop", "#share", "#input", "#send", ".answer .text"):
            await expect(page.locator(part)).to_be_in_viewport(ratio=1)
        assert await page.locator("#scroller").evaluate("(one) => one.clientHeight") > 0.4 * height
        await page.get_by_role("button", name="Underneath").click()
        await expect(page.locator("#fact-saved")).to_be_visible()


async def test_what_can_not_even_be_sent_is_told_and_kept(context: BrowserContext) -> None:
    """In words, not by the name of an error."""
    async with running_server(echo) as server, context:
        page = await visit(context, server.url)
        await page.get_by_label("Message").evaluate("(one) => one.removeAttribute('maxlength')")
        await ask(page, "long" * 20_000)
        await expect(page.locator("#notice")).to_contain_text("Say it in parts.")
        await expect(page.get_by_label("Message")).to_have_value("long" * 20_000)


async def test_the_chosen_colours_are_there_before_the_scripts(context: BrowserContext) -> None:
    """Nobody who likes it dark is blinded for the time that they take to come."""
    async with running_server() as server, context:
        page = await visit(context, server.url)
        await page.get_by_role("button", name="Dark colours").click()
        seen = asyncio.Event()

        async def hold(route: Route) -> None:
            await seen.wait()
            await route.continue_()

        await page.route("**/demo.js", hold)
        await page.reload(wait_until="commit")
        await expect(page.locator("html")).to_have_attribute("data-theme", "dark")
        seen.set()
        await expect(page.locator("#state")).to_have_text("Connected")


async def test_a_new_visit_greets_at_once(context: BrowserContext) -> None:
    """It does not wait for the connection."""
    async with running_server() as server, context:
        page = await context.new_page()
        await page.route_web_socket("**/v1/realtime*", lambda socket: None)
        await page.goto(server.url)
        await expect(page.get_by_role("heading", name="A visit that outlives its connection")).to_be_visible()
        await expect(page.locator("#state")).to_have_text("Connecting…")
