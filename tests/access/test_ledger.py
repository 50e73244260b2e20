"""What every ledger promises: each sentence of `realtime.access.ledger` is a test, run over each implementation."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import pytest
from redis.asyncio import Redis

from realtime.access.ledger import REMEMBER_S, Account, Balance, Exceeded, Hold, Ledger
from realtime.access.ledger_memory import MemoryLedger
from realtime.access.ledger_redis import RedisLedger
from realtime.errors import StoreError
from tests.contract.redis_subject import running
from tests.support.redis_server import RedisServer, redis_cluster, redis_server

LEASE_S = 10.0
KEEP_S = 100_000.0
PATIENCE_S = 20.0
TOKENS = Account("budget:user%3Aalice:2026-11-29", 100, KEEP_S)
SLOTS = Account("connections:user%3Aalice", 3, 1.0)

AGE = """
for _, key in ipairs(redis.call('KEYS', 'rt:account:*')) do
    local found = redis.call('HGETALL', key)
    for at = 1, #found, 2 do
        local field, value = found[at], found[at + 1]
        local first, second, third = string.match(value, '(%S+) (%S+) (%S+)')
        if third then
            redis.call('HSET', key, field, first .. ' ' .. second .. ' ' .. string.format('%.0f', third - ARGV[1]))
        elseif field == 'look' then
            redis.call('HINCRBY', key, field, -ARGV[1])
        end
    end
    local left = redis.call('PTTL', key) - ARGV[1]
    if left > 0 then redis.call('PEXPIRE', key, string.format('%.0f', left)) else redis.call('DEL', key) end
end
"""
"""Makes accounts older by ARGV[1] milliseconds."""


@dataclass
class Subject:
    """A ledger under test, another view of the same accounts, and the passing of seconds."""

    ledger: Ledger
    other: Ledger
    advance: Callable[[float], Awaitable[None]]


@asynccontextmanager
async def memory() -> AsyncIterator[Subject]:
    """The ledger in this process, on a clock of its own."""
    now = 0.0

    async def advance(seconds: float) -> None:
        nonlocal now
        now += seconds

    async with MemoryLedger(lease_s=LEASE_S, clock=lambda: now) as ledger:
        yield Subject(ledger, ledger, advance)


@asynccontextmanager
async def in_redis(ports: list[int]) -> AsyncIterator[Subject]:
    """The ledger in an empty Redis or cluster, whose accounts grow older at a word."""
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(Redis(port=port)) for port in ports]

        async def advance(seconds: float) -> None:
            for node in nodes:
                await node.eval(AGE, 0, str(round(seconds * 1000)))  # type: ignore[misc, no-untyped-call, unused-ignore]

        for node in nodes:
            await node.flushall()  # type: ignore[no-untyped-call, unused-ignore]
        url = f"redis://127.0.0.1:{ports[0]}/0"
        ledger = await stack.enter_async_context(RedisLedger(url, lease_s=LEASE_S))
        other = await stack.enter_async_context(RedisLedger(url, lease_s=LEASE_S))
        yield Subject(ledger, other, advance)
        left = [await node.pttl(key) for node in nodes for key in await node.keys("*")]
        assert -1 not in left, "every key has a time to live at every moment"


@pytest.fixture(scope="module")
def redis_ports() -> Iterator[list[int]]:
    """The port of a Redis."""
    with running(redis_server()) as redis:
        yield [redis.port]


@pytest.fixture(scope="module")
def cluster_ports() -> Iterator[list[int]]:
    """The ports of a cluster's nodes."""
    with running(redis_cluster()) as cluster:
        yield cluster.ports


@pytest.fixture(params=["memory", "redis", "cluster"])
def implementation(
    request: pytest.FixtureRequest, redis_ports: list[int], cluster_ports: list[int]
) -> AbstractAsyncContextManager[Subject]:
    """One of the ledgers."""
    if request.param == "memory":
        return memory()
    return in_redis(redis_ports if request.param == "redis" else cluster_ports)


@pytest.fixture
async def subject(implementation: AbstractAsyncContextManager[Subject]) -> AsyncIterator[Subject]:
    """An empty ledger."""
    async with implementation as subject:
        yield subject


@pytest.fixture
def ledger(subject: Subject) -> Ledger:
    """The same, where no time passes."""
    return subject.ledger


async def test_an_account_begins_empty(ledger: Ledger) -> None:
    """Nothing is used or held of one that nobody has named."""
    assert await ledger.balance(TOKENS) == Balance(100, 0, 0)


