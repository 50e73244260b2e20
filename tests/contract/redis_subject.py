"""Redis stores under test: a server or a cluster that is emptied for each test, and whose time can be made to pass."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

from redis.asyncio import Redis

from realtime.store.redis import RedisStore
from tests.support.redis_access import PASSWORD, USER, restrict
from tests.support.redis_server import patient_calls, redis_cluster, redis_server

AGE = """
for _, key in ipairs(redis.call('KEYS', '*')) do
    local left = redis.call('PTTL', key) - ARGV[1]
    if string.sub(key, -5) == ':meta' then redis.call('HINCRBY', key, 'deadline', -ARGV[1]) end
    if key == 'rt:tasks' then
        for _, task in ipairs(redis.call('ZRANGE', key, 0, -1)) do redis.call('ZINCRBY', key, -ARGV[1], task) end
    end
    if left > 0 then redis.call('PEXPIRE', key, string.format('%.0f', left)) else redis.call('DEL', key) end
end
"""
"""Makes every key older by ARGV[1] milliseconds: what expires in them is gone, as if they had passed."""

PATIENCE_S = 30.0

Opened = tuple[RedisStore, Callable[[float], Awaitable[None]]]


@contextmanager
def running(service: AbstractAsyncContextManager[Any]) -> Iterator[Any]:
    """A service that outlives the loops of the tests that use it."""
    with asyncio.Runner() as runner:
        yield runner.run(service.__aenter__())
        runner.run(service.__aexit__(None, None, None))


@asynccontextmanager
async def restricted_server() -> AsyncIterator[list[int]]:
    """The port of a Redis."""
    async with redis_server() as redis:
        await restrict(redis)
        yield [redis.port]


@asynccontextmanager
async def restricted_cluster() -> AsyncIterator[list[int]]:
    """The ports of a cluster's nodes."""
    async with redis_cluster() as cluster:
        for node in cluster.nodes:
            await restrict(node, cluster=True)
        yield cluster.ports


@asynccontextmanager
async def redis_store(ports: list[int], **settings: Any) -> AsyncIterator[Opened]:
    """A store in the Redis, or the cluster, that listens on `ports`, which is empty; and the passing of seconds. The
    store's user may do what the operations page says, and no more."""
    async with AsyncExitStack() as stack:
        stack.enter_context(patient_calls())
        nodes = [await stack.enter_async_context(Redis(port=port)) for port in ports]

        async def advance(seconds: float) -> None:
            for node in nodes:
                await node.eval(AGE, 0, str(round(seconds * 1000)))  # type: ignore[misc, no-untyped-call, unused-ignore]

        for node in nodes:
            await node.flushall()  # type: ignore[no-untyped-call, unused-ignore]
        await _pass_on(nodes)
        store = RedisStore(f"redis://{USER}:{PASSWORD}@127.0.0.1:{ports[0]}/0", **settings)
        yield await stack.enter_async_context(store), advance
        assert not await _immortal(nodes), "every key has a time to live at every moment"
        for node in nodes:
            assert not await node.acl_log()  # type: ignore[no-untyped-call, unused-ignore]


async def _pass_on(nodes: list[Redis]) -> None:
    """Return once each node of a cluster has heard all that was published at any: the next test must not hear it."""
    async with AsyncExitStack() as stack, asyncio.timeout(PATIENCE_S):
        ears = [await stack.enter_async_context(node.pubsub()) for node in nodes]  # type: ignore[no-untyped-call, unused-ignore]
        for ear in ears:
            await ear.subscribe("marker")
            await ear.get_message(timeout=None)  # it is confirmed
        for node in nodes:
            await node.publish("marker", "")
        for ear in ears:
            for _ in nodes:
                await ear.get_message(timeout=None)


async def _immortal(nodes: list[Redis]) -> list[str]:
    keys = [(node, key) for node in nodes for key in await node.keys("*")]
    return [str(key) for node, key in keys if await node.pttl(key) == -1]
