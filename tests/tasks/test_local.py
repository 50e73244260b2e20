"""The queue in the process: what runs, what waits, and in which order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from realtime import Context, task
from realtime.background import Background
from realtime.store.base import TaskRef
from realtime.tasks.local import LocalQueue
from realtime.tasks.registry import Registry
from tests.support.sdk import turns


class Job(msgspec.Struct):
    """Any input."""


def function() -> Callable[..., Any]:
    """Any task."""

    async def work(ctx: Context, job: Job) -> None: ...

    return work


DEFINITIONS = Registry(
    [
        task("normal")(function()),
        task("urgent", priority="high")(function()),
        task("idle", priority="low")(function()),
        task("single", concurrency=1)(function()),
    ]
).definitions


class Hands:
    """A handler whose every task runs until it is told to end."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ends: dict[str, asyncio.Event] = {}
        self.cancelled: list[str] = []

    async def __call__(self, ref: TaskRef) -> None:
        self.begun.append(ref.task_id)
        self.ends[ref.task_id] = asyncio.Event()
        try:
            await self.ends[ref.task_id].wait()
        except asyncio.CancelledError:
            self.cancelled.append(ref.task_id)
            raise

    async def end(self, *task_ids: str) -> None:
        """End these, and let what follows begin."""
        for task_id in task_ids:
            self.ends[task_id].set()
        await turns()


@asynccontextmanager
async def running(queue: LocalQueue) -> AsyncIterator[Hands]:
    """The queue at work."""
    hands = Hands()
    async with queue, Background() as background:
        background.spawn(queue.run(hands))
        yield hands


def queue_of(slots: int) -> LocalQueue:
    """A queue with room for so many."""
    return LocalQueue(list(DEFINITIONS.values()), slots=slots)


def ref(task_id: str, name: str = "normal") -> TaskRef:
    """A task."""
    return TaskRef("sess_1", task_id, name)


async def test_the_most_urgent_comes_first_then_the_oldest() -> None:
    """Whatever the order in which they came."""
    queue = queue_of(1)
    for one in (ref("n1"), ref("i1", "idle"), ref("n2"), ref("u1", "urgent"), ref("i2", "idle"), ref("u2", "urgent")):
        await queue.submit(one)
    async with running(queue) as hands:
        expected = ["u1", "u2", "n1", "n2", "i1", "i2"]
        for number, task_id in enumerate(expected, 1):
            await turns()
            assert hands.begun == expected[:number]
            await hands.end(task_id)


async def test_as_many_run_as_there_is_room() -> None:
    """What comes while there is room runs at once."""
    queue = queue_of(3)
    async with running(queue) as hands:
        for number in range(5):
            await queue.submit(ref(str(number)))
            await turns()
        assert hands.begun == ["0", "1", "2"]
        await hands.end("1")
        assert hands.begun == ["0", "1", "2", "3"]


async def test_task_of_limited_concurrency_leaves_room_to_others() -> None:
    """One of it runs; who waits for it holds up nobody."""
    queue = queue_of(3)
    async with running(queue) as hands:
        for task_id in ("s1", "s2", "s3"):
            await queue.submit(ref(task_id, "single"))
        await queue.submit(ref("n1"))
        await turns()
        assert hands.begun == ["s1", "n1"]
        await hands.end("s1")
        assert hands.begun == ["s1", "n1", "s2"]


@pytest.mark.parametrize("runs", [False, True])
async def test_task_that_waits_or_runs_is_not_handed_out_again(runs: bool) -> None:
    """One that has ended is."""
    queue = queue_of(1)
    if not runs:
        await queue.submit(ref("n1"))
        await queue.submit(ref("n1"))
    async with running(queue) as hands:
        await queue.submit(ref("n1"))
        await turns()
        await queue.submit(ref("n1"))
        await hands.end("n1")
        assert hands.begun == ["n1"]
        await queue.submit(ref("n1"))
        await turns()
        assert hands.begun == ["n1", "n1"]


async def test_drained_it_begins_nothing_and_waits_for_what_runs() -> None:
    """However much waits."""
    queue = queue_of(1)
    async with running(queue) as hands:
        await queue.submit(ref("n1"))
        await queue.submit(ref("n2"))
        await turns()
        draining = asyncio.create_task(queue.drain())
        await turns()
        assert not draining.done()
        await hands.end("n1")
        await draining
        await queue.submit(ref("n3"))
        await turns()
        assert hands.begun == ["n1"]


async def test_drained_while_idle_it_is_over_at_once() -> None:
    """There is nothing to wait for."""
    queue = queue_of(1)
    async with running(queue):
        await queue.drain()


async def test_cancelled_it_cancels_what_runs_and_waits_for_it() -> None:
    """Nothing of it is left."""
    queue = queue_of(2)
    async with running(queue) as hands:
        await queue.submit(ref("n1"))
        await queue.submit(ref("n2"))
        await turns()
    assert sorted(hands.cancelled) == ["n1", "n2"]


async def test_handler_that_fails_gives_its_room_back() -> None:
    """It should not, and costs nobody else anything."""

    async def fail(one: TaskRef) -> None:
        begun.append(one.task_id)
        raise ValueError

    begun: list[str] = []
    queue = queue_of(1)
    async with queue, Background() as background:
        background.spawn(queue.run(fail))
        for task_id in ("n1", "n2"):
            await queue.submit(ref(task_id))
        await turns()
        assert begun == ["n1", "n2"]
