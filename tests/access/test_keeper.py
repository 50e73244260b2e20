"""What this process holds is kept while it is held, and given back for certain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from unittest import mock

import pytest

from realtime.access import keeper as keeper_module
from realtime.access.keeper import RETRY_S, Keeper
from realtime.access.ledger import Account, Balance, Exceeded, Hold
from realtime.access.ledger_memory import MemoryLedger
from realtime.access.ledger_redis import RedisLedger
from realtime.errors import StoreError
from realtime.observe import logs
from realtime.store.redis_calls import unavailable
from tests.support.clock import advancing_clock
from tests.support.redis_server import redis_server

LEASE_S = 10.0
PATIENCE_S = 20.0
TOKENS = Account("tokens", 100, 100_000.0)
SLOTS = Account("slots", 3, 60.0)


class Line(MemoryLedger):
    """A ledger that can be away, whose answers can get lost, and whose holds may be a while under way."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(lease_s=LEASE_S, clock=lambda: self.now)
        self.is_down = False
        self.loses_answers = False
        self.under_way: asyncio.Event | None = None
        self.renewed: list[list[Hold]] = []
        self.settlements = 0

    async def hold(self, account: Account, hold_id: str, amount: int) -> Balance:
        """As the ledger's."""
        self._reach()
        if self.under_way is not None:
            late = asyncio.create_task(self._land(self.under_way, account, hold_id, amount))
            return await asyncio.shield(late)
        balance = await super().hold(account, hold_id, amount)
        self._answer()
        return balance

    async def renew(self, holds: Sequence[Hold]) -> None:
        """As the ledger's."""
        self._reach()
        self.renewed.append(list(holds))
        await super().renew(holds)
        self._answer()

    async def settle(self, account: Account, hold_id: str, spent: int) -> None:
        """As the ledger's."""
        self.settlements += 1
        self._reach()
        await super().settle(account, hold_id, spent)
        self._answer()

    async def _land(self, landed: asyncio.Event, account: Account, hold_id: str, amount: int) -> Balance:
        await landed.wait()
        return await super().hold(account, hold_id, amount)

    def _reach(self) -> None:
        if self.is_down:
            raise unavailable()

    def _answer(self) -> None:
        if self.loses_answers:
            raise unavailable()


@pytest.fixture
def ledger() -> Line:
    """A ledger in memory, at the end of a line."""
    return Line()


@pytest.fixture
def keeper(ledger: Line) -> Keeper:
    """A keeper that nobody runs yet."""
    return Keeper(ledger)


@asynccontextmanager
async def runs(keeper: Keeper) -> AsyncIterator[Callable[[float], None]]:
    """The keeper at work, and the passing of its seconds."""
    with advancing_clock() as advance:
        task = asyncio.create_task(keeper.run())
        try:
            async with asyncio.timeout(10 * PATIENCE_S):  # of a clock that is put forward
                yield advance
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def _never(account: Account, hold_id: str, spent: int) -> None:
    await asyncio.Event().wait()


