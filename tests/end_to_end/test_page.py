"""The demo page in a real browser: a conversation, and what becomes of it when connections come and go."""

import json
import re
from collections.abc import AsyncIterator

from playwright.async_api import BrowserContext, WebSocketRoute, expect

from realtime.responders.base import Request
from tests.end_to_end.page import WORDS, Paced, ask, logged_answers, session_of, visit
from tests.support.browser import OpenContext, allowed_errors, browser, chromium, context, needs_chromium, open_context
from tests.support.client import attached
from tests.support.no_websockets import without_websockets
from tests.support.server import running_server
from tests.support.tcp_proxy import TcpProxy

__all__ = ["allowed_errors", "browser", "chromium", "context", "open_context"]
pytestmark = needs_chromium

END = "(scroller) => scroller.scrollHeight - scroller.clientHeight"
"""How far down a scroller can be."""


async def test_an_answer_streams_in(context: BrowserContext) -> None:
    """The answer grows while the model speaks, and there is a Stop for as long."""
    paced = Paced()
    async with running_server(responder=paced) as server, context:
        page = await visit(context, server.url)
        await ask(page, "Go on")
        await expect(page.locator(".user .text")).to_have_text("Go on")
        text = page.locator(".answer .text")
        for words in (1, 2, 50):
            await paced.let(words)
            await expect(text).to_have_text("".join(WORDS[:words]).strip())
        await expect(page.get_by_role("button", name="Stop", exact=True)).to_be_visible()
        await paced.let()
        await expect(page.get_by_role("button", name="Stop", exact=True)).to_be_hidden()
        assert await text.text_content() == "".join(WORDS)


async def test_stop_ends_the_answer(context: BrowserContext) -> None:
    """Stop ends the model call, and the partial answer stays and says so."""
    paced = Paced()
    async with running_server(responder=paced) as server, context:
        page = await visit(context, server.url)
        await ask(page, "Go on")
        await paced.let(3)
        await expect(page.locator(".answer .text")).to_contain_text("word2")
        await page.get_by_role("button", name="Stop", exact=True).click()
        await expect(page.locator(".answer .mark")).to_have_text("Stopped")
        await paced.closed.wait()
        assert [await page.locator(".answer .text").text_content()] == await logged_answers(server, page)


async def test_escape_stops_too(context: BrowserContext) -> None:
    """The keyboard needs no way to the button."""
    paced = Paced()
    async with running_server(responder=paced) as server, context:
        page = await visit(context, server.url)
        await ask(page, "Go on")
        await expect(page.get_by_role("button", name="Stop", exact=True)).to_be_visible()
        await page.keyboard.press("Escape")
        await expect(page.locator(".answer .mark")).to_have_text("Stopped")


async def test_speaking_interrupts(context: BrowserContext) -> None:
    """Who says something else while an answer runs gets an answer to that instead."""
    endless = Paced()

    async def responder(request: Request) -> AsyncIterator[str]:
        if request.messages[-1].content == "Never mind":
            yield "Good."
            return
        async for word in endless(request):
            yield word

    async with running_server(responder=responder) as server, context:
        page = await visit(context, server.url)
        await ask(page, "Go on")
        await endless.let(3)
        await expect(page.locator(".answer .text")).to_contain_text("word2")
        await ask(page, "Never mind")
        await expect(page.locator(".answer .text").last).to_have_text("Good.")
        await expect(page.locator(".answer").first.locator(".mark")).to_contain_text("Interrupted")
        await expect(page.locator(".answer").last.locator(".mark")).to_be_hidden()
        await endless.closed.wait()


async def test_a_dropped_connection_leaves_no_seam(context: BrowserContext) -> None:
    """What the model said while the page was cut off arrives afterwards, once; the text is the stored one."""
    paced = Paced()
    async with running_server(responder=paced) as server, context:
        page = await visit(context, server.url)
        await ask(page, "Go on")
        await paced.let(20)
        await expect(page.locator(".answer .text")).to_contain_text("word19")
        await page.get_by_role("button", name="Drop connection").click()
        await expect(page.locator("body")).to_have_attribute("data-state", "waiting")
        await paced.let(200)
        await expect(page.locator(".answer .text")).to_contain_text("word199")
        await expect(page.locator("#state")).to_have_text(re.compile(r"Back, \d+ tokens caught up"))
        await expect(page.locator("#fact-merged")).not_to_have_text("0")
        await paced.let()
        await expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")
        assert await page.locator(".answer .text").text_content() == "".join(WORDS)
        assert await logged_answers(server, page) == ["".join(WORDS)]
        assert paced.asked == ["Go on"]


