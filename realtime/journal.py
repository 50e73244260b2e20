"""Writes what the responses of this process say to the store: all of them in one round trip, every few milliseconds.

The journal is the only writer of a response's channel once the response runs, so its own writes never overtake each
other, and a position that the store does not expect means that somebody else has ended the response.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from realtime.hub import View
from realtime.log import Entry, length
from realtime.protocol import ResponseDone
from realtime.store.base import Batch, Store, Write


class Tail:
    """What one channel still has to tell the store. `lost` is called with the error once a write was refused."""

    __slots__ = ("_end", "_ended", "channel", "lost", "session_id", "view")

    def __init__(self, session_id: str, channel: str, view: View, *, lost: Callable[[Exception], None]) -> None:
        self.session_id = session_id
        self.channel = channel
        self.view = view
        self.lost = lost
        self._end: ResponseDone | None = None
        self._ended: asyncio.Future[None] | None = None

    def finish(self, end: ResponseDone) -> asyncio.Future[None]:
        """Let `end` follow the last delta; the future is done, or has the store's error, once it was written."""
        self._end = end
        self._ended = asyncio.get_running_loop().create_future()
        return self._ended

    def batch(self) -> Batch:
        """All that is shown and not stored yet, and the end if there is one."""
        entries: list[Entry] = self.view.log.entries(self.view.stored)
        if self._end is not None:
            entries.append(self._end)
        return Batch(self.session_id, [Write(self.channel, entries, expect=self.view.stored)])

    def settle(self, batch: Batch, error: Exception | None) -> None:
        """Take note of what became of a batch."""
        [write] = batch.writes
        if error is None:
            stored = self.view.stored if write.expect is None else write.expect
            self.view.stored = max(self.view.stored, stored + sum(map(length, write.entries)))
        elif self._ended is None:
            self.lost(error)
        if self._ended is not None and write.entries[-1] is self._end and not self._ended.done():
            self._ended.set_exception(error) if error else self._ended.set_result(None)


class Journal:
    """The one task that flushes. Owned by who runs `run()`."""

    def __init__(self, store: Store, *, interval_s: float) -> None:
        self._store = store
        self._interval_s = interval_s
        self._dirty: dict[Tail, None] = {}
        self._marked = asyncio.Event()
        self._urgent = asyncio.Event()

    def mark(self, tail: Tail) -> None:
        """The tail's view has something new; it is written within the interval."""
        self._dirty[tail] = None
        self._marked.set()

    async def finish(self, tail: Tail, end: ResponseDone) -> None:
        """Write what is left of the channel, and its end, at once; returns when the store has it.

        Raises the store's error: `PositionConflict` where somebody else has ended it, `NotFound` where the session is
        gone. The end is shown to nobody before it is stored.
        """
        ended = tail.finish(end)
        self.mark(tail)
        self._urgent.set()
        await ended

    async def run(self) -> None:
        """Flush for ever."""
        while True:
            await self._marked.wait()
            await self._pause()
            self._marked.clear()
            self._urgent.clear()
            await self._flush()

    async def _pause(self) -> None:
        if self._urgent.is_set():
            return
        try:
            async with asyncio.timeout(self._interval_s):
                await self._urgent.wait()
        except TimeoutError:
            return

    async def _flush(self) -> None:
        pending = [(tail, tail.batch()) for tail in self._dirty]
        self._dirty = {}
        errors = await self._store.append_all([batch for _, batch in pending])
        for (tail, batch), error in zip(pending, errors, strict=True):
            tail.settle(batch, error)