async def test_a_hold_takes_from_what_is_free(ledger: Ledger) -> None:
    """The balance that it returns counts it already, and so does everybody's."""
    balance = await ledger.hold(TOKENS, "a", 60)
    assert balance == Balance(100, 0, 60) == await ledger.balance(TOKENS)
    assert balance.free == 40


async def test_what_does_not_fit_is_refused(ledger: Ledger) -> None:
    """The refusal says how the account stands, and holds nothing."""
    await ledger.hold(TOKENS, "a", 60)
    with pytest.raises(Exceeded) as refusal:
        await ledger.hold(TOKENS, "b", 41)
    assert refusal.value.balance == Balance(100, 0, 60)
    assert await ledger.hold(TOKENS, "b", 40) == Balance(100, 0, 100)


async def test_what_was_used_is_not_free(ledger: Ledger) -> None:
    """Until the account is forgotten."""
    await ledger.settle(TOKENS, "a", 70)
    with pytest.raises(Exceeded):
        await ledger.hold(TOKENS, "b", 31)
    assert await ledger.hold(TOKENS, "b", 30) == Balance(100, 70, 30)


async def test_a_hold_of_the_same_id_replaces_the_first(ledger: Ledger) -> None:
    """Its own amount does not stand in its way; where the new one does not fit, the old one stays."""
    await ledger.hold(TOKENS, "a", 60)
    await ledger.hold(TOKENS, "a", 60)
    assert await ledger.hold(TOKENS, "a", 100) == Balance(100, 0, 100)
    with pytest.raises(Exceeded):
        await ledger.hold(TOKENS, "a", 101)
    assert await ledger.hold(TOKENS, "a", 10) == Balance(100, 0, 10)


async def test_settling_charges_and_frees(ledger: Ledger) -> None:
    """What a hold came to may be more than it held."""
    await ledger.hold(TOKENS, "a", 60)
    await ledger.hold(TOKENS, "b", 10)
    await ledger.settle(TOKENS, "a", 20)
    assert await ledger.balance(TOKENS) == Balance(100, 20, 10)
    await ledger.settle(TOKENS, "b", 200)
    assert (await ledger.balance(TOKENS)).free == -120


@pytest.mark.parametrize("spent", [0, 20])
async def test_only_the_first_settlement_counts(ledger: Ledger, spent: int) -> None:
    """One that is sent again because its answer was lost charges nothing, nor does another's."""
    await ledger.hold(TOKENS, "a", 60)
    await ledger.settle(TOKENS, "a", spent)
    await ledger.settle(TOKENS, "a", spent)
    await ledger.settle(TOKENS, "a", 99)
    assert await ledger.balance(TOKENS) == Balance(100, spent, 0)


@pytest.mark.parametrize("spent", [0, 20])
async def test_what_comes_after_the_settlement_changes_nothing(ledger: Ledger, spent: int) -> None:
    """Calls whose callers have given up may come late, and in any order."""
    await ledger.settle(TOKENS, "a", spent)
    await ledger.renew([Hold(TOKENS, "a", 60, 30)])
    with pytest.raises(Exceeded):
        await ledger.hold(TOKENS, "a", 1)
    assert await ledger.balance(TOKENS) == Balance(100, spent, 0)


async def test_a_hold_that_is_not_renewed_runs_out(subject: Subject) -> None:
    """Whoever held it is dead: the rest is free, what was spent is charged."""
    await subject.ledger.hold(TOKENS, "a", 60)
    await subject.ledger.renew([Hold(TOKENS, "a", 60, 20)])
    await subject.advance(LEASE_S - 2)
    assert await subject.other.balance(TOKENS) == Balance(100, 0, 60)
    await subject.advance(2.1)
    assert await subject.other.balance(TOKENS) == Balance(100, 20, 0)


async def test_each_hold_runs_out_by_itself(subject: Subject) -> None:
    """However many there are, at whatever times."""
    for number in range(5):
        await subject.ledger.hold(TOKENS, f"{number}", 10)
        await subject.advance(1)
    await subject.advance(LEASE_S - 4.5)
    for number in range(4, -1, -1):
        assert (await subject.ledger.balance(TOKENS)).held == 10 * number
        await subject.advance(1)


async def test_a_hold_that_is_renewed_lives(subject: Subject) -> None:
    """However long; all are renewed in one call, of any accounts."""
    holds = [Hold(TOKENS, "a", 60), Hold(SLOTS, "a", 1), Hold(SLOTS, "b", 1)]
    for hold in holds:
        await subject.ledger.hold(hold.account, hold.hold_id, hold.amount)
    for _ in range(6):
        await subject.advance(LEASE_S / 2)
        await subject.ledger.renew(holds)
    assert await subject.ledger.balance(TOKENS) == Balance(100, 0, 60)
    assert await subject.ledger.balance(SLOTS) == Balance(3, 0, 2)


