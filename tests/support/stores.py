"""Stores in memory that behave like those at the end of a network: others' ways to one, slow, deaf and faulty ones."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

from realtime.errors import StoreError
from realtime.log import ChannelLog, Deltas, Entry
from realtime.store.base import (
    CommandRecord,
    Listener,
    Missed,
    Notice,
    Snapshot,
    Standing,
    TaskRef,
    Unwatch,
    Viewer,
    Write,
)
from realtime.store.memory import MemoryStore

ALL = 1_000_000
"""More characters than any channel here has."""


def unavailable() -> StoreError:
    """What a store says that does not answer."""
    return StoreError("store_unavailable", "The store does not answer.")


class Watched(MemoryStore):
    """Counts who watches, and lets something happen while a session is read."""

    def __init__(self) -> None:
        super().__init__()
        self.watchers = 0
        self.meanwhile: Callable[[], Awaitable[None]] | None = None
        self.loading: asyncio.Event | None = None

    async def follow(self, session_id: str, channel: str, listener: Listener) -> Unwatch:
        """As the store's."""
        end = await super().follow(session_id, channel, listener)
        self.watchers += 1

        def unwatch() -> None:
            self.watchers -= 1
            end()

        return unwatch

    async def load(self, session_id: str) -> Snapshot:
        """As the store's, once `loading` is set, and then `meanwhile` happens."""
        if self.loading is not None:
            await self.loading.wait()
        snapshot = await super().load(session_id)
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            await meanwhile()
        return snapshot


class Elsewhere(MemoryStore):
    """Another instance's way to the sessions of a memory store; without one, to its own."""

    shared = True

    def __init__(self, store: MemoryStore | None = None) -> None:
        store = store or MemoryStore()
        super().__init__(session_ttl_s=store._ttl_s, max_session_bytes=store._max_bytes, clock=store._clock)
        self._sessions = store._sessions
        self._instances = store._instances
        self._tasks = store._tasks
        self._listeners = store._listeners


class Late(Elsewhere):
    """One that hears late of what others do: when `deliver` is called, or by itself after some `hops` of the loop."""

    def __init__(self, store: MemoryStore | None = None) -> None:
        super().__init__(store)
        self.hops: Callable[[], int] | None = None
        self.waiting: list[tuple[Listener, Notice]] = []
        self.is_cut = False
        """Whether it hears of nothing."""
        self._hearers: list[Listener] = []
        self._is_telling = False

    async def follow(self, session_id: str, channel: str, listener: Listener) -> Unwatch:
        """As the store's, but for the delay. Who has stopped to listen is told nothing any more."""
        hears = True

        def hear(notice: Notice) -> None:
            if hears:
                listener(notice)

        def later(notice: Notice) -> None:
            if self._is_telling:
                hear(notice)
            elif not self.is_cut:
                self.waiting.append((hear, notice))
                if self.hops is not None:
                    self._hop(self.hops())

        unwatch = await super().follow(session_id, channel, later)
        self._hearers.append(hear)

        def stop() -> None:
            nonlocal hears
            hears = False
            unwatch()

        return stop

    async def append(
        self, session_id: str, writes: Sequence[Write], command: CommandRecord | None = None, *, keep_s: float = 0.0
    ) -> None:
        """As the store's: what was done here is heard here at once."""
        with self._telling():
            await super().append(session_id, writes, command, keep_s=keep_s)

    async def join(self, session_id: str, viewer: Viewer) -> None:
        """The same."""
        with self._telling():
            await super().join(session_id, viewer)

    async def leave(self, session_id: str, connection_id: str, floor_s: float) -> None:
        """The same."""
        with self._telling():
            await super().leave(session_id, connection_id, floor_s)

    def deliver(self, count: int = ALL) -> None:
        """Let listeners hear the oldest `count` notices that they have not heard yet."""
        now, self.waiting = self.waiting[:count], self.waiting[count:]
        for listener, notice in now:
            listener(notice)

    def miss(self) -> None:
        """Lose what is under way, and know it."""
        self.waiting.clear()
        for hear in self._hearers:
            hear(Missed())

    def _hop(self, left: int) -> None:
        if left:
            asyncio.get_running_loop().call_soon(self._hop, left - 1)
        else:
            self.deliver(1)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        self._is_telling = True
        try:
            yield
        finally:
            self._is_telling = False


class Slow(Elsewhere):
    """One whose answers are under way for some turns of the loop: what they say may be old news by then."""

    def __init__(self, store: MemoryStore | None = None, turns: Callable[[], int] = lambda: 5) -> None:
        super().__init__(store)
        self.turns = turns

    async def append(
        self, session_id: str, writes: Sequence[Write], command: CommandRecord | None = None, *, keep_s: float = 0.0
    ) -> None:
        """As the store's, in some turns, and known some turns after."""
        await self._travel()
        await super().append(session_id, writes, command, keep_s=keep_s)
        await self._travel()

    async def load(self, session_id: str) -> Snapshot:
        """As the store's, some turns ago."""
        snapshot = await super().load(session_id)
        await self._travel()
        return snapshot

    async def read(self, session_id: str, channel: str, after: int, max_chars: int) -> list[Entry]:
        """The same."""
        entries = await super().read(session_id, channel, after, max_chars)
        await self._travel()
        return entries

    async def viewers(self, session_id: str) -> list[Viewer]:
        """The same."""
        viewers = await super().viewers(session_id)
        await self._travel()
        return viewers

    async def standings(self, session_ids: Sequence[str]) -> list[Standing | None]:
        """The same."""
        standings = await super().standings(session_ids)
        await self._travel()
        return standings

    async def follow(self, session_id: str, channel: str, listener: Listener) -> Unwatch:
        """The same."""
        await self._travel()
        return await super().follow(session_id, channel, listener)

    async def _travel(self) -> None:
        for _ in range(self.turns()):
            await asyncio.sleep(0)


