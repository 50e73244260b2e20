"""Says in the log when Redis stops answering, when it answers again, and what it refuses: once, not at each call."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from redis.exceptions import ResponseError

from realtime.observe import logs, metrics

STEADY_S = 3.0
"""How long nothing may have failed before Redis counts as back: of several connections, or nodes, one may work."""
REFUSED_S = 60.0
"""How long a reason that was logged is not logged again."""
MAX_REASON_CHARS = 200
MAX_REASONS = 20
"""Reasons that are logged within `REFUSED_S`: their texts are the server's."""


def reason_of(error: ResponseError) -> str:
    """Why Redis refuses, in its words; not what it refuses, which it repeats of a command that it doesn't know."""
    return str(error).partition(", with args")[0][:MAX_REASON_CHARS]


class Health:
    """How Redis does, as far as its replies tell. `clock` gives monotonic seconds; tests pass their own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._away_since: float | None = None
        self._failed_at = 0.0
        self._refused: dict[str, float] = {}
        """When each reason was logged."""

    def failed(self, error: Exception) -> None:
        """There was no reply."""
        metrics.STORE_ERRORS.labels("unreachable").inc()
        self._failed_at = self._clock()
        if self._away_since is None:
            self._away_since = self._failed_at
            logs.warning("redis does not answer", error=type(error).__qualname__)

    def replied(self, replies: Sequence[Any]) -> None:
        """These were the replies, some of which may be exceptions: an error of Redis, or the lack of a reply."""
        errors = [reply for reply in replies if isinstance(reply, Exception)]
        for error in errors:
            if isinstance(error, ResponseError):
                self._refuses(reason_of(error))
            else:
                self.failed(error)
        if self._away_since is not None and self._clock() - self._failed_at >= STEADY_S:
            logs.info("redis answers again", after_s=round(self._failed_at - self._away_since, 1))
            self._away_since = None

    def _refuses(self, reason: str) -> None:
        metrics.STORE_ERRORS.labels("refused").inc()
        now = self._clock()
        self._refused = {reason: at for reason, at in self._refused.items() if now - at < REFUSED_S}
        if reason not in self._refused and len(self._refused) < MAX_REASONS:
            self._refused[reason] = now
            logs.warning("redis refuses", reason=reason)
