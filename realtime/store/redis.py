"""The store in Redis: any instance serves any session. What one sees is what `realtime.store.base.Store` promises.

A session's keys share a hash tag, so a cluster works: no step touches two sessions. Who appends tells the watchers of
its own process itself, at once; those of others hear of it over the bus.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Callable, Collection, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import msgspec

from realtime.errors import NotFound, StoreError, session_not_found
from realtime.log import Deltas, Entry, entries_from, length
from realtime.protocol import Id, Session
from realtime.store.base import (
    Appended,
    Batch,
    CommandRecord,
    CommandSeen,
    Gone,
    Head,
    Listener,
    Missed,
    Notice,
    PositionConflict,
    Snapshot,
    Standing,
    TaskRef,
    Unwatch,
    Viewer,
    ViewerJoined,
    Write,
    ends_channel,
    is_free,
    only_deltas,
    session_full,
)
from realtime.store.redis_bus import Bus
from realtime.store.redis_calls import Calls, Command, Replies, checked, end_tasks, unavailable
from realtime.store.redis_scripts import APPEND, CREATE, ERASE, JOIN, LEAVE, LOAD, OVERDUE, TRACK, UNTRACK, USE
from realtime.store.redis_values import Values
from realtime.store.sealing import Clear, Sealer

PREFIX = "rt:"
TASKS = f"{PREFIX}tasks"
DAY_MS = 86_400_000
KEPT_COMMANDS = 1000
READ_ELEMENTS = 256
"""Elements that are read in one round trip."""
EVENT_CHARS = 64
"""What an event that is not a delta counts for where a read is bounded by characters, at least."""

_REFUSALS: dict[bytes, Callable[[], Exception]] = {
    b"unknown": session_not_found,
    b"seen": CommandSeen,
    b"conflict": PositionConflict,
    b"full": session_full,
}


class RedisStore:
    """See `realtime.store.base.Store`. `url` is `redis://…` or `rediss://…`, of a server or of a node of a cluster.
    `sealer` seals all content that is written and published; `None` leaves it as it is."""

    shared = True

    def __init__(
        self,
        url: str,
        *,
        session_ttl_s: float = 3600,
        task_ttl_s: float = 3600,
        max_session_bytes: int = 8 * 1024 * 1024,
        sealer: Sealer | None = None,
    ) -> None:
        self._values = Values(sealer or Clear())
        self._ttl_s = session_ttl_s
        self._tasks_ttl_ms = 2 * _ms(max(session_ttl_s, task_ttl_s)) + DAY_MS
        self._max_bytes = max_session_bytes
        self._origin = secrets.token_hex(8)
        """Marks what this process has published, and has told its own watchers already."""
        self._calls = Calls(url, is_store=True)
        self._bus = Bus(self._calls, beat=f"{PREFIX}beat:{self._origin}", hear=self._hear, doubt=self._doubt)
        self._listeners: dict[str, list[Listener]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def create(self, session: Session, ttl_s: float | None = None) -> None:
        ttl_ms = _ms(self._ttl_s if ttl_s is None else ttl_s)
        await self._calls.run(CREATE, _meta(session.id), ttl_ms, self._values.session(session))

    async def load(self, session_id: str) -> Snapshot:
        found = await self._calls.run(LOAD, _meta(session_id))
        if found is None:
            raise self._unknown(session_id)
        left_ms, flat = found
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        positions = {name[2:].decode(): int(value) for name, value in fields.items() if name.startswith(b"p:")}
        return Snapshot(
            session=self._values.read_session(fields[b"session"], session_id),
            expires_in_s=int(left_ms) / 1000,
            size_bytes=int(fields[b"size"]),
            heads={channel: Head(abs(position), position < 0) for channel, position in positions.items()},
            audience=int(fields[b"audience"]),
        )

    async def use(self, session_id: str) -> None:
        if not await self._calls.run(USE, _meta(session_id)):
            raise self._unknown(session_id)

    async def append(
        self, session_id: str, writes: Sequence[Write], command: CommandRecord | None = None, *, keep_s: float = 0.0
    ) -> None:
        try:
            arguments = self._append_arguments(session_id, writes, command, keep_s)
            reply = await self._calls.run(APPEND, *arguments, then=partial(self._appended, session_id, writes))
        except StoreError:
            self._tell(_topic(session_id), Missed())  # it may have been carried out, or may yet be
            raise
        if reply[0] == b"unknown":
            raise self._unknown(session_id)
        if (error := _refusal(reply)) is not None:
            raise error

    async def append_all(self, batches: Sequence[Batch]) -> list[Exception | None]:
        if not batches:
            return []
        arguments = [self._append_arguments(batch.session_id, batch.writes, None, batch.keep_s) for batch in batches]
        replies = await self._calls.run_all(APPEND, arguments, then=partial(self._appended_all, batches))
        return [unavailable() if isinstance(reply, Exception) else _refusal(reply) for reply in replies]

    async def read(self, session_id: str, channel: str, after: int, max_chars: int) -> list[Entry]:
        entries: list[Entry] = []
        chars = 0
        while True:
            elements = await self._read_elements(session_id, channel, after)
            for last, element in elements:
                fresh = _until(last, after, self._values.read_entries(element, session_id, channel))
                entries += fresh
                chars += sum(_chars(entry) for entry in fresh)
                after = last
                if chars >= max_chars:
                    return entries
            if len(elements) < READ_ELEMENTS:
                return entries

    async def find_command(self, session_id: str, user: str, event_id: str) -> CommandRecord | None:
        _meta(session_id)  # what can't be an id needs no keys
        names = self._values.record_names(session_id, user, event_id)
        found = await self._of(session_id, ("HMGET", _key(session_id, "commands"), *names))
        record = next(filter(None, found), None)
        return self._values.read_record(record, session_id, user, event_id) if record else None

    async def watch(self, session_id: str, listener: Listener) -> Unwatch:
        _meta(session_id)  # what can't be an id is not worth a subscription
        return await self._listen(_topic(session_id), listener)

    async def follow(self, session_id: str, channel: str, listener: Listener) -> Unwatch:
        return await self._listen(_topic(session_id, channel), listener)

    async def join(self, session_id: str, viewer: Viewer) -> None:
        whose = (_meta(session_id), self._origin, viewer.participant.connection_id)
        joining = self._calls.run(
            JOIN, *whose, self._values.viewer(viewer, session_id), then=partial(self._joined, session_id, viewer)
        )
        if await self._told(session_id, joining) is None:
            raise self._unknown(session_id)

    async def leave(self, session_id: str, connection_id: str, floor_s: float) -> None:
        arguments = (self._origin, connection_id, floor_s)
        notify = partial(self._left, session_id, floor_s)
        if await self._told(session_id, self._calls.run(LEAVE, _meta(session_id), *arguments, then=notify)) is None:
            raise self._unknown(session_id)

    async def viewers(self, session_id: str) -> list[Viewer]:
        found = await self._of(session_id, ("HGETALL", _key(session_id, "viewers")))
        numbered = sorted((int(number), viewer) for number, viewer in (one.split(b" ", 1) for one in found.values()))
        return [self._values.read_viewer(viewer, session_id) for _, viewer in numbered]

    async def standings(self, session_ids: Sequence[str]) -> list[Standing | None]:
        if not session_ids:
            return []
        fields = ("p:session", "p:control", "audience")
        commands = [("HMGET", _meta(session_id), *fields) for session_id in session_ids]
        return [_standing(checked(reply)) for reply in await self._calls.call_all(commands, again=True)]

    async def erase(self, session_id: str) -> None:
        if not await self._calls.run(ERASE, _meta(session_id), self._origin):
            raise self._unknown(session_id)
        self._end(session_id, Gone("deleted"))

    async def sign(self, instance: str, lease_s: float) -> None:
        await self._calls.call("SET", _instance_key(instance), 1, "PX", round(lease_s * 1000), again=True)

    async def resign(self, instance: str) -> None:
        await self._calls.call("DEL", _instance_key(instance), again=True)

    async def living(self, instances: Collection[str]) -> set[str]:
        names = list(instances)
        replies = await self._calls.call_all([("EXISTS", _instance_key(name)) for name in names], again=True)
        return {name for name, reply in zip(names, replies, strict=True) if checked(reply)}

    async def track(self, task: TaskRef, due_s: float, payer: str | None = None, most: int = 0) -> bool:
        named = "" if payer is None else hashlib.sha256(payer.encode(errors="surrogatepass")).hexdigest()
        encoded = msgspec.msgpack.encode(task)
        return bool(await self._calls.run(TRACK, TASKS, self._tasks_ttl_ms, _ms(due_s), encoded, named, most))

    async def untrack(self, tasks: Sequence[TaskRef]) -> None:
        if tasks:
            await self._calls.run(UNTRACK, TASKS, *map(msgspec.msgpack.encode, tasks))

    async def overdue(self, again_s: float, limit: int) -> list[TaskRef]:
        found = await self._calls.run(OVERDUE, TASKS, self._tasks_ttl_ms, _ms(again_s), limit)
        return [msgspec.msgpack.decode(task, type=TaskRef) for task in found]

    async def tracked(self) -> int:
        count: int = await self._calls.call("ZCARD", TASKS, again=True)
        return count

    async def ping(self) -> None:
        await self._calls.call("PING", again=True)

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(work, name="redis bus") for work in (self._bus.listen(), self._bus.beat())]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await end_tasks(self._tasks)
        await self._calls.aclose()

    def _append_arguments(
        self, session_id: str, writes: Sequence[Write], command: CommandRecord | None, keep_s: float
    ) -> Command:
        free = int(all(map(is_free, writes)))
        arguments: list[Any] = [_meta(session_id), self._origin, _ms(keep_s), self._max_bytes, free]
        arguments += (*(self._recorded(session_id, command) if command else (b"", b"")), KEPT_COMMANDS)
        for write in writes:
            arguments += (
                write.channel,
                -1 if write.expect is None else write.expect,
                sum(map(length, write.entries)),
                int(ends_channel(write)),
                f"/{write.channel}" if only_deltas(write) else "",
                self._values.entries(write.entries, session_id, write.channel),
            )
        return arguments

    def _recorded(self, session_id: str, command: CommandRecord) -> tuple[bytes, bytes]:
        [name, *_] = self._values.record_names(session_id, command.user, command.event_id)
        return name, self._values.record(command, session_id)

    def _appended(self, session_id: str, writes: Sequence[Write], reply: Any) -> None:
        topics = [_topic(session_id, write.channel if only_deltas(write) else "") for write in writes]
        if isinstance(reply, Exception):  # it may have been carried out
            for topic in topics:
                self._tell(topic, Missed())
        elif reply[0] == b"ok":
            for topic, write, first in zip(topics, writes, reply[1:], strict=True):
                self._tell(topic, Appended(write.channel, first, write.entries))

    def _appended_all(self, batches: Sequence[Batch], replies: Replies) -> None:
        for batch, reply in zip(batches, replies, strict=True):
            self._appended(batch.session_id, batch.writes, reply)

    def _joined(self, session_id: str, viewer: Viewer, reply: Any) -> None:
        if reply == 1:
            self._tell(_topic(session_id), ViewerJoined(viewer))

    def _left(self, session_id: str, floor_s: float, reply: Any) -> None:
        if reply and isinstance(reply, bytes):
            message = b"L\0%b\0%b" % (repr(floor_s).encode(), reply)  # as others hear of it
            self._tell(_topic(session_id), self._values.notice(message, session_id))

    async def _told(self, session_id: str, call: Any) -> Any:
        """The reply to a call that is told of; where there is none, it may have had its effect."""
        try:
            return await call
        except StoreError:
            self._tell(_topic(session_id), Missed())
            raise

    async def _of(self, session_id: str, command: Command) -> Any:
        """What a command finds that reads something of a session."""
        commands = [("EXISTS", _meta(session_id)), command]
        exists, found = map(checked, await self._calls.call_all(commands, again=True))
        if not exists:
            raise self._unknown(session_id)
        return found

    async def _read_elements(self, session_id: str, channel: str, after: int) -> list[tuple[int, bytes]]:
        """Elements of a channel with their last positions, from the one on that holds what comes after `after`."""
        command = ("XRANGE", _key(session_id, f"log:{channel}"), f"{after + 1}-0", "+", "COUNT", READ_ELEMENTS)
        found = await self._of(session_id, command)
        return [(int(name.partition(b"-")[0]), fields[b"e"]) for name, fields in found]

    async def _listen(self, topic: str, listener: Listener) -> Unwatch:
        self._listeners.setdefault(topic, []).append(listener)
        try:
            await self._bus.subscribe(topic)
        except BaseException:
            self._unlisten(topic, listener)
            raise
        return partial(self._unlisten, topic, listener)

    def _unlisten(self, topic: str, listener: Listener) -> None:
        listeners = self._listeners.get(topic, [])
        if listener in listeners:
            listeners.remove(listener)
            if not listeners:
                del self._listeners[topic]
                self._bus.unsubscribe(topic)

    def _tell(self, topic: str, notice: Notice) -> None:
        for listener in tuple(self._listeners.get(topic, ())):
            listener(notice)

    def _unknown(self, session_id: str) -> NotFound:
        """The session is not there; whoever watches it hears of that now."""
        self._end(session_id, Gone("lost"))
        return session_not_found()

    def _end(self, session_id: str, gone: Gone) -> None:
        topic = _topic(session_id)
        self._tell(topic, gone)
        for listener in self._listeners.get(topic, []).copy():
            self._unlisten(topic, listener)

    def _doubt(self) -> None:
        for topic in list(self._listeners):
            self._tell(topic, Missed())

    def _hear(self, topic: str, message: bytes) -> None:
        if topic in self._listeners and message[1:17] != self._origin.encode():
            self._tell(topic, self._values.notice(message, _session_of(topic)))


def _standing(fields: list[bytes | None]) -> Standing | None:
    session, control, audience = fields
    return Standing(abs(int(session)), int(control or 0), int(audience or 0)) if session is not None else None


def _refusal(reply: Any) -> Exception | None:
    refusal = _REFUSALS.get(reply[0])
    return refusal() if refusal is not None else None


def _until(last: int, after: int, entries: list[Entry]) -> list[Entry]:
    """The entries of an element that ends at `last`, without those up to `after`."""
    first = last - sum(map(length, entries)) + 1
    return entries if first > after else list(entries_from(entries, after + 1 - first))


def _chars(entry: Entry) -> int:
    return sum(map(len, entry.texts)) if isinstance(entry, Deltas) else EVENT_CHARS


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _instance_key(instance: str) -> str:
    return f"{PREFIX}instance:{instance}"


def _topic(session_id: str, channel: str = "") -> str:
    """Where is published what happens to a session; the deltas of each channel have a topic of their own."""
    topic = f"{PREFIX}{{{session_id}}}"
    return f"{topic}/{channel}" if channel else topic


def _session_of(topic: str) -> str:
    return topic[len(PREFIX) + 1 : topic.index("}")]


def _key(session_id: str, name: str) -> str:
    return f"{PREFIX}{{{session_id}}}:{name}"


def _meta(session_id: str) -> str:
    """The key of a session's hash. Raises `NotFound` for what can't be a session's id, and so is none."""
    try:
        msgspec.convert(session_id, Id)
    except msgspec.ValidationError:
        raise session_not_found() from None
    return _key(session_id, "meta")
