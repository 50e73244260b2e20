"""What a running attempt reports, on its way to the store."""

from __future__ import annotations

import asyncio
from numbers import Integral
from typing import Any

from realtime.journal import Journal, Tail
from realtime.protocol import MAX_FRAME_CHARS, TaskOutputTextDelta, TaskProgress, timestamp
from realtime.responders.answering import checked
from realtime.tasks.outcome import MAX_MESSAGE_CHARS

PROGRESS_S = 0.05
"""The shortest time between two progress events of an attempt: of those in between only the newest is kept."""
MAX_UNSTORED = 256
"""How many events of an attempt may wait for the store before the attempt waits for it too."""
WAIT_S = 0.02


class AttemptReporter:
    """Reports of one attempt, through the journal. `tail` is the end of its task's channel."""

    def __init__(self, journal: Journal, tail: Tail, *, attempt: int) -> None:
        self._journal = journal
        self._tail = tail
        self._attempt = attempt
        self._template = TaskOutputTextDelta(task_id=tail.channel, attempt=attempt, delta="")
        self._newest: TaskProgress | None = None
        self._held = False
        self._told_at = -PROGRESS_S
        self._timer: asyncio.TimerHandle | None = None
        self._is_stopped = False

    async def progress(self, progress: int | float, total: int | float | None, message: str | None) -> None:
        """Report how far the attempt is; less than before counts as that. Waits while too much is not stored yet.

        Raises `ValueError` or `TypeError` for what is no number that every client could read. A long message is cut.
        """
        self._check()
        progress = _number(progress)
        before = self._newest.progress if self._newest else progress
        self._newest = TaskProgress(
            task_id=self._tail.channel,
            attempt=self._attempt,
            progress=max(before, progress),
            total=None if total is None else _number(total),
            message=None if message is None else checked(message)[:MAX_MESSAGE_CHARS],
            at=timestamp(),
        )
        self._held = True
        self._tell_in_time()
        await self._room()

    async def write(self, text: str) -> None:
        """Report the next piece of text. Waits while too much is not stored yet."""
        self._check()
        checked(text)
        self.flush()
        for start in range(0, len(text), MAX_FRAME_CHARS):
            self._tail.view.append_delta(self._template, text[start : start + MAX_FRAME_CHARS])
            self._journal.mark(self._tail)
            await self._room()

    def flush(self) -> None:
        """Tell the progress that was held back, if any."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._held and self._newest is not None:
            self._held = False
            self._told_at = asyncio.get_running_loop().time()
            self._tail.view.append(self._newest)
            self._journal.mark(self._tail)

    def stop(self) -> None:
        """Report nothing more: an attempt that was left behind is cancelled where it reports."""
        self._is_stopped = True
        self._held = False
        self.flush()

    def _tell_in_time(self) -> None:
        loop = asyncio.get_running_loop()
        due = self._told_at + PROGRESS_S
        if loop.time() >= due:
            self.flush()
        elif self._timer is None:
            self._timer = loop.call_at(due, self.flush)

    async def _room(self) -> None:
        await asyncio.sleep(0)
        while self._tail.view.log.head - self._tail.view.stored > MAX_UNSTORED:
            self._check()
            await asyncio.sleep(WAIT_S)  # the journal tells nobody

    def _check(self) -> None:
        if self._is_stopped:
            raise asyncio.CancelledError


def _number(value: Any) -> int | float:
    """A number as both encodings can carry it, whatever library it is of."""
    number = int(value) if isinstance(value, Integral) else float(value)
    if not abs(number) < 2**63:
        raise ValueError("progress is told in numbers")
    return number
