"""The demo page in a real browser: what a person sees and does, and what the page must never do."""

import asyncio
import json
import os
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.async_api import Browser, BrowserContext, Page, Route, WebSocketRoute, async_playwright, expect

from realtime.responders.base import Request
from tests.end_to_end import echo
from tests.support.client import attached
from tests.support.server import RunningServer, running_server

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP = {"width": 1200, "height": 800}
PHONE = {"width": 360, "height": 720}

WORDS = [f"word{number} " for number in range(300)]
EVIL = (
    "<script>window.ran = 1</script><img src=x onerror='window.ran = 2'><b onclick=alert(3)>bold</b>"
    "<style>body { display: none }</style></div></li><a href='javascript:window.ran = 4'>&lt;&amp;\u202e</a>"
)

END = "(main) => main.scrollHeight - main.clientHeight"
"""How far down a scroller can be."""

# On a laptop without it the tests are skipped; in CI they fail.
pytestmark = pytest.mark.skipif(CHROMIUM is None and "CI" not in os.environ, reason="chromium is missing")

OpenContext = Callable[..., Awaitable[BrowserContext]]


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    """Start the browser; a test has it to itself."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        await browser.close()


@pytest.fixture
async def open_context(browser: Browser) -> AsyncIterator[OpenContext]:
    """Open windows of the browser; no console may show an error, which a breach of the CSP is."""
    complaints: list[str] = []

    async def open_one(**options: Any) -> BrowserContext:
        context = await browser.new_context(**{"viewport": DESKTOP, **options})
        context.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
        context.on("weberror", lambda error: complaints.append(str(error.error)))
        return context

    yield open_one
    assert complaints == []


@pytest.fixture
async def context(open_context: OpenContext) -> BrowserContext:
    """One window, as wide as on a desk."""
    return await open_context()


async def visit(context: BrowserContext, url: str) -> Page:
    """Open a tab, and wait until its session is there."""
    page = await context.new_page()
    await page.goto(url)
    await expect(page.locator("body")).to_have_attribute("data-state", "open")
    return page


async def ask(page: Page, text: str) -> None:
    """Say something, by the keyboard."""
    await page.get_by_label("Message").fill(text)
    await page.get_by_label("Message").press("Enter")


def session_of(page: Page) -> str:
    """The session's id, as the page's address has it."""
    return urlsplit(page.url).fragment


async def logged_answers(server: RunningServer, page: Page) -> list[str]:
    """Read the session's log from its start until its answers are done; return their texts."""
    async with attached(server, session_of(page), history="all") as reader:
        await reader.until("response.created")
        while len(reader.transcript.positions) > 1:
            await reader.receive()
        return list(reader.transcript.texts.values())


async def overflow(page: Page) -> float:
    """Return by how many pixels something is wider than its place (less than one is rounding)."""
    parts = page.locator("html, header, header *, main, main *:not(.unseen), footer")
    wider: float = await parts.evaluate_all(
        "(parts) => Math.max(...parts.map((part) => part.scrollWidth - part.getBoundingClientRect().width))"
    )
    return wider


class Paced:
    """A responder that says `WORDS`, so many of them as the test has let through."""

    def __init__(self) -> None:
        self.allowed = 0
        self.asked: list[str] = []
        self.closed = asyncio.Event()
        self._more = asyncio.Condition()

    async def __call__(self, request: Request) -> AsyncIterator[str]:
        """Answer with `WORDS`."""
        self.asked.append(request.messages[-1].content)
        try:
            for number, word in enumerate(WORDS):
                async with self._more:
                    while number >= self.allowed:
                        await self._more.wait()
                yield word
        finally:
            self.closed.set()

    async def let(self, allowed: int = len(WORDS)) -> None:
        """Let so many words through, counted from the start."""
        async with self._more:
            self.allowed = allowed
            self._more.notify_all()