async def turns(count: int = 20) -> None:
    """Let everybody go on who can."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_what_is_held_is_renewed_with_what_it_has_spent(ledger: Line, keeper: Keeper) -> None:
    """All in one call, three times a lease."""
    tokens = await keeper.hold(TOKENS, "a", 60)
    await keeper.hold(SLOTS, "a", 1)
    async with runs(keeper) as advance:
        await turns()
        for spent in (10, 20, 30):
            tokens.spent = spent
            advance(LEASE_S / 3 + 0.01)
            await turns()
    assert [[(hold.amount, hold.spent) for hold in holds] for holds in ledger.renewed] == [
        [(60, spent), (1, 0)] for spent in (0, 10, 20, 30)
    ]


async def test_what_is_refused_is_not_kept(ledger: Line, keeper: Keeper) -> None:
    """Nor is anything settled for it."""
    with pytest.raises(Exceeded):
        await keeper.hold(TOKENS, "a", 101)
    assert len(keeper) == 0
    await keeper.pay_all()
    assert ledger.settlements == 0


async def test_settling_charges_at_once(ledger: Line, keeper: Keeper) -> None:
    """In one call to the ledger, however often it is done."""
    held = await keeper.hold(TOKENS, "a", 60)
    async with runs(keeper):
        await held.settle(20)
        await held.settle(30)
        held.release(40)
        await turns()
    assert await ledger.balance(TOKENS) == Balance(100, 20, 0)
    assert (ledger.settlements, len(keeper)) == (1, 0)


async def test_what_is_released_is_settled_soon(ledger: Line, keeper: Keeper) -> None:
    """By whoever runs the keeper, so that cleaning up need not wait."""
    held = await keeper.hold(TOKENS, "a", 60)
    async with runs(keeper):
        held.release(20)
        await turns()
        assert await ledger.balance(TOKENS) == Balance(100, 20, 0)


@pytest.mark.parametrize("loses_answers", [False, True])
async def test_a_settlement_is_tried_until_it_is_answered(ledger: Line, keeper: Keeper, loses_answers: bool) -> None:
    """An outage loses no charge and makes none twice, whether or not the calls had their effect."""
    held = [await keeper.hold(TOKENS, f"{number}", 10) for number in range(4)]
    async with runs(keeper) as advance:
        ledger.is_down, ledger.loses_answers = not loses_answers, loses_answers
        await held[0].settle(1)
        await held[1].settle(0)
        held[2].release(3)
        for _ in range(3):
            await turns()
            advance(RETRY_S + 0.01)
        ledger.is_down = ledger.loses_answers = False
        await turns()
        advance(RETRY_S + 0.01)
        await turns()
        assert await ledger.balance(TOKENS) == Balance(100, 4, 10)
        settlements = ledger.settlements
        advance(LEASE_S)
        await turns()
        assert ledger.settlements == settlements


async def test_renewals_go_on_after_an_outage(ledger: Line, keeper: Keeper) -> None:
    """What ran out meanwhile is made again, and charged once."""
    held = await keeper.hold(TOKENS, "a", 60)
    held.spent = 20
    async with runs(keeper) as advance:
        await turns()
        ledger.is_down = True
        advance(LEASE_S)
        await turns()
        ledger.now += LEASE_S + 1
        assert await ledger.balance(TOKENS) == Balance(100, 20, 0)
        ledger.is_down = False
        advance(RETRY_S + 0.01)
        await turns()
        assert await ledger.balance(TOKENS) == Balance(100, 0, 60)
        await held.settle(30)
    assert await ledger.balance(TOKENS) == Balance(100, 30, 0)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_hold_whose_caller_is_cancelled_is_given_back(ledger: Line, keeper: Keeper, when: str) -> None:
    """Whether the ledger carries it out before or after it is told to give it back."""
    ledger.under_way = landed = asyncio.Event()
    calling = asyncio.create_task(keeper.hold(TOKENS, "a", 60))
    await turns()
    calling.cancel()
    if when == "before":
        landed.set()
    with pytest.raises(asyncio.CancelledError):
        await calling
    async with runs(keeper):
        await turns()
        landed.set()
        await turns()
    assert await ledger.balance(TOKENS) == Balance(100, 0, 0)
    assert len(keeper) == 0


async def test_a_hold_that_was_not_answered_is_given_back(ledger: Line, keeper: Keeper) -> None:
    """It may have been made."""
    ledger.loses_answers = True
    with pytest.raises(StoreError):
        await keeper.hold(TOKENS, "a", 60)
    ledger.loses_answers = False
    assert await ledger.balance(TOKENS) == Balance(100, 0, 60)
    await keeper.pay_all()
    assert await ledger.balance(TOKENS) == Balance(100, 0, 0)


async def test_settling_that_is_cancelled_is_done_all_the_same(ledger: Line, keeper: Keeper) -> None:
    """The charge is owed before the ledger is asked."""
    held = await keeper.hold(TOKENS, "a", 60)
    with mock.patch.object(ledger, "settle", _never):
        settling = asyncio.create_task(held.settle(20))
        await turns()
        settling.cancel()
        await asyncio.wait([settling])
    async with runs(keeper):
        await turns()
    assert await ledger.balance(TOKENS) == Balance(100, 20, 0)


async def test_a_hold_may_be_changed(ledger: Line, keeper: Keeper) -> None:
    """It stays the same one; where the change fails, it stays as it was."""
    held = await keeper.hold(TOKENS, "a", 60)
    held.spent = 50
    assert await keeper.hold(TOKENS, "a", 90) is held
    with pytest.raises(Exceeded):
        await keeper.hold(TOKENS, "a", 101)
    ledger.is_down = True
    with pytest.raises(StoreError):
        await keeper.hold(TOKENS, "a", 95)
    ledger.is_down = False
    await keeper.pay_all()
    assert (held.amount, held.spent, len(keeper)) == (90, 50, 1)
    assert await ledger.balance(TOKENS) == Balance(100, 0, 90)


async def test_a_hold_goes_from_process_to_process(ledger: Line, keeper: Keeper) -> None:
    """One drops it and can't settle it any more, the other adopts it and does."""
    other = Keeper(ledger)
    held = await keeper.hold(TOKENS, "a", 60)
    adopted = other.adopt(TOKENS, "a", 60)
    keeper.drop(held)
    await held.settle(99)
    held.release(99)
    await keeper.pay_all()
    assert await ledger.balance(TOKENS) == Balance(100, 0, 60)
    await adopted.settle(20)
    assert await ledger.balance(TOKENS) == Balance(100, 20, 0)


