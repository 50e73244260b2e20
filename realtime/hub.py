"""The sessions that this process is busy with: a fold of each one's log, the ends of its channels, and its readers.

A `LiveSession` watches its session in the store. What is appended anywhere is folded into its state and shown to its
readers here; what a response of this process says is shown first and stored by the journal a moment later.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from msgspec import Struct

from realtime.log import ChannelLog, Deltas, Entry, length
from realtime.protocol import (
    CONTROL_CHANNEL,
    MAX_FRAME_CHARS,
    SESSION_CHANNEL,
    ChannelEvent,
    Delta,
    Participant,
    ResponseCreated,
    ResponseDone,
)
from realtime.session import CancelResponse, SessionState
from realtime.store.base import Appended, Gone, Notice, Snapshot, Store, ViewerJoined, ViewerLeft
from realtime.viewers import Audience

WINDOW = 32
"""How many of a channel's newest events stay at hand for its readers; who is further behind reads from the store."""


class Reader(Protocol):
    """Somebody who follows a live session."""

    participant: Participant
    floor_s: float
    """The least grace that its end deserves, read when it is gone."""

    def wake(self) -> None:
        """Something may be new. Called on the event loop; must not raise."""

    def follows(self, channel: str) -> bool:
        """Whether this reader has not seen the channel's end yet."""


class View:
    """The end of one channel's log: all that the store does not have yet, and a window of what it has.

    `stored` is the position up to which the store has the channel.
    """

    __slots__ = ("finished", "log", "stored")

    def __init__(self, position: int = 0) -> None:
        self.log = ChannelLog(position)
        self.stored = position
        self.finished = False

    def append_delta(self, template: Delta, text: str) -> None:
        """Show a delta before it is stored; only the channel's owner does."""
        self.log.append_delta(template, text)
        self._trim()

    def receive(self, first: int, entries: Sequence[Entry]) -> list[ChannelEvent]:
        """Take what the store has from position `first` on; returns the events of it that were not shown before,
        deltas left out."""
        end = first + sum(map(length, entries)) - 1
        if end <= self.log.head:  # all of it was shown from here
            self.stored = max(self.stored, end)
            return []
        fresh = list(_after(entries, self.log.head + 1 - first))
        self.log.extend(fresh)
        self.stored = max(self.stored, end)
        self._trim()
        return [entry for entry in fresh if not isinstance(entry, Deltas)]

    def _trim(self) -> None:
        if self.log.head - self.log.start > 3 * WINDOW:
            self.log.drop(min(self.stored, self.log.head - WINDOW))