async def test_an_answer_that_ends_while_cut_off_is_whole(context: BrowserContext) -> None:
    """The end, too, is caught up with."""
    paced = Paced()
    async with running_server(responder=paced) as server, context:
        page = await visit(context, server.url)
        await ask(page, "Go on")
        await paced.let(20)
        await expect(page.locator(".answer .text")).to_contain_text("word19")
        await page.get_by_role("button", name="Drop connection").click()
        await paced.let()
        await paced.closed.wait()
        await expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")
        assert await page.locator(".answer .text").text_content() == "".join(WORDS)


async def test_what_is_said_while_cut_off_is_answered_once(context: BrowserContext) -> None:
    """A message of the time without a connection waits for it, in sight."""
    paced = Paced()
    async with running_server(responder=paced) as server, context:
        page = await visit(context, server.url)
        await page.get_by_role("button", name="Drop connection").click()
        await ask(page, "Are you there?")
        await expect(page.locator(".user.unsent .text")).to_have_text("Are you there?")
        await paced.let()
        await expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")
        await expect(page.locator(".user .text")).to_have_text(["Are you there?"])
        await expect(page.locator(".user.unsent")).to_have_count(0)
        assert paced.asked == ["Are you there?"]


async def test_a_reload_continues(context: BrowserContext) -> None:
    """The same session is there again, and its answer goes on."""
    paced = Paced()
    async with running_server(responder=paced) as server, context:
        page = await visit(context, server.url)
        await ask(page, "Go on")
        await paced.let(20)
        await expect(page.locator(".answer .text")).to_contain_text("word19")
        before = page.url
        await page.reload()
        await expect(page.locator(".answer .text")).to_contain_text("word19")
        await paced.let()
        await expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")
        assert page.url == before
        assert await page.locator(".user .text").all_text_contents() == ["Go on"]
        assert await page.locator(".answer .text").text_content() == "".join(WORDS)


async def test_a_new_session_is_empty_and_back_leads_to_the_one_before(context: BrowserContext) -> None:
    """New visit starts afresh; the browser's Back returns to the conversation before."""
    paced = Paced()
    async with running_server(responder=paced) as server, context:
        page = await visit(context, server.url)
        first = page.url
        await paced.let()
        await ask(page, "Remember me")
        await expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")
        await page.get_by_role("button", name="New visit").click()
        await expect(page.locator("#intro")).to_be_visible()
        await expect(page.locator("#log > *")).to_have_count(0)
        await expect(page.locator("#notice")).to_be_hidden()
        assert page.url != first
        await page.go_back()
        await expect(page.locator(".user .text")).to_have_text("Remember me")
        assert page.url == first


async def test_a_session_that_is_gone_is_replaced(context: BrowserContext) -> None:
    """An old address leads to a new session, and the page says why."""
    async with running_server() as server, context:
        page = await visit(context, f"{server.url}/#sess_00000000000000000000000000000000")
        await expect(page.locator("#notice")).to_contain_text("has expired")
        assert not page.url.endswith("#sess_00000000000000000000000000000000")


async def test_a_session_that_another_closes_stays_readable(context: BrowserContext) -> None:
    """The page says that it is over, keeps what was said, and takes nothing more."""
    paced = Paced()
    async with running_server(responder=paced) as server, context:
        page = await visit(context, server.url)
        await paced.let()
        await ask(page, "Remember me")
        await expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")
        async with attached(server, session_of(page)) as other:
            await other.send("session.close")
            await expect(page.locator("#notice")).to_contain_text("was closed")
        await expect(page.get_by_label("Message")).to_be_disabled()
        await expect(page.locator(".user .text")).to_have_text("Remember me")


async def test_a_failed_answer_says_so(context: BrowserContext) -> None:
    """A model that breaks off leaves what it said, with a word on what happened."""

    async def responder(request: Request) -> AsyncIterator[str]:
        yield "So far "
        raise RuntimeError("secret detail")

    async with running_server(responder=responder) as server, context:
        page = await visit(context, server.url)
        await ask(page, "Go on")
        await expect(page.locator(".answer .mark")).to_have_text(
            "Failed: Something went wrong at the server. Try it again."
        )
        assert await page.locator(".answer .text").text_content() == "So far "
        assert "secret detail" not in await page.content()


