"""One task at work: each way in which it can end, and that it ends once in all of them."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from realtime import Context, TaskError, task
from realtime.errors import ConflictError, InvalidRequest, NotFound
from realtime.log import Deltas
from realtime.offload import Offloader
from realtime.protocol import SESSION_CHANNEL, TaskProgress, TaskStarted
from realtime.store.base import PositionConflict, Write
from realtime.store.memory import MemoryStore
from realtime.tasks.outcome import MAX_INLINE_BYTES, MAX_RESULT_BYTES
from tests.contract import flat, item
from tests.support.stores import Faulty
from tests.tasks.workplace import PATIENCE_S, failure_of, processes, result_of, working

pytestmark = pytest.mark.usefixtures("reports")


class Job(msgspec.Struct):
    """What a task is given."""

    text: str = ""


class Gate:
    """A task that has begun waits here, and notes how its wait ended."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.open = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def wait(self) -> None:
        self.begun.set()
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def until_begun(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self.begun.wait()


def waiting_task(gate: Gate, **options: Any) -> Callable[..., Any]:
    """A task that waits at a gate."""

    @task("work", **options)
    async def work(ctx: Context, job: Job) -> str:
        await gate.wait()
        return "done"

    return work


# --- plain functions, which have to be found by their names ----------------------------------------------------------


@task()
def shout(job: Job) -> str:
    """Shout."""
    return job.text.upper()


@task()
def spin(job: Job) -> None:
    """Tell who computes, and never end."""
    with open(job.text, "w") as file:
        file.write(str(os.getpid()))
    while True:
        time.sleep(0.01)


@task()
def fail(job: Job) -> None:
    """Fail for what it was given."""
    raise ValueError(job.text)


@task()
def refuse(job: Job) -> None:
    """Fail in words for clients."""
    raise TaskError("bad_pages", "Two pages are missing.")


@task()
def die(job: Job) -> None:
    """End the process."""
    os.kill(os.getpid(), signal.SIGKILL)


# --- how it ends -----------------------------------------------------------------------------------------------------


async def test_it_completes() -> None:
    """With what the function returns, as JSON; and is forgotten by the index of unfinished tasks."""

    @task()
    async def work(ctx: Context, job: Job) -> dict[str, Any]:
        assert ctx.session is not None
        return {"attempt": ctx.attempt, "said": job.text, "session": ctx.session.id, "id": ctx.task_id}

    async with working(work) as place:
        ref = await place.start("work", text="hi")
        done = await place.done(ref)
        expected = {"attempt": 1, "said": "hi", "session": ref.session_id, "id": ref.task_id}
        assert result_of(done) == expected
        assert done.result_url is None
        assert await place.attempts(ref) == [(1, "inst_1")]
        await place.idle()


async def _raises(error: BaseException) -> tuple[str, str]:
    @task("work")
    async def work(ctx: Context, job: Job) -> None:
        raise error

    async with working(work) as place:
        return failure_of(await place.outcome("work", text="the secret"))


FAILURES: list[tuple[BaseException, tuple[str, str]]] = [
    (ValueError("secret"), ("server_error", "task_failed")),
    (TimeoutError(), ("server_error", "task_failed")),
    (asyncio.CancelledError(), ("server_error", "task_failed")),
    (GeneratorExit(), ("server_error", "task_failed")),
    (SystemExit(1), ("server_error", "task_failed")),
    (PositionConflict(), ("server_error", "task_failed")),
    (ExceptionGroup("secret", [ValueError("secret")]), ("server_error", "task_failed")),
    (TaskError("bad_pages", "Two pages are missing."), ("server_error", "bad_pages")),
    (InvalidRequest("bad_page", "That page."), ("invalid_request_error", "bad_page")),
    (NotFound("no_page", "That page."), ("not_found_error", "no_page")),
    (ConflictError("busy", "Somebody reads it."), ("conflict_error", "busy")),
    (TaskError("long", "x" * 1_000_000), ("server_error", "long")),
    (TaskError("odd", "\ud800"), ("server_error", "task_failed")),
    (TaskError("odd", {"no": "text"}), ("server_error", "task_failed")),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("error", "expected"), FAILURES, ids=lambda value: type(value).__name__)
async def test_it_fails_with_what_it_raises(error: BaseException, expected: tuple[str, str]) -> None:
    """Whatever that is. Only errors that are meant for clients are told in their own words."""
    assert await _raises(error) == expected


async def test_what_it_raises_is_in_the_log_alone(reports: list[BaseException]) -> None:
    """The client is told the type, and nothing of what the error says."""

    @task()
    async def work(ctx: Context, job: Job) -> None:
        raise ValueError(job.text)

    async with working(work) as place:
        done = await place.outcome("work", text="the secret")
    assert done.error is not None
    assert done.error.message == "The task raised ValueError."
    assert [type(error) for error in reports] == [ValueError]


@pytest.mark.parametrize(
    "result",
    [object(), {"a": object()}, {1, object()}, "\ud800", {(1, 2): 3}, 2**64, {"deep": [2**70]}, msgspec.Raw(b"{")],
    ids=["object", "inside", "set", "surrogate", "keys", "number", "deep", "raw"],
)
async def test_result_that_not_every_client_can_read_is_a_failure(result: Any) -> None:
    """It is no JSON, or one of the two encodings has no such number."""

    @task()
    async def work(ctx: Context, job: Job) -> Any:
        return result

    async with working(work) as place:
        assert failure_of(await place.outcome("work")) == ("server_error", "invalid_result")


@pytest.mark.parametrize(
    ("size", "is_inline"),
    [(MAX_INLINE_BYTES, True), (MAX_INLINE_BYTES + 1, False), (MAX_RESULT_BYTES, False)],
)
async def test_large_result_is_kept_whole(size: int, is_inline: bool) -> None:
    """Up to 128 KiB it is told with the end, up to 1 MiB it is to be fetched."""

    @task()
    async def work(ctx: Context, job: Job) -> str:
        return "x" * (size - 2)

    async with working(work) as place:
        ref = await place.start("work")
        done = await place.done(ref)
        assert len(done.result_json or "") == size
        url = f"/v1/sessions/{ref.session_id}/tasks/{ref.task_id}/result"
        assert done.result_url == (None if is_inline else url)
        assert (done.for_clients().result is msgspec.UNSET) is not is_inline


async def test_result_over_the_limit_is_a_failure() -> None:
    """By name, and nothing of it is kept."""

    @task()
    async def work(ctx: Context, job: Job) -> str:
        return "x" * (MAX_RESULT_BYTES - 1)

    async with working(work) as place:
        assert failure_of(await place.outcome("work")) == ("server_error", "result_too_large")


# --- plain functions -------------------------------------------------------------------------------------------------


async def test_plain_function_computes_elsewhere() -> None:
    """It takes the input alone, and gives its result."""
    async with processes(), working(shout) as place:
        assert result_of(await place.outcome("shout", text="hi")) == "HI"


@pytest.mark.parametrize(
    ("function", "expected"),
    [(fail, ("server_error", "task_failed")), (die, ("server_error", "worker_died"))],
    ids=["raises", "dies"],
)
async def test_plain_function_that_fails(function: Callable[..., Any], expected: tuple[str, str]) -> None:
    """As one that is awaited does."""
    async with processes(), working(function, shout) as place:
        done = await place.outcome(function.__name__, text="secret")
        assert failure_of(done) == expected
        assert done.error is not None
        assert "secret" not in done.error.message
        assert result_of(await place.outcome("shout", text="next")) == "NEXT"


async def test_plain_function_s_own_words_come_through() -> None:
    """An error for clients is that in another process too."""
    async with processes(), working(refuse) as place:
        assert failure_of(await place.outcome("refuse")) == ("server_error", "bad_pages")


async def test_function_that_can_t_be_sent_to_another_process() -> None:
    """A clear failure, which names the function."""

    @task()
    def local(job: Job) -> None:
        return None

    async with processes(), working(local) as place:
        done = await place.outcome("local")
        assert failure_of(done) == ("server_error", "task_failed")
        assert done.error is not None
        assert "local can't be offloaded" in done.error.message


async def test_plain_function_that_is_cancelled_is_killed(tmp_path: Any) -> None:
    """Its process is gone, and the next task has another one."""
    path = tmp_path / "pid"
    async with processes(), working(spin, shout) as place:
        ref = await place.start("spin", text=str(path))
        pid = await asyncio.to_thread(_read_number, path)
        await place.cancel(ref)
        assert (await place.done(ref)).status == "cancelled"
        await asyncio.to_thread(_until_gone, pid)
        assert result_of(await place.outcome("shout", text="next")) == "NEXT"


async def test_plain_function_that_takes_too_long_is_killed(tmp_path: Any) -> None:
    """The same."""
    spinning = task("spinning", timeout_s=1.5)(spin_once)
    path = tmp_path / "pid"
    async with processes(), working(spinning) as place:
        assert failure_of(await place.outcome("spinning", text=str(path))) == ("server_error", "task_timeout")
        if path.exists():  # or the process had not even begun
            await asyncio.to_thread(_until_gone, int(path.read_text()))


def spin_once(job: Job) -> None:
    """As `spin`."""
    spin(job)


def _read_number(path: Any) -> int:
    until = time.monotonic() + PATIENCE_S
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < until
        time.sleep(0.01)
    return int(path.read_text())


def _until_gone(pid: int) -> None:
    until = time.monotonic() + PATIENCE_S
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < until
        time.sleep(0.01)


# --- attempts --------------------------------------------------------------------------------------------------------


async def test_attempts_follow_each_other_until_one_succeeds() -> None:
    """What earlier ones told is void: the record, and the log, say so."""

    @task(retries=2)
    async def work(ctx: Context, job: Job) -> int:
        await ctx.progress(10 - ctx.attempt, 10, f"attempt {ctx.attempt}")
        await ctx.write(f"said {ctx.attempt}")
        if ctx.attempt < 3:
            raise ValueError
        return ctx.attempt

    async with working(work) as place:
        ref = await place.start("work")
        assert result_of(await place.done(ref)) == 3
        assert [attempt for attempt, _ in await place.attempts(ref)] == [1, 2, 3]
        record = await place.until(ref, lambda record: record.done)
        assert record.texts == ["said 3"]
        assert record.progress is not None
        assert (record.progress.attempt, record.progress.message) == (3, "attempt 3")


async def test_attempts_are_told_in_order() -> None:
    """Each begins with its claim, and all that it tells bears its number."""

    @task(retries=2)
    async def work(ctx: Context, job: Job) -> None:
        await ctx.progress(1)
        await ctx.write("said")
        raise TaskError("no", "No.")

    async with working(work) as place:
        ref = await place.start("work")
        assert failure_of(await place.done(ref)) == ("server_error", "no")
        newest = 0
        for event in flat(await place.entries(ref))[:-1]:
            if isinstance(event, TaskStarted):
                assert event.attempt == newest + 1
                newest = event.attempt
            else:
                assert event.attempt == newest  # type: ignore[attr-defined]
        assert newest == 3


@pytest.mark.parametrize(
    "error", [InvalidRequest("bad", "Bad."), ConflictError("bad", "Bad.")], ids=["invalid", "conflict"]
)
async def test_what_would_come_to_the_same_is_not_tried_again(error: Exception) -> None:
    """An input that is refused is refused the second time too."""

    @task(retries=5)
    async def work(ctx: Context, job: Job) -> None:
        raise error

    async with working(work) as place:
        ref = await place.start("work")
        assert failure_of(await place.done(ref))[1] == "bad"
        assert len(await place.attempts(ref)) == 1


@pytest.mark.parametrize(
    "error", [NotFound("no_page", "None."), PositionConflict(), TimeoutError()], ids=["found", "position", "time"]
)
async def test_any_error_of_the_function_counts_as_a_failed_attempt(error: Exception) -> None:
    """Even one that would mean something else if it came from the store."""

    @task(retries=1)
    async def work(ctx: Context, job: Job) -> str:
        if ctx.attempt == 1:
            raise error
        return "second"

    async with working(work) as place:
        ref = await place.start("work")
        assert result_of(await place.done(ref)) == "second"
        assert len(await place.attempts(ref)) == 2


async def test_attempt_that_takes_too_long_is_stopped_and_followed() -> None:
    """Each attempt has its own time."""
    gate = Gate()
    async with working(waiting_task(gate, timeout_s=0.05, retries=1)) as place:
        ref = await place.start("work")
        assert failure_of(await place.done(ref)) == ("server_error", "task_timeout")
        assert gate.cancelled.is_set()
        assert len(await place.attempts(ref)) == 2


async def test_timeout_of_its_own_is_not_told_as_the_task_s() -> None:
    """A call that it has made took too long, and not the task."""

    @task(timeout_s=3600)
    async def work(ctx: Context, job: Job) -> None:
        async with asyncio.timeout(0):
            await asyncio.sleep(1)

    async with working(work) as place:
        assert failure_of(await place.outcome("work")) == ("server_error", "task_failed")


async def test_input_that_the_task_can_t_read_any_more_fails() -> None:
    """A later version of the task wants another input than the one that was checked."""

    class Other(msgspec.Struct):
        number: int

    @task("work")
    async def work(ctx: Context, job: Job) -> None:
        raise AssertionError

    async with working(work) as place:
        definition = place.registry.definition("work")
        place.registry.definitions["work"] = msgspec.structs.replace(definition, input_type=Other)
        with pytest.raises(InvalidRequest):
            place.registry.check("work", {"text": "x"})
        place.registry.definitions["work"] = definition
        ref = await place.create("work", text="x")
        place.registry.definitions["work"] = msgspec.structs.replace(definition, input_type=Other)
        await place.queue.submit(ref)
        assert failure_of(await place.done(ref)) == ("server_error", "task_failed")


# --- cancelling ------------------------------------------------------------------------------------------------------


async def test_task_that_is_cancelled_before_it_begins_does_not() -> None:
    """Its end is its only event, and names the command."""
    gate = Gate()
    async with working(waiting_task(gate)) as place:
        ref = await place.create("work")
        await place.cancel(ref, "evt_1")
        await place.queue.submit(ref)
        done = await place.done(ref)
        assert (done.status, done.for_event_id) == ("cancelled", "evt_1")
        await place.idle()


@pytest.mark.parametrize("times", [1, 2])
async def test_task_that_is_cancelled_while_it_runs_is_stopped(times: int) -> None:
    """However often it is cancelled."""
    gate = Gate()
    async with working(waiting_task(gate, retries=3)) as place:
        ref = await place.start("work")
        await gate.until_begun()
        for number in range(times):
            await place.cancel(ref, f"evt_{number}")
        done = await place.done(ref)
        assert (done.status, done.for_event_id, done.error) == ("cancelled", "evt_0", None)
        assert gate.cancelled.is_set()
        await place.cancel(ref)
        await place.idle()
        assert len(await place.attempts(ref)) == 1


async def test_task_that_is_cancelled_between_two_attempts_is_not_tried_again() -> None:
    """It does not wait for the next one either."""
    failed = asyncio.Event()

    @task(retries=3)
    async def work(ctx: Context, job: Job) -> None:
        failed.set()
        raise ValueError

    async with working(work) as place:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("realtime.tasks.run.BACKOFF_S", (3600.0, 3600.0))
            ref = await place.start("work")
            await failed.wait()
            await place.cancel(ref)
            assert (await place.done(ref)).status == "cancelled"
        assert len(await place.attempts(ref)) == 1


@pytest.mark.parametrize("turns", range(12))
async def test_task_that_is_cancelled_while_it_ends_has_one_end(turns: int) -> None:
    """Whichever comes first."""
    gate = Gate()
    async with working(waiting_task(gate)) as place:
        ref = await place.start("work")
        await gate.until_begun()
        gate.open.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        await place.cancel(ref)
        assert (await place.done(ref)).status in {"complete", "cancelled"}
        await place.idle()


async def test_function_that_swallows_its_cancelling_and_returns_is_cancelled_all_the_same() -> None:
    """What it returns then is nobody's."""

    @task()
    async def work(ctx: Context, job: Job) -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "stubborn"
        return "never"

    async with working(work) as place:
        ref = await place.start("work")
        await place.started(ref)
        await place.cancel(ref)
        done = await place.done(ref)
        assert (done.status, done.result_json) == ("cancelled", None)


@pytest.mark.parametrize("timeout_s", [None, 0.05])
async def test_function_that_never_stops_holds_up_nobody(timeout_s: float | None) -> None:
    """Not one that was cancelled, and not one that has run out of time. What it tells afterwards nobody hears."""
    release, begun = asyncio.Event(), asyncio.Event()

    @task(timeout_s=timeout_s)
    async def work(ctx: Context, job: Job) -> str:
        begun.set()
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        await ctx.write("too late")
        await ctx.progress(1)
        return "never"

    async with working(work) as place:
        ref = await place.start("work")
        await begun.wait()
        if timeout_s is None:
            await place.cancel(ref)
        done = await place.done(ref)
        assert done.status == ("cancelled" if timeout_s is None else "failed")
        release.set()
        await asyncio.sleep(0.05)
        await place.done(ref)
        assert not [entry for entry in await place.entries(ref) if isinstance(entry, Deltas | TaskProgress)]


async def test_attempt_that_never_stops_does_not_disturb_the_next_one() -> None:
    """It has run out of time, and would speak on: there it is cancelled once more."""
    release, stopped = asyncio.Event(), asyncio.Event()

    @task(timeout_s=1.0, retries=1)
    async def work(ctx: Context, job: Job) -> str:
        if ctx.attempt == 2:
            release.set()
            await stopped.wait()
            return "second"
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        try:
            await ctx.write("of the first")
        finally:
            stopped.set()
        return "first"

    async with working(work) as place:
        ref = await place.start("work")
        assert result_of(await place.done(ref)) == "second"
        assert len(await place.attempts(ref)) == 2
        assert not [entry for entry in await place.entries(ref) if isinstance(entry, Deltas)]


# --- the session's end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", [False, True])
async def test_task_of_a_session_that_is_closed_is_cancelled(runs: bool) -> None:
    """By the command that closed it."""
    gate = Gate()
    async with working(waiting_task(gate)) as place:
        ref = await place.create("work")
        if runs:
            await place.queue.submit(ref)
            await gate.until_begun()
        await place.close(ref)
        await place.queue.submit(ref)
        done = await place.done(ref)
        assert (done.status, done.for_event_id) == ("cancelled", "evt_close")


@pytest.mark.parametrize("runs", [False, True])
async def test_task_of_a_session_that_is_erased_is_stopped(runs: bool) -> None:
    """There is nothing left to write to."""
    gate = Gate()
    async with working(waiting_task(gate)) as place:
        ref = await place.create("work")
        if runs:
            await place.queue.submit(ref)
            await gate.until_begun()
        await place.store.erase(ref.session_id)
        await place.queue.submit(ref)
        await place.idle()
        assert gate.begun.is_set() is runs
        assert gate.cancelled.is_set() is runs


@pytest.mark.parametrize("when", ["before", "while"])
async def test_task_of_a_session_that_is_full_fails(when: str) -> None:
    """Whether there was no room for its beginning, or for what it says."""

    @task()
    async def work(ctx: Context, job: Job) -> None:
        while True:
            await ctx.write("x" * 1000)

    store = MemoryStore(max_session_bytes=10_000)
    async with working(work, store=store) as place:
        ref = await place.create("work")
        if when == "before":
            await store.append(ref.session_id, [Write(SESSION_CHANNEL, [item("x" * 10_000)])])
        await place.queue.submit(ref)
        assert failure_of(await place.done(ref)) == ("conflict_error", "session_full")
        await place.idle()


async def test_full_session_takes_a_result_all_the_same() -> None:
    """A task that has done its work is not failed for the room that its result takes."""
    gate = Gate()
    store = MemoryStore(max_session_bytes=10_000)
    async with working(waiting_task(gate), store=store) as place:
        ref = await place.start("work")
        await gate.until_begun()
        await store.append(ref.session_id, [Write(SESSION_CHANNEL, [item("x" * 10_000)])])
        gate.open.set()
        assert result_of(await place.done(ref)) == "done"


# --- a store that does not answer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["before", "after", "untold"])
async def test_claim_without_an_answer_is_made_once(fault: str) -> None:
    """Whether or not it had its effect."""
    store = Faulty()
    gate = Gate()
    gate.open.set()
    async with working(waiting_task(gate), store=store) as place:
        ref = await place.create("work")
        store.faults = [fault]
        await place.queue.submit(ref)
        assert result_of(await place.done(ref)) == "done"
        assert await place.attempts(ref) == [(1, "inst_1")]


async def test_claim_that_comes_late_is_refused() -> None:
    """The one that was made instead has the position."""
    store = Faulty()
    gate = Gate()
    async with working(waiting_task(gate), store=store) as place:
        ref = await place.create("work")
        store.faults = ["late"]
        await place.queue.submit(ref)
        await gate.until_begun()
        await store.land()
        gate.open.set()
        assert result_of(await place.done(ref)) == "done"
        assert await place.attempts(ref) == [(1, "inst_1")]


async def test_task_goes_on_through_an_outage() -> None:
    """What it says meanwhile is told later, whole, and so is its end."""
    store = Faulty()
    said = asyncio.Event()
    gate = Gate()

    @task()
    async def work(ctx: Context, job: Job) -> str:
        await ctx.write("one ")
        await gate.wait()
        await ctx.write("two")
        said.set()
        return "done"

    async with working(work, store=store) as place:
        ref = await place.start("work")
        await gate.until_begun()
        await place.until(ref, lambda record: record.texts)
        store.is_down = True
        gate.open.set()
        await said.wait()
        await asyncio.sleep(0.02)
        store.is_down = False
        assert result_of(await place.done(ref)) == "done"
        record = await place.until(ref, lambda record: record.done)
        assert "".join(record.texts) == "one two"
        assert len(await place.attempts(ref)) == 1


async def test_process_that_ends_leaves_its_tasks_as_they_are() -> None:
    """They are another worker's, who begins another attempt."""
    gate = Gate()
    store = MemoryStore()
    async with working(waiting_task(gate), store=store) as place:
        ref = await place.start("work")
        await gate.until_begun()
    assert gate.cancelled.is_set()
    await store.resign("inst_1")
    gate.open.set()
    async with working(waiting_task(gate), store=store, instance="inst_2") as other:
        await other.queue.submit(ref)
        assert result_of(await other.done(ref)) == "done"
        assert await other.attempts(ref) == [(1, "inst_1"), (2, "inst_2")]


def slow(_job: Job) -> str:
    time.sleep(0.3)
    return "done"


async def test_the_time_that_a_function_waits_for_a_process_is_not_its_own() -> None:
    """Nine for one process, which runs already: together they take longer than each of them may."""
    async with Offloader(1) as pool, working(task(timeout_s=2.0)(slow)) as place:
        await pool.run(slow, Job())
        refs = [await place.start("slow") for _ in range(9)]
        assert [result_of(await place.done(ref)) for ref in refs] == ["done"] * 9
