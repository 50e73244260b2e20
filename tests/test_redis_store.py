"""What is the store's in Redis alone: what it says when an answer is missing, and what older versions have left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from realtime.errors import StoreError
from realtime.store.base import Appended, Batch, Missed, Notice, TaskRef, Write
from realtime.store.redis import RedisStore
from tests.contract import session, spoken
from tests.support.redis_server import RedisServer, patient_calls, redis_server

PATIENCE_S = 30.0
SESSION = "sess_1"
DELTA = [Write("task_1", [spoken("task_1", "a")])]


@pytest.fixture
async def redis() -> AsyncIterator[RedisServer]:
    """The Redis of a test."""
    async with redis_server() as server:
        yield server


@pytest.mark.parametrize("call", ["append", "append_all"])
async def test_a_writer_that_follows_is_told_that_an_append_may_be_missing(redis: RedisServer, call: str) -> None:
    """Where nobody knows whether deltas were written, their followers have to look; others don't."""
    heard, others = list[Notice](), list[Notice]()
    async with RedisStore(redis.url) as store, asyncio.timeout(PATIENCE_S):
        await store.create(session(SESSION))
        await store.follow(SESSION, "task_1", heard.append)
        await store.follow(SESSION, "task_2", others.append)
        await store.append(SESSION, DELTA)
        await redis.kill()
        if call == "append":
            with pytest.raises(StoreError):
                await store.append(SESSION, DELTA)
        else:
            [error] = await store.append_all([Batch(SESSION, DELTA)])
            assert isinstance(error, StoreError)
    assert heard == [Appended("task_1", 1, DELTA[0].entries), Missed()]
    assert others == []


async def test_a_session_that_has_no_time_to_live_of_its_own_has_the_usual_one(redis: RedisServer) -> None:
    """Version 0.2 kept none with its sessions: they are used as before."""
    async with RedisStore(redis.url) as store:
        await store.create(session(SESSION), 60.0)
        await redis.command("HDEL", f"rt:{{{SESSION}}}:meta", "ttl")
        await store.append(SESSION, DELTA)
        assert 3400 < (await store.load(SESSION)).expires_in_s <= 3600


async def test_the_index_of_tasks_never_lacks_a_time_to_live(redis: RedisServer) -> None:
    """From the first task on, for longer than any session lives; and there is no index without tasks."""
    task = TaskRef(SESSION, "task_1", "analyse")
    async with RedisStore(redis.url, session_ttl_s=50, task_ttl_s=100) as store:
        await store.track(task, 0.0)
        assert 86_400 + 190 < await redis.command("TTL", "rt:tasks") <= 86_400 + 200
        assert await store.overdue(1.0, 10) == [task]
        assert await redis.command("TTL", "rt:tasks") > 86_400
        await store.untrack([task])
        assert await redis.command("EXISTS", "rt:tasks") == 0


async def test_of_ten_thousand_tasks_each_is_found_once(redis: RedisServer) -> None:
    """Whoever looks gets as many as it asks for at a time."""
    tasks = [TaskRef(SESSION, f"task_{number:05}", "analyse") for number in range(10_000)]
    with patient_calls():
        async with RedisStore(redis.url) as store:
            for start in range(0, len(tasks), 100):
                await asyncio.gather(*(store.track(task, 0.0) for task in tasks[start : start + 100]))
            found: list[TaskRef] = []
            while some := await store.overdue(60.0, 500):
                assert len(some) <= 500
                found += some
            assert sorted(found) == tasks
            await store.untrack(found)
            assert await store.tracked() == 0


async def test_a_task_that_an_older_version_has_forgotten_takes_nobodys_place(redis: RedisServer) -> None:
    """It knows the index alone, and not whose a task is. Whoever is untracked leaves nothing behind."""
    tasks = [TaskRef(SESSION, f"task_{number}", "analyse") for number in range(3)]
    async with RedisStore(redis.url) as store:
        assert await store.track(tasks[0], 0.0, "user:ann", 1)
        assert not await store.track(tasks[1], 0.0, "user:ann", 1)
        await redis.command("DEL", "rt:tasks")
        assert await store.track(tasks[1], 0.0, "user:ann", 1)
        assert not await store.track(tasks[2], 0.0, "user:ann", 1)
        for name in ("payers", "shares"):
            assert await redis.command("TTL", f"rt:{{rt:tasks}}:{name}") > 86_400
        await store.untrack(tasks)
        assert await redis.command("DBSIZE") == 0
