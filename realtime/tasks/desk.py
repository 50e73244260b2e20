"""Where tasks are handed in: what is registered, what is on record as unfinished, and the queue."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from msgspec import Struct

from realtime.errors import StoreError
from realtime.store.base import Store, TaskRef
from realtime.tasks.queue import Queue
from realtime.tasks.registry import Registry

LOOKS_PER_TTL = 3
"""How often within its time to live an unfinished task is looked at, and its session so kept."""
SUBMIT_S = 5.0
"""How long a task that was announced may take to be on record and in the queue, before that is looked into."""


class Desk(Struct, frozen=True):
    """Takes tasks in. `ttl_s` is how long one is kept after its last use."""

    registry: Registry
    store: Store
    queue: Queue
    ttl_s: float

    async def announce(self, tasks: Sequence[TaskRef]) -> None:
        """Note tasks that are about to be recorded: whatever happens from now on, they are found. Raises `StoreError`:
        then they must not be recorded."""
        for task in tasks:
            await self.store.track(task, min(SUBMIT_S, self.ttl_s / LOOKS_PER_TTL))

    async def submit(self, task: TaskRef) -> None:
        """Have a recorded task run. What goes wrong here the index of unfinished tasks mends."""
        with suppress(StoreError):
            await self.queue.submit(task)