async def test_the_demo_answers(context: BrowserContext) -> None:
    """Out of the box, without a key, a question gets an answer that says that it is a demo."""
    async with running_server() as server, context:
        page = await visit(context, server.url)
        await ask(page, "Good morning")
        answer = page.locator(".answer")
        await expect(answer).to_contain_text("demo")
        await expect(answer).to_have_attribute("aria-busy", "true")
        await expect(answer).to_have_attribute("aria-busy", "false", timeout=30_000)
        assert [await answer.locator(".text").text_content()] == await logged_answers(server, page)


async def test_an_answer_streams_in(context: BrowserContext) -> None:
    """The answer grows while the model speaks, and Send becomes Stop for as long."""
    paced = Paced()
    async with running_server(responder=paced) as server, context:
        page = await visit(context, server.url)
        await ask(page, "Go on")
        await expect(page.locator(".user .text")).to_have_text("Go on")
        text = page.locator(".answer .text")
        for words in (1, 2, 50):
            await paced.let(words)
            await expect(text).to_have_text("".join(WORDS[:words]).strip())
        await expect(page.get_by_role("button", name="Stop")).to_be_visible()
        await paced.let()
        await expect(page.get_by_role("button", name="Send")).to_be_visible()
        assert await text.text_content() == "".join(WORDS)


async def test_the_facts_are_told(context: BrowserContext) -> None:
    """The line under the composer counts what happens."""
    paced = Paced()
    async with running_server(responder=paced) as server, context:
        page = await visit(context, server.url)
        await ask(page, "Go on")
        await paced.let(10)
        await expect(page.locator("#fact-positions")).to_have_text(re.compile(r"session \d+ · resp_\S+ 11"))
        assert await page.locator("#fact-events").text_content() != "0"
        await expect(page.locator("#fact-participants")).to_have_text("1")
        await expect(page.locator("#fact-first-token")).to_contain_text(" ms")
        await expect(page.locator("#fact-session")).to_have_attribute("href", f"#{session_of(page)}")
        await paced.let()


async def test_stop_ends_the_answer(context: BrowserContext) -> None:
    """Stop ends the model call, and the partial answer stays and says so."""
    paced = Paced()
    async with running_server(responder=paced) as server, context:
        page = await visit(context, server.url)
        await ask(page, "Go on")
        await paced.let(3)
        await expect(page.locator(".answer .text")).to_contain_text("word2")
        await page.get_by_role("button", name="Stop").click()
        await expect(page.locator(".answer .mark")).to_have_text("Stopped")
        await paced.closed.wait()
        assert [await page.locator(".answer .text").text_content()] == await logged_answers(server, page)


async def test_escape_stops_too(context: BrowserContext) -> None:
    """The keyboard needs no way to the button."""
    paced = Paced()
    async with running_server(responder=paced) as server, context:
        page = await visit(context, server.url)
        await ask(page, "Go on")
        await expect(page.get_by_role("button", name="Stop")).to_be_visible()
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
        await expect(page.locator(".user.unsent")).to_have_text("You: Are you there?")
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


async def test_a_second_tab_sees_the_same(context: BrowserContext) -> None:
    """Two tabs of one session show one conversation, live, whoever speaks."""
    paced = Paced()
    async with running_server(responder=paced) as server, context:
        first = await visit(context, server.url)
        second = await visit(context, first.url)
        for page in (first, second):
            await expect(page.locator("#fact-participants")).to_have_text("2")
        await ask(first, "From the first")
        await expect(second.locator(".user .text")).to_have_text("From the first")
        await paced.let(5)
        await expect(second.locator(".answer .text")).to_have_text("".join(WORDS[:5]).strip())
        await paced.let()
        for page in (first, second):
            await expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")
            assert await page.locator(".answer .text").text_content() == "".join(WORDS)
        await ask(second, "From the second")
        await expect(first.locator(".user .text")).to_have_text(["From the first", "From the second"])
        await second.close()
        await expect(first.locator("#fact-participants")).to_have_text("1")


