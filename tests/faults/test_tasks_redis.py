"""Redis dies, hangs, and forgets while tasks wait and run: none is lost, and none is taken from a worker that lives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.support.redis_server import RedisServer, redis_server
from tests.support.worker import POLL_S, Site, Submitted, site

LEASE_S = 1.0
LONG_LEASE_S = 10.0
AWAY_S = 2.5 * LEASE_S
LONG_S = 3.5
"""Longer than Redis is away."""
TASKS = 60


@pytest.fixture
async def redis() -> AsyncIterator[RedisServer]:
    """A Redis that keeps what it was told, also when it is killed."""
    async with redis_server(append_only=True, appendfsync="always") as server:
        yield server


async def some_tasks(here: Site) -> tuple[list[Submitted], list[Submitted]]:
    """Tasks that run by now and will for a while, and others, most of which wait."""
    long = [await here.submit("sleep", seconds=LONG_S) for _ in range(3)]
    long += [await here.submit("write_numbers", steps=80, pause_s=LONG_S / 80) for _ in range(3)]
    for task in long:
        await here.begun(task)
    others = [here.submit("write_numbers", steps=10, pause_s=0.03) for _ in range(TASKS)]
    return long, await asyncio.gather(*others, here.submit("compute", seconds=0.3))


async def until_queued(redis: RedisServer, count: int) -> None:
    """Return once so many tasks are in the queue: they are submitted after they were accepted."""
    async with asyncio.timeout(20):
        while len(await redis.command("KEYS", "saq:job:*")) < count:  # noqa: ASYNC110  # nothing tells of it
            await asyncio.sleep(POLL_S)


async def hand_out_again(redis: RedisServer) -> None:
    """Have the queue hand out again all that waits and runs, as one may that promises to do it once at least."""
    for job in await redis.command("KEYS", "saq:job:*"):
        name = job.split(":")[3]
        await redis.command("RPUSH", f"saq:rt:{name}:queued", job)


@pytest.mark.timeout(90)
async def test_redis_is_killed_and_restarted_while_tasks_wait_and_run(redis: RedisServer) -> None:
    """Every task ends once and runs once: no worker was lost, also where another one waits for its tasks."""
    async with site(redis, workers=2, worker_slots=10, lease_s=LEASE_S) as here:
        long, others = await some_tasks(here)
        await hand_out_again(redis)
        await redis.kill()
        await asyncio.sleep(AWAY_S)
        await redis.start()
        logs = await here.come_to_what_they_must([*long, *others])
        assert {log.attempts for log in logs} == {1}
        await here.forgotten()


@pytest.mark.timeout(90)
async def test_redis_is_killed_again_and_again_while_tasks_come_and_end(redis: RedisServer) -> None:
    """What was accepted ends once, also where the outage hides what has become of a write."""
    async with site(redis, workers=2, worker_slots=5, lease_s=LEASE_S) as here:
        tasks = []
        for _ in range(4):
            tasks += await asyncio.gather(*[here.submit("count", steps=5, pause_s=0.03) for _ in range(25)])
            await redis.kill()
            await redis.start()
        logs = await here.come_to_what_they_must(tasks)
        assert {log.attempts for log in logs} == {1}
        await here.forgotten()


@pytest.mark.timeout(90)
async def test_redis_hangs_for_longer_than_the_lease(redis: RedisServer) -> None:
    """That every lease has run out proves nothing: tasks stay with their workers, also those that others wait for."""
    async with site(redis, workers=2, worker_slots=10, lease_s=LEASE_S) as here:
        long, others = await some_tasks(here)
        await hand_out_again(redis)
        redis.pause()
        await asyncio.sleep(AWAY_S)
        redis.resume()
        logs = await here.come_to_what_they_must([*long, *others])
        assert {log.attempts for log in logs} == {1}
        await here.forgotten()


async def test_tasks_that_are_handed_out_to_several_workers_at_once_run_once(redis: RedisServer) -> None:
    """Who claims a task first has it."""
    async with site(redis, workers=3, lease_s=LONG_LEASE_S) as here:
        for worker in here.workers:
            worker.pause()
        tasks = [await here.submit("sleep", seconds=0.1) for _ in range(100)]
        await until_queued(redis, len(tasks))
        jobs = await redis.command("KEYS", "saq:job:*")
        await redis.command("RPUSH", "saq:rt:sleep:queued", *sorted(3 * jobs))
        for worker in here.workers:
            worker.resume()
        logs = await here.come_to_what_they_must(tasks)
        assert {log.attempts for log in logs} == {1}
        await here.forgotten()


@pytest.mark.timeout(60)
async def test_a_task_whose_submission_was_lost_is_found_and_runs(redis: RedisServer) -> None:
    """The queue has forgotten everything; the index of unfinished tasks has not."""
    async with site(redis, lease_s=LEASE_S) as here:
        tasks = [await here.submit("nothing", number=number) for number in range(5)]
        await until_queued(redis, len(tasks))
        await redis.command("DEL", *await redis.command("KEYS", "saq:*"))
        await here.start_worker()
        logs = await here.come_to_what_they_must(tasks)
        assert {log.attempts for log in logs} == {1}
        await here.forgotten()


@pytest.mark.timeout(60)
async def test_an_instance_that_dies_between_recording_and_submitting_loses_no_task(redis: RedisServer) -> None:
    """Killed the moment it has recorded a task, wherever that leaves it: another instance's sweeper finds it."""
    async with site(redis, instances=2, workers=1, lease_s=LEASE_S) as here:
        asked = [asyncio.create_task(here.submit("nothing", number=number)) for number in range(100)]
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        here.instances[0].kill()
        await asyncio.wait(asked)
        tasks = [one.result() for one in asked if one.exception() is None]
        assert 0 < len(tasks) < len(asked), "it was killed in the middle"
        await here.come_to_what_they_must(tasks)
        await here.forgotten()
