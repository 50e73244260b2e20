"""Several workers of one store: one of them runs a task, and whoever has lost it says nothing more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from random import Random
from typing import Any

import msgspec
import pytest

from realtime import Context, task
from realtime.background import Background
from realtime.control import CancelTask
from realtime.errors import ServerError
from realtime.protocol import SESSION_CHANNEL, TaskDone, TaskStarted
from realtime.store.base import TaskRef, Write
from realtime.store.memory import MemoryStore
from realtime.tasks.record import read_record
from realtime.tasks.run import MAX_LOST
from tests.contract import flat, item
from tests.support.sdk import turns
from tests.support.stores import Elsewhere, Faulty, Late, Slow
from tests.tasks.test_run import Gate, Job
from tests.tasks.workplace import PATIENCE_S, Workplace, eventually, failure_of, result_of, working

pytestmark = pytest.mark.usefixtures("reports")


class Trace:
    """Which attempts ran where, and how many at once."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.running = self.most = 0

    def at(self, gate: Gate, name: str) -> Callable[..., Any]:
        """The task, as the worker of that name runs it."""

        @task("work", retries=1)
        async def work(ctx: Context, job: Job) -> str:
            self.ran.append(f"{name} {ctx.attempt}")
            self.running += 1
            self.most = max(self.most, self.running)
            try:
                await gate.wait()
            finally:
                self.running -= 1
            return f"{name} {ctx.attempt}"

        return work


@asynccontextmanager
async def two_workers(
    trace: Trace, gates: tuple[Gate, Gate], stores: tuple[MemoryStore, MemoryStore] | None = None
) -> AsyncIterator[tuple[Workplace, Workplace]]:
    """Two workers of one store, `a` and `b`, each with a gate of its own."""
    first, second = stores or [MemoryStore()] * 2
    async with (
        working(trace.at(gates[0], "a"), store=first, instance="a") as one,
        working(trace.at(gates[1], "b"), store=second, instance="b") as other,
    ):
        yield one, other


async def test_task_that_is_handed_to_two_workers_runs_once() -> None:
    """Whoever claims it first runs it; the other one waits, and finds that it is over."""
    trace, gates = Trace(), (Gate(), Gate())
    async with two_workers(trace, gates) as (one, other):
        ref = await one.create("work")
        await asyncio.gather(one.queue.submit(ref), other.queue.submit(ref))
        await one.started(ref)
        await turns()
        assert len(trace.ran) == 1
        for gate in gates:
            gate.open.set()
        done = await one.done(ref)
        assert result_of(done) == trace.ran[0]
        await one.idle()
        await other.idle()
        assert (len(trace.ran), trace.most) == (1, 1)
        assert len(await one.attempts(ref)) == 1


@pytest.mark.parametrize("lag", range(8))
async def test_workers_that_claim_at_the_same_time(lag: int) -> None:
    """However their steps interleave: each attempt is one worker's."""
    trace, gates = Trace(), (Gate(), Gate())
    for gate in gates:
        gate.open.set()
    store = MemoryStore()
    hops = Random(lag)
    stores = (Slow(store, lambda: hops.randrange(4)), Slow(store, lambda: hops.randrange(4)))
    async with two_workers(trace, gates, stores) as (one, other):
        for _ in range(20):
            ref = await one.create("work")
            await one.queue.submit(ref)
            await turns(lag)
            await other.queue.submit(ref)
            assert result_of(await one.done(ref)) in {"a 1", "b 1"}
        await one.idle()
        await other.idle()
        assert len(trace.ran) == 20


async def test_task_is_handed_twice_to_one_worker_and_runs_once() -> None:
    """The second one returns when the first does."""
    trace, gate = Trace(), Gate()
    async with working(trace.at(gate, "a")) as place:
        ref = await place.start("work")
        await gate.until_begun()
        again = asyncio.create_task(place.worker.handle(ref))
        await turns()
        assert not again.done()
        gate.open.set()
        await again
        await place.done(ref)
        assert trace.ran == ["a 1"]


