"""Who is let in, who is refused, and what is left held by either."""

from __future__ import annotations

import asyncio
from unittest import mock

import msgspec
import pytest

from realtime.access.admission import Admission, Most
from realtime.access.keeper import Keeper
from realtime.access.ledger import Account, Balance
from realtime.access.ledger_memory import MemoryLedger
from realtime.access.principal import Principal
from realtime.access.rates import MemoryRates, Rate, Taken
from realtime.access.till import Allowances, Budget, Till
from realtime.errors import BudgetError, RateLimited, StoreError
from realtime.store.redis_calls import unavailable
from tests.support.principals import known

ANN, BOB = known("ann"), known("bob")
HOUR_S = 3600.0


class Site:
    """Admission with small limits, over a ledger and rates in memory. While it is `down` neither answers."""

    def __init__(self) -> None:
        self.ledger = MemoryLedger(lease_s=60.0)
        self.rates = MemoryRates()
        self.keeper = Keeper(self.ledger)
        rate = Rate(3, HOUR_S)
        most = Most(
            connections_per_user=2,
            connections_per_address=3,
            responses=rate,
            oneshots=rate,
            tasks=rate,
            sessions=rate,
            messages=Rate(5, 1.0),
        )
        self.till = Till(self.ledger, self.keeper, Allowances(responses=2, budget=Budget(1000, 3600)))
        self.admission = Admission(most, self.rates, self.keeper, self.till)

    async def held(self, name: str) -> int:
        """How much of an account is held, once all that was released is settled."""
        await self.keeper.pay_all()
        return (await self.ledger.balance(Account(name, 0, 0.0))).held

    def down(self) -> mock._patch[mock.AsyncMock]:
        """For a block: the ledger makes no hold."""
        return mock.patch.object(self.ledger, "hold", mock.AsyncMock(side_effect=unavailable()))


@pytest.fixture
def site() -> Site:
    """The site of a test."""
    return Site()


class Sizes:
    """Says that a response may come to so many tokens, and counts how often it was asked."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.asked = 0

    async def __call__(self) -> int:
        self.asked += 1
        return self.tokens


class Places:
    """So many places for tasks; `taken` of them are."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0

    async def take(self) -> None:
        """Take one."""
        if self.taken == self.most:
            raise RateLimited("too_many_tasks_at_once", "Too many.")
        self.taken += 1

    def give_back(self) -> None:
        """Give one back."""
        self.taken -= 1


async def anywhere() -> None:
    """There is a place."""


# -------------------------------------------------------------------------------------------------------------- rates


@pytest.mark.parametrize("kind", ["response", "oneshot", "task", "session"])
async def test_each_payer_has_a_rate_of_each_kind(site: Site, kind: str) -> None:
    """The one after the last is told when to come again and how it stands; another user is let in."""

    async def ask(principal: Principal) -> None:
        if kind == "task":
            await site.admission.task(principal.payer, anywhere)
        elif kind == "session":
            await site.admission.session(principal)
        else:
            (await getattr(site.admission, kind)(principal, Sizes(1) if kind == "response" else 1)).purse.settle(None)
            await site.keeper.pay_all()

    for _ in range(3):
        await ask(ANN)
    with pytest.raises(RateLimited) as refusal:
        await ask(ANN)
    assert refusal.value.code == "rate_limited"
    assert 0 < (refusal.value.retry_after_ms or 0) <= HOUR_S * 1000 / 3
    [limit] = refusal.value.limits
    assert (limit.name, limit.limit, limit.remaining) == (f"{kind}s", 3, 0)
    await ask(BOB)


async def test_anonymous_users_have_the_rate_of_their_address(site: Site) -> None:
    """However many there are behind it; a user of its name is somebody else."""
    for _ in range(3):
        await site.admission.task(Principal(address="10.0.0.1").payer, anywhere)
    with pytest.raises(RateLimited):
        await site.admission.task(Principal(address="10.0.0.1").payer, anywhere)
    await site.admission.task(Principal(address="10.0.0.2").payer, anywhere)
    await site.admission.task(known("10.0.0.1").payer, anywhere)


async def test_what_is_let_in_is_told_what_is_left(site: Site) -> None:
    """Of the rate, and of the tokens."""
    admitted = await site.admission.response(ANN, Sizes(400))
    assert [(one.name, one.limit, one.remaining) for one in admitted.limits] == [
        ("responses", 3, 2),
        ("tokens", 1000, 600),
    ]


async def test_what_a_budget_refuses_is_told_how_its_rate_stands(site: Site) -> None:
    """And how its budget does. Each try counts: who asks for what it can't have is not to be looked up without end."""
    with pytest.raises(BudgetError) as refusal:
        await site.admission.response(ANN, Sizes(1001))
    assert [(one.name, one.remaining) for one in refusal.value.limits] == [("responses", 2), ("tokens", 1000)]
    assert (await site.held("responses:user%3Aann"), len(site.keeper)) == (0, 0)


