"""Wakes one waiting task: the least that a reader needs, cheaper than an `asyncio.Event` per connection."""

from __future__ import annotations

import asyncio
import math


class Doorbell:
    """One task waits, anybody rings. A ring while nobody waits is kept, and several are one."""

    __slots__ = ("_rung", "_waiter")

    def __init__(self) -> None:
        self._rung = False
        self._waiter: asyncio.Future[None] | None = None

    def ring(self) -> None:
        """Wake the waiting task, now or when it next waits."""
        self._rung = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self, until: float = math.inf) -> None:
        """Return once it rings or has rung since the last call, or at loop time `until`."""
        if not self._rung:
            await self._ringing(until)
        self._rung = False

    async def _ringing(self, until: float) -> None:
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = loop.call_at(until, self.ring) if until < math.inf else None
        try:
            await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()
