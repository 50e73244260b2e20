"""When to come back. No I/O: the time is an argument."""

from __future__ import annotations

import random

FIRST_S = 0.25
LAST_S = 10.0
STEADY_S = 5.0
"""A connection that held for so long starts anew; a server that accepts and drops does not."""


class Backoff:
    """Waits that double, with jitter, so that the thousand clients of a lost server don't come back as one."""

    def __init__(self) -> None:
        self._failures = 0
        self._opened_at: float | None = None

    def opened(self, now: float) -> None:
        """The connection is good, since `now`, in seconds of a clock."""
        self._opened_at = now

    def delay_s(self, now: float) -> float:
        """How long to wait after a connection that ended `now`."""
        if self._opened_at is not None and now - self._opened_at >= STEADY_S:
            self._failures = 0
        longest: float = min(LAST_S, FIRST_S * 2**self._failures)
        self._failures += 1
        self._opened_at = None
        return longest * random.uniform(0.5, 1.0)
