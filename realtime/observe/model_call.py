"""One call of a model, as it is seen from outside: counted and timed."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from realtime.observe import metrics


class ModelCall:
    """A call that lasts as long as the `with` block. `first` is to be called once, when it has said something."""

    __slots__ = ("_began_at",)

    def first(self) -> None:
        """The first piece of its answer is there."""
        metrics.FIRST_TOKEN_SECONDS.observe(time.monotonic() - self._began_at)

    def __enter__(self) -> Self:
        self._began_at = time.monotonic()
        metrics.MODEL_CALLS.inc()
        metrics.MODEL_CALLS_RUNNING.inc()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        metrics.MODEL_CALLS_RUNNING.dec()
        metrics.upstream_failed(error)
