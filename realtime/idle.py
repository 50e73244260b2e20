"""A timeout on silence: it ends a block in which nothing made progress for too long."""

from __future__ import annotations

import asyncio
import math
from types import TracebackType
from typing import Self


class IdleTimeout:
    """Raises `TimeoutError` out of its `async with` block once `progress()` was not called for `idle_s` seconds.

    It is `asyncio.timeout` with a deadline that moves, made so that moving it costs one assignment: a single timer
    looks at the last progress when it fires, and sets itself anew if there was some.
    """

    __slots__ = ("_idle_s", "_last", "_loop", "_timeout", "_timer")

    def __init__(self, idle_s: float) -> None:
        self._idle_s = idle_s
        self._timeout = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None

    def progress(self) -> None:
        """Something happened: the silence starts anew."""
        self._last = self._loop.time()

    def pause(self) -> None:
        """What follows is no silence, until the next `progress`."""
        self._last = math.inf

    @property
    def expired(self) -> bool:
        """Whether the `TimeoutError` that left the block is this one's."""
        return self._timeout.expired()

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        await self._timeout.__aenter__()
        self.progress()
        self._arm(self._last)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self._timeout.__aexit__(kind, error, trace)

    def _arm(self, silent_since: float) -> None:
        self._timer = self._loop.call_at(silent_since + self._idle_s, self._look)

    def _look(self) -> None:
        now = self._loop.time()
        silent_since = min(self._last, now)
        if now >= silent_since + self._idle_s:
            self._timer = None
            self._timeout.reschedule(now)
        else:
            self._arm(silent_since)
