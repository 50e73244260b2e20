"""Work that goes on beside its owner, and ends with it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextvars import Context
from types import TracebackType
from typing import Any, Self

from realtime.observe import logs


class Background:
    """Any number of coroutines, owned by `async with`: leaving it cancels those that still run, and waits for them.

    A fault in one ends that one, and is reported; it does not end the others.
    """

    def __init__(self) -> None:
        self._group = asyncio.TaskGroup()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await self._group.__aexit__(kind, error, trace)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Have `work` run until it ends or this does. One that is stopping takes no more work.

        It is nobody's: it knows nothing of the connection, if any, that has given rise to it.
        """
        if self._stopping:
            work.close()
            return
        task = self._group.create_task(_contained(work), context=Context())
        task.add_done_callback(lambda _: work.close())  # it may have been cancelled before it began
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _contained(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except Exception as error:
        logs.report(error)
