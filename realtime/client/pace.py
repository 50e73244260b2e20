"""How fast commands go out: a server lets a connection send so many messages a second, and refuses the others."""

from __future__ import annotations

import math

BURST = 40
INTERVAL_S = 0.025


class Pace:
    """One connection's. Pure: `now` is seconds of any clock that only goes on."""

    def __init__(self) -> None:
        self._full_at = -math.inf

    def wait_s(self, now: float) -> float:
        """In how many seconds it is the turn of one more, which takes that turn."""
        self._full_at = max(self._full_at, now) + INTERVAL_S
        return max(0.0, self._full_at - now - BURST * INTERVAL_S)
