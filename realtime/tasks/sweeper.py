"""Looks after tasks that should have ended by now: what was never submitted is, what has ended is forgotten, and so is
what was never recorded."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from realtime.errors import NotFound, StoreError, StoreUnreadable
from realtime.observe import logs, metrics
from realtime.store.base import Store, TaskRef
from realtime.tasks.queue import Queue
from realtime.tasks.record import read_recorded

EVERY_S = 1.0
LOOK_S = 10.0
"""How often it looks whether there is a worker; where there is none twice, it says so."""
BATCH = 200
"""Tasks that are looked at in one go."""


class Sweeper:
    """One of any number of sweepers of a store's index of unfinished tasks; each task is looked at by one of them,
    every `again_s`."""

    def __init__(self, store: Store, queue: Queue, *, again_s: float) -> None:
        self._store = store
        self._queue = queue
        self._again_s = again_s
        self._look_at = 0.0
        self._missed = 0

    async def run(self) -> None:
        """Sweep for ever."""
        while True:
            try:
                while await self.sweep() == BATCH:
                    pass
                unfinished = await self._store.tracked()
                metrics.TASKS_UNFINISHED.set(unfinished)
                await self._look(unfinished)
            except StoreError:
                pass  # it is tried again
            except Exception as error:  # whatever it is, there is nobody else who looks
                logs.report(error)
            await asyncio.sleep(EVERY_S)

    async def _look(self, unfinished: int) -> None:
        """Say, once until it is over, that tasks wait and nobody is there to run them."""
        now = asyncio.get_running_loop().time()
        if now < self._look_at:
            return
        self._look_at = now + LOOK_S
        waiting = await self._queue.unattended() if unfinished else 0
        self._missed = self._missed + 1 if waiting else 0
        if self._missed == 2:
            logs.warning("tasks wait, and no worker runs them", waiting=waiting)

    async def sweep(self) -> int:
        """Look at the tasks that are due; returns how many. Raises `StoreError`."""
        due = await self._store.overdue(self._again_s, BATCH)
        sessions: dict[str, set[TaskRef]] = {}
        for task in due:
            sessions.setdefault(task.session_id, set()).add(task)
        unfinished = set[TaskRef]().union(*await asyncio.gather(*map(self._unfinished, sessions, sessions.values())))
        if over := [task for task in due if task not in unfinished]:
            await self._store.untrack(over)
        await self._submit([task for task in due if task in unfinished])
        return len(due)

    async def _unfinished(self, session_id: str, tasks: set[TaskRef]) -> set[TaskRef]:
        """Those of a session's tasks that are on record, without an end. If any is on record, the session is kept."""
        try:
            recorded = await read_recorded(self._store, session_id, tasks)
            if not recorded:
                return recorded
            await self._store.use(session_id)
            heads = (await self._store.load(session_id)).heads
        except (NotFound, StoreUnreadable):  # nobody can do anything for them
            return set()
        return {task for task in recorded if not ((head := heads.get(task.task_id)) and head.finished)}

    async def _submit(self, tasks: Sequence[TaskRef]) -> None:
        for task in tasks:
            await self._queue.submit(task)
