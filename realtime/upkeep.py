"""What an instance does again and again so that nothing is forgotten: it says that it lives, looks after what others
may have left behind, and reads what it may not have been told."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from realtime.engine import Engine
from realtime.errors import NotFound, ServerError, StoreError
from realtime.live import RETRY_S, LiveSession, Reader
from realtime.observe import logs
from realtime.store.base import Viewer
from realtime.viewers import SERVER_ENDED_FLOOR_S

BEATS_PER_LEASE = 3
LOOK_S = 1.0
"""How often to look after the sessions that are open here, at the least."""
USES_PER_TTL = 3
"""How often within its time to live a session that is open here is said to be in use."""
BATCH = 500
"""Sessions that are asked for in one go: more would make others wait for the answer."""


class Confidence:
    """Whether a lease that is missing may be believed to have run out. Pure: `now` is monotonic seconds.

    After an outage of the store, or of this process, every lease may be gone, and nobody can conclude anything from
    that until everybody has had the time to renew: one whole lease of unbroken answers.
    """

    __slots__ = ("_answered_at", "_lease_s", "_since")

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._since: float | None = None
        self._answered_at = 0.0

    def answered(self, now: float) -> bool:
        """The store has answered; returns whether it has done so without a break for a whole lease.

        A long time after the last answer is a break, whoever has stood still meanwhile.
        """
        if self._since is None or now - self._answered_at > self._lease_s * 2 / BEATS_PER_LEASE:
            self._since = now
        self._answered_at = now
        return now - self._since >= self._lease_s

    def failed(self) -> None:
        """The store has not answered, or has lost leases."""
        self._since = None


class Upkeep:
    """The upkeep of one engine's sessions. Each of its methods runs for ever, in a task of its own."""

    def __init__(self, engine: Engine, *, lease_s: float, ttl_s: float) -> None:
        self._engine = engine
        self._store = engine.store
        self._lease_s = lease_s
        self._ttl_s = ttl_s
        self._confidence = Confidence(lease_s)
        self._unclaimed: set[tuple[str, str]] = set()
        self._ghosts: dict[str, set[str]] = {}
        """By session, the connections that were viewers from here at the last look, and not here."""

    async def sign(self) -> None:
        """Say that this instance lives."""
        own = self._engine.instance
        has_signed = False
        while True:
            try:
                if has_signed and own not in await self._store.living({own}):
                    self._confidence.failed()  # and not only this one's lease may be gone
                await self._store.sign(own, self._lease_s)
                has_signed = True
            except Exception as error:  # whatever it is, an instance that lives has to go on saying so
                self._note(error)
                await asyncio.sleep(RETRY_S)
            else:
                await asyncio.sleep(self._lease_s / BEATS_PER_LEASE)

    async def look(self) -> None:
        """Look after the sessions that are open here: a message that was lost costs a second, and not a model call."""
        while True:
            await asyncio.sleep(min(LOOK_S, self._lease_s / BEATS_PER_LEASE))
            try:
                await self.look_once()
            except Exception as error:  # whatever it is, there is nobody else who looks
                self._note(error)

    async def use(self) -> None:
        """Say of the sessions that are open here that they are in use, so that they don't expire."""
        while True:
            await asyncio.sleep(self._ttl_s / USES_PER_TTL)
            for batch in _batches(self._engine.hub.sessions()):
                await asyncio.gather(*map(self._use, batch))

    async def look_once(self) -> None:
        """Find what was not told, what nobody has started, and what lost instances have left. Raises `StoreError`."""
        busy = [live for live in self._engine.hub.sessions() if live.state.unfinished]
        for batch in _batches(busy):
            standings = await self._store.standings([live.id for live in batch])
            for live, standing in zip(batch, standings, strict=True):
                live.look_at(standing)
        self._start_unclaimed(busy)
        for batch in _batches(self._engine.hub.sessions()) or [[]]:
            await self._look_for_lost(batch)

    def _note(self, error: Exception) -> None:
        self._confidence.failed()
        if not isinstance(error, StoreError):
            logs.report(error)

    def _start_unclaimed(self, busy: Iterable[LiveSession]) -> None:
        """Start what may run and was not started by the second look: whoever should have may be gone."""
        waiting = {(live.id, response.id): live for live in busy if (response := live.state.runnable())}
        for key in waiting.keys() & self._unclaimed:
            self._engine.start_next(waiting[key])
        self._unclaimed = set(waiting)

    async def _use(self, live: LiveSession) -> None:
        try:
            await self._store.load(live.id)
        except NotFound:
            live.look_at(None)
        except Exception as error:  # one session's trouble is not another's
            self._note(error)

    async def _look_for_lost(self, sessions: Sequence[LiveSession]) -> None:
        own = self._engine.instance
        instances = {own}.union(*map(_instances, sessions))
        lost = instances - await self._store.living(instances)
        if own in lost:
            self._confidence.failed()
        if not self._confidence.answered(asyncio.get_running_loop().time()):
            lost = set()
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


def _instances(live: LiveSession) -> set[str]:
    """The instances that a session depends on."""
    running = {response.instance for response in live.state.unfinished.values() if response.instance}
    return running | set(live.audience.instances)


def _batches(sessions: Iterable[LiveSession]) -> list[list[LiveSession]]:
    every = list(sessions)
    return [every[start : start + BATCH] for start in range(0, len(every), BATCH)]
