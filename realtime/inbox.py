"""The commands of one connection that wait to be carried out, one after the other."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from realtime.protocol import AuthRefresh, Command

MAX_WAITING = 64
"""Commands that may wait on one connection; while so many do, its reader waits."""


class Inbox:
    """Carries out commands in their order, in a task that exists only while there are any.

    `execute` must not raise: it tells the client what went wrong.
    """

    __slots__ = ("_execute", "_room", "_waiting", "_worker")

    def __init__(self, execute: Callable[[Command | AuthRefresh], Awaitable[None]]) -> None:
        self._execute = execute
        self._waiting: deque[Command | AuthRefresh] | None = None
        self._room: asyncio.Future[None] | None = None
        self._worker: asyncio.Task[None] | None = None

    async def put(self, command: Command | AuthRefresh) -> None:
        """Have a command carried out. Waits only while `MAX_WAITING` do."""
        if self._waiting is None:
            self._waiting = deque()
        self._waiting.append(command)
        if self._worker is None:
            self._worker = asyncio.create_task(self._work(self._waiting))
        while len(self._waiting or ()) >= MAX_WAITING:
            self._room = self._room or asyncio.get_running_loop().create_future()
            await asyncio.shield(self._room)

    async def finish(self, timeout_s: float) -> None:
        """Let what waits be carried out; what is not within `timeout_s` is given up."""
        if self._worker is not None:
            await asyncio.wait([self._worker], timeout=timeout_s)
            self.stop()

    def stop(self) -> None:
        """Give up what waits."""
        if self._worker is not None:
            self._worker.cancel()

    async def _work(self, waiting: deque[Command | AuthRefresh]) -> None:
        try:
            while waiting:
                await self._execute(waiting[0])
                waiting.popleft()
                self._make_room()
                await asyncio.sleep(0)  # many at once, none of which waits for anything, hold up nobody else
        finally:
            self._worker = self._waiting = None
            self._make_room()

    def _make_room(self) -> None:
        if self._room is not None:
            self._room.set_result(None)
            self._room = None
