"""What was never submitted is, what has ended is forgotten, and one sweeper of many does it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
from structlog.testing import capture_logs

from realtime.errors import NotFound
from realtime.observe import logs
from realtime.protocol import MAX_FRAME_CHARS, SESSION_CHANNEL, SessionClosed, TaskDone, TaskStarted
from realtime.session import task_created
from realtime.store.base import TaskRef, Write
from realtime.store.memory import MemoryStore
from realtime.tasks import sweeper as sweeper_module
from realtime.tasks.local import LocalQueue
from realtime.tasks.sweeper import BATCH, Sweeper
from tests.contract import NOW, item, session
from tests.support.sdk import turns
from tests.support.stores import Faulty

AGAIN_S = 30.0


class Submitted(LocalQueue):
    """A queue that remembers what it was given, and fails while there are `faults`."""

    def __init__(self) -> None:
        super().__init__((), slots=1)
        self.given = asyncio.Event()
        self.tasks: list[TaskRef] = []
        self.faults: list[Exception] = []

    async def submit(self, task: TaskRef) -> None:
        """Remember it."""
        if self.faults:
            raise self.faults.pop(0)
        self.tasks.append(task)
        self.given.set()


class Room:
    """A store whose time the test tells, a queue, and a sweeper."""

    def __init__(self) -> None:
        self.now = 0.0
        self.store = MemoryStore(session_ttl_s=90.0, clock=lambda: self.now)
        self.queue = Submitted()
        self.sweeper = Sweeper(self.store, self.queue, again_s=AGAIN_S)

    async def announce(self, session_id: str, due_s: float = 5.0) -> TaskRef:
        """Note a task of a session that is made if there is none."""
        if session_id not in self.store._sessions:
            await self.store.create(session(session_id))
        ref = TaskRef(session_id, f"t{await self.store.tracked()}", "work")
        await self.store.track(ref, due_s)
        return ref

    async def record(self, ref: TaskRef, *events: TaskStarted | TaskDone) -> None:
        """Record it, and what it has come to."""
        created = task_created(ref.task_id, ref.name, "{}", user="ann", payer=None, now=NOW)
        await self.store.append(ref.session_id, [Write(SESSION_CHANNEL, [created])])
        if events:
            await self.store.append(ref.session_id, [Write(ref.task_id, list(events))])


def started(ref: TaskRef) -> TaskStarted:
    """It runs."""
    return TaskStarted(task_id=ref.task_id, attempt=1, instance="inst_1")


def done(ref: TaskRef) -> TaskDone:
    """It has ended."""
    return TaskDone(task_id=ref.task_id, status="complete")


async def test_task_is_left_alone_until_it_is_due() -> None:
    """Whoever has announced it has a few seconds to record and submit it."""
    room = Room()
    ref = await room.announce("sess_1")
    await room.record(ref)
    assert await room.sweeper.sweep() == 0
    room.now = 5.0
    assert await room.sweeper.sweep() == 1
    assert room.queue.tasks == [ref]


@pytest.mark.parametrize("is_running", [False, True])
async def test_task_without_an_end_is_submitted_again_and_again(is_running: bool) -> None:
    """Whether or not somebody works on it: the queue knows, and so does its log."""
    room = Room()
    ref = await room.announce("sess_1")
    await room.record(ref, *([started(ref)] if is_running else []))
    for number in range(10):
        room.now = 5.0 + number * AGAIN_S
        assert await room.sweeper.sweep() == 1
        assert await room.sweeper.sweep() == 0
    assert room.queue.tasks == [ref] * 10


async def test_task_that_waits_long_is_not_forgotten() -> None:
    """Being looked at, its session lives on; once nobody looks, it expires."""
    room = Room()
    ref = await room.announce("sess_1")
    await room.record(ref)
    for _ in range(20):
        room.now += AGAIN_S
        await room.sweeper.sweep()
        room.store.sweep()
    await room.store.load("sess_1")
    room.now += 91.0
    assert await room.sweeper.sweep() == 1
    assert await room.store.tracked() == 0


@pytest.mark.parametrize("how", ["done", "erased"])
async def test_task_that_is_over_is_forgotten(how: str) -> None:
    """Nobody runs it again."""
    room = Room()
    ref = await room.announce("sess_1")
    await room.record(ref, started(ref), done(ref))
    if how == "erased":
        await room.store.erase("sess_1")
    room.now = 5.0
    assert await room.sweeper.sweep() == 1
    assert room.queue.tasks == []
    assert await room.store.tracked() == 0


@pytest.mark.parametrize("other", ["none", "waits", "runs", "has its id"])
async def test_task_that_was_never_recorded_is_let_go(other: str) -> None:
    """Once whoever has announced it has had the time to record it. Another of its session is left as it was."""
    room = Room()
    ref = await room.announce("sess_1")
    recorded = msgspec.structs.replace(ref, task_id="other") if other != "has its id" else TaskRef("sess_1", "t0", "x")
    if other != "none":
        await room.store.track(recorded, 5.0)
        await room.record(recorded, *([started(recorded)] if other == "runs" else []))
    room.now = 4.0
    assert await room.sweeper.sweep() == 0
    room.now = 5.0
    kept = [] if other == "none" else [recorded]
    assert await room.sweeper.sweep() == 1 + len(kept)
    assert room.queue.tasks == kept
    assert await room.store.tracked() == len(kept)


async def test_task_that_was_never_recorded_keeps_no_session() -> None:
    """Nobody has used it."""
    room = Room()
    await room.announce("sess_1", due_s=60.0)
    room.now = 60.0
    assert await room.sweeper.sweep() == 1
    room.now = 90.0
    with pytest.raises(NotFound):
        await room.store.load("sess_1")


async def test_task_is_found_on_record_however_long_the_log_is() -> None:
    """It is read to where the task was made."""
    room = Room()
    await room.store.create(session("sess_1"))
    for number in range(5):
        await room.store.append("sess_1", [Write(SESSION_CHANNEL, [item("x" * MAX_FRAME_CHARS, str(number))])])
    ref = await room.announce("sess_1")
    await room.record(ref)
    room.now = 5.0
    await room.sweeper.sweep()
    assert room.queue.tasks == [ref]


async def test_task_of_a_closed_session_is_submitted() -> None:
    """It has no end yet, and a worker writes one."""
    room = Room()
    ref = await room.announce("sess_1")
    await room.record(ref)
    await room.store.append("sess_1", [Write(SESSION_CHANNEL, [SessionClosed(reason="closed by client")])])
    room.now = 5.0
    await room.sweeper.sweep()
    assert room.queue.tasks == [ref]


async def test_one_sweeper_of_many_looks_at_a_task() -> None:
    """Those that come at the same time find nothing."""
    room = Room()
    for number in range(10):
        await room.record(await room.announce(f"sess_{number}"))
    room.now = 5.0
    others = [Sweeper(room.store, room.queue, again_s=AGAIN_S) for _ in range(5)]
    assert sum(await asyncio.gather(*(one.sweep() for one in others))) == 10
    assert len(room.queue.tasks) == len(set(room.queue.tasks)) == 10


@asynccontextmanager
async def sweeping(sweeper: Sweeper) -> AsyncIterator[asyncio.Task[None]]:
    """A sweeper at work."""
    running = asyncio.create_task(sweeper.run())
    try:
        yield running
    finally:
        running.cancel()
        await asyncio.wait([running])


async def test_many_are_looked_at_in_one_go() -> None:
    """Batch after batch, without a rest in between."""
    room = Room()
    for number in range(2 * BATCH + 1):
        await room.record(await room.announce(f"sess_{number}"))
    room.now = 5.0
    async with sweeping(room.sweeper):
        await turns(200)
        assert len(set(room.queue.tasks)) == 2 * BATCH + 1


async def test_it_goes_on_after_what_goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that does not answer is nothing to report; a fault of ours is."""
    reports: list[BaseException] = []
    monkeypatch.setattr(logs, "report", reports.append)
    monkeypatch.setattr(sweeper_module, "EVERY_S", 0.001)
    room = Room()
    store = Faulty(room.store)
    ref = await room.announce("sess_1", due_s=0.0)
    await room.record(ref)
    store.is_down = True
    room.queue.faults = [ValueError()]
    async with sweeping(Sweeper(store, room.queue, again_s=0.0)), asyncio.timeout(20):
        await asyncio.sleep(0.01)
        assert room.queue.tasks == []
        store.is_down = False
        await room.queue.given.wait()
    assert [type(report) for report in reports] == [ValueError]


async def test_tasks_that_wait_without_a_worker_are_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is none the next time either; and anew, when there was one meanwhile."""
    monkeypatch.setattr(sweeper_module, "EVERY_S", 0.0)
    monkeypatch.setattr(sweeper_module, "LOOK_S", 0.0)
    room = Room()
    await room.record(await room.announce("sess_1"))
    looks, looked = iter([3, 0, 3, 3, 3, 3, 0, 4, 5]), asyncio.Event()

    async def unattended() -> int:
        waiting = next(looks, None)
        if waiting is None:
            looked.set()
        return waiting or 0

    monkeypatch.setattr(room.queue, "unattended", unattended)
    with capture_logs() as lines:
        async with sweeping(room.sweeper), asyncio.timeout(20):
            await looked.wait()
    assert [line["waiting"] for line in lines] == [3, 5]
