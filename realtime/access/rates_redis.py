"""Rates over all instances, in Redis."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from throttled.rate_limiter.gcra import RedisLimitAtomicActionSpec

from realtime.access.names import joined, key
from realtime.access.rates import Rate, Taken
from realtime.store.redis_calls import Calls
from realtime.store.redis_scripts import script

PREFIX = "rt:rate:"
TAKE = script(RedisLimitAtomicActionSpec.SCRIPTS)


class RedisRates:
    """Those of all instances, in Redis: one key each, gone when it is full again. The step is throttled-py's script."""

    def __init__(self, url: str) -> None:
        self._calls = Calls(url)

    async def take(self, name: str, subject: str, rate: Rate, cost: int = 1) -> Taken:
        reply = await self._calls.run(TAKE, key(PREFIX, joined(name, subject)), rate.interval_s, rate.limit, cost)
        is_limited, remaining, reset_s, retry_after_s = reply
        return Taken(not is_limited, rate.limit, remaining, float(reset_s), float(retry_after_s))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._calls.aclose()
