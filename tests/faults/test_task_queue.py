"""What becomes of tasks when their worker, or the queue's Redis, fails: handed out again, and never lost for it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator

import pytest

from realtime.errors import StoreError
from realtime.store.base import TaskRef
from realtime.store.redis_calls import TIMEOUT_S
from realtime.tasks.saq_queue import SaqQueue
from tests.support.queue_worker import (
    PATIENCE_S,
    POLL_S,
    TTL_S,
    Work,
    WorkerProcess,
    definition,
    forgotten,
    worker_process,
    working,
)
from tests.support.redis_server import RedisServer, redis_server

LEASE_S = 0.6
LONG_LEASE_S = 30.0
"""For what must not have to wait for a lease to run out."""
JOBS = 60


@pytest.fixture
async def redis() -> AsyncIterator[RedisServer]:
    """A Redis that keeps what it was told, also when it is killed."""
    async with redis_server(append_only=True, appendfsync="always") as server:
        yield server


@pytest.fixture
def work() -> Work:
    """What the tasks of a test do."""
    return Work()


def queue_at(redis: RedisServer, lease_s: float = LEASE_S, slots: int = 2) -> SaqQueue:
    """A queue of tasks that run until they are let go."""
    return SaqQueue(redis.url, [definition("hold")], slots=slots, lease_s=lease_s, ttl_s=TTL_S)


def task(task_id: str) -> TaskRef:
    """A task that runs until it is let go."""
    return TaskRef("sess_1", task_id, "hold")


async def submitted(queue: SaqQueue, count: int) -> set[str]:
    """Submit so many; returns their ids."""
    names = {f"t{number}" for number in range(count)}
    await asyncio.gather(*[queue.submit(task(name)) for name in names])
    return names


async def killed(worker: WorkerProcess) -> None:
    """SIGKILL; returns once it is gone."""
    worker.send(signal.SIGKILL)
    assert await worker.exit_status() == -signal.SIGKILL


async def test_the_tasks_of_a_killed_worker_are_handed_to_another(redis: RedisServer) -> None:
    async with queue_at(redis) as queue, worker_process(redis.url, lease_s=LEASE_S) as first:
        names = await submitted(queue, 3)
        await first.until_count("began", 2)
        await killed(first)
        async with worker_process(redis.url, lease_s=LEASE_S) as second:
            await second.until_count("began", 2)
            second.send(signal.SIGUSR1)
            await second.until("ended", *names)
            await forgotten(redis)
        assert len(second.told("began")) == 3


async def test_a_worker_that_lives_finds_what_a_killed_one_had(redis: RedisServer, work: Work) -> None:
    async with queue_at(redis) as queue, worker_process(redis.url, lease_s=LEASE_S) as other:
        names = await submitted(queue, 2)
        await other.until("began", *names)
        async with working(queue, work):
            await killed(other)
            await work.until("began", *names)
            work.may_end.set()
            await forgotten(redis)


async def test_a_worker_that_ends_hands_its_tasks_back_at_once(redis: RedisServer, work: Work) -> None:
    async with queue_at(redis, LONG_LEASE_S) as queue, worker_process(redis.url, lease_s=LONG_LEASE_S) as leaving:
        names = await submitted(queue, 2)
        await leaving.until("began", *names)
        async with working(queue, work):
            leaving.send(signal.SIGTERM)
            await work.until("began", *names)
            assert await leaving.exit_status() == 0
            work.may_end.set()
            await forgotten(redis)


async def test_a_task_outlives_many_leases_with_its_worker(redis: RedisServer, work: Work) -> None:
    other = Work()
    async with queue_at(redis) as queue, queue_at(redis) as other_queue:
        async with working(queue, work):
            await queue.submit(task("long"))
            await work.until("began", "long")
            async with working(other_queue, other):
                await asyncio.sleep(5 * LEASE_S)
                await queue.submit(task("next"))
                work.may_end.set()
                other.may_end.set()
                await forgotten(redis)
    assert (work.all + other.all).count(("began", "long")) == 1


async def test_a_restart_of_redis_loses_no_task_and_ends_none(redis: RedisServer, work: Work) -> None:
    async with queue_at(redis) as queue, working(queue, work):
        names = await submitted(queue, JOBS)
        await work.until_count("began", 2)
        running = set(work.told("began"))
        await redis.kill()
        with pytest.raises(StoreError):
            await queue.submit(task("meanwhile"))
        await asyncio.sleep(2 * LEASE_S)
        await redis.start()
        await submits_again(queue)
        work.may_end.set()
        await work.until("ended", *names, "meanwhile")
        await forgotten(redis)
    assert not work.told("cancelled")
    assert running <= set(work.told("ended"))


async def test_tasks_that_end_while_redis_is_away_are_not_lost(
    redis: RedisServer, work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    async with queue_at(redis) as queue, working(queue, work):
        names = await submitted(queue, JOBS)
        await work.until_count("began", 2)
        await redis.kill()
        work.may_end.set()
        await work.until_count("ended", 2)
        await redis.start()
        await work.until("ended", *names)
        await forgotten(redis)
    assert not work.told("cancelled")
    assert "saq" not in {record.name for record in caplog.records}


async def test_restarts_of_redis_in_the_middle_of_many(redis: RedisServer, work: Work) -> None:
    work.may_end.set()
    async with queue_at(redis) as queue, working(queue, work):
        for number in range(3):
            before = len(work.told("ended"))
            names = [f"{number}-{name}" for name in range(JOBS)]
            await asyncio.gather(*[queue.submit(task(name)) for name in names])
            await work.until_count("ended", before + JOBS // 4)
            await redis.kill()
            await redis.start()
            await work.until("ended", *names)
            await submits_again(queue)
        await forgotten(redis)


async def test_a_redis_that_hangs_for_longer_than_the_lease_disturbs_no_task(redis: RedisServer, work: Work) -> None:
    async with queue_at(redis, slots=8) as queue, queue_at(redis, slots=8) as other_queue:
        async with working(queue, work), working(other_queue, work):
            names = await submitted(queue, 4)
            await work.until("began", *names)
            redis.pause()
            await asyncio.sleep(TIMEOUT_S + 3 * LEASE_S)  # each call is given up meanwhile
            redis.resume()
            await submits_again(queue)
            await work.until("began", "meanwhile")
            await asyncio.sleep(2 * LEASE_S)
            assert sorted(work.told("began")) == sorted([*names, "meanwhile"])
            work.may_end.set()
            await work.until("ended", *names)
            await forgotten(redis)
    assert not work.told("cancelled")


async def test_a_redis_that_has_lost_all_is_filled_again(redis: RedisServer, work: Work) -> None:
    async with queue_at(redis) as queue, working(queue, work):
        await submitted(queue, 2)
        await work.until_count("began", 2)
        await redis.wipe()
        await submits_again(queue)
        work.may_end.set()
        await work.until("ended", "t0", "t1", "meanwhile")
        await forgotten(redis)
    assert not work.told("cancelled")


async def test_cancelled_without_redis_a_worker_ends_all_the_same(redis: RedisServer, work: Work) -> None:
    next_work = Work()
    next_work.may_end.set()
    async with queue_at(redis) as queue:
        async with working(queue, work) as running:
            names = await submitted(queue, 2)
            await work.until("began", *names)
            redis.pause()
            running.cancel()
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.wait([running])
        redis.resume()
        assert sorted(work.told("cancelled")) == sorted(names)
    async with queue_at(redis) as next_queue, working(next_queue, next_work):
        await next_work.until("ended", *names)
        await forgotten(redis)


async def submits_again(queue: SaqQueue) -> None:
    """Return once the queue takes a task."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await queue.submit(task("meanwhile"))
            except StoreError:
                await asyncio.sleep(POLL_S)
