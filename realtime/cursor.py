"""One reader's place in a session: its positions, and what it is sent next. Replay and live are the same loop.

A cursor keeps no queue. What waits for its reader is what the logs hold past its positions, and it is merged only when
the reader is ready to take it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from msgspec.structs import replace

from realtime.errors import NotFound
from realtime.live import UNBEGUN, LiveSession
from realtime.log import ChannelLog
from realtime.protocol import (
    CONTROL_CHANNEL,
    MAX_FRAME_CHARS,
    SESSION_CHANNEL,
    ChannelEvent,
    ResponseCreated,
    SessionClosed,
    TaskCreated,
)
from realtime.store.base import Head


class Start:
    """Where a reader begins: its positions, and the channels that it has to forget first. Until it was told to forget
    one, it stands where it says that it stands: it may leave before that, and come back.

    `after` is what the reader says that it has, `None` if it has nothing; `heads` is where the channels stand.
    """

    __slots__ = ("heads", "positions", "resets")

    def __init__(self, heads: Mapping[str, Head], after: Mapping[str, int] | None) -> None:
        self.heads = heads
        self.positions = {SESSION_CHANNEL: 0}
        self.resets: set[str] = set()
        for channel, position in (after or {}).items():
            self._resume(channel, position)

    def _resume(self, channel: str, position: int) -> None:
        head = self.heads.get(channel)
        if head is None or channel == CONTROL_CHANNEL:
            return
        if channel == SESSION_CHANNEL and position > head.position:
            raise NotFound("store_lost", "The session has lost events that you have seen; start a new one.")
        if channel != SESSION_CHANNEL and head.finished and position >= head.position:
            self.resets.add(channel)
        self.positions[channel] = position


async def find_start(live: LiveSession, after: Mapping[str, int] | None) -> Start:
    """Where a reader that has `after` begins in `live`. Raises `NotFound` (`store_lost`) if the session has less."""
    heads = dict((await live.store.load(live.id)).heads)
    while live.state.position < heads[SESSION_CHANNEL].position or _is_old(live, heads, after or {}):
        # Either is older than the other. What was told here: another instance's readers may know more. The answer: it
        # knows nothing of the end of a response that ended meanwhile.
        heads = dict((await live.refresh()).heads)
    for channel, shown in live.positions().items():
        stored = heads.get(channel)
        if stored is None or not stored.finished:
            heads[channel] = Head(max(shown, stored.position if stored else 0), finished=False)
    heads[SESSION_CHANNEL] = Head(live.state.position, finished=live.state.closed)
    return Start(heads, after)


def _is_old(live: LiveSession, heads: Mapping[str, Head], after: Mapping[str, int]) -> bool:
    """Whether what a reader names has ended by what was told here, and not by `heads`."""
    named = [channel for channel in after if live.state.knows(channel) and live.state.is_over(channel)]
    return any(not heads.get(channel, UNBEGUN).finished for channel in named)


class Cursor:
    """A reader of `live` that begins at `start`; without one it sees only what comes now.

    What stood in the logs when it began comes first, marked `replay`, then what comes live. `interval_s` is the
    shortest time between two events of one response.
    """

    __slots__ = (
        "_chunk",
        "_heads",
        "_interval_s",
        "_live",
        "_not_before",
        "_replaying",
        "_resets",
        "due",
        "positions",
    )

    def __init__(self, live: LiveSession, start: Start | None, *, interval_s: float = 0.0) -> None:
        self._live = live
        self.positions = start.positions if start else live.positions()
        self._heads = {name: head.position for name, head in start.heads.items()} if start else {}
        self._replaying = start is not None
        self._resets = start.resets if start else set()
        self._interval_s = interval_s
        self._not_before: dict[str, float] = {}
        self._chunk: tuple[str, ChannelLog] | None = None
        self.due = math.inf
        """When `next` is worth asking again although nothing new was appended, in its `now`'s seconds."""

    async def next(self, now: float) -> ChannelEvent | None:
        """The next event for this reader, merged from all that waits in its channel; `None` if nothing waits.

        `now` is monotonic seconds. The positions move on: what was returned is not returned again.
        """
        event = await self._scan(now)
        if event is None and self._replaying and self.due is math.inf:
            self._replaying = False
            self._heads = {}
            event = await self._scan(now)
        if event is None:
            self._chunk = None
        return event

    async def _scan(self, now: float) -> ChannelEvent | None:
        self.due = math.inf
        for channel, position in self.positions.items():
            if self._interval_s and self._too_soon(channel, now):
                continue
            if position and self._is_beyond_end(channel, position):
                self._resets.add(channel)
            event = await self._peek(channel, 0 if channel in self._resets else position)
            if event is not None and not self._held_back(event):
                return self._take(channel, event, now)
        return None

    def _too_soon(self, channel: str, now: float) -> bool:
        at = self._not_before.get(channel, now)
        if at <= now or not self._waits(channel):
            return False
        self.due = min(self.due, at)
        return True

    def _waits(self, channel: str) -> bool:
        view = self._live.views.get(channel)
        return view is None or view.log.head > self.positions[channel]

    def _is_beyond_end(self, channel: str, position: int) -> bool:
        """Whether the reader named a position that it can't have: who saw a channel's end has left it, but for the
        session's own."""
        view = self._live.views.get(channel)
        return channel != SESSION_CHANNEL and view is not None and view.finished and position >= view.log.head

    def _held_back(self, event: ChannelEvent) -> bool:
        """The session's end comes after the end of everything in it."""
        return isinstance(event, SessionClosed) and len(self.positions) > 1

    async def _peek(self, channel: str, position: int) -> ChannelEvent | None:
        upto = self._heads.get(channel, 0) if self._replaying else None
        if upto is not None and position >= upto:
            return None
        return (await self._log(channel, position)).next(position, upto)

    async def _log(self, channel: str, position: int) -> ChannelLog:
        """A log that holds what comes after `position`, as far as anybody has it."""
        view = self._live.views.get(channel)
        if view is not None and view.log.covers(position):
            return view.log
        if self._chunk is not None:
            name, chunk = self._chunk
            if name == channel and chunk.start <= position < chunk.head:
                return chunk
        chunk = ChannelLog(position)
        chunk.extend(await self._live.store.read(self._live.id, channel, position, MAX_FRAME_CHARS))
        self._chunk = (channel, chunk)
        return chunk

    def _take(self, channel: str, event: ChannelEvent, now: float) -> ChannelEvent:
        if channel != SESSION_CHANNEL:
            del self.positions[channel]  # to the end of the row: the other channels come first next time
        self.positions[channel] = event.seq
        if self._interval_s and channel != SESSION_CHANNEL:
            self._not_before[channel] = now + self._interval_s
        if event.ends_channel:
            self._leave(channel)
        elif isinstance(event, ResponseCreated):
            self.positions.setdefault(event.response.id, 0)
        elif isinstance(event, TaskCreated):
            self.positions.setdefault(event.task.id, 0)
        return self._marked(channel, event.for_clients())

    def _marked(self, channel: str, event: ChannelEvent) -> ChannelEvent:
        replay = self._replaying
        reset = channel in self._resets
        if not (replay or reset):
            return event
        self._resets.discard(channel)
        return replace(event, replay=replay, reset=reset)

    def _leave(self, channel: str) -> None:
        if channel != SESSION_CHANNEL:
            del self.positions[channel]
            self._not_before.pop(channel, None)
            self._live.release(channel)