async def test_a_refused_message_comes_back_with_the_reason(context: BrowserContext) -> None:
    """What the server refuses is told in words, and its text is in the composer again."""

    def refuse(socket: WebSocketRoute) -> None:
        server = socket.connect_to_server()

        def on_message(text: str | bytes) -> None:
            command = json.loads(text)
            if command["type"] != "response.create":
                server.send(text)
                return
            error = {
                "type": "rate_limit_error",
                "code": "rate_limited",
                "message": "Too many responses.",
                "event_id": command["event_id"],
                "retry_after_ms": 11_500,
                "fatal": False,
            }
            socket.send(json.dumps({"type": "error", "error": error}))

        socket.on_message(on_message)

    async with running_server() as server, context:
        await context.route_web_socket("**/v1/realtime*", refuse)
        page = await visit(context, server.url)
        await ask(page, "Once more")
        await expect(page.locator("#notice")).to_have_text("Too many responses. Try again in 12 s.")
        await expect(page.locator(".user")).to_have_count(0)
        await expect(page.get_by_label("Message")).to_have_value("Once more")


async def test_the_page_follows_the_answer_unless_the_reader_looks_back(open_context: OpenContext) -> None:
    """The newest words stay in sight; who scrolled up is left alone."""
    paced = Paced()
    context = await open_context(viewport={"width": 900, "height": 480})
    async with running_server(responder=paced) as server, context:
        page = await visit(context, server.url)
        scroller = page.locator("#scroller")
        await ask(page, "Go on")
        await paced.let(200)
        await expect(page.locator(".answer .text")).to_contain_text("word199")
        await expect(scroller).to_have_js_property("scrollTop", await scroller.evaluate(END))
        assert await scroller.evaluate(END) > 100
        await scroller.hover()
        await page.mouse.wheel(0, -10_000)
        await expect(scroller).to_have_js_property("scrollTop", 0)
        await paced.let()
        await expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")
        assert await scroller.evaluate("(main) => main.scrollTop") == 0


async def test_enter_sends_and_shift_enter_starts_a_line(context: BrowserContext) -> None:
    """A message may have several lines."""
    paced = Paced()
    async with running_server(responder=paced) as server, context:
        page = await visit(context, server.url)
        await page.keyboard.type("one")
        await page.keyboard.press("Shift+Enter")
        await page.keyboard.type("two")
        await expect(page.locator(".user")).to_have_count(0)
        await page.keyboard.press("Enter")
        await expect(page.locator(".user .text")).to_be_visible()
        assert await page.locator(".user .text").text_content() == "one\ntwo"
        await paced.let()


async def test_a_network_that_breaks_leaves_no_seam(context: BrowserContext) -> None:
    """Cut by the network and not by the button, in the middle of an answer, the text is the stored one, too."""
    paced = Paced()
    async with running_server(responder=paced) as server, TcpProxy("127.0.0.1", server.port) as proxy, context:
        page = await visit(context, f"http://127.0.0.1:{proxy.port}")
        await ask(page, "Go on")
        await paced.let(20)
        await expect(page.locator(".answer .text")).to_contain_text("word19")
        await proxy.reset()
        await paced.let(200)
        await expect(page.locator(".answer .text")).to_contain_text("word199")
        await expect(page.locator("#fact-reconnects")).to_contain_text("tokens caught up")
        await paced.let()
        await expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")
        assert await page.locator(".answer .text").text_content() == "".join(WORDS)
        assert await logged_answers(server, page) == ["".join(WORDS)]
        assert paced.asked == ["Go on"]


async def test_an_attempt_that_takes_long_is_told(context: BrowserContext) -> None:
    """It does not go on promising to be back soon."""
    async with running_server() as server, TcpProxy("127.0.0.1", server.port) as proxy, context:
        page = await visit(context, f"http://127.0.0.1:{proxy.port}")
        await expect(page.locator("#state")).to_have_text("Connected")
        await proxy.blackhole()
        await proxy.reset()
        await expect(page.locator("#state")).to_have_text("Cut off, connecting again…")
        await proxy.resume()
        await expect(page.locator("#state")).to_have_text("Back")


async def test_where_websockets_are_blocked_it_is_the_same(context: BrowserContext, allowed_errors: list[str]) -> None:
    """The page goes over to server-sent events by itself, says so, and resumes there without a seam as well."""
    allowed_errors.append("WebSocket connection to .* failed")
    paced = Paced()
    async with running_server(responder=paced) as server, without_websockets(server.port) as url, context:
        page = await visit(context, url)
        await expect(page.locator("#state")).to_have_text("Connected, by server-sent events")
        await expect(page.locator("#fact-transport")).to_have_text("server-sent events")
        await ask(page, "Go on")
        await paced.let(20)
        await expect(page.locator(".answer .text")).to_contain_text("word19")
        await page.get_by_role("button", name="Drop connection").click()
        await paced.let()
        await expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")
        assert await page.locator(".answer .text").text_content() == "".join(WORDS)
        assert paced.asked == ["Go on"]
        await page.close()
