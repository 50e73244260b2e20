"""The queue of a server that runs its tasks itself: in the process, and gone with it, as its store is."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Collection
from itertools import count
from types import TracebackType
from typing import Self

from realtime.store.base import TaskRef
from realtime.tasks.queue import Handler
from realtime.tasks.registry import PRIORITIES, TaskDefinition


class LocalQueue:
    """A `Queue` in memory, for at most `slots` tasks at once."""

    def __init__(self, definitions: Collection[TaskDefinition], *, slots: int) -> None:
        self._definitions = {definition.name: definition for definition in definitions}
        self._slots = slots
        self._waiting: dict[str, deque[tuple[int, TaskRef]]] = {name: deque() for name in self._definitions}
        self._arrivals = count()
        self._known: set[TaskRef] = set()
        """Those that wait or run."""
        self._running: dict[asyncio.Task[None], TaskRef] = {}
        self._changed = asyncio.Event()
        self._drained = False

    async def submit(self, task: TaskRef) -> None:
        """Have a task run, unless it waits or runs already."""
        if task not in self._known:
            self._known.add(task)
            self._waiting[task.name].append((next(self._arrivals), task))
            self._changed.set()

    async def unattended(self) -> int:
        """None: the worker is this process."""
        return 0

    async def run(self, handle: Handler) -> None:
        """Run what is submitted, for ever. What is cancelled with it is lost with it."""
        try:
            while True:
                self._changed.clear()
                while (task := self._next()) is not None:
                    self._start(handle, task)
                await self._changed.wait()
        finally:
            for working in self._running:
                working.cancel()
            if self._running:
                await asyncio.wait(self._running)

    async def drain(self) -> None:
        """Start no more, and return once nothing runs."""
        self._drained = True
        while self._running:
            await asyncio.wait(self._running)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def _next(self) -> TaskRef | None:
        """The task that is to run next, of those that there is room for: the most urgent, then the oldest."""
        if self._drained or len(self._running) >= self._slots:
            return None
        running = Counter(task.name for task in self._running.values())
        firsts = [
            (PRIORITIES.index(one.priority), waiting[0][0], one.name)
            for one in self._definitions.values()
            if (waiting := self._waiting[one.name]) and running[one.name] < (one.concurrency or self._slots)
        ]
        return self._waiting[min(firsts)[2]].popleft()[1] if firsts else None

    def _start(self, handle: Handler, task: TaskRef) -> None:
        working = asyncio.ensure_future(handle(task))
        self._running[working] = task
        working.add_done_callback(self._ended)

    def _ended(self, working: asyncio.Task[None]) -> None:
        self._known.discard(self._running.pop(working))
        self._changed.set()
        if not working.cancelled():
            working.exception()  # a handler raises nothing
