"""Tasks are cancelled, from another instance, at any moment: one end, and the same for everybody who reads."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from httpx_sse import EventSource

from tests.end_to_end import PATIENCE_S
from tests.support.client import Client, Event, attached
from tests.support.redis_server import RedisServer, redis_server
from tests.support.worker import Site, Submitted, site

LEASE_S = 1.0
FOR_EVER_S = 600.0
RACES = 120
SESSIONS = 3
LONGEST_S = 0.2


@pytest.fixture
async def redis() -> AsyncIterator[RedisServer]:
    """The Redis of a test."""
    async with redis_server() as server:
        yield server


async def create(client: Client, task_id: str, name: str, **given: Any) -> Submitted:
    """Make a task in the client's session."""
    await client.send("task.create", task_id=task_id, name=name, input=given)
    async with asyncio.timeout(PATIENCE_S):
        while task_id not in client.transcript.positions and task_id not in client.transcript.done:
            await client.receive()
    return Submitted(task_id, name, given, client.session_id)


async def done(client: Client, task: Submitted) -> Event:
    """The task's end, as a viewer is told it."""
    async with asyncio.timeout(2 * PATIENCE_S):
        while task.id not in client.transcript.done:
            await client.receive()
    return client.transcript.done[task.id]


async def streamed(here: Site, task: Submitted, *, at: int) -> list[Event]:
    """A task's events by its stream, to the end."""
    async with here.streaming(f"{task.path}/events", at=at) as answer, asyncio.timeout(2 * PATIENCE_S):
        return [json.loads(one.data) async for one in EventSource(answer).aiter_sse() if one.data]


async def all_agree(here: Site, client: Client, task: Submitted) -> str:
    """How a task has ended; every reader has to say the same: a viewer here, a stream there, a request, the log."""
    seen = await done(client, task)
    [log] = await here.ended([task])
    events = await streamed(here, task, at=1)
    assert [event["type"] for event in events].count("task.done") == 1
    shown = [await here.show(task, at=at) for at in (0, 1)]
    assert log.done is not None
    assert {log.done.status, seen["status"], events[-1]["status"], *[one["status"] for one in shown]} == {
        log.done.status
    }
    results = [seen.get("result"), events[-1].get("result"), *[one.get("result") for one in shown], log.outcome.result]
    assert results.count(results[0]) == len(results)
    return log.done.status


async def test_a_task_is_cancelled_while_it_waits(redis: RedisServer) -> None:
    """No worker is up; the one that comes does not begin it."""
    async with site(redis, instances=2, lease_s=LEASE_S) as here:
        async with attached(here.instances[0]) as client:
            task = await create(client, "t", "nothing", number=1)
            alone = await here.submit("nothing", number=2)
            await here.cancel(task, at=1)
            await here.cancel(alone, at=1)
            assert await all_agree(here, client, task) == "cancelled"
            await here.ended([alone])
            await here.start_worker()
            await here.forgotten()
            logs = await here.ended([task, alone])
            assert [(log.attempts, log.outcome.status) for log in logs] == [(0, "cancelled"), (0, "cancelled")]


async def test_a_task_is_cancelled_while_it_runs(redis: RedisServer) -> None:
    """One that waits, and ones that compute: the process is replaced, so that the next one can compute."""
    async with site(redis, instances=2, workers=1, lease_s=LEASE_S) as here:
        async with attached(here.instances[0]) as client:
            waits = await create(client, "waits", "sleep", seconds=FOR_EVER_S)
            computes = [await create(client, f"c{number}", "compute", seconds=FOR_EVER_S) for number in range(3)]
            alone = await here.submit("sleep", seconds=FOR_EVER_S)
            for task in (waits, *computes, alone):
                await here.begun(task)
            for task in (waits, *computes, alone):
                await here.cancel(task, at=1)
            for task in (waits, *computes):
                assert await all_agree(here, client, task) == "cancelled"
            [log] = await here.ended([alone])
            assert (log.attempts, log.outcome.status) == (1, "cancelled")
            await here.come_to_what_they_must([await here.submit("compute", seconds=0.1)])
            await here.cancel(alone, at=1)  # is no error, and has no effect
            await here.forgotten()


async def test_a_cancel_races_with_the_end(redis: RedisServer) -> None:
    """Whichever is first, there is one end; and both happen."""
    chance = random.Random(5)
    async with site(redis, instances=2, workers=2, lease_s=LEASE_S) as here:
        outcomes: list[str] = []

        async def cancel(task: Submitted) -> None:
            await asyncio.sleep(task.given["seconds"] + chance.uniform(-0.03, 0.05))
            await here.cancel(task, at=1)

        for _ in range(SESSIONS):
            async with attached(here.instances[0]) as client, asyncio.TaskGroup() as cancels:
                tasks = []
                for number in range(RACES // SESSIONS):
                    tasks.append(await create(client, f"t{number}", "sleep", seconds=chance.uniform(0.03, LONGEST_S)))
                    cancels.create_task(cancel(tasks[-1]))
                outcomes += [await all_agree(here, client, task) for task in tasks]
        assert set(outcomes) == {"complete", "cancelled"}, "some each"
        await here.forgotten()
