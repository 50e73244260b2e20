"""Workers are killed, told to end, and stand still: every task ends once, and comes to what it must."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.instance import Instance
from tests.support.redis_server import RedisServer, redis_server
from tests.support.scale import scaled
from tests.support.worker import POLL_S, Site, Submitted, site

LEASE_S = 1.0
TASKS = scaled(200, 80)
WORKERS = 3
KILLS = scaled(6, 3)
DRAIN_S = 2.0
DRAIN_SLACK_S = 10.0
"""What an end may take beyond the time to drain."""
ORPHANS_S = 20.0


@pytest.fixture
async def redis() -> AsyncIterator[RedisServer]:
    """The Redis of a test."""
    async with redis_server() as server:
        yield server


def mixed(chance: random.Random, count: int) -> list[tuple[str, dict[str, Any]]]:
    """Tasks of every kind, most of them some tenths of a second long."""
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("count", {"steps": 12, "pause_s": 0.05}),
        ("write_numbers", {"steps": 12, "pause_s": 0.05}),
        ("write_numbers", {"steps": 60, "pause_s": 0.01}),
        ("sleep", {"seconds": 0.5}),
        ("compute", {"seconds": 0.03}),
        ("break_down", {"number": 7}),
        ("nothing", {"number": 8}),
    ]
    return chance.choices(kinds, weights=(6, 4, 4, 2, 2, 1, 3), k=count)


async def gone(worker: Instance) -> None:
    """Return once nothing of a worker is left, not even a process that computes for it."""
    await worker.exit_status()
    async with asyncio.timeout(ORPHANS_S):
        while True:
            try:
                os.killpg(worker.pid, 0)
            except ProcessLookupError:
                return
            await asyncio.sleep(POLL_S)


async def lose_workers(here: Site, chance: random.Random) -> list[Submitted]:
    """Kill workers at random moments, each followed by a new one; returns the tasks that they were given meanwhile."""
    living, tasks = list(here.workers), list[Submitted]()
    for _ in range(KILLS):
        given = [here.submit(name, **given) for name, given in mixed(chance, TASKS // KILLS)]
        tasks += await asyncio.gather(*given)
        await asyncio.sleep(chance.uniform(0.1, 0.5))
        victim = living.pop(chance.randrange(WORKERS))
        os.kill(victim.pid, signal.SIGKILL)
        await gone(victim)
        living.append(await here.start_worker())
    return tasks


def restless(tasks: list[Submitted], attempts: list[int]) -> list[str]:
    """The names of the tasks that were tried more than once, and do not ask for that."""
    return [one.name for one, tried in zip(tasks, attempts, strict=True) if tried > 1 and one.name != "break_down"]


@pytest.mark.timeout(120)
async def test_every_task_ends_once_however_often_workers_are_killed(redis: RedisServer) -> None:
    """Nothing is lost, nothing ends twice, and what a lost attempt has told is void."""
    chance = random.Random(11)
    async with site(redis, workers=WORKERS, worker_slots=5, lease_s=LEASE_S) as here:
        tasks = await lose_workers(here, chance)
        logs = await here.come_to_what_they_must(tasks)
        assert len(restless(tasks, [log.attempts for log in logs])) >= KILLS, "the kills hit nothing"
        for task, log in zip(tasks, logs, strict=True):
            assert log.progress == task.given.get("steps", 0 if task.name == "sleep" else None)
        await here.forgotten()


@pytest.mark.timeout(90)
async def test_a_worker_that_is_told_to_end_hands_back_what_is_long(redis: RedisServer) -> None:
    """It is gone soon after the time to drain; what is short has ended here by then, what is long ends elsewhere."""
    async with site(redis, workers=2, worker_slots=6, lease_s=LEASE_S, drain_s=DRAIN_S) as here:
        long = [await here.submit("sleep", seconds=3 * DRAIN_S) for _ in range(6)]
        short = [here.submit("count", steps=6, pause_s=0.05) for _ in range(60)]
        computed = [here.submit("compute", seconds=0.05) for _ in range(10)]
        tasks = [*long, *await asyncio.gather(*short, *computed)]
        for task in long:
            await here.begun(task)
        leaving = here.workers[0]
        leaving.terminate()
        started = time.monotonic()
        assert await leaving.exit_status() == 0
        assert time.monotonic() - started < DRAIN_S + DRAIN_SLACK_S
        await here.start_worker()
        logs = await here.come_to_what_they_must(tasks)
        assert {log.attempts for log in logs[len(long) :]} == {1}, "what is short is not handed back"
        assert {log.attempts for log in logs} == {1, 2}, "nothing long was handed back"
        await here.forgotten()


@pytest.mark.timeout(90)
async def test_workers_deployed_one_after_the_other_under_load(redis: RedisServer) -> None:
    """Each is replaced while tasks come; every end is in order, and nothing is lost."""
    chance = random.Random(12)
    async with site(redis, workers=2, worker_slots=5, lease_s=LEASE_S, drain_s=DRAIN_S) as here:
        tasks: list[Submitted] = []

        async def submit() -> None:
            for name, given in mixed(chance, 80):
                tasks.append(await here.submit(name, **given))
                await asyncio.sleep(0.02)

        submitting = asyncio.create_task(submit())
        for leaving in list(here.workers):
            await asyncio.sleep(chance.uniform(0.2, 0.5))
            leaving.terminate()
            await here.start_worker()
            assert await leaving.exit_status() == 0
        await submitting
        logs = await here.come_to_what_they_must(tasks)
        assert restless(tasks, [log.attempts for log in logs]) == [], "all of them are shorter than the drain"
        await here.forgotten()


async def test_a_worker_that_stood_still_cannot_write_over_its_successor(redis: RedisServer) -> None:
    """Woken after its lease it finds that another one has its tasks; it goes on with others."""
    async with site(redis, workers=1, lease_s=LEASE_S) as here:
        still = here.workers[0]
        tasks = [await here.submit("write_numbers", steps=40, pause_s=0.05) for _ in range(8)]
        begun = [await here.begun(task) for task in tasks]
        still.pause()
        successor = await here.start_worker()
        again = [await here.begun(task, attempt=2) for task in tasks]
        assert not {one.instances[0] for one in begun} & {one.instances[1] for one in again}
        still.resume()
        logs = await here.come_to_what_they_must(tasks)
        assert {log.attempts for log in logs} == {2}
        successor.kill()
        await here.come_to_what_they_must([await here.submit("nothing", number=3), *tasks])
