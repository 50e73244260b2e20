"""How fast commands go out: a server lets a connection send so many messages a second, and refuses the others."""

from __future__ import annotations

import math

BURST = 40
INTERVAL_S = 0.025


class Pace:
    """One connection's. Pure: `now` is seconds of any clock that only goes on."""

    def __init__(self) -> None:
        self._full_at = -math.inf

    def take(self, now: float) -> float:
        """0.0 where one more may go out now, and is counted; else how many seconds to wait for it."""
        full_at = max(self._full_at, now) + INTERVAL_S
        wait_s = full_at - now - BURST * INTERVAL_S
        if wait_s > 0:
            return wait_s
        self._full_at = full_at
        return 0.0
