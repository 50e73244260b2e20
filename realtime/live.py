"""A session that this process is busy with: a fold of its log, the ends of its channels, its audience and its readers.

A `LiveSession` watches its session in the store. What is appended anywhere is folded into its state and shown to its
readers here; what a response of this process says is shown first and stored by the journal a moment later.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from typing import Any, Protocol

from msgspec.structs import replace

from realtime.doorbell import Doorbell
from realtime.errors import NotFound, StoreError, session_not_found
from realtime.log import ChannelLog, Deltas, Entry, entries_from, length
from realtime.observe import logs
from realtime.protocol import (
    CONTROL_CHANNEL,
    MAX_FRAME_CHARS,
    SESSION_CHANNEL,
    ChannelEvent,
    Participant,
    ResponseCreated,
    ResponseDone,
    ResponseInProgress,
    TaskCreated,
    TaskDone,
    TaskStarted,
)
from realtime.session import ResponseState, SessionState, TaskState
from realtime.store.base import (
    Appended,
    Gone,
    Head,
    Missed,
    Notice,
    Snapshot,
    Standing,
    Store,
    Unwatch,
    ViewerJoined,
    ViewerLeft,
)
from realtime.view import View, is_end
from realtime.viewers import Audience

UNBEGUN = Head(0, finished=False)
"""Where a channel stands that nothing was appended to yet."""
ENTRIES_A_TURN = 500
RETRY_S = 0.5
"""How long to wait before the store is asked again that did not answer."""


class Reader(Protocol):
    """Somebody who follows a live session."""

    participant: Participant
    floor_s: float
    """The least grace that its end deserves, read when it is gone."""

    def wake(self) -> None:
        """Something may be new. Called on the event loop; must not raise."""

    def follows(self, channel: str) -> bool:
        """Whether this reader has not seen the channel's end yet."""


