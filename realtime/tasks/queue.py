"""What hands tasks out to workers. It only dispatches: what a task is, and how it stands, its log says."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Protocol, Self

from realtime.store.base import TaskRef

Handler = Callable[[TaskRef], Awaitable[None]]
"""Runs a task to its end. It raises nothing but `CancelledError`: then the task is handed out again."""


class Queue(Protocol):
    """Tasks that wait for a worker. Owned by `async with`; `run` is what a worker does, submitting takes no `run`.

    A task is handed out at least once, and again if the process that it was handed to is gone. Which waits is not told
    here: whoever needs to know reads its log.
    """

    async def submit(self, task: TaskRef) -> None:
        """Have a task handed out, once: one that waits or runs already is left as it is. Raises `StoreError`."""

    async def unattended(self) -> int:
        """How many tasks wait while no worker that knows them has been there for a while. Raises `StoreError`."""

    async def run(self, handle: Handler) -> None:
        """Hand tasks out to `handle`, as many at once as there is room, the most urgent first; for ever.

        Cancelled, it cancels what runs, hands it back to the queue, and returns once that is done or can't be.
        """

    async def drain(self) -> None:
        """Hand out no more, and hand back what has not begun; returns once nothing runs. `run` goes on until then."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
