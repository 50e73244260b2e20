"""Tasks of a session as its viewers see them, on another instance than the one that took them: live, and resumed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.end_to_end import PATIENCE_S
from tests.support.client import Client, Transcript, attached
from tests.support.redis_server import RedisServer, redis_server
from tests.support.sample_tasks import numbers
from tests.support.worker import site

LEASE_S = 1.0
STEPS = 40
PAUSE_S = 0.05


@pytest.fixture
async def redis() -> AsyncIterator[RedisServer]:
    """The Redis of a test."""
    async with redis_server() as server:
        yield server


async def told(client: Client, progress: int) -> None:
    """Return once the client knows that the task has come so far."""
    async with asyncio.timeout(2 * PATIENCE_S):
        while client.transcript.progress.get("t", 0) < progress:
            await client.receive()
    assert "t" not in client.transcript.done, "it is told while the task runs"


async def done(client: Client) -> None:
    """Return once the task's end was told."""
    async with asyncio.timeout(4 * PATIENCE_S):
        while "t" not in client.transcript.done:
            await client.receive()


def check(transcript: Transcript) -> None:
    """See that a reader has the task whole."""
    assert transcript.texts["t"] == numbers(STEPS)
    assert transcript.progress["t"] == STEPS
    assert (transcript.done["t"]["status"], transcript.done["t"]["result"]) == ("complete", STEPS)


async def test_viewers_on_every_instance_see_a_task_live_and_after_a_drop(redis: RedisServer) -> None:
    """Created, started, progress, text and the end, wherever a viewer is; one that comes back goes on where it was."""
    async with site(redis, instances=2, workers=1, lease_s=LEASE_S) as here:
        one, two = here.instances
        dropped = Transcript()
        async with attached(one) as near, attached(two, near.session_id) as far:
            async with attached(two, near.session_id, transcript=dropped) as leaves:
                await near.send(
                    "task.create", task_id="t", name="write_numbers", input={"steps": STEPS, "pause_s": PAUSE_S}
                )
                for client in (near, far, leaves):
                    await told(client, STEPS // 4)
                leaves.reset()
            await told(near, STEPS // 2)
            assert dropped.progress["t"] < STEPS // 2
            async with attached(one, near.session_id, transcript=dropped, after=dropped.after()) as back:
                await told(back, STEPS // 2)
                await asyncio.gather(*map(done, (near, far, back)))
            async with attached(two, near.session_id) as late:
                await done(late)
                for transcript in (near.transcript, far.transcript, dropped, late.transcript):
                    check(transcript)
            kinds = [event["type"] for event in far.transcript.events if event["type"].startswith("task.")]
            assert kinds[:2] == ["task.created", "task.started"]
            assert kinds.count("task.progress") > STEPS // 4, "live, and not in a few large pieces"
            assert kinds.index("task.done") == len(kinds) - 1


async def test_viewers_of_a_task_whose_worker_is_killed_see_the_next_attempt(redis: RedisServer) -> None:
    """What the first has told is void for each of them: for who stays, for who resumes, and for who comes late."""
    async with site(redis, instances=2, workers=1, lease_s=LEASE_S) as here:
        one, two = here.instances
        dropped = Transcript()
        async with attached(one) as near, attached(two, near.session_id) as far:
            async with attached(two, near.session_id, transcript=dropped) as leaves:
                await near.send(
                    "task.create", task_id="t", name="write_numbers", input={"steps": STEPS, "pause_s": PAUSE_S}
                )
                for client in (near, far, leaves):
                    await told(client, STEPS // 3)
            here.workers[0].kill()
            await here.start_worker()
            async with attached(one, near.session_id, transcript=dropped, after=dropped.after()) as back:
                await asyncio.gather(*map(done, (near, far, back)))
            async with attached(two, near.session_id) as late:
                await done(late)
                for transcript in (near.transcript, far.transcript, dropped, late.transcript):
                    check(transcript)
                    assert transcript.attempts["t"] == 2
