"""Writes what the responses and tasks of this process say to the store: all in one round trip, every few milliseconds.

The journal is the only writer of a channel once its response or task runs, so its own writes never overtake each
other. A store that does not answer is asked again until it does, while readers here go on reading. Because a write that
was not answered may have had its effect all the same, a position that the store does not expect is looked into: what
stands there may be what this process wrote. If it isn't, somebody else has ended it. And if less stands there than was
written, the store has lost a part of it, and what follows can't be told in order any more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator

from realtime.errors import ConflictError, StoreError
from realtime.live import RETRY_S
from realtime.log import Deltas, Entry, length
from realtime.observe import logs, metrics
from realtime.protocol import MAX_FRAME_CHARS, ChannelEvent
from realtime.store.base import Batch, Head, PositionConflict, Store, Write
from realtime.view import View


class Tail:
    """What one channel still has to tell the store. `lost` is called with the error once a write was refused. Its
    session is kept for at least `keep_s` after each write."""

    __slots__ = ("_end", "_ended", "_refused", "channel", "keep_s", "lost", "session_id", "view")

    def __init__(
        self, session_id: str, channel: str, view: View, *, lost: Callable[[Exception], None], keep_s: float = 0.0
    ) -> None:
        self.session_id = session_id
        self.channel = channel
        self.view = view
        self.lost = lost
        self.keep_s = keep_s
        self._end: ChannelEvent | None = None
        self._ended: asyncio.Future[None] | None = None
        self._refused: Exception | None = None
        """Why nothing more of this can be written, not even its end."""

    def finish(self, end: ChannelEvent) -> asyncio.Future[None]:
        """Let `end` follow the last delta; the future is done, or has the store's error, once it was written."""
        self._end = end
        self._ended = asyncio.get_running_loop().create_future()
        if self._refused is not None:
            self._ended.set_exception(self._refused)
        return self._ended

    def batch(self) -> Batch:
        """All that is shown and not stored yet, and the end if there is one."""
        write = Write(self.channel, self._entries(), expect=self.view.stored)
        return Batch(self.session_id, [write], keep_s=self.keep_s)

    def abandon(self) -> None:
        """Write nothing more of this."""
        self._refused = self._refused or PositionConflict()

    @property
    def is_clean(self) -> bool:
        """Whether there is nothing to write."""
        return self._refused is not None or (self._end is None and self.view.stored >= self.view.log.head)

    def wrote(self, batch: Batch) -> None:
        """The store has a batch."""
        [write] = batch.writes
        stored = self.view.stored if write.expect is None else write.expect
        self.view.stored = max(self.view.stored, stored + sum(map(length, write.entries)))
        if write.entries[-1] is self._end:
            self._resolve()

    def refuse(self, error: Exception) -> None:
        """The store takes no more of this; of a full session's (`ConflictError`) it still takes the end."""
        if not isinstance(error, ConflictError):
            self._refused = error
        if self._ended is None:
            self.lost(error)
        elif not self._ended.done():
            self._ended.set_exception(error)

    def compare(self, after: int, found: list[Entry], *, finished: bool) -> bool:
        """Look at what the store has from `after` on, and whether the channel has ended there; returns whether this
        process wrote that, and may go on after it."""
        known = max(0, self.view.stored - after)  # a late answer may have told of more since that was asked for
        ours, theirs = list(_singly(self._entries())), list(_singly(found))[known:]
        if ours[: len(theirs)] != theirs or (finished and len(theirs) < len(ours)):
            return False
        self.view.stored += len(theirs)
        if finished:
            self._resolve()
        return True

    def _entries(self) -> list[Entry]:
        entries = self.view.log.entries(self.view.stored)
        if self._end is not None:
            entries.append(self._end)
        return entries

    def _resolve(self) -> None:
        self._end = None
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)


class Journal:
    """The one task that flushes. Owned by who runs `run()`."""

    def __init__(self, store: Store, *, interval_s: float) -> None:
        self._store = store
        self._interval_s = interval_s
        self._dirty: dict[Tail, None] = {}
        self._marked = asyncio.Event()
        self._urgent = asyncio.Event()
        self._oldest_at: float | None = None
        """`time.monotonic()` since when something waits for the store."""

    def mark(self, tail: Tail) -> None:
        """The tail's view has something new; it is written within the interval."""
        self._dirty[tail] = None
        if self._oldest_at is None:
            self._oldest_at = time.monotonic()
        self._marked.set()

    async def finish(self, tail: Tail, end: ChannelEvent) -> None:
        """Write what is left of the channel, and its end, at once; returns when the store has it, however long that
        takes.

        Raises the store's refusal: `PositionConflict` where somebody else has ended it, `NotFound` where the session is
        gone, `StoreError` (`store_lost`) where the store has lost what the end would follow. The end is shown to nobody
        before it is stored.
        """
        ended = tail.finish(end)
        if not ended.done():
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
            oldest_at, self._oldest_at = self._oldest_at or time.monotonic(), None
            try:
                answered = await self._flush()
            except Exception as error:  # a fault of ours: the other responses have to be written all the same
                logs.report(error)
                answered = False
            metrics.JOURNAL_LAG_SECONDS.observe(time.monotonic() - oldest_at)
            if not answered:
                self._oldest_at = oldest_at
                await asyncio.sleep(RETRY_S)

    async def _pause(self) -> None:
        if self._urgent.is_set():
            return
        try:
            async with asyncio.timeout(self._interval_s):
                await self._urgent.wait()
        except TimeoutError:
            return

    async def _flush(self) -> bool:
        """Write what is new; returns whether the store has answered."""
        pending = [(tail, tail.batch()) for tail in self._dirty if not tail.is_clean]
        self._dirty = {}
        errors = await self._store.append_all([batch for _, batch in pending])
        conflicts = []
        answered = True
        for (tail, batch), error in zip(pending, errors, strict=True):
            match error:
                case None:
                    tail.wrote(batch)
                case PositionConflict():
                    conflicts.append(tail)
                case StoreError():
                    self.mark(tail)
                    answered = False
                case _:
                    tail.refuse(error)
        await asyncio.gather(*map(self._look_into, conflicts))
        return answered

    async def _look_into(self, tail: Tail) -> None:
        """Find out who was first where a write came to a position that the store did not expect."""
        stood = tail.view.stored
        try:
            snapshot = await self._store.load(tail.session_id)
            head = snapshot.heads.get(tail.channel, Head(0, finished=False))
            found = await self._read(tail, stood)
        except StoreError:
            self.mark(tail)
        except Exception as error:  # whatever it is, it is this channel's end and not the journal's
            tail.refuse(error)
        else:
            if head.position < stood and not head.finished:
                tail.refuse(StoreError("store_lost", "The store has lost a part of it."))
            elif head.position >= stood and tail.compare(stood, found, finished=head.finished):
                self.mark(tail)
            else:
                tail.refuse(PositionConflict())

    async def _read(self, tail: Tail, after: int) -> list[Entry]:
        entries: list[Entry] = []
        while found := await self._store.read(tail.session_id, tail.channel, after, MAX_FRAME_CHARS):
            entries += found
            after += sum(map(length, found))
        return entries


def _singly(entries: Iterable[Entry]) -> Iterator[tuple[ChannelEvent, str]]:
    """The entries as one pair a position, however they were cut into runs."""
    for entry in entries:
        if isinstance(entry, Deltas):
            yield from ((entry.template, text) for text in entry.texts)
        else:
            yield entry, ""
