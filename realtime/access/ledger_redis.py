"""The ledger in Redis: each step is one script over one account, which is one key, so a cluster works.

The key is a hash:

| field | holds |
|---|---|
| `used`, `held` | what was charged, and what live holds keep together |
| `h:ID` | a hold: its amount, what it has spent so far, its deadline |
| `e:ID` | a hold that has ended: what was charged for it, 1 if it was settled, until when that is remembered |
| `look` | when to look for what has run out: not at each use, which with many holds is not free |

Times are milliseconds of Redis's own clock. Each use moves the key's time to live.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from realtime.access.ledger import REMEMBER_S, Account, Balance, Exceeded, Hold
from realtime.access.names import key
from realtime.store.redis_calls import Calls, Command, checked
from realtime.store.redis_scripts import script

PREFIX = "rt:account:"
BATCH = 500
"""Holds that are renewed in one pipeline: more would make others wait for the answer."""

_BOOK = """
local key = KEYS[1]
local lease, keep, remember = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function get(field)
    return tonumber(redis.call('HGET', key, field) or 0)
end

local function add(field, amount)
    if amount ~= 0 then redis.call('HINCRBY', key, field, string.format('%.0f', amount)) end
end

local function three(text)
    local first, second, third = string.match(text or '0 0 0', '(%S+) (%S+) (%S+)')
    return tonumber(first), tonumber(second), tonumber(third)
end

-- The amount of a hold, and what it has spent; 0 and 0 if there is none.
local function hold(id)
    return three(redis.call('HGET', key, 'h:' .. id))
end

-- What was charged for a hold that has ended, and 1 if it was settled; 0 and 0 if it has not.
local function ended(id)
    return three(redis.call('HGET', key, 'e:' .. id))
end

-- Make a hold, prolong it, or take back that it has run out.
local function put(id, amount, spent)
    local before, known = hold(id)
    local charged = ended(id)
    add('held', amount - before)
    add('used', -charged)
    if charged ~= 0 then redis.call('HDEL', key, 'e:' .. id) end
    spent = math.max(spent, known, charged)
    redis.call('HSET', key, 'h:' .. id, string.format('%.0f %.0f %.0f', amount, spent, now + lease))
end

-- End a hold, which comes to `charge`.
local function finish(id, charge, settled)
    add('held', -hold(id))
    add('used', charge - ended(id))
    redis.call('HDEL', key, 'h:' .. id)
    local forget = now + (charge == 0 and lease or remember)
    redis.call('HSET', key, 'e:' .. id, string.format('%.0f %.0f %.0f', charge, settled, forget))
end

local function look()
    local again = now + lease
    local found = redis.call('HGETALL', key)
    for at = 1, #found, 2 do
        local kind, id = string.sub(found[at], 1, 2), string.sub(found[at], 3)
        local _, second, deadline = three(found[at + 1])
        if kind == 'e:' and deadline <= now then redis.call('HDEL', key, found[at]) end
        if kind == 'h:' and deadline <= now then finish(id, second, 0) end
        if kind == 'h:' and deadline > now then again = math.min(again, deadline) end
    end
    redis.call('HSET', key, 'look', string.format('%.0f', again))
end

if get('look') <= now then look() end
redis.call('PEXPIRE', key, string.format('%.0f', math.max(lease, keep)))
"""
"""ARGV, of each script: the lease, how long the account is kept, how long the end of a hold is remembered."""

HOLD = script(
    _BOOK
    + """
local id, amount, limit = ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6])
local charged, settled = ended(id)
local others = get('used') - charged + get('held') - hold(id)
local fits = settled == 0 and others + amount <= limit
if fits then put(id, amount, 0) end
return {fits and 1 or 0, get('used'), get('held')}
"""
)
"""ARGV: the hold, its amount, the limit. Returns whether it is held now, and the balance."""

RENEW = script(
    _BOOK
    + """
for at = 4, #ARGV, 3 do
    local _, settled = ended(ARGV[at])
    local amount = math.max(tonumber(ARGV[at + 1]), (hold(ARGV[at]))) -- it may have grown while this was under way
    if settled == 0 then put(ARGV[at], amount, tonumber(ARGV[at + 2])) end
end
return 1
"""
)
"""ARGV: for each hold its id, its amount, what it has spent."""

SETTLE = script(
    _BOOK
    + """
local _, settled = ended(ARGV[4])
if settled == 0 then finish(ARGV[4], tonumber(ARGV[5]), 1) end
return 1
"""
)
"""ARGV: the hold, what it came to."""

BALANCE = script(_BOOK + "return {get('used'), get('held')}")


class RedisLedger:
    """See `realtime.access.ledger.Ledger`. `url` is that of a server, or of a node of a cluster."""

    def __init__(self, url: str, *, lease_s: float) -> None:
        self.lease_s = lease_s
        self._calls = Calls(url)

    async def hold(self, account: Account, hold_id: str, amount: int) -> Balance:
        reply = await self._calls.run(HOLD, *self._book(account), hold_id, amount, account.limit)
        fits, used, held = map(int, reply)
        balance = Balance(account.limit, used, held)
        if not fits:
            raise Exceeded(balance)
        return balance

    async def renew(self, holds: Sequence[Hold]) -> None:
        for start in range(0, len(holds), BATCH):
            arguments = self._by_account(holds[start : start + BATCH])
            for reply in await self._calls.run_all(RENEW, arguments):
                checked(reply)

    async def settle(self, account: Account, hold_id: str, spent: int) -> None:
        await self._calls.run(SETTLE, *self._book(account), hold_id, spent)

    async def balance(self, account: Account) -> Balance:
        used, held = map(int, await self._calls.run(BALANCE, *self._book(account)))
        return Balance(account.limit, used, held)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._calls.aclose()

    def _book(self, account: Account) -> tuple[Any, ...]:
        """The arguments that each script begins with."""
        return key(PREFIX, account.name), _ms(self.lease_s), _ms(account.keep_s), _ms(REMEMBER_S)

    def _by_account(self, holds: Sequence[Hold]) -> list[Command]:
        found: dict[str, list[Any]] = {}
        for hold in holds:
            arguments = found.setdefault(hold.account.name, [*self._book(hold.account)])
            arguments += (hold.hold_id, hold.amount, hold.spent)
        return list(found.values())


def _ms(seconds: float) -> int:
    return max(round(seconds * 1000), 1)
