"""How the accounts of a real deployment stand, read through the ledger's own interface."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from realtime.access.ledger import Account, Balance
from realtime.access.ledger_redis import RedisLedger
from realtime.access.names import joined
from realtime.access.till import Budget

LEASE_S = 3.0
"""The lease of instances in tests of what a lost one held."""
PATIENCE_S = 14.0
POLL_S = 0.02
ANONYMOUS = "address:127.0.0.1"
"""Who pays, where nobody shows a token."""


class Accounts:
    """The accounts in one Redis. `payer` is whose."""

    def __init__(self, ledger: RedisLedger, payer: str = ANONYMOUS) -> None:
        self._ledger = ledger
        self._payer = payer

    async def tokens(self) -> Balance:
        """The budget of the day."""
        return await self._ledger.balance(Budget(0, 86_400).account(self._payer, time.time()))

    async def session(self, session_id: str) -> Balance:
        """The budget of a session."""
        return await self._ledger.balance(Account(joined("session", session_id), 0, 3600.0))

    async def responses(self) -> int:
        """How many responses at once are held."""
        return (await self._ledger.balance(Account(joined("responses", self._payer), 0, 0.0))).held

    async def connections(self, kind: str = "address", name: str = "127.0.0.1") -> int:
        """How many connections are held."""
        return (await self._ledger.balance(Account(joined("connections", kind, name), 0, 0.0))).held

    async def nothing_held(self) -> Balance:
        """Return how the tokens stand once neither tokens nor responses are held, which has to be within a lease."""
        async with asyncio.timeout(PATIENCE_S):
            while await self.responses() or (await self.tokens()).held:  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)
        return await self.tokens()


@asynccontextmanager
async def accounts(url: str, payer: str = ANONYMOUS) -> AsyncIterator[Accounts]:
    """The accounts in a Redis."""
    async with RedisLedger(url, lease_s=LEASE_S) as ledger:
        yield Accounts(ledger, payer)


def weight(usage: dict[str, int]) -> int:
    """What a usage that a client was told weighs in a budget: the sum, a tenth of what a cache gave, five quarters of
    what it took, rounded up once."""
    read, created = usage.get("cache_read_input_tokens") or 0, usage.get("cache_creation_input_tokens") or 0
    return usage["input_tokens"] + usage["output_tokens"] - (-(2 * read + 25 * created) // 20)
