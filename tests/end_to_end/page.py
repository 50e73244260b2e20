"""What the tests of the demo page share: to open it, to speak, and a model that says so much as it is let."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

from playwright.async_api import BrowserContext, Page, expect

from realtime.responders.base import Request
from tests.support.client import attached
from tests.support.server import RunningServer

WORDS = [f"word{number} " for number in range(300)]
ANSWERED_MS = 30_000


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


async def answered(page: Page) -> None:
    """Return once the newest answer has ended."""
    await expect(page.locator(".answer").last).to_have_attribute("aria-busy", "false", timeout=ANSWERED_MS)


def session_of(page: Page) -> str:
    """The session's id, as the page's address has it."""
    return urlsplit(page.url).fragment.split("&")[0]


async def logged_answers(server: RunningServer, page: Page) -> list[str]:
    """Read the session's log from its start until its answers are done; return their texts."""
    async with attached(server, session_of(page), history="all") as reader:
        await reader.until("response.created")
        while len(reader.transcript.positions) > 1:
            await reader.receive()
        return [text for channel, text in reader.transcript.texts.items() if channel.startswith("resp_")]


async def events_of(server: RunningServer, page: Page, kind: str) -> list[dict[str, Any]]:
    """The events of that type that the session's log has by now."""
    async with attached(server, session_of(page), history="all") as reader:
        await reader.send("session.update", session={}, event_id=f"read {len(reader.transcript.events)}")
        await reader.until("session.updated", for_event_id=f"read {len(reader.transcript.events)}")
        return [event for event in reader.transcript.events if event["type"] == kind]


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
