"""The queue in Redis while all is well: each task once, in the right order, as many at once as there is room for."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from realtime.errors import StoreError
from realtime.store.base import TaskRef
from realtime.store.redis_calls import TIMEOUT_S
from realtime.tasks.saq_queue import SaqQueue
from tests.support.ports import free_port
from tests.support.queue_worker import PATIENCE_S, POLL_S, TTL_S, Work, definition, forgotten, working
from tests.support.redis_server import RedisServer, patient_calls, redis_server

LEASE_S = 10.0
JOBS = 2000


@pytest.fixture
def patient() -> Iterator[None]:
    """Much is asked for at once: what has to answer soon may answer late."""
    with patient_calls():
        yield


@pytest.fixture
async def redis() -> AsyncIterator[RedisServer]:
    """The Redis of a test."""
    async with redis_server() as server:
        yield server


@pytest.fixture
def work() -> Work:
    """What the tasks of a test do."""
    return Work()


def queue_at(redis: RedisServer, *names: str, slots: int = 2, **options: Any) -> SaqQueue:
    """A queue of tasks of these names."""
    definitions = [definition(name, **options) for name in names]
    return SaqQueue(redis.url, definitions, slots=slots, lease_s=LEASE_S, ttl_s=TTL_S)


def task(task_id: str, name: str = "job") -> TaskRef:
    """A task of one session."""
    return TaskRef("sess_1", task_id, name)


async def test_a_task_is_handed_out_whole_and_then_forgotten(redis: RedisServer) -> None:
    handed: asyncio.Queue[TaskRef] = asyncio.Queue()
    async with queue_at(redis, "job") as queue, queue_at(redis) as server:
        await server.submit(task("before"))
        running = asyncio.create_task(queue.run(handed.put))
        async with asyncio.timeout(PATIENCE_S):
            assert await handed.get() == task("before")
            await server.submit(task("after"))
            assert await handed.get() == task("after")
        await forgotten(redis)
        running.cancel()
        await asyncio.wait([running])


async def test_tasks_that_wait_without_a_worker_are_known(redis: RedisServer) -> None:
    """Until there is one that knows them, and not at once when it is gone: it may only be late."""
    handed: asyncio.Queue[TaskRef] = asyncio.Queue()
    async with queue_at(redis, "job", "other") as server, queue_at(redis, "job") as queue:
        assert await server.unattended() == 0
        for name in ("one", "two"):
            await server.submit(task(name))
        await server.submit(task("three", "other"))
        assert await server.unattended() == 3
        running = asyncio.create_task(queue.run(handed.put))
        async with asyncio.timeout(PATIENCE_S):
            while await server.unattended() != 1:  # noqa: ASYNC110  # nothing tells of it
                await asyncio.sleep(POLL_S)
            await handed.get()
        await queue.drain()
        running.cancel()
        await asyncio.wait([running])
        await server.submit(task("four"))
        assert await server.unattended() == 1
        await redis.command("DEL", queue._queue("job")._sweep)
        assert await server.unattended() == 2


async def test_what_waits_or_runs_is_not_submitted_again(redis: RedisServer, work: Work) -> None:
    async with queue_at(redis, "job", slots=6) as queue:
        for _ in range(3):
            await queue.submit(task("once"))
        async with working(queue, work):
            await work.until("began", "once")
            await queue.submit(task("once"))
            await queue.submit(task("last"))
            await work.until("began", "last")
            work.may_end.set()
            await forgotten(redis)
        assert work.told("began") == ["once", "last"]


async def test_what_is_done_may_be_submitted_again(redis: RedisServer, work: Work) -> None:
    work.may_end.set()
    async with queue_at(redis, "job") as queue, working(queue, work):
        for count in (1, 2):
            await queue.submit(task("twice"))
            await work.until_count("ended", count)
            await forgotten(redis)


async def test_the_most_urgent_come_first_and_then_the_oldest(redis: RedisServer, work: Work) -> None:
    definitions = [definition(priority, priority=priority) for priority in ("low", "normal", "high")]
    async with SaqQueue(redis.url, definitions, slots=1, lease_s=LEASE_S, ttl_s=TTL_S) as queue, working(queue, work):
        await queue.submit(task("first", "normal"))
        await work.until("began", "first")
        for name in ("low", "normal", "high"):
            for number in range(3):
                await queue.submit(task(f"{name}-{number}", name))
        work.may_end.set()
        await work.until_count("ended", 10)
    order = [f"{name}-{number}" for name in ("high", "normal", "low") for number in range(3)]
    assert work.told("began") == ["first", *order]


async def test_no_more_run_at_once_than_a_name_and_the_process_allow(redis: RedisServer, work: Work) -> None:
    definitions = [definition("few", concurrency=2), definition("many")]
    async with SaqQueue(redis.url, definitions, slots=3, lease_s=LEASE_S, ttl_s=TTL_S) as queue, working(queue, work):
        for number in range(5):
            await queue.submit(task(f"few-{number}", "few"))
        await work.until("began", "few-0", "few-1")
        await queue.submit(task("many-0", "many"))
        await queue.submit(task("many-1", "many"))
        await work.until("began", "many-0")
        assert len(work.told("began")) == 3
        work.may_end.set()
        await work.until_count("ended", 7)
        assert work.at_once == 3
        await forgotten(redis)


async def test_a_worker_without_room_leaves_tasks_to_others(redis: RedisServer, work: Work) -> None:
    busy = Work()
    async with queue_at(redis, "job", "other", slots=1) as full, queue_at(redis, "job", "other") as free:
        async with working(full, busy):
            async with asyncio.timeout(PATIENCE_S):
                while (await redis.command("INFO", "clients"))["blocked_clients"] < 2:  # noqa: ASYNC110
                    await asyncio.sleep(POLL_S)
            await full.submit(task("holds"))
            await busy.until("began", "holds")
            await full.submit(task("t0"))
            await full.submit(task("t1", "other"))
            async with working(free, work):
                await work.until("began", "t0", "t1")
            busy.may_end.set()
            await busy.until("ended", "holds")


async def test_a_task_that_no_worker_knows_waits_for_one_that_does(redis: RedisServer, work: Work) -> None:
    work.may_end.set()
    async with queue_at(redis, "old") as old, queue_at(redis, "new") as new:
        async with working(old, work):
            await old.submit(task("strange", "new"))
            await old.submit(task("known", "old"))
            await work.until("ended", "known")
            assert work.told("began") == ["known"]
        async with working(new, work):
            await work.until("ended", "strange")


@pytest.mark.usefixtures("patient")
async def test_two_thousand_tasks_each_once(redis: RedisServer, work: Work) -> None:
    work.may_end.set()
    async with queue_at(redis, "a", "b", slots=4) as one, queue_at(redis, "a", "b", slots=4) as other:
        async with working(one, work), working(other, work):
            await asyncio.gather(*[one.submit(task(f"t{number}", "ab"[number % 2])) for number in range(JOBS)])
            await work.until_count("ended", JOBS)
            await forgotten(redis)
    assert Counter(work.told("began")) == Counter(f"t{number}" for number in range(JOBS))


async def test_a_drain_waits_for_what_runs_and_leaves_the_rest(redis: RedisServer, work: Work) -> None:
    next_work = Work()
    next_work.may_end.set()
    async with queue_at(redis, "job", slots=1) as queue, working(queue, work):
        await queue.submit(task("runs"))
        await work.until("began", "runs")
        await queue.submit(task("waits"))
        draining = asyncio.create_task(queue.drain())
        async with queue_at(redis, "job") as next_queue, working(next_queue, next_work):
            await next_work.until("ended", "waits")
            await next_queue.drain()
        assert not draining.done()
        await queue.submit(task("later"))
        work.may_end.set()
        async with asyncio.timeout(PATIENCE_S):
            await draining
        assert work.all == [("began", "runs"), ("ended", "runs")]
        assert await redis.command("LRANGE", "saq:rt:job:queued", 0, -1) == ["saq:job:rt:job:sess_1:later"]


async def test_what_is_cancelled_is_handed_back_as_the_next(redis: RedisServer, work: Work) -> None:
    next_work = Work()
    next_work.may_end.set()
    async with queue_at(redis, "job", slots=2) as queue:
        async with working(queue, work):
            for number in range(4):
                await queue.submit(task(f"t{number}"))
            await work.until("began", "t0", "t1")
        assert sorted(work.told("cancelled")) == ["t0", "t1"]
        assert await redis.command("LLEN", "saq:rt:job:active") == 0
    async with queue_at(redis, "job", slots=1) as next_queue, working(next_queue, next_work):
        await next_work.until_count("ended", 4)
    assert sorted(next_work.told("began")[:2]) == ["t0", "t1"]
    assert next_work.told("began")[2:] == ["t2", "t3"]


async def test_a_handler_that_cancels_itself_gets_its_task_again(redis: RedisServer, work: Work) -> None:
    given_back = asyncio.Event()

    async def handle(given: TaskRef) -> None:
        if not given_back.is_set():
            given_back.set()
            raise asyncio.CancelledError
        work.tell("ended", given.task_id)

    async with queue_at(redis, "job", slots=1) as queue:
        running = asyncio.create_task(queue.run(handle))
        await queue.submit(task("t"))
        await work.until("ended", "t")
        await forgotten(redis)
        running.cancel()
        await asyncio.wait([running])


async def test_a_handler_that_raises_all_the_same_stops_nothing_and_tells_no_ids(
    redis: RedisServer, work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    async def handle(given: TaskRef) -> None:
        work.tell("began", given.task_id)
        raise ValueError("of a bug")

    caplog.set_level(logging.DEBUG)
    async with queue_at(redis, "job", slots=1) as queue:
        running = asyncio.create_task(queue.run(handle))
        for task_id in ("t0", "t1"):
            await queue.submit(task(task_id))
        await work.until("began", "t0", "t1")
        await forgotten(redis)
        running.cancel()
        await asyncio.wait([running])
    assert "sess_1" not in caplog.text
    assert "saq" not in {record.name for record in caplog.records}


async def test_every_key_has_a_time_to_live(redis: RedisServer, work: Work) -> None:
    async with queue_at(redis, "job", slots=1) as queue:
        await queue.submit(task("t0"))
        assert not await without_ttl(redis)
        async with working(queue, work):
            await work.until("began", "t0")
            await queue.submit(task("t1"))
            async with asyncio.timeout(PATIENCE_S):
                while await without_ttl(redis):  # noqa: ASYNC110  # a list made anew has none for a moment
                    await asyncio.sleep(POLL_S)
            assert await redis.command("EXISTS", "saq:rt:job:active") == 1
        assert not await without_ttl(redis)


async def test_a_task_that_runs_does_not_expire(redis: RedisServer, work: Work) -> None:
    async with SaqQueue(redis.url, [definition("job")], slots=1, lease_s=1, ttl_s=1) as queue, working(queue, work):
        await queue.submit(task("t"))
        await work.until("began", "t")
        key = "saq:job:rt:job:sess_1:t"
        for _ in range(2):
            await redis.command("PEXPIRE", key, 900)
            async with asyncio.timeout(PATIENCE_S):
                while int(await redis.command("PTTL", key)) <= 900:  # noqa: ASYNC110
                    await asyncio.sleep(POLL_S)
        work.may_end.set()
        await forgotten(redis)


async def test_a_task_that_expired_while_it_waited_can_be_submitted_again(redis: RedisServer, work: Work) -> None:
    work.may_end.set()
    async with queue_at(redis, "job") as queue:
        await queue.submit(task("t"))
        await redis.command("DEL", "saq:job:rt:job:sess_1:t")
        await queue.submit(task("t"))
        async with working(queue, work):
            await work.until("ended", "t")
            await forgotten(redis)
    assert work.told("began") == ["t"]


async def test_nothing_is_left_open(redis: RedisServer, work: Work) -> None:
    async with queue_at(redis, "a", "b", "c") as queue, working(queue, work):
        await queue.submit(task("t", "a"))
        await work.until("began", "t")
        assert len(str(await redis.command("CLIENT", "LIST")).splitlines()) > 3
    async with asyncio.timeout(PATIENCE_S):
        while len(str(await redis.command("CLIENT", "LIST")).splitlines()) > 1:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)


@pytest.mark.usefixtures("patient")
async def test_few_connections_however_many_slots(redis: RedisServer, work: Work) -> None:
    async with queue_at(redis, "a", "b", slots=100) as queue, working(queue, work):
        await asyncio.gather(*[queue.submit(task(f"t{number}", "ab"[number % 2])) for number in range(300)])
        await work.until_count("began", 100)
        assert len(str(await redis.command("CLIENT", "LIST")).splitlines()) <= 2 + 8 + 1
        work.may_end.set()
        await work.until_count("ended", 300)


async def test_a_submission_without_redis_fails_soon_and_may_be_tried_again() -> None:
    url = f"redis://127.0.0.1:{free_port()}/0"
    async with SaqQueue(url, [definition("job")], slots=1, lease_s=LEASE_S, ttl_s=TTL_S) as queue:
        with pytest.raises(StoreError, match="try again") as refused:
            await queue.submit(task("t"))
    assert refused.value.code == "store_unavailable"


async def test_a_submission_to_a_redis_that_hangs_fails_as_soon(redis: RedisServer) -> None:
    async with queue_at(redis, "job") as queue:
        await queue.submit(task("t0"))
        redis.pause()
        try:
            async with asyncio.timeout(TIMEOUT_S + PATIENCE_S):
                with pytest.raises(StoreError):
                    await queue.submit(task("t1"))
        finally:
            redis.resume()
        await queue.submit(task("t1"))


async def without_ttl(redis: RedisServer) -> list[str]:
    """The keys that stay for ever."""
    return [key for key in await redis.command("KEYS", "*") if await redis.command("TTL", key) == -1]
