"""Sheds load as coalescing: when this process is busy, streams are read less often, and more at a time.

A token that is read, framed and written alone costs several times what it costs among others: most of that is the
kernel's, per read and per write. So a busy process takes a rest after each read of a stream; what arrives meanwhile
waits in the kernel, is read at once, and goes out as one frame. Latency grows by the rest, which is bounded, instead of
by a queue, which is not. An idle process never rests, and each token goes out as soon as it comes. Nor does one that is
busy with something else than streams: there would be nothing to gain, and whoever makes it busy would slow down others.
"""

from __future__ import annotations

import asyncio
import time

SAMPLE_S = 0.2
TARGET = 0.55
"""The share of one core beyond which rests grow. Below it a core still takes a burst without falling behind."""
FEW_READS = 1000
"""Reads in a second that are not worth a rest: all together they cost less than a tenth of a core."""
STEP_S = 0.03
"""How much a rest grows with each sample, for a process that is wholly busy beyond the target."""
MAX_REST_S = 0.05
"""The longest rest: what may be added to a token's latency, half of the 100 ms that a reader does not notice."""
LATE_S = 0.02
"""A timer that fires so late tells of a busy loop even where the process got little of its core."""

GRAIN_S = 0.004
"""Rests end in steps of this: thousands of timers cost more than what they time."""
MAX_IN_A_ROW = 512
"""Pieces that are taken from one stream before others have their turn."""
AT_HAND_S = 0.00005
"""A piece that comes within this was there already; one that had to be read takes a turn of the loop at least."""


class Pace:
    """How long a stream rests after each read: `rest_s`, 0 while the process is not busy with streams.

    `reads` counts what was read of all streams.
    """

    __slots__ = ("_resting", "reads", "rest_s")

    def __init__(self) -> None:
        self.rest_s = 0.0
        self.reads = 0
        self._resting: dict[int, list[asyncio.Future[None]]] = {}

    def observe(self, *, busy: float, late_s: float, reads_per_s: float) -> None:
        """Take a sample: the share of a core that the process used, how late a timer fired, in seconds, and how often
        streams were read."""
        if late_s >= LATE_S:
            busy = 1.0
        if reads_per_s < FEW_READS:
            busy = 0.0
        grown = self.rest_s + STEP_S * (busy - TARGET) / (1 - TARGET)
        self.rest_s = min(max(grown, 0.0), MAX_REST_S)

    async def run(self) -> None:
        """Take samples for ever."""
        loop = asyncio.get_running_loop()
        while True:
            started, used, read = loop.time(), time.process_time(), self.reads
            await asyncio.sleep(SAMPLE_S)
            elapsed = loop.time() - started
            busy = (time.process_time() - used) / elapsed
            self.observe(busy=busy, late_s=elapsed - SAMPLE_S, reads_per_s=(self.reads - read) / elapsed)

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
    """One stream's rests. `take` is awaited after each piece that was taken from it."""

    __slots__ = ("_asked_at", "_in_a_row", "_pace")

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._asked_at = 0.0
        self._in_a_row = 0

    async def take(self) -> None:
        """Rest if the process is busy, unless the piece was there the moment it was asked for: there may be more.

        A stream that always has more at hand lets the loop turn once in a while.
        """
        self._in_a_row += 1
        self._pace.reads += 1
        if self._pace.rest_s and time.monotonic() - self._asked_at > AT_HAND_S:
            await self._pace.rest()
        elif self._in_a_row >= MAX_IN_A_ROW:
            self._in_a_row = 0
            await asyncio.sleep(0)
        self._asked_at = time.monotonic()
