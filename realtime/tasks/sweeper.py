"""Looks after tasks that should have ended by now: what was never submitted is, what has ended is forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from realtime.errors import NotFound, StoreError, StoreUnreadable
from realtime.observe import logs, metrics
from realtime.store.base import Store, TaskRef
from realtime.tasks.queue import Queue

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
        are_over = await asyncio.gather(*map(self._is_over, due))
        over = [task for task, is_over in zip(due, are_over, strict=True) if is_over]
        if over:
            await self._store.untrack(over)
        await self._submit([task for task in due if task not in over])
        return len(due)

    async def _is_over(self, task: TaskRef) -> bool:
        """Whether a task has ended, or its session has. Being asked for, its session is kept."""
        try:
            snapshot = await self._store.load(task.session_id)
        except (NotFound, StoreUnreadable):  # nobody can do anything for it
            return True
        head = snapshot.heads.get(task.task_id)
        return head is not None and head.finished

    async def _submit(self, tasks: Sequence[TaskRef]) -> None:
        for task in tasks:
            await self._queue.submit(task)