class LiveSession:
    """One session in this process: its state, the views of its unfinished channels, its audience and its readers.

    `changed` is called after whatever is appended or happens to the audience, but for deltas of this process; `cancel`
    for every request to stop a response.
    """

    __slots__ = (
        "_backlog",
        "_timer",
        "_unwatch",
        "audience",
        "cancel",
        "changed",
        "gone",
        "id",
        "readers",
        "state",
        "store",
        "users",
        "views",
    )

    def __init__(
        self,
        session_id: str,
        store: Store,
        *,
        changed: Callable[[LiveSession], None],
        cancel: Callable[[LiveSession, CancelResponse], None],
    ) -> None:
        self.id = session_id
        self.store = store
        self.changed = changed
        self.cancel = cancel
        self.state: SessionState
        self.audience: Audience
        self.views: dict[str, View] = {}
        self.users = 0
        """How many keep it open: see `Hub.retain`."""
        self.readers: set[Reader] = set()
        self.gone: Gone | None = None
        """Set once the store has the session no more."""
        self._backlog: list[Notice] | None = []
        self._unwatch: Callable[[], None] = _nothing
        self._timer: asyncio.TimerHandle | None = None

    async def open(self) -> None:
        """Watch, then read, then go on by position. Raises `NotFound`."""
        self._unwatch = self.store.watch(self.id, self._receive)
        try:
            snapshot = await self.store.load(self.id)
            viewers = await self.store.viewers(self.id)
            self.audience = Audience(viewers, now=asyncio.get_running_loop().time())
            await self._fold(snapshot)
        except BaseException:
            self.close()
            raise
        backlog, self._backlog = self._backlog or [], None
        for notice in backlog:
            self._receive(notice)
        self.changed(self)

    def close(self) -> None:
        """Stop watching. Safe to call twice."""
        self.stop_timer()
        self._unwatch()
        self._unwatch = _nothing

    async def refresh(self) -> None:
        """Read what the session's channel has that was not told yet."""
        head = self.views[SESSION_CHANNEL].log.head
        if entries := await self.store.read(self.id, SESSION_CHANNEL, head, MAX_FRAME_CHARS):
            self._receive(Appended(SESSION_CHANNEL, head + 1, entries))

    def leave(self, reader: Reader) -> None:
        """A reader is gone."""
        self.readers.discard(reader)
        for channel in [channel for channel, view in self.views.items() if view.finished]:
            self.release(channel)

    def start_timer(self, at: float, look: Callable[[LiveSession], None]) -> None:
        """Have `look` called with this session at loop time `at`, unless the timer is stopped or started anew."""
        self.stop_timer()
        self._timer = asyncio.get_running_loop().call_at(at, look, self)

    def stop_timer(self) -> None:
        """Forget the timer, if there is one."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def wake(self) -> None:
        """Let every reader look for what is new."""
        for reader in self.readers:
            reader.wake()

    def positions(self) -> dict[str, int]:
        """Where the session and its unfinished channels stand now.

        A closed session stands before its end: who begins here is still to be told of that.
        """
        unfinished = {name: self.views[name].log.head for name in self.state.unfinished}
        return {SESSION_CHANNEL: self.state.position - int(self.state.closed), **unfinished}

    async def entries(self, channel: str) -> list[Entry]:
        """A channel whole: what the store has of it, then what is shown and not stored yet."""
        log = ChannelLog()
        while found := await self.store.read(self.id, channel, log.head, MAX_FRAME_CHARS):
            log.extend(found)
        view = self.views.get(channel)
        if view is not None and view.log.covers(log.head):
            log.extend(view.log.entries(log.head))
        return log.entries(0)

    def release(self, channel: str) -> None:
        """Drop the view of a channel that has ended, unless a reader has not seen its end yet."""
        view = self.views.get(channel)
        if view is not None and view.finished and not any(reader.follows(channel) for reader in self.readers):
            del self.views[channel]

    def _receive(self, notice: Notice) -> None:
        if self._backlog is not None:
            self._backlog.append(notice)
            return
        match notice:
            case Appended(channel=channel):
                self._control(notice) if channel == CONTROL_CHANNEL else self._append(notice)
            case ViewerJoined(participant=participant):
                self.audience.join(participant)
                self.wake()
            case ViewerLeft(participant=participant, floor_s=floor_s):
                now = asyncio.get_running_loop().time()
                self.audience.leave(participant, floor_s=floor_s, now=now)
                self._tell()
            case Gone():
                self.gone = notice
                self._tell()

    def _append(self, appended: Appended) -> None:
        view = self.views.get(appended.channel)
        if view is None:
            return
        shown = view.log.head
        for event in view.receive(appended.first, appended.entries):
            self._apply(event)
        if appended.channel == SESSION_CHANNEL:
            self.state.position = view.log.head
        elif view.finished:
            self.release(appended.channel)
        if view.log.head > shown:
            self._tell()

    def _tell(self) -> None:
        self.wake()
        self.changed(self)

    def _apply(self, event: ChannelEvent) -> None:
        self.state.apply(event)
        if isinstance(event, ResponseCreated):
            self.views[event.response.id] = View()
            self.audience.created(event.response.id, now=asyncio.get_running_loop().time())
        elif isinstance(event, ResponseDone):
            self.views[event.response_id].finished = True
            self.audience.ended(event.response_id)

    def _control(self, appended: Appended) -> None:
        for entry in appended.entries:
            if isinstance(entry, CancelResponse):
                self.cancel(self, entry)

    async def _fold(self, snapshot: Snapshot) -> None:
        state = self.state = SessionState(snapshot.session)
        for entry in await self.entries(SESSION_CHANNEL):
            assert not isinstance(entry, Deltas)
            state.apply(entry)
            state.position += 1
        for response in list(state.unfinished.values()):
            head = snapshot.heads.get(response.id)
            if head and head.finished:
                state.end(response.id)
            else:
                response.running = head is not None
                self.views[response.id] = View(head.position if head else 0)
        self.views[SESSION_CHANNEL] = View(state.position)


def _after(entries: Sequence[Entry], skip: int) -> Iterator[Entry]:
    for entry in entries:
        size = length(entry)
        if skip >= size:
            skip -= size
        elif skip > 0 and isinstance(entry, Deltas):
            yield Deltas(entry.template, entry.texts[skip:])
            skip = 0
        else:
            yield entry


class Hub:
    """The live sessions of this process, each opened by its first user and closed after its last."""

    def __init__(
        self,
        store: Store,
        *,
        changed: Callable[[LiveSession], None],
        cancel: Callable[[LiveSession, CancelResponse], None],
    ) -> None:
        self._store = store
        self._changed = changed
        self._cancel = cancel
        self._sessions: dict[str, _Use] = {}

    def sessions(self) -> Iterator[LiveSession]:
        """The sessions that are open now."""
        return (use.live for use in list(self._sessions.values()) if use.opened.done() and not use.live.gone)

    @asynccontextmanager
    async def use(self, session_id: str) -> AsyncIterator[LiveSession]:
        """Use a session; raises `NotFound` if the store does not have it."""
        use = self._sessions.get(session_id)
        if use is None or use.live.gone:
            use = self._sessions[session_id] = self._open(session_id)
        self.retain(use.live)
        try:
            await asyncio.shield(use.opened)
            yield use.live
        finally:
            self.release(use.live)

    def retain(self, live: LiveSession) -> None:
        """Keep a session open until `release`."""
        live.users += 1

    def release(self, live: LiveSession) -> None:
        """The opposite of `retain`: the last one closes the session."""
        live.users -= 1
        if live.users > 0:
            return
        live.close()
        use = self._sessions.get(live.id)
        if use is not None and use.live is live:
            use.opened.cancel()
            del self._sessions[live.id]

    def _open(self, session_id: str) -> _Use:
        live = LiveSession(session_id, self._store, changed=self._changed, cancel=self._cancel)
        return _Use(live, asyncio.ensure_future(live.open()))


class _Use(Struct, frozen=True):
    """A live session, and the future that is done once it has been read."""

    live: LiveSession
    opened: asyncio.Future[None]


def _nothing() -> None:
    return
