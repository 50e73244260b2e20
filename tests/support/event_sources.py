"""`EventSource`s that are not ours, following a real stream: the one from npm under Node, and Chromium's.

async with node_source(url) as source:
    await source.until("response.done")
    assert source.transcript.texts[...] == ...
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
from playwright.async_api import async_playwright

from realtime.log import parse_positions
from tests.support.client import Event, Transcript

NODE_FOLDER = Path(__file__).resolve().parents[1] / "node"
INSTALL = ("ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error")
INSTALL_S = 120.0
LONGEST_LINE_BYTES = 4 * 1024 * 1024
CHROMIUM_ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
)
OPEN, CLOSED = 1, 2
"""Values of `readyState`."""

TYPES = [
    "session.resumed",
    "session.updated",
    "session.closed",
    "session.going_away",
    "participant.joined",
    "participant.left",
    "conversation.item.created",
    "conversation.item.truncated",
    "response.created",
    "response.in_progress",
    "response.output_text.delta",
    "response.reasoning.delta",
    "response.done",
    "server_error",
]

IN_THE_PAGE = """([url, types]) => {
  const source = new EventSource(url);
  source.addEventListener("open", () => tell({ open: true }));
  source.addEventListener("error", () => tell({ error: null, state: source.readyState }));
  for (const type of types) {
    source.addEventListener(type, ({ lastEventId, data }) => tell({ event: type, id: lastEventId, data }));
  }
}"""

SIGN_IN = """async authorization =>
  (await fetch("/v1/auth/cookie", { method: "POST", headers: { authorization } })).status"""


class Source:
    """An `EventSource` that somebody else runs. What it dispatches goes through `transcript`, which finds every double.

    `opened` counts how often it has connected; `state` is its `readyState` at its last error.
    """

    def __init__(self) -> None:
        self.transcript = Transcript()
        self.opened = 0
        self.state = OPEN
        self._told: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, told: Event) -> None:
        """Take what it tells."""
        self._told.put_nowait(told)

    async def receive(self) -> Event:
        """The next event of the session, applied."""
        while True:
            told = await self._told.get()
            if "event" in told:
                return self._apply(told)
            self._note(told)

    async def until(self, kind: str, **fields: Any) -> Event:
        """Receive until an event of that type with those top-level fields; returns it."""
        while True:
            event = await self.receive()
            if event["type"] == kind and all(event.get(name) == value for name, value in fields.items()):
                return event

    async def until_opened(self, times: int) -> None:
        """Receive until it has connected so often."""
        while self.opened < times:
            await self._receive_any()

    async def until_stopped(self) -> None:
        """Receive until it has given up for good."""
        while self.state != CLOSED:
            await self._receive_any()

    async def _receive_any(self) -> None:
        told = await self._told.get()
        self._apply(told) if "event" in told else self._note(told)

    def _note(self, told: Event) -> None:
        if "open" in told:
            self.opened += 1
        else:
            self.state = told["state"]

    def _apply(self, told: Event) -> Event:
        event: Event = json.loads(told["data"])
        assert told["event"] == ("server_error" if event["type"] == "error" else event["type"])
        self.transcript.apply(event)
        assert parse_positions(told["id"]) == self.transcript.positions, told
        return event


@asynccontextmanager
async def node_source(url: str) -> AsyncIterator[Source]:
    """The `EventSource` of the npm package, which is installed where it is missing."""
    node = await node_with_packages()
    process = await asyncio.create_subprocess_exec(
        node,
        "follow.mjs",
        url,
        *TYPES,
        cwd=NODE_FOLDER,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        limit=LONGEST_LINE_BYTES,
    )
    source = Source()
    reading = asyncio.create_task(_read(process, source))
    try:
        yield source
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await reading


@asynccontextmanager
async def chromium_source(url: str, *, signed_in_by: str = "") -> AsyncIterator[Source]:
    """Chromium's own, in a page of the server, which may have a cookie made of an `Authorization` before."""
    chromium = shutil.which("chromium")
    if chromium is None:
        _missing("chromium")
    source = Source()
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGUMENTS)
        page = await browser.new_page(bypass_csp=True)  # what is there for machines lets no script ask for anything
        await page.goto(url.split("/v1/")[0] + "/healthz")
        if signed_in_by:
            assert await page.evaluate(SIGN_IN, signed_in_by) == 204
        await page.expose_function("tell", source.put)
        await page.evaluate(IN_THE_PAGE, [url, TYPES])
        yield source
        await browser.close()


async def _read(process: asyncio.subprocess.Process, source: Source) -> None:
    assert process.stdout is not None
    while line := await process.stdout.readline():
        source.put(json.loads(line))


async def node_with_packages() -> str:
    """The Node to run, with the packages of the lock file beside it. In CI that fails where it can't be; else skips."""
    with (NODE_FOLDER / "package.json").open() as lock:  # another test may be installing them
        await asyncio.to_thread(fcntl.flock, lock, fcntl.LOCK_EX)
        return await _installed()


async def _installed() -> str:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None:
        _missing("node")
    installed, lock = NODE_FOLDER / "node_modules/.package-lock.json", NODE_FOLDER / "package-lock.json"
    if installed.exists() and installed.stat().st_mtime >= lock.stat().st_mtime:
        return node
    if npm is None:
        _missing("npm")
    installing = await asyncio.create_subprocess_exec(npm, *INSTALL, cwd=NODE_FOLDER, stdin=asyncio.subprocess.DEVNULL)
    async with asyncio.timeout(INSTALL_S):
        if await installing.wait() != 0:
            _missing("the packages of tests/node")
    return node


def _missing(what: str) -> NoReturn:
    """Skip the test, but in CI, where everything has to be there."""
    if "CI" in os.environ:
        pytest.fail(f"{what} is missing")
    pytest.skip(f"{what} is missing")
