"""What an instance does again and again so that nothing is forgotten: it looks after what others may have left behind,
and reads what it may not have been told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from realtime.engine import Engine
from realtime.errors import NotFound, ServerError, StoreError
from realtime.lease import BEATS_PER_LEASE, Lease
from realtime.live import LiveSession, Reader
from realtime.store.base import Store, Viewer
from realtime.viewers import SERVER_ENDED_FLOOR_S

LOOK_S = 1.0
"""How often to look after the sessions that are open here, at the least."""
USES_PER_TTL = 3
"""How often within its time to live a session that is open here is said to be in use."""
BATCH = 500
"""Sessions that are asked for in one go: more would make others wait for the answer."""


class Upkeep:
    """The upkeep of one engine's sessions. Each of its methods runs for ever, in a task of its own."""

    def __init__(self, engine: Engine, lease: Lease, *, ttl_s: float) -> None:
        self._engine = engine
        self._store = engine.store
        self._lease = lease
        self._ttl_s = ttl_s
        self._unclaimed: set[tuple[str, str]] = set()
        self._ghosts: dict[str, set[str]] = {}
        """By session, the connections that were viewers from here at the last look, and not here."""

    async def look(self) -> None:
        """Look after the sessions that are open here: a message that was lost costs a second, and not a model call."""
        while True:
            await asyncio.sleep(min(LOOK_S, self._lease.lease_s / BEATS_PER_LEASE))
            try:
                await self.look_once()
            except Exception as error:  # whatever it is, there is nobody else who looks
                self._lease.note(error)

    async def use(self) -> None:
        """Say of the sessions that are open here that they are in use, so that they don't expire."""
        while True:
            await asyncio.sleep(self._ttl_s / USES_PER_TTL)
            await use_all(self._store, self._engine.hub.sessions(), self._lease.note)

    async def look_once(self) -> None:
        """Find what was not told, what nobody has started, and what lost instances have left. Raises `StoreError`."""
        busy = [live for live in self._engine.hub.sessions() if live.state.unfinished or live.state.unfinished_tasks]
        await look_at_all(self._store, busy)
        self._start_unclaimed(busy)
        for batch in _batches(self._engine.hub.sessions()) or [[]]:
            await self._look_for_lost(batch)

    def _start_unclaimed(self, busy: Iterable[LiveSession]) -> None:
        """Start what may run and was not started by the second look: whoever should have may be gone."""
        waiting = {(live.id, response.id): live for live in busy if (response := live.state.runnable())}
        for key in waiting.keys() & self._unclaimed:
            self._engine.start_next(waiting[key])
        self._unclaimed = set(waiting)

    async def _look_for_lost(self, sessions: Sequence[LiveSession]) -> None:
        lost = await self._lease.lost(set().union(*map(_instances, sessions)))
        for live in sessions:
            try:
                await self._mend(live, lost)
            except NotFound:
                live.look_at(None)

    async def _mend(self, live: LiveSession, lost: set[str]) -> None:
        """End what lost instances have left in a session, and what this one knows nothing of."""
        for instance in lost & _instances(live):
            for connection_id in live.audience.attached_to(instance):
                await self._store.leave(live.id, connection_id, SERVER_ENDED_FLOOR_S)
        for reader in list(live.readers):
            if reader.participant.connection_id not in live.audience.participants:
                await self._join_again(live, reader)
        await self._dismiss_ghosts(live)
        for response in list(live.state.unfinished.values()):
            if response.done:  # meanwhile: nobody mourns it
                continue
            if response.instance in lost:
                instance_lost = ServerError("instance_lost", "The instance that ran the response was lost.")
                await self._engine.bury(live, response, instance_lost)
            elif response.instance == self._engine.instance and not self._engine.runs(live.id, response.id):
                store_lost = StoreError("store_lost", "The store has lost the end of the response.")
                await self._engine.bury(live, response, store_lost)

    async def _dismiss_ghosts(self, live: LiveSession) -> None:
        """Take out viewers of this instance that are not here at the second look: a call to join that nobody waited for
        any more may come after the one to leave."""
        here = {reader.participant.connection_id for reader in live.readers}
        ghosts = set(live.audience.attached_to(self._engine.instance)) - here
        for connection_id in ghosts & self._ghosts.get(live.id, set()):
            await self._store.leave(live.id, connection_id, SERVER_ENDED_FLOOR_S)
        if ghosts:
            self._ghosts[live.id] = ghosts
        else:
            self._ghosts.pop(live.id, None)

    async def _join_again(self, live: LiveSession, reader: Reader) -> None:
        """Others have thought this instance dead: its connections look at the session all the same."""
        await self._store.join(live.id, Viewer(reader.participant, self._engine.instance))
        live.doubt()
        if reader not in live.readers:  # it has left meanwhile, maybe before it came
            await self._store.leave(live.id, reader.participant.connection_id, reader.floor_s)


async def look_at_all(store: Store, sessions: Iterable[LiveSession]) -> None:
    """Compare where sessions stand in the store with what was told of them here. Raises `StoreError`."""
    for batch in _batches(sessions):
        standings = await store.standings([live.id for live in batch])
        for live, standing in zip(batch, standings, strict=True):
            live.look_at(standing)


async def use_all(store: Store, sessions: Iterable[LiveSession], note: Callable[[Exception], None]) -> None:
    """Say of sessions that they are in use; `note` is told of what goes wrong."""
    for batch in _batches(sessions):
        await asyncio.gather(*(_use(store, live, note) for live in batch))


async def _use(store: Store, live: LiveSession, note: Callable[[Exception], None]) -> None:
    try:
        await store.use(live.id)
    except NotFound:
        live.look_at(None)
    except Exception as error:  # one session's trouble is not another's
        note(error)


def _instances(live: LiveSession) -> set[str]:
    """The instances that a session depends on."""
    running = {response.instance for response in live.state.unfinished.values() if response.instance}
    return running | set(live.audience.instances)


def _batches(sessions: Iterable[LiveSession]) -> list[list[LiveSession]]:
    every = list(sessions)
    return [every[start : start + BATCH] for start in range(0, len(every), BATCH)]
