"""Where tasks are handed in: whatever fails on the way, none is lost, and none is made twice or after a refusal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest

from realtime import Context, task
from realtime.engine import Engine
from realtime.errors import InvalidRequest, NotFound, StoreError
from realtime.live import LiveSession
from realtime.protocol import TaskCreate, TaskDone
from realtime.tasks.record import TaskRecord, read_record
from tests.support.principals import known
from tests.support.stores import Faulty, unavailable
from tests.tasks.test_run import Job
from tests.tasks.workplace import engine_of, eventually, result_of

ANN = known("ann")

pytestmark = pytest.mark.usefixtures("reports")


class Work:
    """A task that gives back what it was given; `ran` is what that was each time."""

    def __init__(self) -> None:
        self.ran: list[str] = []

        @task("work")
        async def work(ctx: Context, job: Job) -> str:
            self.ran.append(job.text)
            return job.text

        self.function = work


@asynccontextmanager
async def session_at(work: Work, store: Faulty) -> AsyncIterator[tuple[Engine, LiveSession]]:
    """An engine with the task, and a session that somebody uses."""
    async with engine_of(work.function, store=store) as engine:
        session_id = await engine.commands.create(ANN)
        async with engine.hub.use(session_id) as live:
            yield engine, live


async def end_of(store: Faulty, session_id: str, task_id: str) -> TaskDone:
    """The end of a task, and that the index knows nothing more of it then."""
    record = TaskRecord()

    async def is_over() -> bool:
        nonlocal record
        record = await read_record(store, session_id, task_id)
        return record.done is not None and not await store.tracked()

    await eventually(is_over)
    assert record.done is not None
    return record.done


def command(text: str = "hi", event_id: str | None = None) -> TaskCreate:
    """Ask for the task."""
    return TaskCreate(name="work", task_id="mine", input={"text": text}, event_id=event_id)


async def test_task_that_is_handed_in_runs() -> None:
    """At once: nobody waits for the index of unfinished ones."""
    store, work = Faulty(), Work()
    async with session_at(work, store) as (engine, live):
        assert (await engine.commands.execute(live, command(), ANN)).made.task_id == "mine"
        assert result_of(await end_of(store, live.id, "mine")) == "hi"
    assert work.ran == ["hi"]


@pytest.mark.parametrize("fault", ["after", "untold"])
async def test_task_that_was_recorded_without_an_answer_is_found(fault: str) -> None:
    """Whoever asked for it was told of a failure, and nobody has submitted it."""
    store, work = Faulty(), Work()
    async with session_at(work, store) as (engine, live):
        store.faults = [fault]
        with pytest.raises(StoreError):
            await engine.commands.execute(live, command(), ANN)
        assert result_of(await end_of(store, live.id, "mine")) == "hi"
    assert work.ran == ["hi"]


async def test_command_that_is_sent_again_makes_no_second_task() -> None:
    """It is told which one it has made."""
    store, work = Faulty(), Work()
    async with session_at(work, store) as (engine, live):
        store.faults = ["after"]
        with pytest.raises(StoreError):
            await engine.commands.execute(live, command(event_id="e1"), ANN)
        for _ in range(2):
            outcome = await engine.commands.execute(live, command(event_id="e1"), ANN)
            assert (outcome.made.task_id, outcome.duplicate) == ("mine", True)
        assert result_of(await end_of(store, live.id, "mine")) == "hi"
    assert work.ran == ["hi"]


async def test_task_that_was_not_recorded_does_not_run() -> None:
    """It was announced, and is forgotten."""
    store, work = Faulty(), Work()
    async with session_at(work, store) as (engine, live):
        store.faults = ["before"]
        with pytest.raises(StoreError):
            await engine.commands.execute(live, command(), ANN)
        await eventually(partial(_is_forgotten, store))
        assert live.state.tasks == {}
    assert work.ran == []


async def test_task_that_can_t_be_announced_is_not_recorded() -> None:
    """Nobody would find it, if its submission was lost."""
    store, work = Faulty(), Work()
    async with session_at(work, store) as (engine, live):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "track", _fail)
            with pytest.raises(StoreError):
                await engine.commands.execute(live, command(), ANN)
            with pytest.raises(StoreError):
                await engine.commands.create_task(ANN, "work", {"text": "hi"})
        assert live.state.tasks == {}
    assert work.ran == []


async def test_task_whose_submission_is_lost_is_found(reports: list[BaseException]) -> None:
    """The queue did not answer, which is nothing to report."""
    store, work = Faulty(), Work()
    async with session_at(work, store) as (engine, live):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine.desk.queue, "submit", _fail)
            await engine.commands.execute(live, command(), ANN)
            await asyncio.sleep(0)
        assert result_of(await end_of(store, live.id, "mine")) == "hi"
    assert (work.ran, reports) == (["hi"], [])


@pytest.mark.parametrize("fault", ["before", "after", "untold"])
async def test_task_of_nobody_s_session_is_unmade_where_it_can_t_be_told_of(fault: str) -> None:
    """Nobody knows its id: it would be work for nobody."""
    store, work = Faulty(), Work()
    async with engine_of(work.function, store=store) as engine:
        store.faults = [fault]
        with pytest.raises(StoreError):
            await engine.commands.create_task(ANN, "work", {"text": "hi"})
        await eventually(partial(_is_forgotten, store))
        assert store._sessions == {}
    assert work.ran in ([], ["hi"])


async def test_task_that_makes_no_sense_is_refused_before_anything_is_made() -> None:
    """Not even a session, nor a place on the index."""
    store, work = Faulty(), Work()
    async with engine_of(work.function, store=store) as engine:
        with pytest.raises(NotFound):
            await engine.commands.create_task(ANN, "nothing", {})
        with pytest.raises(InvalidRequest):
            await engine.commands.create_task(ANN, "work", {"text": 1})
        assert (store._sessions, await store.tracked()) == ({}, 0)


async def _is_forgotten(store: Faulty) -> bool:
    return await store.tracked() == 0


async def _fail(*_: object) -> None:
    raise unavailable()