async def test_many_holds_are_renewed_at_once(subject: Subject) -> None:
    """More than go into one pipeline."""
    account = Account("many", 5_000, KEEP_S)
    holds = [Hold(account, f"{number}", 1) for number in range(1_200)]
    await subject.ledger.renew(holds)
    await subject.advance(LEASE_S / 2)
    await subject.ledger.renew(holds)
    await subject.advance(LEASE_S / 2 + 0.1)
    assert await subject.ledger.balance(account) == Balance(5_000, 0, 1_200)


async def test_a_renewal_takes_nothing_from_a_hold_that_has_grown(subject: Subject) -> None:
    """It was under way meanwhile: what it would give back somebody else might take."""
    await subject.ledger.hold(TOKENS, "a", 20)
    await subject.ledger.hold(TOKENS, "a", 80)
    await subject.ledger.renew([Hold(TOKENS, "a", 20)])
    assert (await subject.ledger.balance(TOKENS)).held == 80


async def test_no_hold_to_renew_is_no_work(ledger: Ledger) -> None:
    """Nothing happens."""
    await ledger.renew([])


async def test_what_was_spent_never_falls(subject: Subject) -> None:
    """A renewal that comes late, from whoever had the hold before, knows less."""
    await subject.ledger.hold(TOKENS, "a", 60)
    await subject.ledger.renew([Hold(TOKENS, "a", 60, 20)])
    await subject.other.renew([Hold(TOKENS, "a", 60, 0)])
    await subject.advance(LEASE_S + 0.1)
    assert await subject.ledger.balance(TOKENS) == Balance(100, 20, 0)


async def test_a_hold_that_ran_out_under_its_holder_is_made_again(subject: Subject) -> None:
    """As if it had never run out, even where it does not fit any more."""
    await subject.ledger.hold(TOKENS, "a", 60)
    await subject.ledger.renew([Hold(TOKENS, "a", 60, 20)])
    await subject.advance(LEASE_S + 0.1)
    await subject.other.hold(TOKENS, "b", 80)
    await subject.ledger.renew([Hold(TOKENS, "a", 60, 30)])
    assert await subject.ledger.balance(TOKENS) == Balance(100, 0, 140)
    await subject.ledger.settle(TOKENS, "a", 40)
    assert await subject.ledger.balance(TOKENS) == Balance(100, 40, 80)


@pytest.mark.parametrize("spent", [0, 10, 20, 45])
async def test_a_hold_that_ran_out_is_charged_once(subject: Subject, spent: int) -> None:
    """What was charged when it ran out counts towards what it came to in the end, which may be less."""
    await subject.ledger.hold(TOKENS, "a", 60)
    await subject.ledger.renew([Hold(TOKENS, "a", 60, 20)])
    await subject.advance(LEASE_S + 0.1)
    assert (await subject.ledger.balance(TOKENS)).used == 20
    await subject.ledger.settle(TOKENS, "a", spent)
    await subject.ledger.settle(TOKENS, "a", spent)
    assert await subject.ledger.balance(TOKENS) == Balance(100, spent, 0)


async def test_what_a_hold_had_spent_is_known_when_it_is_held_again(subject: Subject) -> None:
    """One that ran out goes on where it was."""
    await subject.ledger.renew([Hold(TOKENS, "a", 60, 20)])
    await subject.advance(LEASE_S + 0.1)
    assert await subject.ledger.hold(TOKENS, "a", 100) == Balance(100, 0, 100)
    await subject.advance(LEASE_S + 0.1)
    assert await subject.ledger.balance(TOKENS) == Balance(100, 20, 0)


async def test_a_charge_is_remembered_for_a_while(subject: Subject) -> None:
    """So a settlement that is tried again after an outage charges nothing; after that it is forgotten."""
    await subject.ledger.settle(TOKENS, "a", 20)
    await subject.advance(REMEMBER_S - 10)
    await subject.ledger.settle(TOKENS, "a", 20)
    assert (await subject.ledger.balance(TOKENS)).used == 20
    await subject.advance(20)
    await subject.ledger.settle(TOKENS, "a", 20)
    assert (await subject.ledger.balance(TOKENS)).used == 40


