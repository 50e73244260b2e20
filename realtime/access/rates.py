"""How often something may happen: rates over all instances, and of one connection alone.

All by GCRA: what is kept is when the allowance will be full again. A full one allows `limit` at once.
"""

from __future__ import annotations

import heapq
import math
import re
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from msgspec import Struct

from realtime.access.names import joined
from realtime.settings import SettingsError

PERIODS_S = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86_400.0}
SWEEP_S = 60.0
MAX_ALLOWANCES = 100_000
"""Allowances in memory that are not full. Beyond that those are forgotten that lack least: a flood of new subjects
makes room for itself out of itself, and does not lift the limit of one that has reached it."""
KEPT_SHARE = 0.9
_SLACK = 1e-6
"""The share of one take by which sums of floats may be off."""


class Rate(Struct, frozen=True):
    """So many in so many seconds."""

    limit: int
    period_s: float

    @property
    def interval_s(self) -> float:
        """After how long there is one more."""
        return self.period_s / self.limit


class Taken(Struct, frozen=True):
    """What became of an attempt to take, and how the allowance stands. `retry_after_s` is 0 where it is allowed."""

    allowed: bool
    limit: int
    remaining: int
    reset_s: float
    """In how long the allowance is full again."""
    retry_after_s: float


def parse_rate(text: str) -> Rate:
    """The rate that a setting such as `10/minute` means. Raises `SettingsError`."""
    found = re.fullmatch(rf"(\d{{1,9}})/({'|'.join(PERIODS_S)})", text)
    if found is None or not int(found[1]):
        raise SettingsError(f"{text!r} is no rate: expected for example 10/minute, at least 1")
    return Rate(int(found[1]), PERIODS_S[found[2]])


class Allowance:
    """What is left of one rate, of which nobody else takes. Pure: `now` is seconds of any clock that only goes on."""

    __slots__ = ("_rate", "full_at")

    def __init__(self, rate: Rate) -> None:
        self._rate = rate
        self.full_at = -math.inf

    def take(self, now: float, cost: int = 1) -> float:
        """0.0 if it is allowed, and taken; else how many seconds to wait for it. A cost above the limit never is."""
        full_at = max(self.full_at, now) + cost * self._rate.interval_s
        wait_s = full_at - now - self._rate.period_s
        if wait_s > self._rate.interval_s * _SLACK:
            return wait_s
        self.full_at = full_at
        return 0.0

    def give_back(self) -> None:
        """Give back one that was taken."""
        self.full_at -= self._rate.interval_s

    def remaining(self, now: float) -> int:
        """How many may be taken at once."""
        missing = self.reset_s(now) / self._rate.interval_s
        return max(self._rate.limit - math.ceil(missing - _SLACK), 0)

    def reset_s(self, now: float) -> float:
        """In how long it is full again."""
        return max(self.full_at - now, 0.0)


class Rates(Protocol):
    """Allowances by the name of what is limited, and by who it is limited for. Owned by `async with`.

    A name always goes with the same rate.
    """

    async def take(self, name: str, subject: str, rate: Rate, cost: int = 1) -> Taken:
        """Take `cost`, which is at most the limit, if so much is left; else nothing is taken. 0 only looks.

        Raises `StoreError` where Redis does not answer within 1.5 s; it may have been taken then.
        """

    async def give_back(self, name: str, subject: str, rate: Rate) -> None:
        """Give back one that was taken. Raises `StoreError` as above."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class MemoryRates:
    """Those of this process alone. `clock` gives monotonic seconds; tests pass their own."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, max_allowances: int = MAX_ALLOWANCES) -> None:
        self._clock = clock
        self._max = max_allowances
        self._allowances: dict[str, Allowance] = {}
        self._sweep_at = 0.0

    def __len__(self) -> int:
        """How many allowances are remembered."""
        return len(self._allowances)

    async def take(self, name: str, subject: str, rate: Rate, cost: int = 1) -> Taken:
        now = self._clock()
        self._sweep(now)
        allowance = self._allowances.setdefault(joined(name, subject), Allowance(rate))
        wait_s = allowance.take(now, cost)
        return Taken(not wait_s, rate.limit, allowance.remaining(now), allowance.reset_s(now), wait_s)

    async def give_back(self, name: str, subject: str, rate: Rate) -> None:
        self._allowances.setdefault(joined(name, subject), Allowance(rate)).give_back()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._allowances.clear()

    def _sweep(self, now: float) -> None:
        """Forget what is full again, and make room."""
        is_crowded = len(self._allowances) >= self._max
        if now < self._sweep_at and not is_crowded:
            return
        kept = [item for item in self._allowances.items() if item[1].full_at > now]
        if is_crowded:
            kept = heapq.nlargest(int(self._max * KEPT_SHARE), kept, key=lambda item: item[1].full_at)
        self._allowances = dict(kept)
        self._sweep_at = now + SWEEP_S
