"""The instances of a chaos run: each has a port that it keeps over its deaths, and a way to Redis of its own."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress

import httpx
from msgspec import Struct
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from realtime.errors import RealtimeError
from realtime.store.redis import RedisStore
from tests.chaos.site import Site
from tests.support.instance import Instance, instance, process
from tests.support.ports import free_port
from tests.support.redis_server import RedisServer
from tests.support.tcp_proxy import ProxyConnection, TcpProxy

EXIT_MARGIN_S = 4.0
"""How much longer than its drain an instance may take to exit on a busy machine."""
Start = Callable[["Slot"], AbstractAsyncContextManager[Instance]]


class Life(Struct):
    """One instance, from its start to its end; times are the site's."""

    slot: int
    started_at: float
    name: str = ""
    """Its id in the store, once it is known."""
    killed_at: float | None = None
    terminated_at: float | None = None
    pauses: list[tuple[float, float]] = []
    exit_status: int | None = None


class Slot:
    """A place for one instance after the other. `busy` while something is done to the one that is there."""

    def __init__(self, number: int, site: Site, way: TcpProxy, start: Start, *, identify: bool) -> None:
        self.number = number
        self.port = free_port()
        self.way = way
        self.busy = False
        self.instance: Instance | None = None
        self.lives: list[Life] = []
        self.log: list[str] = []
        self._site = site
        self._start = start
        self._identify = identify
        self._up = asyncio.Event()
        self._identifying: asyncio.Task[None] | None = None

    @property
    def is_up(self) -> bool:
        """Whether there is an instance, and nothing is done to it."""
        return self._up.is_set() and not self.busy

    @property
    def life(self) -> Life:
        """That of the instance that is there, or was last."""
        return self.lives[-1]

    async def up(self) -> None:
        """Return once the instance is up."""
        await self._up.wait()

    async def run(self) -> None:
        """Have an instance here, for ever: when one ends, start the next."""
        while True:
            started_at = self._site.now()
            async with self._start(self) as one:
                self.lives.append(Life(self.number, started_at, pauses=[]))
                self.instance = one
                self._site.note(f"instance {self.number} is up after {self._site.now() - started_at:.1f} s")
                self._identifying = asyncio.create_task(self._find_name(one, self.life))
                self._up.set()
                try:
                    self.life.exit_status = await one.exit_status()
                finally:
                    self._up.clear()
                    await self._over(one)
            self._site.note(f"instance {self.number} ended with {self.life.exit_status}")

    async def _over(self, one: Instance) -> None:
        self.log += one.log
        if self._identifying is not None:
            self._identifying.cancel()
            await asyncio.wait([self._identifying])

    async def _find_name(self, one: Instance, life: Life) -> None:
        """Ask the store which instance a connection to this one belongs to."""
        while self._identify and not life.name:
            with suppress(OSError, TimeoutError, WebSocketException, RealtimeError, KeyError):
                async with asyncio.timeout(5):
                    life.name = await _name_of(one, self._site.redis)
                    self._site.note(f"instance {self.number} is {life.name}")
            await asyncio.sleep(0.3)


async def _name_of(one: Instance, redis: RedisServer) -> str:
    async with RedisStore(redis.url) as store, connect(one.ws_url, compression=None, proxy=None) as socket:
        first = json.loads(await socket.recv())
        for viewer in await store.viewers(first["session"]["id"]):
            if viewer.participant.connection_id == first["connection_id"]:
                return viewer.instance
    return ""


def serve(site: Site) -> Start:
    """How an instance of the server is started."""

    def start(slot: Slot) -> AbstractAsyncContextManager[Instance]:
        return instance(
            model=site.model.url,
            port=slot.port,
            redis_url=f"redis://127.0.0.1:{slot.way.port}/0",
            lease_s=site.options.lease_s,
            drain_s=site.options.drain_s,
            log_level="warning",
            model_context_tokens=6000,
            max_output_tokens=1000,
        )

    return start


def serve_naively(site: Site) -> Start:
    """How an instance of the naive server is started."""

    @asynccontextmanager
    async def start(slot: Slot) -> AsyncIterator[Instance]:
        redis_url = f"redis://127.0.0.1:{slot.way.port}/0"
        command = (sys.executable, "-m", "tests.chaos.naive", str(slot.port), redis_url, site.model.url)
        async with process(command, {}) as one:
            await one.up()
            yield one

    return start


async def subscriber_of(slot: Slot, redis: RedisServer) -> ProxyConnection | None:
    """The connection over which the slot's instance hears what is published; `None` if there is none now."""
    listed = str(await redis.command("CLIENT", "LIST", "TYPE", "pubsub"))
    ports = {
        int(field.rpartition(":")[2]) for line in listed.splitlines() for field in line.split() if field[:5] == "addr="
    }
    for connection in slot.way.connections:
        with suppress(OSError):
            if connection._sockets[1].getsockname()[1] in ports:
                return connection
    return None


async def make_session(site: Site, **settings: str) -> str:
    """A new session's id, however often that has to be asked for."""
    while True:
        with suppress(httpx.HTTPError, ValueError):
            answer = await site.http.post(f"{site.proxy.url}/v1/sessions", json=settings, timeout=5)
            if answer.status_code == 201:
                return str(answer.json()["session"]["id"])
        await asyncio.sleep(0.2)
