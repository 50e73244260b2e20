"""Sheds load as coalescing: when this process is busy, streams are read less often, and more at a time.

A token that is read, framed and written alone costs several times what it costs among others: most of that is the
kernel's, per read and per write. So a busy process takes a rest after each read of a stream; what arrives meanwhile
waits in the kernel, is read at once, and goes out as one frame. Latency grows by the rest, which is bounded, instead of
by a queue, which is not. An idle process never rests, and each token goes out as soon as it comes.
"""

from __future__ import annotations

import asyncio
import time

SAMPLE_S = 0.2
TARGET = 0.55
"""The share of one core beyond which rests grow. Below it a core still takes a burst without falling behind."""
STEP_S = 0.03
"""How much a rest grows with each sample, for a process that is wholly busy beyond the target."""
MAX_REST_S = 0.05
"""The longest rest: what may be added to a token's latency, half of the 100 ms that a reader does not notice."""
LATE_S = 0.02
"""A timer that fires so late tells of a busy loop even where the process got little of its core."""

GRAIN_S = 0.004
"""Rests end in steps of this: thousands of timers cost more than what they time."""
SAME_READ_S = 0.001
"""Pieces that follow each other within this came in one read."""


class Pace:
    """How long a stream rests after each read: `rest_s`, 0 while the process is not busy."""

    __slots__ = ("_resting", "rest_s")

    def __init__(self) -> None:
        self.rest_s = 0.0
        self._resting: dict[int, list[asyncio.Future[None]]] = {}

    def observe(self, *, busy: float, late_s: float) -> None:
        """Take a sample: the share of a core that the process used, and how late a timer fired, in seconds."""
        if late_s >= LATE_S:
            busy = 1.0
        grown = self.rest_s + STEP_S * (busy - TARGET) / (1 - TARGET)
        self.rest_s = min(max(grown, 0.0), MAX_REST_S)

    async def run(self) -> None:
        """Take samples for ever."""
        loop = asyncio.get_running_loop()
        while True:
            started, used = loop.time(), time.process_time()
            await asyncio.sleep(SAMPLE_S)
            elapsed = loop.time() - started
            self.observe(busy=(time.process_time() - used) / elapsed, late_s=elapsed - SAMPLE_S)

    async def rest(self) -> None:
        """Rest for about `rest_s`. Streams whose rests end within the same few milliseconds share a timer."""
        loop = asyncio.get_running_loop()
        slot = int((loop.time() + self.rest_s) / GRAIN_S) + 1
        sharing = self._resting.get(slot)
        if sharing is None:
            sharing = self._resting[slot] = []
            loop.call_at(slot * GRAIN_S, self._end, slot)
        waiter = loop.create_future()
        sharing.append(waiter)
        await waiter

    def _end(self, slot: int) -> None:
        for waiter in self._resting.pop(slot):
            if not waiter.done():
                waiter.set_result(None)


class Breath:
    """One stream's rests. `take` is awaited after each piece; pieces that come in one go are one read."""

    __slots__ = ("_pace", "_rested_at")

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._rested_at = 0.0

    async def take(self) -> None:
        """Rest, unless the piece just taken was there already when the last rest ended."""
        loop = asyncio.get_running_loop()
        if loop.time() - self._rested_at > SAME_READ_S:
            await self._pace.rest()
            self._rested_at = loop.time()
