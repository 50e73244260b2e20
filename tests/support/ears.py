"""Who a live session talks to, where a test has no engine."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from realtime.live import LiveSession
from realtime.protocol import ChannelEvent
from realtime.session import ResponseState

PATIENCE_S = 20.0


class Ears:
    """Keeps what it is told, and runs what it is asked to."""

    def __init__(self, instance: str = "inst_1") -> None:
        self.instance = instance
        self.told: list[LiveSession] = []
        self.requests: list[ChannelEvent] = []
        self.lost: list[str] = []
        self.tasks: set[asyncio.Task[None]] = set()

    def followed(self, live: LiveSession) -> list[str]:
        """What runs elsewhere, as an engine says."""
        responses = [one.id for one in live.state.unfinished.values() if one.running and one.instance != self.instance]
        return responses + [task.id for task in live.state.unfinished_tasks.values() if task.running]

    def changed(self, live: LiveSession) -> None:
        """Something happened to a session."""
        self.told.append(live)

    def asked(self, live: LiveSession, request: ChannelEvent) -> None:
        """Somebody asks for something."""
        self.requests.append(request)

    def unended(self, live: LiveSession, response: ResponseState) -> None:
        """The store has lost an end."""
        self.lost.append(response.id)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something beside the test."""
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def settled(self) -> None:
        """Return once nothing runs any more; what failed, fails the test."""
        async with asyncio.timeout(PATIENCE_S):
            while self.tasks:
                await asyncio.gather(*self.tasks)
                # Since Python 3.12 that does not wait for what is done and not forgotten yet.
                await asyncio.sleep(0)
