"""What a connection costs that only waits, which is what most do."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from websockets.asyncio.client import connect

from tests.support.instance import Instance, instance
from tests.support.memory import resident_bytes

WARM, CONNECTIONS = 200, 400
MOST_BYTES = 26 * 1024
"""It is 23 KiB; one more coroutine, dict or task that is kept for each is a quarter to one."""


async def attach(one: Instance, clients: AsyncExitStack, count: int) -> None:
    """So many more clients, each in a session of its own."""
    for _ in range(count):
        socket = await clients.enter_async_context(connect(one.ws_url))
        await socket.recv()


async def test_a_connection_that_waits_costs_little() -> None:
    async with instance() as one, AsyncExitStack() as clients:
        await attach(one, clients, WARM)
        before = resident_bytes(one.pid)
        async with asyncio.timeout(60):
            await attach(one, clients, CONNECTIONS)
        assert (resident_bytes(one.pid) - before) / CONNECTIONS < MOST_BYTES
