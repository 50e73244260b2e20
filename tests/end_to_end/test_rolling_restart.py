"""Every instance is replaced while people read: nobody loses a character, and nobody is told an answer twice."""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from tests.support.client import Client, Event, Transcript, attached
from tests.support.instance import Instance, instance
from tests.support.nginx import Nginx, nginx
from tests.support.ports import free_port
from tests.support.redis_server import RedisServer, redis_server
from tests.support.scale import scaled

ROOT = Path(__file__).resolve().parents[2]
READERS = scaled(200, 60)
INSTANCES = 3
DRAIN_S = 3
TOKENS = 42
RATE = 12
"""Tokens a second of each answer: it takes longer than a drain, so that some outlive one."""
MODEL_TEXT = "".join(f"{number} " for number in range(1, TOKENS + 1))
BACK_S = 20.0
"""How long an instance may take to be back."""


class Reader:
    """A client that asks for one answer after the other and comes back as the protocol says; `connections` counts."""

    def __init__(self, proxy: Nginx) -> None:
        self.transcript = Transcript()
        self.session_id: str | None = None
        self.connections = 0
        self.stopping = False
        self.reads = asyncio.Event()
        """Set once its first answer has begun."""
        self._proxy = proxy
        self._numbers = itertools.count()
        self._asked = ""
        self._leave_at: float | None = None

    async def run(self) -> None:
        """Read until `stopping`, and then to the end of what was asked for."""
        while not self._finished():
            try:
                await self._connect()
            except (ConnectionClosed, InvalidHandshake, OSError):
                await asyncio.sleep(random.uniform(0.05, 0.3))

    async def _connect(self) -> None:
        after = {"after": self.transcript.after()} if self.session_id else {}
        async with attached(
            self._proxy, self.session_id, transcript=self.transcript, delta_interval_ms=100, **after
        ) as client:
            self.connections += 1
            self.session_id = client.session_id
            self._leave_at = None
            if self._asked and self._asked not in self._created():
                await self._ask(client)
            await self._follow(client)

    async def _follow(self, client: Client) -> None:
        while not self._finished():
            if not self.stopping and self._asked in {"", *self.transcript.done}:
                self._asked = f"r{next(self._numbers)}"
                await self._ask(client)
            try:
                async with asyncio.timeout_at(self._leave_at):
                    event = await client.receive()
            except TimeoutError:
                return
            if not self._stays(event):
                return

    async def _ask(self, client: Client) -> None:
        """Under its own ids, so that to ask again asks once."""
        await client.send("response.create", input="go", response_id=self._asked, event_id=self._asked)

    def _stays(self, event: Event) -> bool:
        """Whether the connection is of use after an event."""
        if self.transcript.texts:
            self.reads.set()
        if event["type"] == "session.going_away":
            self._leave_at = asyncio.get_running_loop().time() + event["reconnect_after_ms"] / 1000
        if event["type"] != "error":
            return True
        assert event["error"]["code"] == "draining", event
        return False

    def _created(self) -> set[str]:
        return {*self.transcript.done, *self.transcript.positions}

    def _finished(self) -> bool:
        return self.stopping and self._asked in self.transcript.done


@asynccontextmanager
async def model_server() -> AsyncIterator[str]:
    """The stand-in as a process of its own; yields its URL."""
    options = ("--rate", str(RATE), "--tokens", str(TOKENS))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.model_server", *options), stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None
    try:
        yield (await process.stdout.readline()).decode().strip()
    finally:
        process.terminate()
        await process.wait()


class Fleet:
    """Some instances on ports that stay the same."""

    def __init__(self, stack: AsyncExitStack, model: str, redis: RedisServer) -> None:
        self.ports = [free_port() for _ in range(INSTANCES)]
        self.gone: list[Instance] = []
        self._stack = stack
        self._model = model
        self._redis = redis
        self._instances: dict[int, Instance] = {}

    async def start(self, port: int) -> None:
        """Have an instance on a port."""
        self._instances[port] = await self._stack.enter_async_context(
            instance(model=self._model, redis_url=self._redis.url, port=port, drain_s=DRAIN_S, loop_block_ms=20_000)
        )

    async def replace(self, port: int) -> None:
        """Tell the instance on a port to end, and start its successor."""
        old = self._instances[port]
        self.gone.append(old)
        old.terminate()
        async with asyncio.timeout(DRAIN_S + 10):
            assert await old.exit_status() == 0
        await self.start(port)


async def stored(server: Nginx, session_id: str) -> Transcript:
    """What the store has of a session."""
    async with attached(server, session_id, history="all") as client:
        while client.transcript.positions["session"] < client.first["positions"]["session"]:
            await client.receive()
        while len(client.transcript.positions) > 1:
            await client.receive()
        return client.transcript


@pytest.mark.timeout(240)
async def test_readers_see_every_answer_whole_while_all_instances_are_replaced() -> None:
    """What they have is what is stored, which is what the model said, or as much of it as its instance had time for."""
    async with AsyncExitStack() as stack:
        model = await stack.enter_async_context(model_server())
        redis = await stack.enter_async_context(redis_server())
        fleet = Fleet(stack, model, redis)
        await asyncio.gather(*map(fleet.start, fleet.ports))
        proxy = await stack.enter_async_context(nginx(*fleet.ports))
        readers = [Reader(proxy) for _ in range(READERS)]
        async with asyncio.TaskGroup() as reading:
            for reader in readers:
                reading.create_task(reader.run())
            for reader in readers:
                await reader.reads.wait()
            for port in fleet.ports:
                await fleet.replace(port)
            for reader in readers:
                reader.stopping = True
        for gone in fleet.gone:
            assert gone.notes == []
        transcripts = [await stored(proxy, reader.session_id or "") for reader in readers]
    for reader, transcript in zip(readers, transcripts, strict=True):
        assert reader.transcript.texts == transcript.texts
        assert reader.transcript.done.keys() == transcript.done.keys()
        for response_id, done in transcript.done.items():
            check_end(done, transcript.texts[response_id])
        assert reader.connections <= 2 * INSTANCES + 1
    statuses = [done["status"] for transcript in transcripts for done in transcript.done.values()]
    assert statuses.count("completed") >= READERS
    assert statuses.count("failed") > 0, "no answer has outlived a drain"


def check_end(done: Event, text: str) -> None:
    """A response is whole, or says that its instance was shut down."""
    if done["status"] == "completed":
        assert text == MODEL_TEXT
    else:
        assert (done["status"], done["error"]["code"]) == ("failed", "instance_shutdown")
        assert MODEL_TEXT.startswith(text)