async def test_an_unknown_hold_is_charged(ledger: Ledger) -> None:
    """The ledger has lost it; it cost money all the same."""
    await ledger.settle(TOKENS, "a", 20)
    assert await ledger.balance(TOKENS) == Balance(100, 20, 0)


async def test_an_account_is_forgotten_some_time_after_its_last_use(subject: Subject) -> None:
    """Each use counts."""
    await subject.ledger.settle(TOKENS, "a", 20)
    await subject.advance(KEEP_S - 20)
    assert (await subject.ledger.balance(TOKENS)).used == 20
    await subject.advance(KEEP_S - 20)
    assert (await subject.ledger.balance(TOKENS)).used == 20
    await subject.advance(KEEP_S + 1)
    assert (await subject.ledger.balance(TOKENS)).used == 0


async def test_an_account_is_kept_as_long_as_its_holds_live(subject: Subject) -> None:
    """Even if it is to be forgotten sooner."""
    await subject.ledger.hold(SLOTS, "a", 1)
    await subject.advance(LEASE_S - 2)
    assert (await subject.ledger.balance(SLOTS)).held == 1


@pytest.mark.parametrize("id_", ["bob:2026-11-29", "{bob}", "h:x y", "\ud800", "🙂" * 5_000, "\0", ""])
async def test_accounts_of_any_name_are_apart(ledger: Ledger, id_: str) -> None:
    """Whatever a user's id holds."""
    account = Account(f"budget:{id_}", 10, KEEP_S)
    await ledger.hold(account, "a", 5)
    assert (await ledger.balance(account)).held == 5
    assert (await ledger.balance(Account(f"budget:{id_}x", 10, KEEP_S))).held == 0


async def test_large_amounts_are_exact(ledger: Ledger) -> None:
    """Up to a million million tokens."""
    account = Account("large", 10**12, KEEP_S)
    await ledger.hold(account, "a", 10**12 - 1)
    await ledger.settle(account, "a", 10**12 - 1)
    assert await ledger.hold(account, "b", 1) == Balance(10**12, 10**12 - 1, 1)


async def test_of_a_hundred_holds_at_once_no_more_are_made_than_fit(subject: Subject) -> None:
    """Two processes ask at once: no race lets them overspend."""
    ledgers = (subject.ledger, subject.other)

    async def try_to_hold(number: int) -> bool:
        try:
            balance = await ledgers[number % 2].hold(TOKENS, f"{number}", 7)
        except Exceeded:
            return False
        assert balance.used + balance.held <= TOKENS.limit
        return True

    async with asyncio.timeout(PATIENCE_S):
        made = await asyncio.gather(*map(try_to_hold, range(100)))
    assert sum(made) == 14
    assert await subject.ledger.balance(TOKENS) == Balance(100, 0, 98)


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_happens_the_sums_are_right(subject: Subject, seed: int) -> None:
    """At random: holds never pass the limit, and once all is settled what is used is what was spent."""
    dice = random.Random(seed)
    model = _Model(subject, dice)
    for _ in range(60):
        await model.step()
    await model.settle_all()


class _Model:
    """What the ledger should say. Settlements and renewals are sent twice, out of order, and after the lease."""

    def __init__(self, subject: Subject, dice: random.Random) -> None:
        self.subject = subject
        self.dice = dice
        self.spent: dict[str, int] = {}
        """By each hold that has not ended."""
        self.settled: dict[str, int] = {}
        self.amounts: dict[str, int] = {}

    async def step(self) -> None:
        steps = [self.hold, self.hold, self.renew, self.settle, self.settle_again, self.pass_time]
        await self.dice.choice(steps)()

    async def hold(self) -> None:
        hold_id, amount = f"{len(self.amounts)}", self.dice.randint(0, 40)
        self.amounts[hold_id] = amount
        before = await self.subject.ledger.balance(TOKENS)
        try:
            balance = await self.dice.choice([self.subject.ledger, self.subject.other]).hold(TOKENS, hold_id, amount)
        except Exceeded:
            fits = False
        else:
            fits = balance.used + balance.held <= TOKENS.limit
            self.spent[hold_id] = 0
        assert fits is (amount <= before.free)

    async def renew(self) -> None:
        for hold_id in self.spent:
            self.spent[hold_id] += self.dice.randint(0, 3)
        chosen = [hold_id for hold_id in self.spent if self.dice.random() < 0.8]
        await self.subject.ledger.renew([Hold(TOKENS, i, self.amounts[i], self.spent[i]) for i in chosen])

    async def settle(self) -> None:
        if self.spent:
            hold_id = self.dice.choice(list(self.spent))
            self.settled[hold_id] = self.spent.pop(hold_id) + self.dice.randint(0, 3)
            await self.subject.ledger.settle(TOKENS, hold_id, self.settled[hold_id])

    async def settle_again(self) -> None:
        if charged := [hold_id for hold_id, spent in self.settled.items() if spent]:
            hold_id = self.dice.choice(charged)
            await self.subject.other.settle(TOKENS, hold_id, self.dice.randint(0, 50))
            await self.subject.other.renew([Hold(TOKENS, hold_id, 5, 5)])

    async def pass_time(self) -> None:
        await self.subject.advance(self.dice.uniform(0, LEASE_S))

    async def settle_all(self) -> None:
        for hold_id, spent in self.spent.items():
            await self.subject.ledger.settle(TOKENS, hold_id, spent)
        expected = sum(self.settled.values()) + sum(self.spent.values())
        assert await self.subject.ledger.balance(TOKENS) == Balance(100, expected, 0)


