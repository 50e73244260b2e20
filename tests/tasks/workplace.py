"""Workers in one process, over one store in memory: tasks are recorded by the test, and what comes of them is read from
their logs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from unittest import mock

import msgspec

from realtime import parts
from realtime.app import create_app
from realtime.background import Background
from realtime.call import ModelSettings
from realtime.control import CancelTask
from realtime.engine import Engine
from realtime.errors import NotFound
from realtime.journal import Journal
from realtime.lease import Lease
from realtime.log import Entry
from realtime.observe import logs
from realtime.offload import Offloader
from realtime.protocol import CONTROL_CHANNEL, SESSION_CHANNEL, SessionClosed, TaskDone, TaskStarted, new_id
from realtime.responders.base import Responder
from realtime.session import task_created
from realtime.settings import Settings
from realtime.store.base import Notice, TaskRef, Write
from realtime.store.memory import MemoryStore
from realtime.tasks import desk as desk_module
from realtime.tasks import run as run_module
from realtime.tasks import sweeper as sweeper_module
from realtime.tasks import worker as worker_module
from realtime.tasks.local import LocalQueue
from realtime.tasks.record import TaskRecord, read_record
from realtime.tasks.registry import Registry
from realtime.tasks.run import Kit
from realtime.tasks.worker import Worker
from tests.contract import NOW, flat, session
from tests.support.limits import GENEROUS
from tests.support.tills import open_till
from tests.tasks.scripted import Script

PATIENCE_S = 20.0
"""How long what has to come may take, so that what never comes fails its own test, also on a busy machine."""
LEASE_S = 0.2
TTL_S = 60.0


class Workplace:
    """One worker, `instance`, and its way to the store that others may share."""

    def __init__(self, store: MemoryStore, registry: Registry, worker: Worker, queue: LocalQueue) -> None:
        self.store = store
        self.registry = registry
        self.worker = worker
        self.queue = queue

    @property
    def instance(self) -> str:
        """The worker's name."""
        return self.worker.instance

    async def create(self, name: str, session_id: str | None = None, **given: Any) -> TaskRef:
        """Record a task, on the index too, in a session that is made if there is none; nobody is told to run it."""
        session_id = session_id or new_id("sess")
        task = TaskRef(session_id, new_id("task"), name)
        created = task_created(task.task_id, name, self.registry.check(name, given), user="ann", payer=None, now=NOW)
        try:
            await self.store.load(session_id)
        except NotFound:
            await self.store.create(session(session_id))
        await self.store.track(task, TTL_S)
        await self.store.append(session_id, [Write(SESSION_CHANNEL, [created])])
        return task

    async def start(self, name: str, session_id: str | None = None, **given: Any) -> TaskRef:
        """Record a task, and have it run."""
        task = await self.create(name, session_id, **given)
        await self.queue.submit(task)
        return task

    async def outcome(self, name: str, **given: Any) -> TaskDone:
        """What a new task comes to."""
        return await self.done(await self.start(name, **given))

    async def cancel(self, task: TaskRef, event_id: str | None = None) -> None:
        """Ask for the end of a task."""
        request = CancelTask(task_id=task.task_id, for_event_id=event_id)
        await self.store.append(task.session_id, [Write(CONTROL_CHANNEL, [request])])

    async def close(self, task: TaskRef) -> None:
        """Close the session of a task."""
        closed = SessionClosed(reason="closed by client", for_event_id="evt_close")
        await self.store.append(task.session_id, [Write(SESSION_CHANNEL, [closed])])

    async def until(self, task: TaskRef, holds: Callable[[TaskRecord], object]) -> TaskRecord:
        """A task as its log has it, once that holds."""
        changed = asyncio.Event()

        def hear(_: Notice) -> None:
            changed.set()

        ends = [await self.store.watch(task.session_id, hear)]
        ends.append(await self.store.follow(task.session_id, task.task_id, hear))
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not holds(record := await read_record(self.store, task.session_id, task.task_id)):
                    await changed.wait()
                    changed.clear()
            return record
        finally:
            for end in ends:
                end()

    async def started(self, task: TaskRef, attempt: int = 1) -> TaskRecord:
        """A task once that attempt was claimed."""
        return await self.until(task, lambda record: record.attempt >= attempt)

    async def done(self, task: TaskRef) -> TaskDone:
        """The one end of a task; nothing comes after it."""
        await self.until(task, lambda record: record.done)
        events = flat(await self.entries(task))
        ends = [event for event in events if isinstance(event, TaskDone)]
        assert len(ends) == 1
        assert events[-1] is ends[0] or events[-1] == ends[0]
        return ends[0]

    async def entries(self, task: TaskRef) -> list[Entry]:
        """The log of a task."""
        return await self.store.read(task.session_id, task.task_id, 0, 10_000_000)

    async def attempts(self, task: TaskRef) -> list[tuple[int, str | None]]:
        """The attempts at a task, each with who has claimed it."""
        events = flat(await self.entries(task))
        return [(event.attempt, event.instance) for event in events if isinstance(event, TaskStarted)]

    async def idle(self) -> None:
        """Return once no task is on the index of unfinished ones, nor at work here."""

        async def is_idle() -> bool:
            return not (await self.store.tracked() or self.worker._runs)

        await eventually(is_idle)


