"""Where tasks are handed in: what is registered, what is on record as unfinished, and the queue."""

from __future__ import annotations

from contextlib import suppress

from msgspec import Struct

from realtime.errors import RateLimited, StoreError
from realtime.observe import metrics
from realtime.store.base import Store, TaskRef
from realtime.tasks.queue import Queue
from realtime.tasks.registry import Registry

LOOKS_PER_TTL = 3
"""How often within its time to live an unfinished task is looked at, and its session so kept."""
FULL_WAIT_MS = 1000
"""When who has too many tasks may try again."""
SUBMIT_S = 5.0
"""How long a task that was announced may take to be on record and in the queue, before that is looked into."""


class Desk(Struct, frozen=True):
    """Takes tasks in. `ttl_s` is how long one is kept after its last use, `most_per_payer` how many of one payer may
    run or wait."""

    registry: Registry
    store: Store
    queue: Queue
    ttl_s: float
    most_per_payer: int

    async def announce(self, task: TaskRef, payer: str | None) -> None:
        """Note a task that is about to be recorded: whatever happens from now on, it is found. Raises `RateLimited` and
        `StoreError`: then it must not be recorded."""
        due_s = min(SUBMIT_S, self.ttl_s / LOOKS_PER_TTL)
        if not await self.store.track(task, due_s, payer, self.most_per_payer):
            metrics.LIMITS_HIT.labels("tasks_at_once").inc()
            raise RateLimited(
                "too_many_tasks_at_once", "Too many tasks of yours run or wait.", retry_after_ms=FULL_WAIT_MS
            )

    async def withdraw(self, task: TaskRef) -> None:
        """Forget a task that was announced, and will certainly not be recorded."""
        with suppress(StoreError):  # then it is found that it is not
            await self.store.untrack([task])

    async def submit(self, task: TaskRef) -> None:
        """Have a recorded task run. What goes wrong here the index of unfinished tasks mends."""
        with suppress(StoreError):
            await self.queue.submit(task)
