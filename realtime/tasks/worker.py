"""Runs the tasks that a queue hands out: in a process of its own, or beside the server's sessions."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from realtime.background import Background
from realtime.control import CancelTask
from realtime.errors import NotFound, RealtimeError, StoreError, StoreUnreadable
from realtime.hub import Hub
from realtime.live import RETRY_S, LiveSession
from realtime.observe import logs
from realtime.protocol import ChannelEvent
from realtime.session import ResponseState
from realtime.store.base import PositionConflict, Store, TaskRef
from realtime.tasks.outcome import ended, failed
from realtime.tasks.queue import Queue
from realtime.tasks.run import Kit, Run
from realtime.upkeep import LOOK_S, USES_PER_TTL, look_at_all, use_all


class Worker:
    """A worker, owned by `async with`, inside which it works. It listens to the sessions of its tasks.

    `ttl_s` is the shortest time that a session is kept after its last use.
    """

    def __init__(self, store: Store, queue: Queue, kit: Kit, *, ttl_s: float) -> None:
        self.instance = kit.lease.instance
        self.hub = Hub(store, self)
        self.draining = False
        """Whether its instance drains. Tasks begin all the same until `finish_turns`: a response that is to finish may
        wait for one."""
        self._store = store
        self._queue = queue
        self._kit = kit
        self._ttl_s = ttl_s
        self._runs: dict[TaskRef, Run] = {}
        self._background = Background()

    async def __aenter__(self) -> Self:
        await self._background.__aenter__()
        for work in (self._queue.run(self.handle), self._look(), self._use()):
            self.spawn(work)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._background.__aexit__(kind, error, trace)

    async def handle(self, task: TaskRef) -> None:
        """Run a task to its end. Cancelled, it is left for another worker."""
        if task in self._runs:  # handed out twice
            await self._runs[task].over.wait()
            return
        try:
            run = self._runs[task] = Run(task, self._kit)
        except NotFound:  # a task that this worker does not know
            return
        try:
            await self._run(run, task)
        except Exception as error:  # a fault of ours: the index of unfinished tasks finds it again
            logs.report(error)
        finally:
            del self._runs[task]
            run.over.set()

    async def _run(self, run: Run, task: TaskRef) -> None:
        while True:
            try:
                async with self.hub.use(task.session_id) as live:
                    await run.run(live)
                break
            except (NotFound, StoreUnreadable):
                break
            except StoreError:
                await asyncio.sleep(RETRY_S)
        with suppress(StoreError):  # then it is found to be over
            await self._store.untrack([task])

    async def finish_turns(self) -> None:
        """Begin no more tasks; return once none runs here."""
        await self._queue.drain()

    async def end_turns(self, error: RealtimeError) -> None:
        """End all that run here with `error`, and begin no more; returns once that is stored, however long it takes."""
        self.spawn(self._queue.drain())
        runs = list(self._runs.items())
        for task, run in runs:
            run.end(failed(task, error))
        for _, run in runs:
            await run.over.wait()

    def followed(self, _live: LiveSession) -> list[str]:
        """Nobody reads here."""
        return []

    def changed(self, live: LiveSession) -> None:
        """End the runs that the session's end, or somebody else, has ended."""
        for task, run in self._runs.items():
            if task.session_id == live.id:
                self._look_at(run, task, live)

    def asked(self, live: LiveSession, request: ChannelEvent) -> None:
        """Cancel a run that is to be cancelled."""
        if not isinstance(request, CancelTask):
            return
        task = live.state.unfinished_tasks.get(request.task_id)
        if task is not None:
            task.stopping = True
            run = self._runs.get(TaskRef(live.id, task.id, task.name))
            if run is not None:
                run.end(ended(run.task, "cancelled", for_event_id=request.for_event_id))

    def unended(self, live: LiveSession, response: ResponseState) -> None:
        """Responses are the servers'."""

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Have `work` run until it ends or the worker does."""
        self._background.spawn(work)

    def _look_at(self, run: Run, task: TaskRef, live: LiveSession) -> None:
        state = live.state.tasks.get(task.task_id)
        if live.gone:
            run.lose(NotFound("session_not_found", "The session is gone."))
        elif state is not None and (state.done or state.instance not in {None, self.instance}):
            run.lose(PositionConflict())
        elif live.state.closed:
            run.end(ended(task, "cancelled", for_event_id=live.state.closed_by))

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await look_at_all(self._store, self.hub.sessions())
            except Exception as error:  # whatever it is, there is nobody else who looks
                self._kit.lease.note(error)

    async def _use(self) -> None:
        while True:
            await asyncio.sleep(self._ttl_s / USES_PER_TTL)
            await use_all(self._store, self.hub.sessions(), self._kit.lease.note)
