"""The store in this process: plain structures, the same guarantees as any other, gone with the process."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from types import TracebackType
from typing import Self

import msgspec

from realtime.errors import session_not_found
from realtime.log import ChannelLog, Deltas, Entry, length
from realtime.protocol import CONTROL_CHANNEL, SESSION_CHANNEL, Session
from realtime.store.base import (
    Appended,
    Batch,
    CommandRecord,
    CommandSeen,
    Gone,
    Head,
    Listener,
    Notice,
    PositionConflict,
    Snapshot,
    Standing,
    TaskRef,
    Unwatch,
    Viewer,
    ViewerJoined,
    ViewerLeft,
    Write,
    ends_channel,
    is_free,
    only_deltas,
    session_full,
)

KEPT_COMMANDS = 1000
SWEEP_S = 1.0
DAY_S = 86_400.0


class _Stored:
    """One session: its logs, what ended, who looks, how long it lives after a use, and when it expires."""

    __slots__ = ("audience", "channels", "commands", "deadline", "finished", "session", "size", "ttl_s", "viewers")

    def __init__(self, session: Session, ttl_s: float) -> None:
        self.session = session
        self.ttl_s = ttl_s
        self.deadline = 0.0
        self.size = 0
        self.channels = {SESSION_CHANNEL: ChannelLog()}
        self.finished: set[str] | None = None
        self.commands: dict[tuple[str, str], CommandRecord] | None = None
        self.viewers: dict[str, Viewer] = {}
        self.audience = 0
        """How often somebody joined or left."""

    def position(self, channel: str) -> int:
        log = self.channels.get(channel)
        return log.head if log else 0

    def has_ended(self, channel: str) -> bool:
        return self.finished is not None and channel in self.finished

    def keep(self, now: float, keep_s: float = 0.0) -> None:
        """It was used: it lives for its time from now, and for `keep_s`."""
        self.deadline = max(self.deadline, now + max(self.ttl_s, keep_s))


class _Tasks:
    """The unfinished tasks, each with the time when it has to be looked after."""

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._due: dict[TaskRef, float] = {}
        self._payers: dict[TaskRef, str] = {}
        self._deadline = 0.0

    def track(self, task: TaskRef, now: float, due: float, payer: str | None, most: int) -> bool:
        if payer is not None and task not in self._payers:
            if sum(one == payer for one in self._payers.values()) >= most:
                return False
            self._payers[task] = payer
        self._due[task] = due
        self._deadline = now + self._ttl_s
        return True

    def untrack(self, tasks: Sequence[TaskRef]) -> None:
        for task in tasks:
            self._due.pop(task, None)
            self._payers.pop(task, None)

    def overdue(self, now: float, again: float, limit: int) -> list[TaskRef]:
        self._deadline = now + self._ttl_s
        due = ((due, task) for task, due in self._due.items() if due <= now)
        found = [task for _, task in heapq.nsmallest(limit, due)]
        self._due.update(dict.fromkeys(found, again))
        return found

    def sweep(self, now: float) -> None:
        """Forget them all if it is long ago that somebody cared."""
        if self._deadline <= now:
            self._due.clear()
            self._payers.clear()

    def __len__(self) -> int:
        return len(self._due)


class MemoryStore:
    """See `realtime.store.base.Store`. `clock` gives monotonic seconds; tests pass their own."""

    shared = False

    def __init__(
        self,
        *,
        session_ttl_s: float = 3600,
        task_ttl_s: float = 3600,
        max_session_bytes: int = 8 * 1024 * 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ttl_s = session_ttl_s
        self._max_bytes = max_session_bytes
        self._clock = clock
        self._sessions: dict[str, _Stored] = {}
        self._instances: dict[str, float] = {}
        self._tasks = _Tasks(2 * max(session_ttl_s, task_ttl_s) + DAY_S)
        self._listeners: dict[tuple[str, str], list[Listener]] = {}
        """By session and channel; those of the session's own channel hear of everything but deltas."""
        self._sweeper: asyncio.Task[None] | None = None

    async def create(self, session: Session, ttl_s: float | None = None) -> None:
        stored = self._sessions[session.id] = _Stored(session, self._ttl_s if ttl_s is None else ttl_s)
        stored.keep(self._clock())

    async def load(self, session_id: str) -> Snapshot:
        stored = self._find(session_id)
        heads = {name: Head(log.head, stored.has_ended(name)) for name, log in stored.channels.items()}
        return Snapshot(stored.session, stored.deadline - self._clock(), stored.size, heads, stored.audience)

    async def use(self, session_id: str) -> None:
        self._use(session_id)

    async def append(
        self, session_id: str, writes: Sequence[Write], command: CommandRecord | None = None, *, keep_s: float = 0.0
    ) -> None:
        stored = self._use(session_id, keep_s)
        self._check(stored, writes, command)
        if command is not None:
            _record(stored, command)
        notices = [_write(stored, write) for write in writes]
        for write, notice in zip(writes, notices, strict=True):
            self._tell(session_id, notice, write.channel if only_deltas(write) else SESSION_CHANNEL)

    async def append_all(self, batches: Sequence[Batch]) -> list[Exception | None]:
        return [await self._try_append(batch) for batch in batches]

    async def read(self, session_id: str, channel: str, after: int, max_chars: int) -> list[Entry]:
        log = self._find(session_id).channels.get(channel)
        return log.entries(after, max_chars) if log else []

    async def find_command(self, session_id: str, user: str, event_id: str) -> CommandRecord | None:
        commands = self._find(session_id).commands
        return commands.get((user, event_id)) if commands else None

    async def watch(self, session_id: str, listener: Listener) -> Unwatch:
        return await self.follow(session_id, SESSION_CHANNEL, listener)

    async def follow(self, session_id: str, channel: str, listener: Listener) -> Unwatch:
        self._listeners.setdefault((session_id, channel), []).append(listener)
        return partial(self._unwatch, session_id, channel, listener)

    async def join(self, session_id: str, viewer: Viewer) -> None:
        stored = self._use(session_id)
        connection_id = viewer.participant.connection_id
        if connection_id not in stored.viewers:
            stored.viewers[connection_id] = viewer
            stored.audience += 1
            self._tell(session_id, ViewerJoined(viewer))

    async def leave(self, session_id: str, connection_id: str, floor_s: float) -> None:
        stored = self._find(session_id)
        viewer = stored.viewers.pop(connection_id, None)
        if viewer is not None:
            stored.audience += 1
            self._tell(session_id, ViewerLeft(viewer.participant, floor_s))

    async def viewers(self, session_id: str) -> list[Viewer]:
        return list(self._find(session_id).viewers.values())

    async def standings(self, session_ids: Sequence[str]) -> list[Standing | None]:
        return [self._standing(session_id) for session_id in session_ids]

    async def erase(self, session_id: str) -> None:
        self._find(session_id)
        self._forget(session_id, Gone("deleted"))

    async def sign(self, instance: str, lease_s: float) -> None:
        self._instances[instance] = self._clock() + lease_s

    async def resign(self, instance: str) -> None:
        self._instances.pop(instance, None)

    async def living(self, instances: Collection[str]) -> set[str]:
        now = self._clock()
        return {instance for instance in instances if self._instances.get(instance, 0.0) > now}

    async def track(self, task: TaskRef, due_s: float, payer: str | None = None, most: int = 0) -> bool:
        now = self._clock()
        return self._tasks.track(task, now, now + due_s, payer, most)

    async def untrack(self, tasks: Sequence[TaskRef]) -> None:
        self._tasks.untrack(tasks)

    async def overdue(self, again_s: float, limit: int) -> list[TaskRef]:
        now = self._clock()
        return self._tasks.overdue(now, now + again_s, limit)

    async def tracked(self) -> int:
        return len(self._tasks)

    async def ping(self) -> None:
        return

    def sweep(self) -> None:
        """Forget the sessions, the instances and the tasks whose time is over."""
        now = self._clock()
        for session_id in [name for name, stored in self._sessions.items() if stored.deadline <= now]:
            self._forget(session_id, Gone("lost"))
        for instance in [name for name, deadline in self._instances.items() if deadline <= now]:
            del self._instances[instance]
        self._tasks.sweep(now)

    async def __aenter__(self) -> Self:
        self._sweeper = asyncio.create_task(self._sweep_for_ever(), name="memory store sweeper")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._sweeper is not None
        self._sweeper.cancel()
        await asyncio.wait([self._sweeper])

    async def _sweep_for_ever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.sweep()

    def _forget(self, session_id: str, gone: Gone) -> None:
        del self._sessions[session_id]
        self._tell(session_id, gone)

    def _tell(self, session_id: str, notice: Notice, channel: str = SESSION_CHANNEL) -> None:
        for listener in tuple(self._listeners.get((session_id, channel), ())):
            listener(notice)

    def _unwatch(self, session_id: str, channel: str, listener: Listener) -> None:
        listeners = self._listeners.get((session_id, channel), [])
        if listener in listeners:
            listeners.remove(listener)
        if not listeners:
            self._listeners.pop((session_id, channel), None)

    def _standing(self, session_id: str) -> Standing | None:
        stored = self._sessions.get(session_id)
        if stored is None or stored.deadline <= self._clock():
            return None
        return Standing(stored.position(SESSION_CHANNEL), stored.position(CONTROL_CHANNEL), stored.audience)

    def _find(self, session_id: str) -> _Stored:
        stored = self._sessions.get(session_id)
        if stored is None or stored.deadline <= self._clock():
            raise session_not_found()
        return stored

    def _use(self, session_id: str, keep_s: float = 0.0) -> _Stored:
        stored = self._find(session_id)
        stored.keep(self._clock(), keep_s)
        return stored

    def _check(self, stored: _Stored, writes: Sequence[Write], command: CommandRecord | None) -> None:
        if command is not None and stored.commands and (command.user, command.event_id) in stored.commands:
            raise CommandSeen
        for write in writes:
            if stored.has_ended(write.channel) or write.expect not in {None, stored.position(write.channel)}:
                raise PositionConflict
        if writes and stored.size >= self._max_bytes and not all(map(is_free, writes)):
            raise session_full()

    async def _try_append(self, batch: Batch) -> Exception | None:
        try:
            self._use(batch.session_id, batch.keep_s)
            await self.append(batch.session_id, batch.writes)
        except Exception as error:  # returned: one session's error is not another's
            return error
        return None


def _write(stored: _Stored, write: Write) -> Appended:
    log = stored.channels.get(write.channel)
    if log is None:
        log = stored.channels[write.channel] = ChannelLog()
    first = log.head + 1
    log.extend(write.entries)
    stored.size += sum(map(_size, write.entries))
    if ends_channel(write):
        stored.finished = stored.finished or set()
        stored.finished.add(write.channel)
    return Appended(write.channel, first, write.entries)


def _record(stored: _Stored, command: CommandRecord) -> None:
    commands = stored.commands = stored.commands if stored.commands is not None else {}
    commands[command.user, command.event_id] = command
    if len(commands) > KEPT_COMMANDS:
        del commands[next(iter(commands))]


def _size(entry: Entry) -> int:
    """About what an entry costs: its text in UTF-8, and what stands around it."""
    if isinstance(entry, Deltas):
        return len("".join(entry.texts).encode()) + 4 * length(entry)
    return len(msgspec.json.encode(entry))