async def test_where_the_rates_do_not_answer_what_costs_is_refused(site: Site) -> None:
    """And nothing is held."""
    with (
        mock.patch.object(site.rates, "take", mock.AsyncMock(side_effect=unavailable())),
        pytest.raises(StoreError) as refusal,
    ):
        await site.admission.response(ANN, Sizes(1))
    assert refusal.value.retry_after_ms
    assert len(site.keeper) == 0


async def test_where_the_rates_do_not_answer_a_session_may_be_made(site: Site) -> None:
    """It costs nothing."""
    with mock.patch.object(site.rates, "take", mock.AsyncMock(side_effect=unavailable())):
        await site.admission.session(ANN)


async def test_where_the_ledger_does_not_answer_what_costs_is_refused(site: Site) -> None:
    """And nothing stays held of what may have been."""
    with site.down(), pytest.raises(StoreError):
        await site.admission.response(ANN, Sizes(1))
    assert (await site.held("responses:user%3Aann"), len(site.keeper)) == (0, 0)


async def test_where_the_balance_is_not_told_nothing_stays_held(site: Site) -> None:
    """The last question before a response may fail as the first ones."""
    with (
        mock.patch.object(site.ledger, "balance", mock.AsyncMock(side_effect=unavailable())),
        pytest.raises(StoreError),
    ):
        await site.admission.response(ANN, Sizes(1))
    assert (await site.held("responses:user%3Aann"), len(site.keeper)) == (0, 0)


# -------------------------------------------------------------------------------------------------------- connections


async def test_a_user_has_so_many_connections(site: Site) -> None:
    """A place is free again when one ends."""
    async with site.admission.connection(ANN, "c1"):
        async with site.admission.connection(ANN, "c2"):
            with pytest.raises(RateLimited) as refusal:
                async with site.admission.connection(ANN, "c3"):
                    pass
            assert (refusal.value.code, refusal.value.close_code) == ("too_many_connections", 4429)
        await site.keeper.pay_all()
        async with site.admission.connection(ANN, "c4"):
            pass
    assert (await site.held("connections:address:127.0.0.1"), len(site.keeper)) == (0, 0)


async def test_an_address_has_so_many_connections(site: Site) -> None:
    """Whoever is behind it; who is refused by it takes no place of its own."""
    async with (
        site.admission.connection(ANN, "c1"),
        site.admission.connection(ANN, "c2"),
        site.admission.connection(BOB, "c3"),
    ):
        with pytest.raises(RateLimited):
            async with site.admission.connection(BOB, "c4"):
                pass
        assert await site.held("connections:user:bob") == 1


async def test_connections_are_let_in_where_the_ledger_does_not_answer(site: Site) -> None:
    """They cost nothing."""
    with site.down():
        async with site.admission.connection(ANN, "c1"):
            pass
    assert (await site.held("connections:user:ann"), len(site.keeper)) == (0, 0)


@pytest.mark.parametrize("slow", [1, 2])
async def test_an_attach_that_is_cancelled_leaves_no_place_taken(site: Site, slow: int) -> None:
    """Whichever of its places was being taken."""
    real, entered, calls = site.ledger.hold, asyncio.Event(), 0

    async def hold(account: Account, hold_id: str, amount: int) -> Balance:
        nonlocal calls
        calls += 1
        balance = await real(account, hold_id, amount)
        if calls == slow:
            entered.set()
            await asyncio.Event().wait()
        return balance

    async def attach() -> None:
        async with site.admission.connection(ANN, "c1"):
            pass

    with mock.patch.object(site.ledger, "hold", hold):
        attaching = asyncio.create_task(attach())
        await entered.wait()
        attaching.cancel()
        await asyncio.wait([attaching])
    assert await site.held("connections:user:ann") == 0
    assert await site.held("connections:address:127.0.0.1") == 0
    assert len(site.keeper) == 0


# ------------------------------------------------------------------------------------------------------------ tickets


async def test_a_ticket_asks_once(site: Site) -> None:
    """However often its command is decided."""
    ticket, sizes = site.admission.ticket(ANN), Sizes(100)
    bill = await ticket.response(sizes, "s1")
    assert await ticket.response(sizes, "s1") is bill
    place = Places(2)
    await ticket.task(place)
    await ticket.task(place)
    assert (sizes.asked, place.taken) == (1, 2)
    assert (await site.admission.response(ANN, Sizes(1))).limits[0].remaining == 1
    assert (await site.admission.task(ANN.payer, anywhere)).remaining == 1