async def test_predecessor_that_lives_is_waited_for() -> None:
    """However long it takes: it is not lost."""
    trace, gates = Trace(), (Gate(), Gate())
    async with two_workers(trace, gates) as (one, other):
        ref = await one.start("work")
        await gates[0].until_begun()
        await other.queue.submit(ref)
        await asyncio.sleep(0.5)  # two and a half leases
        assert trace.ran == ["a 1"]
        gates[0].open.set()
        assert result_of(await one.done(ref)) == "a 1"
        await other.idle()


async def test_predecessor_that_is_gone_is_followed() -> None:
    """Once its lease is over, and not before; its attempt does not count as one that has failed."""
    trace, gates = Trace(), (Gate(), Gate())
    store = MemoryStore()

    @task("work")
    async def broken(ctx: Context, job: Job) -> None:
        raise ValueError

    async with working(trace.at(gates[1], "b"), store=store, instance="b") as other:
        ref = await other.create("work")
        await store.sign("gone", 0.3)
        claim = TaskStarted(task_id=ref.task_id, attempt=1, instance="gone")
        await store.append(ref.session_id, [Write(ref.task_id, [claim], expect=0)])
        await other.queue.submit(ref)
        assert "gone" in await store.living({"gone"})
        await gates[1].until_begun()
        assert "gone" not in await store.living({"gone"})
        gates[1].open.set()
        assert result_of(await other.done(ref)) == "b 2"


async def test_lost_attempts_leave_the_retries_alone() -> None:
    """An attempt that its worker took with it is followed, and so is one that has failed after it."""

    @task(retries=1)
    async def work(ctx: Context, job: Job) -> int:
        if ctx.attempt < 4:
            raise ValueError
        return ctx.attempt

    async with working(work) as place:
        ref = await place.create("work")
        claims = [TaskStarted(task_id=ref.task_id, attempt=n, instance=f"gone {n}") for n in (1, 2)]
        await place.store.append(ref.session_id, [Write(ref.task_id, claims)])
        await place.queue.submit(ref)
        assert result_of(await place.done(ref)) == 4
        assert [attempt for attempt, _ in await place.attempts(ref)] == [1, 2, 3, 4]


async def test_task_that_ends_every_process_that_tries_it_is_given_up() -> None:
    """After its retries, and a few more."""
    trace, gate = Trace(), Gate()
    async with working(trace.at(gate, "a")) as place:
        ref = await place.create("work")
        tried = 1 + 1 + MAX_LOST
        claims = [TaskStarted(task_id=ref.task_id, attempt=n, instance=f"gone {n}") for n in range(1, tried + 1)]
        await place.store.append(ref.session_id, [Write(ref.task_id, claims)])
        await place.queue.submit(ref)
        assert failure_of(await place.done(ref)) == ("server_error", "worker_lost")
        assert trace.ran == []


async def test_worker_that_has_lost_its_task_stops_and_says_nothing_more() -> None:
    """Another one has begun the next attempt: what this one says is refused, and its call is cancelled."""
    trace, gate = Trace(), Gate()
    async with working(trace.at(gate, "a"), instance="a") as place:
        ref = await place.start("work")
        await gate.until_begun()
        await place.store.sign("b", 60.0)
        claim = TaskStarted(task_id=ref.task_id, attempt=2, instance="b")
        await place.store.append(ref.session_id, [Write(ref.task_id, [claim])])
        async with asyncio.timeout(PATIENCE_S):
            await gate.cancelled.wait()
        end = TaskDone(task_id=ref.task_id, status="complete", result_json='"b"')
        await place.store.append(ref.session_id, [Write(ref.task_id, [end])])
        await place.idle()
        assert result_of(await place.done(ref)) == "b"
        assert await place.attempts(ref) == [(1, "a"), (2, "b")]


