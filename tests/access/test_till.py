"""What a call may cost is held before it, watched within it, and settled after it, whatever happens in between."""

from __future__ import annotations

import random
from unittest import mock

import pytest

from realtime.access.keeper import Held, Keeper
from realtime.access.ledger import Account, Balance, Hold
from realtime.access.ledger_memory import MemoryLedger
from realtime.access.prices import weighted_tokens
from realtime.access.till import SLACK_TOKENS, Allowances, Budget, Purse, Till, parse_budget
from realtime.errors import BudgetError, RateLimited
from realtime.protocol import Bill, Usage
from realtime.settings import SettingsError

LEASE_S = 10.0
DAY_S = 86_400
BUDGET = Budget(1000, DAY_S)
STEPS = 400


class Books(MemoryLedger):
    """A ledger whose clock stands still unless a test moves it."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(lease_s=LEASE_S, clock=lambda: self.now)


class Process:
    """One process's till, over the ledger that all share."""

    def __init__(self, ledger: Books, *, responses: int = 100, session_tokens: int | None = None) -> None:
        self.keeper = Keeper(ledger)
        self.ledger = ledger
        allowances = Allowances(responses=responses, budget=BUDGET, session_tokens=session_tokens)
        self.till = Till(ledger, self.keeper, allowances)

    async def opened(self, tokens: int, *, slot: bool = True, session_id: str | None = None) -> tuple[Bill, Purse]:
        """A new bill of ann's, and its purse."""
        bill = self.till.bill("ann", tokens)
        return bill, await self.till.open(bill, session_id=session_id, slot=slot)

    async def balance(self, at: float | None = None) -> Balance:
        """How the tokens of ann's period stand, once all that was released is settled."""
        await self.keeper.pay_all()
        bill = self.till.bill("ann", 0)
        return await self.ledger.balance(BUDGET.account("ann", bill.made_at if at is None else at))

    async def slots(self) -> int:
        """How many responses of ann's run or wait."""
        await self.keeper.pay_all()
        return (await self.ledger.balance(Account("responses:ann", 100, 0.0))).held


@pytest.fixture
def ledger() -> Books:
    """The ledger of a test."""
    return Books()


@pytest.fixture
def process(ledger: Books) -> Process:
    """A process."""
    return Process(ledger)


def held_of(held: Held) -> Hold:
    """What a renewal tells the ledger."""
    return Hold(held.account, held.hold_id, held.amount, held.spent)


def used(tokens: int) -> Usage:
    """A use of so many tokens."""
    return Usage(input_tokens=tokens, output_tokens=0, total_tokens=tokens, estimated=False)


# ---------------------------------------------------------------------------------------------------------- settings


def test_a_budget_is_parsed() -> None:
    """Tokens in an hour or a day, or none at all."""
    assert parse_budget("") is None
    assert parse_budget("200000/day") == Budget(200_000, DAY_S)
    assert parse_budget("5/hour") == Budget(5, 3600)