class Faulty(Elsewhere):
    """One whose appends fail: each takes the next of `faults`, and none once they are used up.

    `before` fails without an effect, `after` with one, `untold` with one that nobody hears of, and `late` has its
    effect when `land` is called, if ever. While it `is_down` every call fails.
    """

    def __init__(self, store: MemoryStore | None = None) -> None:
        super().__init__(store)
        self.faults: list[str] = []
        self.is_down = False
        self.under_way: list[tuple[str, Sequence[Write], CommandRecord | None, float]] = []
        self.appends = 0

    async def append(
        self, session_id: str, writes: Sequence[Write], command: CommandRecord | None = None, *, keep_s: float = 0.0
    ) -> None:
        """As the store's, but for the faults."""
        self._answer()
        self.appends += 1
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "late":
            self.under_way.append((session_id, writes, command, keep_s))
        elif fault == "untold":
            told, self._listeners = self._listeners, {}
            await super().append(session_id, writes, command, keep_s=keep_s)
            self._listeners = told
        elif fault != "before":
            await super().append(session_id, writes, command, keep_s=keep_s)
        if fault:
            raise unavailable()

    async def land(self) -> None:
        """Let the oldest append have its effect that was under way, or be refused."""
        if self.under_way:
            session_id, writes, command, keep_s = self.under_way.pop(0)
            try:
                await super().append(session_id, writes, command, keep_s=keep_s)
            except Exception:  # nobody waits for the answer any more
                return

    async def load(self, session_id: str) -> Snapshot:
        """As the store's."""
        self._answer()
        return await super().load(session_id)

    async def read(self, session_id: str, channel: str, after: int, max_chars: int) -> list[Entry]:
        """As the store's."""
        self._answer()
        return await super().read(session_id, channel, after, max_chars)

    async def find_command(self, session_id: str, user: str, event_id: str) -> CommandRecord | None:
        """As the store's."""
        self._answer()
        return await super().find_command(session_id, user, event_id)

    async def viewers(self, session_id: str) -> list[Viewer]:
        """As the store's."""
        self._answer()
        return await super().viewers(session_id)

    async def join(self, session_id: str, viewer: Viewer) -> None:
        """As the store's."""
        self._answer()
        await super().join(session_id, viewer)

    async def leave(self, session_id: str, connection_id: str, floor_s: float) -> None:
        """As the store's."""
        self._answer()
        await super().leave(session_id, connection_id, floor_s)

    async def follow(self, session_id: str, channel: str, listener: Listener) -> Unwatch:
        """As the store's."""
        self._answer()
        return await super().follow(session_id, channel, listener)

    async def standings(self, session_ids: Sequence[str]) -> list[Standing | None]:
        """As the store's."""
        self._answer()
        return await super().standings(session_ids)

    async def sign(self, instance: str, lease_s: float) -> None:
        """As the store's."""
        self._answer()
        await super().sign(instance, lease_s)

    async def resign(self, instance: str) -> None:
        """As the store's."""
        self._answer()
        await super().resign(instance)

    async def living(self, instances: Collection[str]) -> set[str]:
        """As the store's."""
        self._answer()
        return await super().living(instances)

    async def track(self, task: TaskRef, due_s: float, payer: str | None = None, most: int = 0) -> bool:
        """As the store's."""
        self._answer()
        return await super().track(task, due_s, payer, most)

    async def untrack(self, tasks: Sequence[TaskRef]) -> None:
        """As the store's."""
        self._answer()
        await super().untrack(tasks)

    async def overdue(self, again_s: float, limit: int) -> list[TaskRef]:
        """As the store's."""
        self._answer()
        return await super().overdue(again_s, limit)

    async def tracked(self) -> int:
        """As the store's."""
        self._answer()
        return await super().tracked()

    def _answer(self) -> None:
        if self.is_down:
            raise unavailable()


class Distant(Slow, Late):
    """One whose answers take a while, and whose notices, too."""


class Line(Faulty, Late):
    """One at the end of a line that can be cut."""

    def __init__(self, store: MemoryStore | None = None) -> None:
        super().__init__(store)
        self.hops = lambda: 3

    def cut(self) -> None:
        """Nothing is heard, and nothing is answered."""
        self.is_down = self.is_cut = True

    def mend(self) -> None:
        """It works again, and knows that it has missed something."""
        self.is_down = self.is_cut = False
        self.miss()


def forget(store: MemoryStore, session_id: str, channel: str, position: int) -> None:
    """Have the store lose what a channel has after `position`, as one that restarts from an old copy does."""
    stored = store._sessions[session_id]
    kept = ChannelLog()
    for entry in stored.channels[channel].entries(0):
        kept.extend(_upto(entry, position - kept.head))
    stored.channels[channel] = kept
    (stored.finished or set()).discard(channel)


def _upto(entry: Entry, count: int) -> list[Entry]:
    if count <= 0:
        return []
    return [Deltas(entry.template, list(entry.texts)[:count])] if isinstance(entry, Deltas) else [entry]
