"""One task at work in this process: attempt after attempt, until it has its one end, however that comes.

Whoever runs a task reads its log first, and claims the next attempt by appending `task.started` where that log ends. So
two workers may be handed the same task: one of them wins, and what the other one writes is refused from then on.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import msgspec
from msgspec import Struct

from realtime.access.audit import hidden, told
from realtime.access.till import Till
from realtime.call import ModelSettings
from realtime.conversation import Message, messages
from realtime.errors import ConflictError, NotFound, RealtimeError, ServerError, StoreError, StoreUnreadable
from realtime.journal import Journal, Tail
from realtime.lease import BEATS_PER_LEASE, Lease
from realtime.live import RETRY_S, LiveSession
from realtime.observe import logs, metrics, traces
from realtime.offload import offload
from realtime.protocol import TaskDone, TaskStarted, seconds_since, timestamp
from realtime.store.base import PositionConflict, TaskRef, Write
from realtime.tasks.context import Context, Model, TaskSession
from realtime.tasks.outcome import completed, ended, failed, failure, is_final, out_of_time
from realtime.tasks.record import TaskRecord, read_created, read_record
from realtime.tasks.registry import Registry
from realtime.tasks.reporter import AttemptReporter
from realtime.turn import STOP_TIMEOUT_S, answers
from realtime.view import View

MAX_LOST = 10
"""How many attempts may be lost with their process, beside those that a task's `retries` allow: a task that ends each
process that tries it must not go on for ever."""
BACKOFF_S = (0.5, 30.0)
"""How long an attempt waits after one that failed: the first such wait, which doubles, and the longest."""
MAX_DOUBLINGS = 16
LOOK_S = 1.0
"""How often to look whether another worker that has a task still lives, at the least."""


class Kit(Struct, frozen=True):
    """What the runs of a worker share. `ttl_s` is how long a task is kept after its last use."""

    registry: Registry
    journal: Journal
    lease: Lease
    model: ModelSettings
    till: Till
    ttl_s: float
    name_of: Callable[[str], str] = hidden
    """What a session is called in the log, and a task that is one of its own."""


class Run:
    """One task that was handed to this process. `run` is its life; `end` and `lose` end it early."""

    def __init__(self, task: TaskRef, kit: Kit) -> None:
        self.over = asyncio.Event()
        """Set once this process is done with it."""
        self.task = task
        self._definition = kit.registry.definition(task.name)
        self._kit = kit
        self._live: LiveSession
        self._payer = ""
        self._created_at = ""
        self._traceparent: str | None = None
        self._span = traces.NOTHING
        self._claimed = 0
        """The attempt that was claimed here and has not begun."""
        self._end: TaskDone | None = None
        self._refused: Exception | None = None
        self._stopped = asyncio.Event()
        self._begun = asyncio.Event()
        """Set once the attempt has what it needs to run, so that its time counts."""

    def end(self, end: TaskDone) -> None:
        """End the task with `end`, unless it is ending already."""
        self._end = self._end or end
        self._stopped.set()

    def lose(self, why: Exception) -> None:
        """The store takes nothing more of this attempt: stop it."""
        self._refused = self._refused or why
        self._stopped.set()

    async def run(self, live: LiveSession) -> None:
        """Work on the task until it has ended, here or elsewhere. Cancelled, it leaves it for another worker."""
        self._live = live
        session = self._kit.name_of(live.id)
        task = session if self.task.task_id == live.id else told(self.task.task_id)
        with logs.bound(session=session, task=task):
            await self._run()

    async def _run(self) -> None:
        while True:
            try:
                if await self._step():
                    return
            except (NotFound, StoreUnreadable):
                return
            except PositionConflict:
                await asyncio.sleep(0)  # somebody was faster: see what they did
            except StoreError:
                await asyncio.sleep(RETRY_S)

    async def _step(self) -> bool:
        """Do what is next; returns whether nothing is left to do."""
        if self.task.task_id not in self._live.state.tasks:
            await self._live.refresh()  # it was recorded elsewhere, and was not told here yet
        record = await read_record(self._live.store, self._live.id, self.task.task_id)
        if record.done or self.task.task_id not in self._live.state.tasks:
            return True
        if not await self._may_run(record):
            await asyncio.sleep(min(LOOK_S, self._kit.lease.lease_s / BEATS_PER_LEASE))
            return False
        if not (self._claimed and self._claimed == record.attempt):
            first = await self._begin(record)
            if isinstance(first, TaskDone):
                return True
            record.apply(first)
            self._live.state.apply(first)  # it is this instance's from now on, whoever's it was
        given = await self._input()
        self._claimed = 0
        told = {"realtime.task.attempt": record.attempt}
        name = f"task {self.task.name}"
        with traces.span(name, kind="CONSUMER", parent=self._traceparent, attributes=told) as self._span:
            return await self._attempt(record, given)

    async def _may_run(self, record: TaskRecord) -> bool:
        """Whether nobody else is at it."""
        instance = record.instance
        return instance in {None, self._kit.lease.instance} or instance in await self._kit.lease.lost({instance})

    def _end_before(self, record: TaskRecord) -> TaskDone | None:
        """The end of a task that is not to be tried again."""
        state = self._live.state
        if state.closed or state.tasks[self.task.task_id].stopping:
            self.end(ended(self.task, "cancelled", for_event_id=state.closed_by))
        if self._end is None and record.attempt > self._definition.retries + MAX_LOST:
            return failed(self.task, ServerError("worker_lost", "The workers that tried the task were lost."))
        return self._end

    def _claim(self, record: TaskRecord) -> TaskStarted:
        self._claimed = record.attempt + 1
        own = self._kit.lease.instance
        return TaskStarted(task_id=self.task.task_id, attempt=self._claimed, instance=own, at=timestamp())

    async def _begin(self, record: TaskRecord) -> TaskStarted | TaskDone:
        """Claim the next attempt, or end the task where there is to be none; returns which."""
        first = self._end_before(record) or self._claim(record)
        try:
            await self._append(record, first)
        except ConflictError as error:  # the session is full: it takes the end alone
            first = failed(self.task, error)
            await self._append(record, first)
        if isinstance(first, TaskDone):
            metrics.TASKS_FINISHED.labels(self.task.name, first.status).inc()
        return first

    async def _append(self, record: TaskRecord, event: TaskStarted | TaskDone) -> None:
        write = Write(self.task.task_id, [event], expect=record.position)
        await self._live.store.append(self._live.id, [write], keep_s=self._kit.ttl_s)

    async def _attempt(self, record: TaskRecord, given: str) -> bool:
        """Work, and write what it came to; returns whether nothing is left to do."""
        self._refused = None
        if self._end is None:
            self._stopped.clear()
        self._begun.clear()
        view = View(record.position)
        tail = Tail(self._live.id, self.task.task_id, view, lost=self.lose, keep_s=self._kit.ttl_s)
        reporter = AttemptReporter(self._kit.journal, tail, attempt=record.attempt)
        try:
            end = await self._outcome(self._measured(reporter, record.attempt, given), record)
            if end is not None:
                reporter.flush()
                await self._kit.journal.finish(tail, end)
                metrics.TASKS_FINISHED.labels(self.task.name, end.status).inc()
                self._span.set({"realtime.task.status": end.status})
                return True
        finally:
            reporter.stop()
            tail.abandon()
        await self._back_off(record.attempt)
        return False

    async def _outcome(self, work: Coroutine[Any, Any, Any], record: TaskRecord) -> TaskDone | None:
        """The end that an attempt has come to; `None` where another one is to follow. Raises the store's refusal of it
        where there was one."""
        working = asyncio.create_task(work)
        others = [asyncio.create_task(self._stopped.wait()), asyncio.create_task(self._out_of_time())]
        try:
            await asyncio.wait([working, *others], return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return self._judged(working, record)
            if self._stopped.is_set():
                return self._stopped_by()
            return self._failed(out_of_time(self._definition), record)
        finally:
            for other in others:
                other.cancel()
            await _leave(working, self.task.name)

    async def _out_of_time(self) -> None:
        """Return when the attempt has had its time; one without a limit has it for ever."""
        await self._begun.wait()
        if self._definition.timeout_s is None:
            await asyncio.get_running_loop().create_future()
        else:
            await asyncio.sleep(self._definition.timeout_s)

    def _stopped_by(self) -> TaskDone:
        if isinstance(self._refused, ConflictError):  # the session is full: it takes the end alone
            return failed(self.task, self._refused)
        if self._refused is not None:
            raise self._refused
        assert self._end is not None
        return self._end

    def _judged(self, working: asyncio.Task[Any], record: TaskRecord) -> TaskDone | None:
        # One that is cancelled is that by itself: nobody has stopped it.
        error = asyncio.CancelledError() if working.cancelled() else working.exception()
        if error is None:
            return completed(self.task, working.result())
        return self._failed(failure(error), record)

    def _failed(self, error: RealtimeError, record: TaskRecord) -> TaskDone | None:
        self._span.fail(error.code)
        is_last = record.attempt - record.lost > self._definition.retries
        return failed(self.task, error) if is_last or is_final(error) else None

    async def _measured(self, reporter: AttemptReporter, attempt: int, given: str) -> Any:
        metrics.TASK_ATTEMPTS.labels(self.task.name).inc()
        if attempt == 1:
            metrics.TASK_WAIT_SECONDS.labels(self.task.name).observe(max(0.0, seconds_since(self._created_at)))
        with metrics.TASKS_RUNNING.track_inprogress(), metrics.TASK_SECONDS.labels(self.task.name).time():
            return await self._work(reporter, attempt, given)

    async def _work(self, reporter: AttemptReporter, attempt: int, given: str) -> Any:
        typed = msgspec.json.decode(given, type=self._definition.input_type)
        if not self._definition.is_async:
            return await offload(self._definition.function, typed, on_start=self._begun.set)
        self._begun.set()
        try:
            return await self._definition.function(self._context(reporter, attempt), typed)
        except SystemExit as error:  # the loop would take it for its own
            raise RuntimeError("the task has exited") from error

    async def _input(self) -> str:
        position = self._live.state.tasks[self.task.task_id].position
        created = await read_created(self._live.store, self._live.id, position)
        assert created.input is not None
        self._payer = created.payer or f"user:{created.user}"
        self._created_at = created.task.created_at
        self._traceparent = created.traceparent
        return created.input

    def _context(self, reporter: AttemptReporter, attempt: int) -> Context:
        is_alone = self._live.id == self.task.task_id
        session = None if is_alone else TaskSession(self._live.id, self._conversation)
        model = Model(self._kit.model, self._kit.till, self._payer, None if is_alone else self._live.id)
        return Context(task_id=self.task.task_id, attempt=attempt, session=session, model=model, reporter=reporter)

    async def _conversation(self) -> list[Message]:
        return messages(self._live.state, await answers(self._live))

    async def _back_off(self, attempt: int) -> None:
        first_s, longest_s = BACKOFF_S
        wait_s = min(longest_s, first_s * 2 ** min(attempt - 1, MAX_DOUBLINGS)) * random.uniform(0.5, 1.0)
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._stopped.wait()


async def _leave(working: asyncio.Task[Any], name: str) -> None:
    """Stop the work, if it is not done. It may take its time, or may not want to stop at all: that holds up nobody."""
    if not working.done():
        working.cancel()
        await asyncio.wait([working], timeout=STOP_TIMEOUT_S)
    if not working.done():
        logs.warning("a task does not stop", name=name)
    working.add_done_callback(_forget_outcome)


def _forget_outcome(working: asyncio.Task[Any]) -> None:
    """Take note of an error that nobody needs, so that asyncio does not tell of it."""
    if not working.cancelled():
        working.exception()