@pytest.mark.parametrize("text", ["5", "5/week", "x/day", "-5/day", "/day"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    """With its text."""
    with pytest.raises(SettingsError, match="no budget"):
        parse_budget(text)


# ----------------------------------------------------------------------------------------------------------- one call


async def test_what_a_call_may_cost_is_held_and_the_rest_given_back(process: Process) -> None:
    """The tokens and the slot, until it is settled with what was used."""
    _, purse = await process.opened(600)
    assert await process.balance() == Balance(1000, 0, 600)
    assert await process.slots() == 1
    purse.settle(used(250))
    assert await process.balance() == Balance(1000, 250, 0)
    assert (await process.slots(), len(process.keeper)) == (0, 0)


async def test_cached_tokens_are_charged_at_their_weight(process: Process) -> None:
    """Reads at a tenth, writes at five quarters."""
    _, purse = await process.opened(900)
    usage = Usage(
        input_tokens=10,
        output_tokens=20,
        total_tokens=430,
        estimated=False,
        cache_read_input_tokens=200,
        cache_creation_input_tokens=200,
    )
    purse.settle(usage)
    assert (await process.balance()).used == 10 + 20 + 20 + 250


async def test_what_does_not_fit_is_refused_and_holds_nothing(process: Process) -> None:
    """Neither tokens nor a slot."""
    await process.opened(600)
    with pytest.raises(BudgetError) as refusal:
        await process.opened(401)
    assert refusal.value.code == "budget_exceeded"
    assert await process.balance() == Balance(1000, 0, 600)
    assert (await process.slots(), len(process.keeper)) == (1, 2)


async def test_who_is_refused_because_of_what_is_held_may_try_again_soon(process: Process) -> None:
    """It may come to less than is held for it."""
    await process.opened(600)
    with pytest.raises(BudgetError) as refusal:
        await process.opened(600)
    assert refusal.value.retry_after_ms == 1000


async def test_who_has_used_the_budget_may_try_again_in_the_next_period(process: Process) -> None:
    """Not before."""
    with mock.patch("realtime.access.till.time.time", return_value=DAY_S * 7 - 90.0):
        _, purse = await process.opened(900)
        purse.settle(used(900))
        await process.keeper.pay_all()
        with pytest.raises(BudgetError) as refusal:
            await process.opened(101)
    assert refusal.value.retry_after_ms == 90_000


async def test_too_many_at_once_are_refused_and_hold_nothing(ledger: Books) -> None:
    """It is told apart from a budget."""
    process = Process(ledger, responses=1)
    _, purse = await process.opened(100)
    with pytest.raises(RateLimited) as refusal:
        await process.opened(100)
    assert (refusal.value.code, type(refusal.value)) == ("too_many_responses_at_once", RateLimited)
    assert await process.balance() == Balance(1000, 0, 100)
    purse.settle(None)
    await process.keeper.pay_all()
    await process.opened(100)


async def test_a_session_has_a_budget_of_its_own(ledger: Books) -> None:
    """What does not fit into it is not held of the user's either; another session's is untouched."""
    process = Process(ledger, session_tokens=300)
    await process.opened(200, session_id="s1")
    with pytest.raises(BudgetError) as refusal:
        await process.opened(200, session_id="s1")
    assert refusal.value.retry_after_ms == 1000
    assert (await process.balance()).held == 200
    await process.opened(200, session_id="s2")
    assert (await process.balance()).held == 400


async def test_a_purse_tells_when_it_is_spent(process: Process) -> None:
    """The moment that nothing is left of the budget."""
    _, purse = await process.opened(1000)
    assert purse.is_limited
    assert await purse.affords(used(999))
    assert not await purse.affords(used(1000))


async def test_a_purse_that_is_used_up_asks_for_more(process: Process) -> None:
    """Once: what an answer uses is an estimate in mid-stream."""
    _, purse = await process.opened(100)
    assert await purse.affords(used(100))
    assert (await process.balance()).held == 100 + SLACK_TOKENS
    assert await purse.affords(used(100 + SLACK_TOKENS - 1))
    assert not await purse.affords(used(100 + SLACK_TOKENS))
    assert (await process.balance()).held == 100 + SLACK_TOKENS


async def test_what_was_spent_is_charged_when_the_process_is_lost(ledger: Books, process: Process) -> None:
    """As far as it was told; the rest is free after the lease."""
    _, purse = await process.opened(600)
    await purse.affords(used(70))
    [held] = purse._funds
    await ledger.renew([held_of(held)])
    ledger.now += LEASE_S + 1
    assert await Process(ledger).balance() == Balance(1000, 70, 0)


async def test_a_purse_grows_only_as_far_as_there_is_room(process: Process) -> None:
    """Where there is none it keeps what it has."""
    _, purse = await process.opened(600)
    await purse.cover(900)
    assert (await process.balance()).held == 900
    with pytest.raises(BudgetError):
        await purse.cover(1001)
    assert (await process.balance()).held == 900
    assert purse.covers(900)


async def test_a_purse_without_holds_costs_nobody_anything() -> None:
    """It covers whatever there is."""
    purse = Purse()
    await purse.cover(10**9)
    assert await purse.affords(used(10**9))
    assert not purse.is_limited
    purse.settle(used(5))
    purse.drop()


# ------------------------------------------------------------------------------------------------ processes and times


async def test_a_call_is_settled_once_by_whoever_adopts_it(ledger: Books) -> None:
    """The process that opened it drops it, or settles too late."""
    one, two = Process(ledger), Process(ledger)
    bill, purse = await one.opened(600)
    adopted = two.till.adopt(bill)
    await adopted.cover(600)
    adopted.settle(used(50))
    await two.keeper.pay_all()
    purse.settle(used(999))
    assert await one.balance() == Balance(1000, 50, 0)
    assert (len(one.keeper), len(two.keeper)) == (0, 0)


async def test_whoever_gives_up_a_purse_takes_nothing_from_its_adopter_in_the_same_process(process: Process) -> None:
    """A command that is cancelled when its response runs already does not make that free."""
    bill, purse = await process.opened(600)
    adopted = process.till.adopt(bill)
    purse.drop()
    purse.settle(None)
    assert (await process.balance()).held == 600
    adopted.settle(used(50))
    assert await process.balance() == Balance(1000, 50, 0)


async def test_what_was_adopted_after_it_ran_out_has_to_fit_again(ledger: Books) -> None:
    """Somebody else may have what it held; before it is known nothing is spent."""
    one, two = Process(ledger), Process(ledger)
    bill, _ = await one.opened(600)
    ledger.now += LEASE_S + 1
    await two.opened(600)
    adopted = two.till.adopt(bill)
    with pytest.raises(BudgetError):
        await adopted.cover(1)
    adopted.settle(None)
    assert await two.balance() == Balance(1000, 0, 600)


async def test_a_response_is_settled_in_the_period_in_which_it_was_made(process: Process) -> None:
    """One that runs over midnight, also where another process settles it."""
    midnight = 20_000.0 * DAY_S
    with mock.patch("realtime.access.till.time.time", return_value=midnight - 1):
        bill, _ = await process.opened(600)
    with mock.patch("realtime.access.till.time.time", return_value=midnight + 5):
        other = Process(process.ledger)
        adopted = other.till.adopt(bill)
        await adopted.cover(700)
        adopted.settle(used(650))
        assert await other.balance(midnight - 1) == Balance(1000, 650, 0)
        assert await other.balance() == Balance(1000, 0, 0)
        left = await other.till.left("ann")
        assert left is not None
        assert (left.remaining, left.reset_s) == (1000, DAY_S - 5)


@pytest.mark.parametrize("seed", range(25))
async def test_whatever_two_processes_do_the_limit_holds_and_the_sums_are_right(seed: int) -> None:
    """Opens, growth, spending, adoption, ends: never more used and held than there is."""
    ledger = Books()
    await Run(ledger, random.Random(seed)).run()


class Run:
    """A random run of two processes over one ledger."""

    def __init__(self, ledger: Books, chance: random.Random) -> None:
        self.processes = Process(ledger), Process(ledger)
        self.chance = chance
        self.open: list[tuple[Bill, Process, Purse]] = []
        self.charged = 0

    async def run(self) -> None:
        """Steps, then the end of all that is open."""
        for _ in range(STEPS):
            await self.chance.choice([self.begin, self.begin, self.grow, self.spend, self.move, self.end])()
            for one in self.processes:
                balance = await one.balance()
                assert balance.used + balance.held <= balance.limit
        while self.open:
            await self.end()
        for one in self.processes:
            await one.keeper.pay_all()
        assert await self.processes[0].balance() == Balance(1000, self.charged, 0)
        assert [len(one.keeper) for one in self.processes] == [0, 0]

    async def begin(self) -> None:
        """A call, if it fits."""
        process = self.chance.choice(self.processes)
        before = await process.balance()
        tokens = self.chance.randint(0, 60)
        try:
            bill, purse = await process.opened(tokens)
        except BudgetError:
            assert before.free < tokens
        else:
            assert before.free >= tokens
            self.open.append((bill, process, purse))

    async def grow(self) -> None:
        """Another model call of one."""
        if self.open:
            _, process, purse = self.chance.choice(self.open)
            before, [held] = await process.balance(), purse._funds
            more = self.chance.randint(1, 40)
            amount = held.amount
            try:
                await purse.cover(amount + more)
            except BudgetError:
                assert before.free < more
                assert held.amount == amount

    async def spend(self) -> None:
        """A piece of an answer, renewed."""
        if self.open:
            _, process, purse = self.chance.choice(self.open)
            [held] = purse._funds
            await purse.affords(used(self.chance.randint(0, held.amount)))
            await process.ledger.renew([held_of(held)])

    async def move(self) -> None:
        """One runs on in a process, the same or another."""
        if self.open:
            bill, _, purse = self.open.pop(self.chance.randrange(len(self.open)))
            taker = self.chance.choice(self.processes)
            adopted = taker.till.adopt(bill)
            purse.drop()
            [held] = adopted._funds
            await adopted.cover(0)
            assert held.is_sure
            self.open.append((bill, taker, adopted))

    async def end(self) -> None:
        """One ends, within what it holds; some never came to a call, and some end twice."""
        if self.open:
            _, _, purse = self.open.pop(self.chance.randrange(len(self.open)))
            [held] = purse._funds
            usage = used(self.chance.randint(0, held.amount)) if self.chance.random() < 0.8 else None
            purse.settle(usage)
            purse.settle(used(1000))
            self.charged += weighted_tokens(usage) if usage else 0