async def eventually(holds: Callable[[], Awaitable[object]]) -> None:
    """Return once that holds, of which no event tells."""
    async with asyncio.timeout(PATIENCE_S):
        while not await holds():  # noqa: ASYNC110  # see above
            await asyncio.sleep(0.001)


@asynccontextmanager
async def working(
    *functions: Callable[..., Any], store: MemoryStore | None = None, instance: str = "inst_1", slots: int = 10
) -> AsyncIterator[Workplace]:
    """A worker of these tasks at work; with `store` beside others of the same one."""
    store = store or MemoryStore()
    registry = Registry(functions)
    queue = LocalQueue(list(registry.definitions.values()), slots=slots)
    journal = Journal(store, interval_s=0.001)
    lease = Lease(store, instance, lease_s=LEASE_S)
    await store.sign(instance, LEASE_S)
    worker = Worker(
        store, queue, Kit(registry, journal, lease, model_settings(), open_till(), ttl_s=TTL_S), ttl_s=TTL_S
    )
    async with Background() as background:
        background.spawn(journal.run())
        background.spawn(lease.sign())
        async with worker:
            yield Workplace(store, registry, worker, queue)


@asynccontextmanager
async def engine_of(
    *functions: Callable[..., Any],
    store: MemoryStore | None = None,
    responder: Responder | None = None,
    **settings: Any,
) -> AsyncIterator[Engine]:
    """The engine of an application that runs these tasks itself."""
    store = store or MemoryStore()
    store.shared = False  # or others would run them
    chosen = Settings(**{"allowed_models": ("*",), **GENEROUS, **settings})
    with mock.patch.object(parts, "MemoryStore", return_value=store):
        application = create_app(responder or Script(), chosen, tasks=functions)
        async with application.router.lifespan_context(application):
            yield application.state.engine


@contextmanager
def hurried() -> Iterator[list[BaseException]]:
    """Have workers wait for next to nothing between attempts; gives what is reported to the log."""
    reports: list[BaseException] = []
    with (
        mock.patch.object(run_module, "BACKOFF_S", (0.001, 0.002)),
        mock.patch.object(run_module, "STOP_TIMEOUT_S", 0.05),
        mock.patch.object(run_module, "RETRY_S", 0.01),
        mock.patch.object(worker_module, "RETRY_S", 0.01),
        mock.patch.object(run_module, "LOOK_S", 0.01),
        mock.patch.object(worker_module, "LOOK_S", 0.05),
        mock.patch.object(sweeper_module, "EVERY_S", 0.02),
        mock.patch.object(desk_module, "SUBMIT_S", 0.0),
        mock.patch.object(logs, "report", reports.append),
    ):
        yield reports


@asynccontextmanager
async def processes() -> AsyncIterator[None]:
    """A pool for plain functions."""
    async with Offloader(1):
        yield


def model_settings() -> ModelSettings:
    """A model that says nothing."""
    return ModelSettings(
        responder=Script(),
        default_model="scripted",
        max_output_tokens=100,
        context_tokens=10_000,
        truncation="auto",
        idle_timeout_s=60.0,
    )


def result_of(done: TaskDone) -> Any:
    """What a task has come to."""
    assert done.status == "complete", done
    return msgspec.json.decode(done.result_json or "")


def failure_of(done: TaskDone) -> tuple[str, str]:
    """Type and code of why a task failed."""
    assert done.status == "failed", done
    assert done.error is not None
    assert done.error.message
    assert done.result_json is None
    return done.error.type, done.error.code