async def test_a_task_without_a_place_counts_against_no_rate(site: Site) -> None:
    """However often it is tried; it is told how much of the rate is left."""
    full = Places(0)
    for _ in range(5):
        with pytest.raises(RateLimited) as refusal:
            await site.admission.task(ANN.payer, full.take)
        assert refusal.value.code == "too_many_tasks_at_once"
        [left] = refusal.value.limits
        assert (left.name, left.limit, left.remaining, left.reset_s) == ("tasks", 3, 3, 0.0)
    assert (await site.admission.task(ANN.payer, anywhere)).remaining == 2


@pytest.mark.parametrize("call", ["give_back", "take"])
async def test_a_task_without_a_place_is_refused_where_the_rate_cannot_be_given_back(site: Site, call: str) -> None:
    """It is refused all the same, and told what was known."""
    answers = {"take": [Taken(True, 3, 2, 1.0, 0.0), unavailable()], "give_back": [None]}
    if call == "give_back":
        answers["give_back"] = [unavailable()]
    rates = mock.Mock(**{name: mock.AsyncMock(side_effect=given) for name, given in answers.items()})
    admission = Admission(site.admission._most, rates, site.keeper, site.till)
    with pytest.raises(RateLimited) as refusal:
        await admission.task(ANN.payer, Places(0).take)
    assert [left.remaining for left in refusal.value.limits] == [2]


@pytest.mark.parametrize(("how", "taken"), [("keep", 1), ("drop", 1), ("give_back", 0)])
async def test_the_place_of_a_task_is_free_again_only_if_none_was_made(site: Site, how: str, taken: int) -> None:
    """Whatever is said afterwards."""
    ticket, places = site.admission.ticket(ANN), Places(1)
    await ticket.task(places)
    getattr(ticket, how)()
    ticket.give_back()
    assert places.taken == taken


async def test_a_ticket_of_which_nothing_was_made_gives_back(site: Site) -> None:
    """All that it held."""
    ticket = site.admission.ticket(ANN)
    await ticket.response(Sizes(100), "s1")
    ticket.give_back()
    assert (await site.held("responses:user%3Aann"), len(site.keeper)) == (0, 0)


async def test_a_ticket_that_is_kept_gives_nothing_back(site: Site) -> None:
    """Its purse is somebody else's."""
    ticket = site.admission.ticket(ANN)
    await ticket.response(Sizes(100), "s1")
    purse = ticket.keep()
    ticket.give_back()
    assert await site.held("responses:user%3Aann") == 1
    assert purse is not None
    purse.settle(None)
    assert await site.held("responses:user%3Aann") == 0


async def test_a_ticket_that_may_have_become_something_runs_out(site: Site) -> None:
    """It is not renewed here, and not given back either."""
    ticket = site.admission.ticket(ANN)
    await ticket.response(Sizes(100), "s1")
    ticket.drop()
    ticket.give_back()
    assert (await site.held("responses:user%3Aann"), len(site.keeper)) == (1, 0)


async def test_a_ticket_that_is_dropped_when_its_response_runs_here_takes_nothing_from_it(site: Site) -> None:
    """Its turn has adopted what is held, and settles it."""
    ticket = site.admission.ticket(ANN)
    turn = site.till.adopt(await ticket.response(Sizes(100), "s1"))
    ticket.drop()
    assert (await site.held("responses:user%3Aann"), len(site.keeper)) == (1, 2)
    turn.settle(None)
    assert (await site.held("responses:user%3Aann"), len(site.keeper)) == (0, 0)


async def test_nobody_counts_tokens_that_are_not_limited() -> None:
    """Reading the whole conversation for it is not free."""
    site = Site()
    site.admission.till = Till(site.ledger, site.keeper, Allowances(responses=2))
    sizes = Sizes(10**9)
    await site.admission.ticket(ANN).response(sizes, "s1")
    assert sizes.asked == 0


def test_a_refused_take_tells_at_least_a_millisecond() -> None:
    """A wait of nothing would be no wait."""
    rates = mock.Mock(take=mock.AsyncMock(return_value=Taken(False, 3, 0, 1.0, 0.0001)))
    site = Site()
    admission = Admission(site.admission._most, rates, site.keeper, site.till)
    with pytest.raises(RateLimited) as refusal:
        asyncio.run(_ask(admission))
    assert refusal.value.retry_after_ms == 1


async def _ask(admission: Admission) -> None:
    await admission.task(ANN.payer, anywhere)


@pytest.mark.parametrize(
    ("who", "may"),
    [
        (ANN, True),
        (msgspec.structs.replace(ANN, session_id="s1"), False),
        (msgspec.structs.replace(ANN, scopes=frozenset({"session"})), False),
    ],
)
async def test_the_model_makes_tasks_only_for_who_may(site: Site, who: Principal, may: bool) -> None:
    """Not for guests, nor for tokens without that scope: the bill says so to whichever instance runs the response."""
    assert (await site.admission.response(who, Sizes(1))).bill.tasks is may
