"""Everybody is cut off at once and comes back: over two instances, in seconds, without a seam."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import AsyncExitStack

from realtime.responders.demo import ANSWER
from tests.support.client import Client, Transcript, attached
from tests.support.instance import Instance, instance
from tests.support.redis_server import redis_server

CLIENTS = 1000
STREAMING = 100
"""Those in whose sessions a response runs; the others rest."""
AT_ONCE = 100
"""Connections that the test opens at a time before the storm."""
JITTER_S = 2.0
BACK_S = 30.0
PATIENCE_S = 30.0
INTERVAL_MS = 200


class Reader:
    """A client that is there, is cut off, and comes back somewhere."""

    def __init__(self, number: int, chance: random.Random) -> None:
        self.transcript = Transcript()
        self.back_at = 0.0
        self.asks = number < STREAMING
        self._number = number
        self._session_id = ""
        self._chance = chance

    async def begin(self, stack: AsyncExitStack, server: Instance) -> Client:
        """Make a session, and put something into it."""
        coming = attached(server, transcript=self.transcript, delta_interval_ms=INTERVAL_MS)
        client = await stack.enter_async_context(coming)
        self._session_id = client.session_id
        await client.send("conversation.item.create", item={"role": "user", "content": str(self._number)})
        await client.until("conversation.item.created")
        return client

    async def ask(self, client: Client) -> None:
        """Have a response run, and read its beginning."""
        await client.send("response.create", response_id="r")
        await client.until("response.output_text.delta")

    async def come_back(self, stack: AsyncExitStack, servers: list[Instance]) -> Client:
        """After a moment, with what it has; as the protocol says, also to who is sent away with a retryable error."""
        seen = self.transcript
        while True:
            await asyncio.sleep(self._chance.random() * JITTER_S)
            server = self._chance.choice(servers)
            coming = attached(
                server, self._session_id, transcript=seen, after=seen.after(), delta_interval_ms=INTERVAL_MS
            )
            try:
                client = await stack.enter_async_context(coming)
            except AssertionError:
                assert seen.events[-1]["error"]["retry_after_ms"] > 0
            else:
                self.back_at = time.monotonic()
                return client

    async def finish(self, client: Client) -> None:
        """Read to the end of the answer; who has none finds its session as it was."""
        await client.send("ping")
        await client.until("pong")
        if self.asks:
            if "r" not in self.transcript.done:
                await client.until("response.done")
            assert self.transcript.texts["r"] == ANSWER.format(said=self._number)
            assert self.transcript.done["r"]["status"] == "completed"
            assert not any(event.get("reset") for event in self.transcript.events)
        assert [item["content"] for item in self.transcript.items] == [str(self._number)]


async def test_a_thousand_clients_are_cut_off_and_are_back_in_seconds() -> None:
    """Each finds its session at whichever instance it reaches, and its answer whole; each instance still has one
    subscriber at Redis, and a few connections."""
    chance = random.Random(23)
    async with redis_server() as redis, AsyncExitStack() as up:
        contexts = [instance(redis_url=redis.url, on_disconnect="continue") for _ in range(2)]
        servers = await asyncio.gather(*map(up.enter_async_context, contexts))
        readers = [Reader(number, random.Random(chance.random())) for number in range(CLIENTS)]
        clients: list[Client] = []
        async with asyncio.timeout(PATIENCE_S), AsyncExitStack() as before:
            for start in range(0, CLIENTS, AT_ONCE):
                some = readers[start : start + AT_ONCE]
                clients += await asyncio.gather(*(reader.begin(before, chance.choice(servers)) for reader in some))
            asking = zip(readers[:STREAMING], clients, strict=False)
            await asyncio.gather(*(reader.ask(client) for reader, client in asking))
            for client in clients:
                client.reset()
            cut_at = time.monotonic()
        async with asyncio.timeout(PATIENCE_S), AsyncExitStack() as after:
            returned = await asyncio.gather(*(reader.come_back(after, servers) for reader in readers))
            assert max(reader.back_at for reader in readers) - cut_at < BACK_S
            assert len(str(await redis.command("CLIENT", "LIST", "TYPE", "PUBSUB")).splitlines()) == len(servers)
            assert (await redis.command("INFO", "stats"))["total_connections_received"] < 50
            finishing = zip(readers, returned, strict=True)
            await asyncio.gather(*(reader.finish(client) for reader, client in finishing))
            for client in returned:
                client.reset()
