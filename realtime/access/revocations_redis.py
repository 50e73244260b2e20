"""Revocations in Redis, for all instances."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from realtime.store.redis_calls import Calls
from realtime.store.redis_scripts import index_script

KEY = "rt:revoked"


class RedisRegister:
    """A register that instances share: a sorted set, by the time of the revocation in milliseconds."""

    def __init__(self, url: str, *, keep_s: float) -> None:
        self._calls = Calls(url)
        self._keep_ms = round(keep_s * 1000)

    async def add(self, subject: str) -> None:
        """As the interface says."""
        await self._calls.run(_ADD, KEY, self._keep_ms, subject)

    async def all(self) -> dict[str, float]:
        """As the interface says."""
        found = await self._calls.run(_ALL, KEY, self._keep_ms)
        return {name.decode(): int(at) / 1000 for name, at in zip(found[::2], found[1::2], strict=True)}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._calls.aclose()


_ADD = index_script("""
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', after(-tonumber(ARGV[1]))))
redis.call('ZADD', KEYS[1], string.format('%.0f', after(0)), ARGV[2])
return redis.call('PEXPIRE', KEYS[1], ARGV[1])
""")
"""ARGV: for how long it is kept, what is revoked."""

_ALL = index_script("""
local oldest = '(' .. string.format('%.0f', after(-tonumber(ARGV[1])))
return redis.call('ZRANGE', KEYS[1], oldest, '+inf', 'BYSCORE', 'WITHSCORES')
""")
"""ARGV: how old they may be."""