async def test_a_hold_that_is_adopted_in_its_own_process_is_the_new_owners_alone(ledger: Line, keeper: Keeper) -> None:
    """With its amount and what it has spent; whatever the old owner does comes too late."""
    held = await keeper.hold(TOKENS, "a", 60)
    held.spent = 7
    adopted = keeper.adopt(TOKENS, "a", 10)
    assert (adopted.amount, adopted.spent, adopted.is_sure) == (60, 7, True)
    held.drop()
    await held.settle(99)
    assert len(keeper) == 1
    await adopted.settle(20)
    assert (await ledger.balance(TOKENS), len(keeper)) == (Balance(100, 20, 0), 0)


async def test_a_hold_that_is_adopted_from_elsewhere_is_not_known_to_be_held(ledger: Line, keeper: Keeper) -> None:
    """It may have run out before; holding it again finds out."""
    other = Keeper(ledger)
    await keeper.hold(TOKENS, "a", 60)
    adopted = other.adopt(TOKENS, "a", 60)
    assert not adopted.is_sure
    assert await other.hold(TOKENS, "a", 60) is adopted
    assert adopted.is_sure


async def test_what_is_owed_is_bounded(ledger: Line, keeper: Keeper) -> None:
    """In an outage the oldest is left to its lease; the log says so."""
    ledger.is_down = True
    with mock.patch.object(keeper_module, "MAX_OWED", 3), mock.patch.object(logs, "warning") as warning:
        for number in range(5):
            await keeper.adopt(TOKENS, f"{number}", 1).settle(number + 1)
    ledger.is_down = False
    await keeper.pay_all()
    assert (await ledger.balance(TOKENS)).used == 3 + 4 + 5
    assert warning.call_count == 2


async def test_a_fault_stops_nothing(ledger: Line, keeper: Keeper) -> None:
    """It is reported, and the rest goes on."""
    await keeper.hold(TOKENS, "a", 60)
    with mock.patch.object(ledger, "renew", mock.AsyncMock(side_effect=ZeroDivisionError)) as renew:
        async with runs(keeper) as advance:
            await turns()
            advance(RETRY_S + 0.01)
            await turns()
    assert renew.await_count == 2


async def test_an_outage_of_redis_leaves_nothing_held_and_charges_once() -> None:
    """Real time, a real Redis that hangs: what was asked meanwhile may come after what took it back."""
    async with redis_server() as redis, RedisLedger(redis.url, lease_s=3600.0) as ledger, asyncio.timeout(PATIENCE_S):
        keeper = Keeper(ledger)
        running = asyncio.create_task(keeper.run())
        held = [await keeper.hold(TOKENS, f"{number}", 10) for number in range(3)]
        redis.pause()
        calling = asyncio.create_task(keeper.hold(TOKENS, "cancelled", 10))
        await turns()
        calling.cancel()
        held[0].release(5)
        await held[1].settle(6)
        with pytest.raises(StoreError):
            await keeper.hold(TOKENS, "unanswered", 10)
        redis.resume()
        while await _balance(ledger) != Balance(100, 11, 10):  # noqa: ASYNC110  # nothing tells of it
            await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.wait([running, calling])


async def _balance(ledger: RedisLedger) -> Balance | None:
    with suppress(StoreError):
        return await ledger.balance(TOKENS)
    return None