async def test_a_new_session_is_empty_and_back_leads_to_the_one_before(context: BrowserContext) -> None:
    """New session starts afresh; the browser's Back returns to the conversation before."""
    paced = Paced()
    async with running_server(responder=paced) as server, context:
        page = await visit(context, server.url)
        first = page.url
        await paced.let()
        await ask(page, "Remember me")
        await expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")
        await page.get_by_role("button", name="New session").click()
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
        await expect(page.locator(".answer .mark")).to_contain_text("Failed: ")
        assert await page.locator(".answer .text").text_content() == "So far "
        assert "secret" not in await page.content()


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
    context = await open_context(viewport={"width": 600, "height": 480})
    async with running_server(responder=paced) as server, context:
        page = await visit(context, server.url)
        scroller = page.locator("main")
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


@pytest.mark.parametrize("size", [1, 2, 7, 1_000])
async def test_markup_of_the_model_shows_as_text(context: BrowserContext, size: int) -> None:
    """Whatever a model says, and wherever it is split, the page only shows it."""

    async def responder(request: Request) -> AsyncIterator[str]:
        for start in range(0, len(EVIL), size):
            yield EVIL[start : start + size]

    async with running_server(responder=responder) as server, context:
        page = await visit(context, server.url)
        await ask(page, EVIL)
        await expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")
        for text in (page.locator(".user .text"), page.locator(".answer .text")):
            assert await text.text_content() == EVIL
            await expect(text.locator("*")).to_have_count(0)
        await page.reload()
        await expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")
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


async def test_the_keyboard_reaches_everything(context: BrowserContext) -> None:
    """Tab leads over the buttons, the suggestions, the composer and the link, and back to the first."""
    async with running_server() as server, context:
        page = await visit(context, server.url)
        seen = set()
        for _ in range(12):
            await page.keyboard.press("Tab")
            seen.add(await page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        suggestions = await page.locator(".suggestions button").all_text_contents()
        assert seen >= {"drop", "new", "scroller", "input", "send", "fact-session", *suggestions}


async def test_a_phone_scrolls_only_up_and_down(open_context: OpenContext) -> None:
    """Nothing is wider than a small screen, not even a word without an end."""

    async def responder(request: Request) -> AsyncIterator[str]:
        yield "endless" * 100

    context = await open_context(viewport=PHONE, is_mobile=True, has_touch=True, device_scale_factor=2)
    async with running_server(responder=responder) as server, context:
        page = await visit(context, server.url)
        assert await overflow(page) < 1
        await ask(page, "unbroken" * 100)
        await expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")
        assert await overflow(page) < 1
        assert await page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [360, 360]


@pytest.mark.parametrize(("scheme", "darkest", "lightest"), [("light", 220, 255), ("dark", 0, 40)])
async def test_the_page_is_as_light_as_the_system(
    open_context: OpenContext, scheme: str, darkest: int, lightest: int
) -> None:
    """Dark and light follow the system's choice."""
    context = await open_context(color_scheme=scheme)
    async with running_server() as server, context:
        page = await visit(context, server.url)
        color = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert all(darkest <= int(part) <= lightest for part in re.findall(r"\d+", color))


async def test_a_token_in_the_address_is_used_and_not_left_there(context: BrowserContext) -> None:
    """It is offered to the server, given to it for a cookie, and stands in no address that a person could copy."""
    kept: list[str | None] = []

    async def keep(route: Route) -> None:
        kept.append(route.request.headers.get("authorization"))
        await route.fulfill(status=204)

    await context.route("**/v1/auth/cookie", keep)
    await context.add_init_script(
        "WebSocket = class extends WebSocket {"
        "  constructor(url, protocols) { super(url, ['realtime.v1']); (globalThis.offered ??= []).push(...protocols); }"
        "};"
    )
    async with running_server(echo) as server:
        page = await visit(context, f"{server.url}/#token=a.b-c.d_e")
        assert re.fullmatch(r"sess_\w+", session_of(page))
        offered = await page.evaluate("offered")
        assert await page.evaluate("history.length") == 2  # the empty tab, and this
    assert offered == ["realtime.v1", "bearer.a.b-c.d_e"]
    assert kept == ["Bearer a.b-c.d_e"]