class Ears(Protocol):
    """Who is told of what happens to a live session. Nothing of it may raise."""

    instance: str
    """The instance that this is."""

    def followed(self, live: LiveSession) -> Iterable[str]:
        """The channels that run, and that readers here have to be told of from the store."""

    def changed(self, live: LiveSession) -> None:
        """Something was appended, or happened to the audience, or the session is gone; but for deltas."""

    def asked(self, live: LiveSession, request: ChannelEvent) -> None:
        """Somebody asks for something on the session's control channel."""

    def unended(self, live: LiveSession, response: ResponseState) -> None:
        """The store does not have the end of a response, which was told: it has lost it."""

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Have `work` run until it ends or the process does."""


class LiveSession:
    """One session in this process: its state, the views of its unfinished channels, its audience and its readers."""

    __slots__ = (
        "_backlog",
        "_ears",
        "_heard",
        "_is_reading",
        "_must_read",
        "_timer",
        "_watches",
        "audience",
        "bells",
        "gone",
        "id",
        "readers",
        "state",
        "store",
        "users",
        "views",
    )

    def __init__(self, session_id: str, store: Store, ears: Ears) -> None:
        self.id = session_id
        self.store = store
        self.state: SessionState
        self.audience: Audience
        self.views: dict[str, View] = {}
        self.users = 0
        """How many keep it open: see `Hub.retain`."""
        self.readers: set[Reader] = set()
        self.bells: set[Doorbell] = set()
        """Rung with the readers: for those who look at the session and are no participants."""
        self.gone: Gone | None = None
        """Set once the store has the session no more."""
        self._ears = ears
        self._heard = Standing(0, 0, 0)
        """Up to where this was told of control requests and of the audience."""
        self._backlog: list[Notice] | None = []
        self._watches: dict[str, Unwatch] = {}
        self._must_read = False
        self._is_reading = False
        self._timer: asyncio.TimerHandle | None = None

    async def open(self) -> None:
        """Watch, then read, then go on by position. Raises `NotFound`."""
        try:
            self._watches[SESSION_CHANNEL] = await self.store.watch(self.id, self._receive)
            snapshot = await self.store.load(self.id)
            self._heard = Standing(0, 0, snapshot.audience)
            self.audience = Audience(await self.store.viewers(self.id), now=asyncio.get_running_loop().time())
            await self._fold(snapshot)
        except BaseException:
            self.close()
            raise
        backlog, self._backlog = self._backlog or [], None
        for notice in backlog:
            self._receive(notice)
        if snapshot.heads.get(CONTROL_CHANNEL) or list(self._ears.followed(self)):
            self.doubt()
        self._ears.changed(self)

    def close(self) -> None:
        """Stop watching. Safe to call twice."""
        self.stop_timer()
        for unwatch in self._watches.values():
            unwatch()
        self._watches.clear()

    def doubt(self) -> None:
        """There may be something in the store that was not told: read it, soon, and until it succeeds."""
        self._must_read = True
        if not self._is_reading:
            self._is_reading = True
            self._ears.spawn(self._read_until_sure())

    async def refresh(self) -> Snapshot:
        """Read what the store has in the logs that was not told yet. Raises `NotFound`."""
        stood = self.state.position
        ended = [response for response in self.state.responses.values() if response.done]
        snapshot = await self.store.load(self.id)
        if snapshot.heads[SESSION_CHANNEL].position < stood:
            raise session_not_found()  # the store has lost what clients have seen: it is not that session any more
        for response in ended:
            if not snapshot.heads.get(response.id, UNBEGUN).finished and self._watches:
                self._ears.unended(self, response)
        await self._catch_up(SESSION_CHANNEL, snapshot.heads[SESSION_CHANNEL])
        for channel, head in snapshot.heads.items():
            if channel in self.views:
                await self._catch_up(channel, head)
        await self._catch_up_control(snapshot.heads.get(CONTROL_CHANNEL))
        return snapshot

    def look_at(self, standing: Standing | None) -> None:
        """Compare with where the session stands in the store, and read if something was missed."""
        if standing is None:
            self._receive(Gone("lost"))
        elif (
            standing.session != self.state.position
            or standing.control > self._heard.control
            or standing.audience != self._heard.audience
        ):
            self.doubt()

    def leave(self, reader: Reader) -> None:
        """A reader is gone."""
        self.readers.discard(reader)
        for channel in [channel for channel, view in self.views.items() if view.finished]:
            self.release(channel)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Have `work` run until it ends or the process does, whether or not the session stays open."""
        self._ears.spawn(work)

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
        for bell in self.bells:
            bell.ring()

    def positions(self) -> dict[str, int]:
        """Where the session and its unfinished channels stand now.

        A closed session stands before its end: who begins here is still to be told of that.
        """
        names = [*self.state.unfinished, *self.state.unfinished_tasks]
        unfinished = {name: self.views[name].log.head for name in names}
        return {SESSION_CHANNEL: self.state.position - int(self.state.closed), **unfinished}

    async def stored(self, channel: str) -> list[Entry]:
        """What the store has of a channel."""
        return (await self._read_log(channel)).entries(0)

    async def entries(self, channel: str) -> list[Entry]:
        """A channel whole: what the store has of it, then what is shown and not stored yet."""
        log = await self._read_log(channel)
        entries = log.entries(0)
        view = self.views.get(channel)
        has_ended = bool(entries) and is_end(entries[-1])  # elsewhere, maybe: what was shown here never came to be
        if view is not None and view.log.covers(log.head) and not has_ended:
            entries += view.log.entries(log.head)
        return entries

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
            case ViewerJoined(viewer=viewer):
                self._heard = replace(self._heard, audience=self._heard.audience + 1)
                self.audience.join(viewer)
                self.wake()
            case ViewerLeft(participant=participant, floor_s=floor_s):
                now = asyncio.get_running_loop().time()
                self._heard = replace(self._heard, audience=self._heard.audience + 1)
                self.audience.leave(participant.connection_id, floor_s=floor_s, now=now)
                self._tell()
            case Missed():
                self.doubt()
            case Gone():
                self.gone = self.gone or notice
                self._tell()

    def _append(self, appended: Appended) -> None:
        view = self.views.get(appended.channel)
        if view is None:
            if not self.state.knows(appended.channel):
                self.doubt()  # its creation was not told
            return
        if appended.first > view.log.head + 1:
            self.doubt()
            return
        shown, log = view.log.head, view.log
        events = view.receive(appended.first, appended.entries)
        if appended.channel == SESSION_CHANNEL:
            self._fold_on(events, view.log.head)
        else:
            for event in events:
                self._apply(event)
        if view.finished and appended.channel != SESSION_CHANNEL:
            self.release(appended.channel)
        if view.log.head > shown or view.log is not log:
            self._tell()

    def _fold_on(self, events: Sequence[ChannelEvent], head: int) -> None:
        """Fold events of the session's own channel, the last of which stands at `head`. Its end may be told again."""
        for position, event in enumerate(events, head - len(events)):
            self.state.position = position
            self._apply(event)
        self.state.position = head

    def _tell(self) -> None:
        self.wake()
        if self._watches:  # or it was closed while it was being read
            self._ears.changed(self)

    def _apply(self, event: ChannelEvent) -> None:
        self.state.apply(event)
        match event:
            case ResponseCreated(response=response):
                self.views[response.id] = View()
                self.audience.created(response.id, now=asyncio.get_running_loop().time())
            case ResponseInProgress(instance=instance) if instance != self._ears.instance:
                self.doubt()  # it runs elsewhere: there is somebody to follow
            case TaskCreated(task=task):
                self.views[task.id] = View()
            case TaskStarted(task_id=task_id) if task_id not in self._watches:
                self.doubt()  # a worker follows no view: there is somebody to follow
            case ResponseDone(response_id=channel) | TaskDone(task_id=channel):
                self.audience.ended(channel)
                self._watches.pop(channel, _nothing)()

    def _control(self, appended: Appended) -> None:
        position = appended.first + sum(map(length, appended.entries)) - 1
        if appended.first > self._heard.control + 1:
            self.doubt()
        elif position > self._heard.control:
            fresh = list(entries_from(appended.entries, self._heard.control + 1 - appended.first))
            self._heard = replace(self._heard, control=position)
            for entry in fresh:
                assert not isinstance(entry, Deltas)
                if self._watches:  # as in `_tell`
                    self._ears.asked(self, entry)

    async def _read_until_sure(self) -> None:
        try:
            while self._must_read and self._watches and not self.gone:
                self._must_read = False
                await self._read_all()
        finally:
            self._is_reading = False

    async def _read_all(self) -> None:
        try:
            await self._follow()
            snapshot = await self.refresh()
            self._heard = replace(self._heard, audience=snapshot.audience)
            await self._read_viewers()
            self._tell()
        except NotFound:
            self._receive(Gone("lost"))
        except StoreError:
            self._must_read = True
            await asyncio.sleep(RETRY_S)
        except Exception as error:  # something in the store that this version can't read: again, but not at once
            logs.report(error)
            self._must_read = True
            await asyncio.sleep(RETRY_S)

    async def _read_viewers(self) -> None:
        """Learn who looks; again, where somebody came or went meanwhile: the answer may be older than that."""
        heard = self._heard.audience
        viewers = await self.store.viewers(self.id)
        if self._heard.audience == heard:
            self.audience.replace(viewers, now=asyncio.get_running_loop().time())
        else:
            self._must_read = True

    async def _follow(self) -> None:
        for channel in self._ears.followed(self):
            if channel not in self._watches:
                unwatch = await self.store.follow(self.id, channel, self._receive)
                if not self._watches or self.state.is_over(channel):
                    unwatch()
                else:
                    self._watches[channel] = unwatch

    async def _read_log(self, channel: str) -> ChannelLog:
        log = ChannelLog()
        while found := await self.store.read(self.id, channel, log.head, MAX_FRAME_CHARS):
            log.extend(found)
            await asyncio.sleep(0)  # a store in this process lets nobody else have a turn
        return log

    async def _catch_up(self, channel: str, head: Head) -> None:
        """Take from the store what a view doesn't have of its channel, up to `head` at least."""
        view = self.views.get(channel)
        while view is not None and not view.finished and (view.log.head < head.position or head.finished):
            after = min(view.log.head, head.position - 1)
            found = await self.store.read(self.id, channel, after, MAX_FRAME_CHARS)
            if not found:
                return
            self._append(Appended(channel, after + 1, found))

    async def _catch_up_control(self, head: Head | None) -> None:
        while head is not None and self._heard.control < head.position:
            after = self._heard.control
            found = await self.store.read(self.id, CONTROL_CHANNEL, after, MAX_FRAME_CHARS)
            if not found:
                return
            self._control(Appended(CONTROL_CHANNEL, after + 1, found))

    async def _fold(self, snapshot: Snapshot) -> None:
        state = self.state = SessionState(snapshot.session)
        async for entry in in_turns(await self.entries(SESSION_CHANNEL)):
            assert not isinstance(entry, Deltas)
            state.apply(entry)
            state.position += 1
        for response in list(state.unfinished.values()):
            await self._fold_response(response, snapshot.heads.get(response.id))
        for task in list(state.unfinished_tasks.values()):
            self._fold_task(task, snapshot.heads.get(task.id, UNBEGUN))
        self.views[SESSION_CHANNEL] = View(state.position)

    async def _fold_response(self, response: ResponseState, head: Head | None) -> None:
        if head is None:
            self.views[response.id] = View()
        elif head.finished:
            self.state.end(response.id)
        else:
            [claim, *_] = await self.store.read(self.id, response.id, 0, 1)
            assert isinstance(claim, ResponseInProgress)
            self.state.apply(claim)
            self.views[response.id] = View(head.position)

    def _fold_task(self, task: TaskState, head: Head) -> None:
        if head.finished:
            self.state.end(task.id)
            return
        task.running = head.position > 0
        self.views[task.id] = View(head.position)


async def in_turns(entries: Iterable[Entry]) -> AsyncIterator[Entry]:
    """The same, and now and then a turn for others: what is done with all that a session may hold takes a while."""
    for count, entry in enumerate(entries, 1):
        yield entry
        if not count % ENTRIES_A_TURN:
            await asyncio.sleep(0)


def _nothing() -> None:
    return