async def test_worker_that_was_told_nothing_is_stopped_by_the_store() -> None:
    """It hears of its successor when it wants to write, at the latest at its end."""
    store = MemoryStore()
    deaf = Late(store)
    ended = asyncio.Event()
    gate = Gate()

    @task("work")
    async def work(ctx: Context, job: Job) -> str:
        await gate.wait()
        ended.set()
        return "a"

    async with working(work, store=deaf, instance="a") as place:
        ref = await place.start("work")
        await gate.until_begun()
        deaf.is_cut = True
        place.worker._look_at = lambda *_: None  # type: ignore[method-assign]
        await store.sign("b", 60.0)
        claim = TaskStarted(task_id=ref.task_id, attempt=2, instance="b")
        await store.append(ref.session_id, [Write(ref.task_id, [claim])])
        gate.open.set()
        await ended.wait()
        await turns()
        end = TaskDone(task_id=ref.task_id, status="complete", result_json='"b"')
        await store.append(ref.session_id, [Write(ref.task_id, [end])])
        await place.idle()
        assert result_of(await place.done(ref)) == "b"


async def test_task_that_was_not_told_here_yet_is_run() -> None:
    """The queue may be faster than the store's notices, where the worker knows the session from another task."""
    store = MemoryStore()
    late = Late(store)
    gate = Gate()

    @task()
    async def quick(ctx: Context, job: Job) -> str:
        return "quick"

    @task()
    async def slow(ctx: Context, job: Job) -> str:
        await gate.wait()
        return "slow"

    async with working(quick, slow, store=late) as place:
        first = await place.start("slow")
        await gate.until_begun()
        elsewhere = Workplace(Elsewhere(store), place.registry, place.worker, place.queue)
        second = await elsewhere.create("quick", first.session_id)
        await place.queue.submit(second)
        await eventually(partial(_is_over, store, second))
        late.deliver()
        assert result_of(await place.done(second)) == "quick"
        gate.open.set()
        late.hops = lambda: 1
        assert result_of(await place.done(first)) == "slow"


async def _is_over(store: MemoryStore, ref: TaskRef) -> bool:
    return (await read_record(store, ref.session_id, ref.task_id)).done is not None


async def test_request_to_cancel_that_was_not_heard_is_found() -> None:
    """A lost message costs a second."""
    store = MemoryStore()
    deaf = Late(store)
    trace, gate = Trace(), Gate()
    async with working(trace.at(gate, "a"), store=deaf) as place:
        ref = await place.start("work")
        await gate.until_begun()
        deaf.is_cut = True
        await store.append(ref.session_id, [Write("control", [CancelTask(task_id=ref.task_id)])])
        async with asyncio.timeout(PATIENCE_S):
            await gate.cancelled.wait()
        assert (await place.done(ref)).status == "cancelled"


async def test_task_that_is_not_known_here_is_left_to_others() -> None:
    """It stays on the index of unfinished ones."""
    gate = Gate()
    async with working(Trace().at(gate, "a")) as place:
        ref = await place.create("work")
        unknown = msgspec.structs.replace(ref, name="other")
        await place.store.track(unknown, 60.0)
        await place.worker.handle(unknown)
        assert await place.store.tracked() == 2
        assert await place.entries(ref) == []


async def test_task_that_was_never_recorded_is_forgotten() -> None:
    """It was announced, and then something went wrong."""
    async with working(Trace().at(Gate(), "a")) as place:
        known = await place.create("work")
        never = msgspec.structs.replace(known, task_id="task_never")
        await place.store.track(never, 60.0)
        await place.worker.handle(never)
        assert await place.store.tracked() == 1


async def test_fault_of_ours_leaves_the_task_to_be_found_again(reports: list[BaseException]) -> None:
    """It is reported, and the worker goes on."""
    store = Faulty()
    gate = Gate()
    gate.open.set()
    async with working(Trace().at(gate, "a"), store=store) as place:
        ref = await place.create("work")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("realtime.tasks.run.read_record", None)
            await place.worker.handle(ref)
        assert [type(report) for report in reports] == [TypeError]
        assert await store.tracked() == 1
        await place.queue.submit(ref)
        assert result_of(await place.done(ref)) == "a 1"


