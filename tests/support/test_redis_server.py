"""The Redis that tests are given is a real one, and does what is asked of it."""

from __future__ import annotations

import asyncio
import os
import time

import pytest
from redis.asyncio import RedisCluster as ClusterClient
from redis.exceptions import AuthenticationError, OutOfMemoryError, RedisError

from tests.support.redis_server import RedisServer, redis_cluster, redis_server


def runs(pid: int) -> bool:
    """Whether a process of that id exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def fill(redis: RedisServer) -> None:
    """Write ten megabytes."""
    for number in range(100):
        await redis.command("SET", f"key-{number}", b"x" * 100_000)


async def test_it_answers_and_is_gone_afterwards() -> None:
    """It is up when the context is entered, empty, and ended when it is left."""
    async with redis_server() as redis:
        assert redis.url == f"redis://127.0.0.1:{redis.port}/0"
        assert await redis.command("DBSIZE") == 0
        await redis.command("SET", "key", "value")
        assert await redis.command("GET", "key") == "value"
        pid = redis.pid
    assert not runs(pid)


async def test_it_never_evicts() -> None:
    """Out of memory, a write is refused, and what is there stays."""
    async with redis_server(maxmemory="3mb") as redis:
        assert await redis.command("CONFIG", "GET", "maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        await redis.command("SET", "first", "value")
        with pytest.raises(OutOfMemoryError):
            await fill(redis)
        assert await redis.command("GET", "first") == "value"


async def test_it_starts_again_with_its_data_where_it_writes_them_down() -> None:
    """What was acknowledged outlives a SIGKILL, on the same port."""
    async with redis_server(append_only=True, appendfsync="always") as redis:
        await redis.command("SET", "key", "value")
        first = redis.pid
        await redis.kill()
        assert not runs(first)
        with pytest.raises(RedisError):
            await redis.command("PING")
        await redis.start()
        assert redis.pid != first
        assert await redis.command("GET", "key") == "value"


async def test_it_starts_again_empty_where_it_does_not() -> None:
    """Without an append-only file a kill loses everything."""
    async with redis_server() as redis:
        await redis.command("SET", "key", "value")
        await redis.kill()
        await redis.start()
        assert await redis.command("DBSIZE") == 0


async def test_wiping_loses_the_data_that_were_written_down() -> None:
    """It is another Redis then, at the same address."""
    async with redis_server(append_only=True) as redis:
        await redis.command("SET", "key", "value")
        await redis.wipe()
        assert await redis.command("DBSIZE") == 0


async def test_a_paused_one_takes_connections_and_says_nothing() -> None:
    """It hangs until it is resumed, and forgets nothing meanwhile."""
    async with redis_server() as redis:
        await redis.command("SET", "key", "value")
        redis.pause()
        waiting = asyncio.create_task(redis.command("GET", "key"))
        done, _ = await asyncio.wait([waiting], timeout=0.2)
        assert not done
        redis.resume()
        assert await waiting == "value"


async def test_a_paused_one_can_be_ended() -> None:
    """Whatever a test did to it, nothing is left of it."""
    async with redis_server() as redis:
        redis.pause()
        pid = redis.pid
    assert not runs(pid)


async def test_it_ends_in_order() -> None:
    """A SIGTERM ends it as a container's end does."""
    async with redis_server(append_only=True) as redis:
        await redis.command("SET", "key", "value")
        await redis.terminate()
        await redis.start()
        assert await redis.command("GET", "key") == "value"


async def test_a_password_is_part_of_the_url() -> None:
    """Without it nobody gets in."""
    async with redis_server(password="p@ss word") as redis:
        assert await redis.command("PING") is True
        redis.url = f"redis://127.0.0.1:{redis.port}/0"
        with pytest.raises(AuthenticationError):
            await redis.command("PING")


async def test_a_start_that_fails_says_why() -> None:
    """The error holds what Redis wrote, and nothing is left running."""
    with pytest.raises(RuntimeError, match="maxmemory-policy"):
        async with redis_server(maxmemory_policy="no-such-policy"):
            pass
    async with redis_server() as redis:
        with pytest.raises(RuntimeError, match="Address already in use"):
            async with redis_server(port=redis.port):
                pass


async def test_starting_is_quick() -> None:
    """So that a test may have one of its own."""
    began = time.monotonic()
    async with redis_server():
        assert time.monotonic() - began < 3  # on an idle machine 0.05


async def test_a_cluster_serves_every_key() -> None:
    """Three nodes share the slots; a client that knows one finds them all."""
    async with redis_cluster() as cluster:
        assert len(set(cluster.ports)) == 3
        client = ClusterClient.from_url(cluster.url, decode_responses=True)
        try:
            for number in range(30):
                await client.set(f"key-{number}", number)
            assert await client.get("key-29") == "29"
        finally:
            await client.aclose()
        sizes = [await node.command("DBSIZE") for node in cluster.nodes]
        assert sum(sizes) == 30
        assert all(sizes)


async def test_a_node_of_a_cluster_may_be_killed_and_started() -> None:
    """It finds the others again by what it has written down."""
    async with redis_cluster(append_only="yes") as cluster:
        await cluster.nodes[1].kill()
        await cluster.nodes[1].start()
        await cluster.ready()
