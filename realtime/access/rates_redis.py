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
GIVE_BACK = script("""
local full_at = redis.call('GET', KEYS[1])
if full_at then redis.call('SET', KEYS[1], full_at - ARGV[1], 'KEEPTTL') end
return 1
""")
"""ARGV: after how long there is one more. What is not there is full."""


class RedisRates:
    """Those of all instances, in Redis: one key each, gone when it is full again. `TAKE` is throttled-py's script."""

    def __init__(self, url: str) -> None:
        self._calls = Calls(url)

    async def take(self, name: str, subject: str, rate: Rate, cost: int = 1) -> Taken:
        reply = await self._calls.run(TAKE, key(PREFIX, joined(name, subject)), rate.interval_s, rate.limit, cost)
        is_limited, remaining, reset_s, retry_after_s = reply
        return Taken(not is_limited, rate.limit, remaining, float(reset_s), float(retry_after_s))

    async def give_back(self, name: str, subject: str, rate: Rate) -> None:
        await self._calls.run(GIVE_BACK, key(PREFIX, joined(name, subject)), rate.interval_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._calls.aclose()
