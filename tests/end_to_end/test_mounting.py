"""The server under a path: of a FastAPI application, of a Starlette one, of a proxy."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import uvicorn
from playwright.async_api import async_playwright, expect
from starlette.applications import Starlette

from realtime.access.tokens import sign
from realtime.app import create_app, mount
from realtime.responders.demo import demo
from realtime.server import listen, make_server
from realtime.settings import Settings
from tests.access.signing import SECRET
from tests.support.browser import ARGUMENTS, CHROMIUM
from tests.support.client import attached
from tests.support.nginx import nginx
from tests.support.server import running_server

ROOT = Path(__file__).resolve().parents[2]
EMBEDDING = (ROOT / "docs/embedding.md").read_text()
APP = r"^```python .*?\n(.*?)^```$"
LOCATION = r"^```nginx\n(.*?)^```$"


class At(NamedTuple):
    """Something to attach to."""

    ws_url: str


@asynccontextmanager
async def plain_uvicorn(app: Any) -> AsyncIterator[str]:
    """The application as anybody runs it; its URL."""
    config = uvicorn.Config(app, port=0, ws="websockets-sansio", lifespan="on", log_config=None)
    async with serving(uvicorn.Server(config)) as url:
        yield url


@asynccontextmanager
async def serving(server: uvicorn.Server, **options: Any) -> AsyncIterator[str]:
    """Run a server in this loop; its URL."""
    task = asyncio.create_task(server.serve(**options))
    try:
        while not server.started:
            await asyncio.sleep(0)
            if task.done():
                task.result()
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


def client(url: str) -> httpx.AsyncClient:
    """An HTTP client of that address."""
    return httpx.AsyncClient(base_url=url, trust_env=False, follow_redirects=True, timeout=20)


async def check_sessions(url: str, prefix: str) -> None:
    """A session under `prefix`, over WebSocket, over HTTP and SSE, and a one-shot."""
    async with client(url) as http:
        made = await http.post(f"{prefix}/v1/sessions")
        session_id = made.json()["session"]["id"]
        assert made.headers["location"] == f"{prefix}/v1/sessions/{session_id}"
        assert (await http.get(made.headers["location"])).json()["session"]["id"] == session_id
        async with attached(At(f"{url.replace('http', 'ws')}{prefix}/v1/realtime"), session_id=session_id) as reader:
            assert await reader.answer("Hello", max_output_tokens=3) == "This is the"
        async with http.stream("GET", f"{prefix}/v1/sessions/{session_id}/events") as events:
            assert events.headers["content-type"].startswith("text/event-stream")
            lines = events.aiter_lines()
            while "session.resumed" not in await anext(lines):
                pass
        whole = await http.post(f"{prefix}/v1/complete", json={"prompt": "Hello", "max_tokens": 2})
        assert whole.json()["text"].startswith("This is")
        task = await http.post(f"{prefix}/v1/tasks/summarise", json={"text": "Short."})
        assert task.headers["location"] == f"{prefix}/v1/tasks/{task.json()['task_id']}"
        assert (await http.delete(task.headers["location"])).status_code == 202


async def test_fastapi_application_has_the_server_under_its_path() -> None:
    """The example, under plain uvicorn: sessions, the application's own routes and lifespan, the page and its files."""
    from examples.fastapi_app import app

    async with plain_uvicorn(app) as url, client(url) as http:
        await check_sessions(url, "/ai")
        assert (await http.get("/visits")).json() == {"1": "Anna, 9:30"}
        page = await http.get("/ai")
        assert page.url.path == "/ai/"
        for path in re.findall(r'(?:href|src)="([^"#]+)"', page.text):
            assert (path, (await http.get(f"/ai/{path}")).status_code) == (path, 200)
        assert (await http.get("/v1/sessions/sess_1")).json() == {"detail": "Not Found"}
        assert (await http.get("/ai/nothing")).json()["error"]["code"] == "not_found"
    assert app.state.visits == {}


async def test_starlette_application_drains_as_the_server_does() -> None:
    """The example, on what it is run by: a shutdown waits for the answer that runs, and says goodbye."""
    from examples.starlette_app import app

    settings = Settings(port=0)
    server = make_server(app, settings)
    async with serving(server, sockets=[listen(settings)]) as url:
        await check_sessions(url, "/ai")
        async with client(url) as http:
            assert (await http.get("/")).text == "The assistant is at /ai/"
        async with attached(At(f"{url.replace('http', 'ws')}/ai/v1/realtime")) as reader:
            response_id = await reader.respond("Hello", max_output_tokens=20)
            await reader.until("response.output_text.delta")
            server.should_exit = True
            done = await reader.until("response.done", response_id=response_id)
            assert done["stop_reason"] == "max_tokens"
            await reader.until("session.going_away")


def test_examples_are_those_of_the_page() -> None:
    """What is shown is what is run here."""
    shown = re.findall(APP, EMBEDDING, re.MULTILINE | re.DOTALL)
    files = [(ROOT / f"examples/{name}_app.py").read_text() for name in ("fastapi", "starlette")]
    bodies = [file[file.index("\nfrom ") + 1 :] for file in files]
    assert shown == bodies


async def test_server_starts_before_its_host_and_ends_after_it() -> None:
    """What the application does in its own lifespan may use the server; and its state is the one that counts."""
    seen: list[str] = []

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[dict[str, int]]:
        seen.append(str((await under.state.engine.store.ping()) is None))
        yield {"answer": 42}
        seen.append("ended")

    under = create_app(demo, Settings())
    host = Starlette(lifespan=lifespan)
    mount(host, under, "/ai")
    async with host.router.lifespan_context(host) as state:
        assert state == {"answer": 42}
    assert seen == ["True", "ended"]


async def test_cookie_is_for_the_path() -> None:
    """Other applications of the same host don't see it; at the root it is for all."""
    settings = Settings(auth_secret=SECRET)
    host = Starlette()
    mount(host, create_app(demo, settings), "/ai")
    headers = {"Authorization": f"Bearer {sign(settings, user='ann', ttl_s=60)}"}
    async with plain_uvicorn(host) as url, client(url) as http:
        answer = await http.post("/ai/v1/auth/cookie", headers=headers)
        assert "Path=/ai;" in answer.headers["set-cookie"]
        assert (await http.post("/ai/v1/sessions", content=b"x" * 70_000, headers=headers)).status_code == 413


async def test_server_under_a_path_of_a_proxy() -> None:
    """nginx with the location of the page takes the path off, and the server tells paths with it."""
    [location] = re.findall(LOCATION, EMBEDDING, re.MULTILINE | re.DOTALL)
    first = "location / {"
    async with running_server(root_path="/ai") as server:
        async with nginx(server.port, replacing={first: f"{location}{first}"}) as proxy:
            await check_sessions(proxy.url, "/ai")


@pytest.mark.skipif(CHROMIUM is None and "CI" not in os.environ, reason="chromium is missing")
async def test_page_works_under_a_path() -> None:
    """In a real browser, without an error: it finds its files and its server, and shows an answer."""
    host = Starlette()
    mount(host, create_app(demo, Settings()), "/ai")
    async with plain_uvicorn(host) as url, async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = await browser.new_page()
        errors: list[str] = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        await page.goto(f"{url}/ai/")
        await page.locator("textarea").fill("Hello")
        await page.keyboard.press("Enter")
        await expect(page.get_by_text("This is the demo responder").first).to_be_visible(timeout=20_000)
        await browser.close()
    assert errors == []
