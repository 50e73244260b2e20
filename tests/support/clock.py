"""The loop's clock in a test's hands, so that hours pass without anybody waiting."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock


@contextmanager
def advancing_clock() -> Iterator[Callable[[float], None]]:
    """A function that puts the running loop's clock forward by so many seconds, in one jump.

    What was due in between happens on the loop's next turn. For asyncio's own loops; `time.monotonic()` stays
    what it is.
    """
    loop = asyncio.get_running_loop()
    real, ahead_s = loop.time, 0.0

    def advance(seconds: float) -> None:
        nonlocal ahead_s
        ahead_s += seconds

    def now() -> float:
        return real() + ahead_s

    with mock.patch.object(loop, "time", now):
        yield advance
