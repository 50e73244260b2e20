"""One chaos run, from its first process to its last check."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import httpx
from msgspec import Struct
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from realtime.errors import NotFound, StoreError
from realtime.store.redis import RedisStore
from tests.chaos.checks import Checks, History
from tests.chaos.drivers import Driver
from tests.chaos.faults import Chaos
from tests.chaos.fleet import Life, Slot, make_session, serve, serve_naively
from tests.chaos.numbers import Scenarios
from tests.chaos.options import Options
from tests.chaos.readers import Reader
from tests.chaos.sessions import Session
from tests.chaos.site import Site
from tests.chaos.stored import StoredSession, read_shown, read_stored
from tests.support.model_server import ModelServer
from tests.support.nginx import nginx
from tests.support.redis_server import redis_server
from tests.support.tcp_proxy import TcpProxy

SENTINEL = "chaos:sentinel"
SENTINEL_S = 0.01
SENTINEL_TTL_S = 600
POLL_S = 0.5
CATCH_UP_S = 20.0
FRESH_AT_ONCE = 6
"""Sessions that are read anew at once: all together would take longer than each may."""
CONTROL_SETTLE_S = 4.0


class Outcome(Struct, frozen=True):
    """What a run came to."""

    site: Site
    slots: Sequence[Slot]
    sessions: int
    readers: Sequence[Reader]
    redis_lost: bool


class Sentinel:
    """Writes to Redis all the time, and so finds out whether it comes back with less than it has acknowledged."""

    def __init__(self, site: Site) -> None:
        self.has_lost = False
        self._site = site
        self._acknowledged = 0

    async def run(self) -> None:
        """Count for ever."""
        url = self._site.redis.url
        async with Redis.from_url(url, socket_timeout=1, retry=Retry(NoBackoff(), 0)) as client:
            while True:
                with suppress(RedisError, OSError, TimeoutError):
                    await self._count(client)
                await asyncio.sleep(SENTINEL_S)

    async def _count(self, client: Redis) -> None:
        pipeline = client.pipeline()
        pipeline.incr(SENTINEL)
        pipeline.expire(SENTINEL, SENTINEL_TTL_S)
        count, _ = await pipeline.execute()
        if count <= self._acknowledged:
            self.has_lost = True
            self._site.note(f"Redis has lost something: {self._acknowledged} has become {count}")
        self._acknowledged = count


class Run:
    """The actors of a run, and what is done with them."""

    def __init__(self, site: Site, slots: Sequence[Slot], store: RedisStore) -> None:
        self._site = site
        self._slots = slots
        self._store = store
        self._sessions: list[Session] = []
        self._readers: dict[str, list[Reader]] = {}
        self._sentinel = Sentinel(site)
        self._few = asyncio.Semaphore(FRESH_AT_ONCE)
        self._chaos: Chaos

    async def run(self) -> Outcome:
        """The whole run."""
        async with asyncio.TaskGroup() as group:
            lasting = [group.create_task(slot.run()) for slot in self._slots]
            lasting.append(group.create_task(self._sentinel.run()))
            try:
                await asyncio.gather(*(slot.up() for slot in self._slots))
                await self._open()
                lasting += [group.create_task(reader.run()) for reader in self._every_reader]
                await self._rage()
                await self._check()
            finally:
                for task in lasting:
                    task.cancel()
        return Outcome(self._site, self._slots, len(self._sessions), self._every_reader, self._sentinel.has_lost)

    @property
    def _every_reader(self) -> list[Reader]:
        return [reader for readers in self._readers.values() for reader in readers]

    async def _open(self) -> None:
        chance = self._site.chance("sessions")
        for number in range(self._site.options.sessions):
            on_disconnect = "cancel" if chance.random() < 0.2 else "continue"
            session_id = await make_session(self._site, on_disconnect=on_disconnect)
            session = Session(session_id, f"s{number}", on_disconnect)
            self._sessions.append(session)
            names = [f"{session.name}-{letter}" for letter in "abc"[: chance.randint(1, 3)]]
            self._readers[session.name] = [Reader(self._site, session, name) for name in names]

    async def _rage(self) -> None:
        """Faults for as long as it was asked for; then let everything come to its end."""
        self._chaos = Chaos(self._site, self._slots, self._every_reader)
        async with asyncio.TaskGroup() as drivers:
            for session in self._sessions:
                drivers.create_task(Driver(self._site, session, self._readers[session.name]).run())
            await self._chaos.run()
            self._site.calm_since = self._site.now()
            self._site.note("calm")

    async def _check(self) -> None:
        is_control = self._site.options.control
        settled = await self._settle(CONTROL_SETTLE_S if is_control else self._site.options.settle_s)
        lives = [life for slot in self._slots for life in slot.lives]
        history = History(
            lives=lives,
            redis_faults=self._chaos.redis_faults,
            redis_lost=self._sentinel.has_lost,
            lease_s=self._site.options.lease_s,
        )
        checks = Checks(self._site, history, self._site.model.received)
        fresh = []
        for session in self._sessions:
            stored = settled[session.name]
            if stored is None or (self._sentinel.has_lost and session.gone):
                self._check_gone(session)
                continue
            checks.session(session, stored, self._readers[session.name])
            if not is_control:
                fresh.append(self._check_shown(checks, session, stored))
                for way in ("realtime.v1", "sse"):
                    fresh.append(self._check_fresh(checks, session, stored, way))
        await asyncio.gather(*fresh)
        self._check_lives(lives)
        self._check_logs()
        self._check_model()
        await self._check_keys()

    async def _settle(self, seconds: float) -> dict[str, StoredSession | None]:
        """What is stored once everything has ended and everybody has read it; after a while, whatever there is."""
        settled: dict[str, StoredSession | None] = {}
        until = self._site.now() + seconds
        while True:
            for session in self._sessions:
                if session.name not in settled or not self._is_settled(session, settled[session.name]):
                    settled[session.name] = await self._read(session)
            waiting = [one.name for one in self._sessions if not self._is_settled(one, settled[one.name])]
            if not waiting or self._site.now() > until:
                self._site.note(f"settled but for {waiting}")
                return settled
            await asyncio.sleep(POLL_S)

    async def _read(self, session: Session) -> StoredSession | None:
        with suppress(NotFound, StoreError, httpx.HTTPError):
            if self._site.options.control:
                return await read_shown(self._site, session.id)
            return await read_stored(self._store, session.id)
        return None

    def _is_settled(self, session: Session, stored: StoredSession | None) -> bool:
        """Whether a session has come to rest, and its readers have all of it."""
        if stored is None:
            return bool(session.gone)
        return stored.is_settled and all(
            reader.broken or reader.gone or _has_read(reader, stored) for reader in self._readers[session.name]
        )

    def _check_gone(self, session: Session) -> None:
        """A session that the store has lost: everybody was told so, and it had to be."""
        self._site.counts["sessions lost"] += 1
        lost = self._sentinel.has_lost
        self._site.check(lost, "a session is gone and nothing was lost", session.name, lambda: session.gone)
        for reader in self._readers[session.name]:
            self._site.check(bool(reader.gone), "a reader was not told of the end", reader.name)

    async def _check_shown(self, checks: Checks, session: Session, stored: StoredSession) -> None:
        shown = None
        with suppress(httpx.HTTPError):
            async with self._few:
                shown = await read_shown(self._site, session.id)
        checks.shown(session, stored, shown)

    async def _check_fresh(self, checks: Checks, session: Session, stored: StoredSession, way: str) -> None:
        """Who comes only now reads the same."""
        reader = Reader(self._site, session, f"{session.name}-fresh-{way}")
        reader.ways = (way,)
        async with self._few:
            reading = asyncio.create_task(reader.run())
            with suppress(TimeoutError):
                async with asyncio.timeout(CATCH_UP_S):
                    while not (_has_read(reader, stored) or reader.broken or reader.gone):  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
            reading.cancel()
            await asyncio.wait([reading])
        checks.transcript(reader.name, reader.transcript, stored)
        self._site.check(not reader.transcript.resets, "a reset of a fresh reader", reader.name)

    def _check_lives(self, lives: Sequence[Life]) -> None:
        for life in lives:
            died = life.exit_status is not None and life.killed_at is None and life.terminated_at is None
            self._site.check(not died, "an instance died", f"instance {life.slot}", lambda life=life: str(life))  # type: ignore[misc]

    def _check_logs(self) -> None:
        """No fault has surfaced where nobody expected one."""
        for slot in self._slots:
            for line in slot.log + (slot.instance.log if slot.instance else []):
                fine = '"level": "error"' not in line and "Traceback" not in line
                self._site.check(fine, "an error in the log", f"instance {slot.number}", lambda line=line: line)  # type: ignore[misc]

    def _check_model(self) -> None:
        calls = self._site.model.active
        names = [call.body["model"] for call in calls]
        self._site.check(not calls, "model calls left open", str(names), lambda: str(len(calls)))
        self._site.counts["model calls"] = len(self._site.model.received)
        self._site.counts["tokens sent"] = sum(call.tokens_sent for call in self._site.model.received)

    async def _check_keys(self) -> None:
        """Everything in Redis expires."""
        async with Redis.from_url(self._site.redis.url) as client:
            async for key in client.scan_iter(count=1000):
                self._site.counts["keys in Redis"] += 1
                left_ms = await client.pttl(key)
                self._site.check(left_ms != -1, "a key without an end", key.decode())


def _has_read(reader: Reader, stored: StoredSession) -> bool:
    transcript = reader.transcript
    return transcript.positions["session"] >= stored.position and stored.responses.keys() <= transcript.done.keys()


@asynccontextmanager
async def _site(options: Options) -> AsyncIterator[tuple[Site, list[Slot]]]:
    """The parts of a run, but for the instances, for which there are places."""
    async with AsyncExitStack() as stack:
        model = await stack.enter_async_context(ModelServer())
        model.scenarios = Scenarios()
        redis = await stack.enter_async_context(redis_server(append_only=True, appendfsync=options.appendfsync))
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20, keepalive_expiry=1)
        http = await stack.enter_async_context(httpx.AsyncClient(trust_env=False, limits=limits))
        ways = [await stack.enter_async_context(TcpProxy("127.0.0.1", redis.port)) for _ in range(options.instances)]
        site = Site(options, model, redis, http)
        start = serve_naively(site) if options.control else serve(site)
        slots = [Slot(number, site, way, start, identify=not options.control) for number, way in enumerate(ways)]
        site.proxy = await stack.enter_async_context(nginx(*(slot.port for slot in slots)))
        yield site, slots


async def run(options: Options) -> Outcome:
    """Do a run."""
    began = time.monotonic()
    async with _site(options) as (site, slots), RedisStore(site.redis.url) as store:
        outcome = await Run(site, slots, store).run()
    site.counts["seconds in all"] = round(time.monotonic() - began)
    return outcome
