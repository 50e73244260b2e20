"""The store in this process: plain structures, the same guarantees as any other, gone with the process."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import msgspec

from realtime.errors import ConflictError, session_not_found
from realtime.log import ChannelLog, Deltas, Entry, length
from realtime.protocol import CONTROL_CHANNEL, SESSION_CHANNEL, Participant, Session
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
    ViewerJoined,
    ViewerLeft,
    Write,
)

KEPT_COMMANDS = 1000
SWEEP_S = 1.0


class _Lease(msgspec.Struct):
    participant: Participant
    deadline: float


class _Stored:
    """One session: its logs, what ended, who looks, and when it expires."""

    __slots__ = (
        "channels",
        "commands",
        "deadline",
        "finished",
        "leases",
        "listeners",
        "next_lease",
        "session",
        "size",
    )

    def __init__(self, session: Session) -> None:
        self.session = session
        self.deadline = 0.0
        self.size = 0
        self.channels = {SESSION_CHANNEL: ChannelLog()}
        self.finished: set[str] | None = None
        self.commands: dict[tuple[str, str], CommandRecord] | None = None
        self.leases: dict[str, _Lease] = {}
        self.next_lease = math.inf
        """When the first of the leases may have run out."""
        self.listeners: list[Listener] = []

    def position(self, channel: str) -> int:
        log = self.channels.get(channel)
        return log.head if log else 0

    def tell(self, notice: Notice) -> None:
        for listener in tuple(self.listeners):
            listener(notice)


class MemoryStore:
    """See `realtime.store.base.Store`. `clock` gives monotonic seconds; tests pass their own."""

    def __init__(
        self,
        *,
        session_ttl_s: float = 3600,
        max_session_bytes: int = 8 * 1024 * 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ttl_s = session_ttl_s
        self._max_bytes = max_session_bytes
        self._clock = clock
        self._sessions: dict[str, _Stored] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self._swept_at = clock()

    async def create(self, session: Session) -> None:
        stored = self._sessions[session.id] = _Stored(session)
        self._touch(stored)

    async def load(self, session_id: str) -> Snapshot:
        stored = self._use(session_id)
        finished = stored.finished or ()
        heads = {name: Head(log.head, name in finished) for name, log in stored.channels.items()}
        return Snapshot(stored.session, self._ttl_s, stored.size, heads)

    async def append(self, session_id: str, writes: Sequence[Write], command: CommandRecord | None = None) -> None:
        stored = self._use(session_id)
        self._check(stored, writes, command)
        if command is not None:
            _record(stored, command)
        notices = [_write(stored, write) for write in writes]
        for notice in notices:
            stored.tell(notice)

    async def append_all(self, batches: Sequence[Batch]) -> list[Exception | None]:
        return [await self._try_append(batch) for batch in batches]

    async def read(self, session_id: str, channel: str, after: int, max_chars: int) -> list[Entry]:
        log = self._use(session_id).channels.get(channel)
        return log.entries(after, max_chars) if log else []

    async def find_command(self, session_id: str, user: str, event_id: str) -> CommandRecord | None:
        commands = self._use(session_id).commands
        return commands.get((user, event_id)) if commands else None

    def watch(self, session_id: str, listener: Listener) -> Callable[[], None]:
        listeners = self._find(session_id).listeners
        listeners.append(listener)
        return lambda: listeners.remove(listener)

    async def hold(self, session_id: str, viewers: Sequence[Participant], lease_s: float) -> None:
        stored = self._use(session_id)
        deadline = self._clock() + lease_s
        for viewer in viewers:
            is_new = viewer.connection_id not in stored.leases
            stored.leases[viewer.connection_id] = _Lease(viewer, deadline)
            if is_new:
                stored.tell(ViewerJoined(viewer))
        stored.next_lease = _next_lease(stored)

    async def release(self, session_id: str, connection_id: str, floor_s: float) -> None:
        stored = self._use(session_id)
        lease = stored.leases.pop(connection_id, None)
        if lease is not None:
            stored.tell(ViewerLeft(lease.participant, floor_s))

    async def viewers(self, session_id: str) -> list[Participant]:
        stored = self._find(session_id)
        now = self._clock()
        return [lease.participant for lease in stored.leases.values() if lease.deadline > now]

    async def erase(self, session_id: str) -> None:
        self._find(session_id)
        self._sessions.pop(session_id).tell(Gone("deleted"))

    async def ping(self) -> None:
        return

    def sweep(self) -> None:
        """Forget the sessions whose time is over, and leases that were not renewed.

        A process that stood still could not renew any: the first sweep after that blames nobody.
        """
        now = self._clock()
        stood_still = now - self._swept_at > 2 * SWEEP_S
        self._swept_at = now
        for session_id, stored in list(self._sessions.items()):
            if stored.deadline <= now:
                del self._sessions[session_id]
                stored.tell(Gone("expired"))
                continue
            if stored.next_lease <= now and not stood_still:
                _drop_lost(stored, now)

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

    def _find(self, session_id: str) -> _Stored:
        stored = self._sessions.get(session_id)
        if stored is None or stored.deadline <= self._clock():
            raise session_not_found()
        return stored

    def _use(self, session_id: str) -> _Stored:
        stored = self._find(session_id)
        self._touch(stored)
        return stored

    def _touch(self, stored: _Stored) -> None:
        stored.deadline = self._clock() + self._ttl_s

    def _check(self, stored: _Stored, writes: Sequence[Write], command: CommandRecord | None) -> None:
        if command is not None and stored.commands and (command.user, command.event_id) in stored.commands:
            raise CommandSeen
        for write in writes:
            if write.expect is not None and write.expect != stored.position(write.channel):
                raise PositionConflict
        if stored.size >= self._max_bytes and not any(map(_is_free, writes)):
            raise ConflictError("session_full", "The session holds as much as a session may; start a new one.")

    async def _try_append(self, batch: Batch) -> Exception | None:
        try:
            await self.append(batch.session_id, batch.writes)
        except Exception as error:  # returned: one session's error is not another's
            return error
        return None


def _drop_lost(stored: _Stored, now: float) -> None:
    for lease in [lease for lease in stored.leases.values() if lease.deadline <= now]:
        del stored.leases[lease.participant.connection_id]
        stored.tell(ViewerLeft(lease.participant, 0.0))
    stored.next_lease = _next_lease(stored)


def _next_lease(stored: _Stored) -> float:
    return min((lease.deadline for lease in stored.leases.values()), default=math.inf)


def _write(stored: _Stored, write: Write) -> Appended:
    log = stored.channels.get(write.channel)
    if log is None:
        log = stored.channels[write.channel] = ChannelLog()
    first = log.head + 1
    log.extend(write.entries)
    stored.size += sum(map(_size, write.entries))
    if _ends(write):
        stored.finished = stored.finished or set()
        stored.finished.add(write.channel)
    return Appended(write.channel, first, write.entries)


def _record(stored: _Stored, command: CommandRecord) -> None:
    commands = stored.commands = stored.commands if stored.commands is not None else {}
    commands[command.user, command.event_id] = command
    if len(commands) > KEPT_COMMANDS:
        del commands[next(iter(commands))]


def _is_free(write: Write) -> bool:
    """Whether a full session takes it all the same: what ends something, or asks for an end."""
    return write.channel == CONTROL_CHANNEL or _ends(write)


def _ends(write: Write) -> bool:
    last = write.entries[-1]
    return not isinstance(last, Deltas) and last.ends_channel


def _size(entry: Entry) -> int:
    """About what an entry costs: its text in UTF-8, and what stands around it."""
    if isinstance(entry, Deltas):
        return len("".join(entry.texts).encode()) + 4 * length(entry)
    return len(msgspec.json.encode(entry))