async def test_two_sessions_have_nothing_to_do_with_each_other() -> None:
    """The end of one is not the other's."""
    gate = Gate()
    async with working(Trace().at(gate, "a")) as place:
        first, second = await place.start("work"), await place.start("work")
        await place.started(first)
        await place.started(second)
        await place.close(first)
        assert (await place.done(first)).status == "cancelled"
        gate.open.set()
        assert result_of(await place.done(second)) == "a 1"


async def test_task_sees_the_conversation_of_its_session() -> None:
    """As the model is told it."""

    @task()
    async def work(ctx: Context, job: Job) -> list[str]:
        assert ctx.session is not None
        return [message.content for message in await ctx.session.messages()]

    async with working(work) as place:
        ref = await place.create("work")
        await place.store.append(ref.session_id, [Write(SESSION_CHANNEL, [item("Hello?")])])
        await place.queue.submit(ref)
        assert result_of(await place.done(ref)) == ["Hello?"]


# --- the end of the worker -------------------------------------------------------------------------------------------


async def test_what_runs_may_finish_before_the_end() -> None:
    """And nothing else begins."""
    trace, gate = Trace(), Gate()
    async with working(trace.at(gate, "a"), slots=1) as place:
        running, waiting = await place.start("work"), await place.start("work")
        await gate.until_begun()
        finishing = asyncio.create_task(place.worker.finish_turns())
        await turns()
        assert not finishing.done()
        gate.open.set()
        await finishing
        assert result_of(await place.done(running)) == "a 1"
        assert await place.entries(waiting) == []


@pytest.mark.parametrize("while_", ["running", "backing off", "refusing to stop"])
async def test_what_does_not_finish_fails_by_name(while_: str) -> None:
    """Whatever it does at the time; what waits does not begin instead."""
    release = asyncio.Event()
    begun = asyncio.Event()

    @task("work", retries=1)
    async def work(ctx: Context, job: Job) -> None:
        begun.set()
        if while_ == "backing off":
            raise ValueError
        try:
            await release.wait()
        except asyncio.CancelledError:
            if while_ == "refusing to stop":
                await release.wait()
            raise

    async with working(work, slots=1) as place:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("realtime.tasks.run.BACKOFF_S", (3600.0, 3600.0))
            ref, waiting = await place.start("work"), await place.start("work")
            await begun.wait()
            await turns()
            async with asyncio.timeout(PATIENCE_S):
                await place.worker.end_turns(ServerError("instance_shutdown", "It ends."))
        assert failure_of(await place.done(ref)) == ("server_error", "instance_shutdown")
        release.set()
        await turns()
        assert await place.entries(waiting) == []


async def test_store_that_is_down_at_the_end_keeps_nobody_for_ever() -> None:
    """Whoever waits for the ends gives up on them, and the worker ends."""
    store = Faulty()
    gate = Gate()
    async with working(Trace().at(gate, "a"), store=store) as place:
        await place.start("work")
        await gate.until_begun()
        store.is_down = True
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await place.worker.end_turns(ServerError("instance_shutdown", "It ends."))
    store.is_down = False


async def test_worker_has_nothing_left_of_tasks_that_have_ended() -> None:
    """No session is open, nothing is at work, nobody listens."""
    gate = Gate()
    gate.open.set()
    async with working(Trace().at(gate, "a")) as place:
        for _ in range(50):
            await place.done(await place.start("work"))
        await place.idle()
        await turns()
        assert list(place.worker.hub.sessions()) == []
        assert place.store._listeners == {}
        assert flat(await place.entries(await place.create("work"))) == []
        assert isinstance(place.worker._background, Background)
        assert len(place.worker._background._tasks) == 3