# --- in memory alone -------------------------------------------------------------------------------------------------


async def test_memory_forgets_accounts_that_nobody_names_again() -> None:
    """A flood of users leaves nothing behind."""
    now = 0.0
    async with MemoryLedger(lease_s=LEASE_S, clock=lambda: now) as ledger:
        for number in range(1_000):
            await ledger.settle(Account(f"{number}", 1, 50.0), "a", 0)
        now = 100.0
        await ledger.balance(TOKENS)
        assert len(ledger) == 1


# --- in Redis alone --------------------------------------------------------------------------------------------------


@pytest.fixture
async def redis() -> AsyncIterator[RedisServer]:
    """The Redis of a test."""
    async with redis_server() as server:
        yield server


async def test_holds_are_made_again_after_redis_has_lost_them(redis: RedisServer) -> None:
    """It was started anew without its data, which takes its scripts along."""
    async with RedisLedger(redis.url, lease_s=LEASE_S) as ledger:
        await ledger.hold(TOKENS, "a", 60)
        await redis.wipe()
        async with asyncio.timeout(PATIENCE_S):
            await _until_answered(ledger, [Hold(TOKENS, "a", 60, 10)])
        assert await ledger.balance(TOKENS) == Balance(100, 0, 60)


async def _until_answered(ledger: Ledger, holds: list[Hold]) -> None:
    while True:
        try:
            return await ledger.renew(holds)
        except StoreError:  # the connection that it had is closed
            await asyncio.sleep(0.01)


async def test_a_redis_that_hangs_is_an_error_soon(redis: RedisServer) -> None:
    """Nobody waits for longer, and what was asked may have its effect later: settling takes it back."""
    async with RedisLedger(redis.url, lease_s=LEASE_S) as ledger:
        await ledger.balance(TOKENS)
        redis.pause()
        async with asyncio.timeout(PATIENCE_S):
            for call in (
                ledger.hold(TOKENS, "a", 60),
                ledger.settle(TOKENS, "b", 5),
                ledger.renew([Hold(TOKENS, "c", 1)]),
            ):
                with pytest.raises(StoreError):
                    await call
            redis.resume()
            await _until_answered(ledger, [])
            await _settled(ledger, "a", 0)
            await _settled(ledger, "b", 5)
            await _settled(ledger, "c", 0)
        assert await ledger.balance(TOKENS) == Balance(100, 5, 0)


async def _settled(ledger: Ledger, hold_id: str, spent: int) -> None:
    while True:
        try:
            return await ledger.settle(TOKENS, hold_id, spent)
        except StoreError:
            await asyncio.sleep(0.01)


async def test_every_account_has_a_time_to_live_from_each_call_on(redis: RedisServer) -> None:
    """For as long as it is to be kept, and at least for a lease."""
    async with RedisLedger(redis.url, lease_s=LEASE_S) as ledger:
        calls: list[tuple[Account, Callable[[Account], Awaitable[object]]]] = [
            (account, call)
            for account in (TOKENS, SLOTS)
            for call in (
                lambda account: ledger.hold(account, "a", 1),
                lambda account: ledger.renew([Hold(account, "a", 1)]),
                lambda account: ledger.settle(account, "a", 1),
                ledger.balance,
            )
        ]
        for account, call in calls:
            await redis.command("FLUSHALL")
            await call(account)
            [name] = await redis.command("KEYS", "*")
            assert name.startswith("rt:account:{")
            assert "alice" not in name
            left_s = await redis.command("PTTL", name) / 1000
            assert max(LEASE_S, account.keep_s) - 5 < left_s <= max(LEASE_S, account.keep_s)
