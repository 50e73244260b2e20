"""Pages of other origins in a real browser: what those that are allowed can do, and what the others can't."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from playwright.async_api import Browser, Page

from tests.end_to_end import echo
from tests.support.browser import browser, chromium, needs_chromium
from tests.support.client import attached
from tests.support.ports import free_port
from tests.support.server import running_server

__all__ = ["browser", "chromium"]
pytestmark = needs_chromium
PAGE = b"<!doctype html><link rel=icon href=data:,><title>another page</title>"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
STATIC = Path(__file__).parents[2] / "static"

FETCH = """async ([url, options]) => {
    const answer = await fetch(url, options).catch(() => null)
    return answer === null ? "refused" : [answer.type, answer.status, (await answer.text()).length > 0]
}"""
LISTEN = """url => new Promise(done => {
    const source = new EventSource(url, {withCredentials: true})
    source.addEventListener("session.resumed", () => { source.close(); done("told") })
    source.onerror = () => { source.close(); done("refused") }
})"""
DIAL = """url => new Promise(done => {
    const socket = new WebSocket(url)
    socket.onmessage = event => { socket.close(); done(JSON.parse(event.data).type) }
    socket.onerror = () => done("refused")
})"""
EMBED = """url => new Promise(done => {
    const image = document.createElement("img")
    image.onload = () => done("shown"); image.onerror = () => done("refused"); image.src = url
})"""
FRAME = """url => new Promise(done => {
    const frame = document.createElement("iframe")
    frame.onload = done; frame.src = url; document.body.append(frame)
})"""

ATTACH = """async url => {
    const { RealtimeSession } = await import("/realtime.js")
    const session = new RealtimeSession({ url })
    session.connect()
    const end = new Promise(done => session.addEventListener("closed", ({ detail }) => done(detail)))
    return await Promise.race([end, session.respond("Hello").text()])
}"""


async def serve_page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A web server of one page, and of the client library, as a bundler would have it."""
    if line := await reader.readline():
        module = STATIC / line.split()[1].decode().removeprefix("/")
        kind, body = (b"text/javascript", module.read_bytes()) if module.is_file() else (b"text/html", PAGE)
        writer.write(ANSWER % (kind, len(body)) + body)
        await writer.drain()
    writer.close()


@asynccontextmanager
async def page_on(browser: Browser, port: int) -> AsyncIterator[Page]:
    """A page of an origin of its own."""
    async with await asyncio.start_server(serve_page, "127.0.0.1", port):
        page = await browser.new_page()
        await page.goto(f"http://127.0.0.1:{port}/")
        yield page
        await page.close()


async def tried(page: Page, script: str, argument: Any) -> Any:
    """What a script of the page comes to."""
    async with asyncio.timeout(20):
        return await page.evaluate(script, argument)


async def test_an_allowed_page_can_use_everything(browser: Browser) -> None:
    """Fetch with credentials and a preflight, errors, event streams, WebSockets; `same-origin` for what is embedded
    does not stand in its way."""
    port = free_port()
    async with running_server(echo, allowed_origins=(f"http://127.0.0.1:{port}",)) as server:
        async with attached(server) as client, page_on(browser, port) as page:
            url = f"{server.url}/v1/sessions/{client.session_id}"
            post = {"method": "POST", "credentials": "include", "headers": {"Idempotency-Key": "a", "Prefer": "b"}}
            assert await tried(page, FETCH, [f"{server.url}/v1/sessions", post]) == ["cors", 201, True]
            assert await tried(page, FETCH, [url, {"credentials": "include"}]) == ["cors", 200, True]
            assert await tried(page, FETCH, [f"{server.url}/v1/nothing", {}]) == ["cors", 404, True]
            assert await tried(page, LISTEN, f"{url}/events") == "told"
            assert await tried(page, DIAL, server.ws_url) == "session.created"
            assert await tried(page, FETCH, [url, {"method": "DELETE"}]) == ["cors", 204, False]


async def test_another_page_can_do_nothing(browser: Browser) -> None:
    """It gets no stream and no socket, and reads of what it asks for only that it is refused; it embeds nothing, and
    nothing that it asks for is done."""
    port = free_port()
    async with running_server(echo) as server, attached(server) as client, page_on(browser, port) as page:
        url = f"{server.url}/v1/sessions/{client.session_id}"
        assert await tried(page, FETCH, [url, {}]) == ["cors", 403, True]
        assert await tried(page, FETCH, [url, {"credentials": "include"}]) == "refused"
        assert await tried(page, FETCH, [url, {"method": "DELETE"}]) == "refused"
        event = {"method": "POST", "mode": "no-cors", "body": '{"type": "session.close"}'}
        assert await tried(page, FETCH, [f"{url}/events", event]) in ("refused", ["opaque", 0, False])
        assert await tried(page, FETCH, [url, {"mode": "no-cors"}]) == "refused"
        assert await tried(page, LISTEN, f"{url}/events") == "refused"
        assert await tried(page, DIAL, server.ws_url) == "refused"
        assert await tried(page, EMBED, f"{server.url}/static/icon.svg") == "refused"
        await tried(page, FRAME, server.url)
        assert "/static/" not in await page.frames[1].content()
        assert await client.answer("nothing has happened") == "nothing has happened"


async def test_the_client_of_another_page_ends_and_says_why(browser: Browser) -> None:
    """It does not try for ever what nobody will allow it; where its origin is named it gets an answer."""
    port = free_port()
    async with page_on(browser, port) as page:
        async with running_server(echo) as server:
            end = {"code": 4403, "reason": "origin_not_allowed"}
            assert await tried(page, ATTACH, server.url) == end
        async with running_server(echo, allowed_origins=(f"http://127.0.0.1:{port}",)) as server:
            assert await tried(page, ATTACH, server.url) == "Hello"


async def test_a_link_to_the_page_can_be_followed(browser: Browser) -> None:
    """From wherever."""
    port = free_port()
    async with running_server(echo) as server, page_on(browser, port) as page:
        await page.evaluate("url => { location.href = url }", server.url)
        await page.wait_for_url(f"{server.url}/**")
        await page.locator("body[data-state=open]").wait_for()
