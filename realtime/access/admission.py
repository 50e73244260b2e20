"""What comes before anything is created or any token is spent: rates, connections and responses at once, budgets.

Where the ledger does not answer, what costs money is refused, and what costs nothing is let in.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Protocol

from msgspec import Struct

from realtime.access.keeper import Held, Keeper
from realtime.access.ledger import Account, Exceeded
from realtime.access.names import joined
from realtime.access.principal import TASK, Principal
from realtime.access.rates import Allowance, MemoryRates, Rate, Rates, Taken
from realtime.access.till import Purse, Till
from realtime.errors import RateLimited, StoreError
from realtime.observe import metrics
from realtime.protocol import Bill, RateLimit

FULL_WAIT_MS = 1000
"""When who has too many connections may try again."""
READ_BYTES = 64 * 1024
"""Half of a rate is the most that one read counts: who makes few requests may read all there is."""


class Most(Struct, frozen=True, kw_only=True):
    """How much of what anybody may have."""

    connections_per_user: int
    connections_per_address: int
    responses: Rate
    oneshots: Rate
    tasks: Rate
    sessions: Rate
    messages: Rate


class Admitted(Struct, frozen=True):
    """A response that may be created: the bill for its log, the purse that holds what it needs, what is left."""

    bill: Bill
    purse: Purse
    limits: list[RateLimit]


class Place(Protocol):
    """A place among a payer's tasks."""

    async def take(self) -> None:
        """Take it, or prolong that it is taken. Raises `RateLimited` where there is none, `StoreError`."""

    def give_back(self) -> None:
        """Have it be free again, soon. Raises nothing."""


class Ticket:
    """One command's admission: asked for once, however often the command is decided.

    Whoever has asked ends it in one of three ways: `keep` where something was made of it, `drop` where nobody knows,
    `give_back` otherwise, which does nothing after one of the others.
    """

    def __init__(self, admission: Admission, principal: Principal) -> None:
        self.limits: list[RateLimit] = []
        self._admission = admission
        self._principal = principal
        self._admitted: Admitted | None = None
        self._place: Place | None = None

    async def response(self, tokens: Callable[[], Awaitable[int]], session_id: str, ending: int = 0) -> Bill:
        """The bill of the response, which may use `tokens`. Raises as `Admission.response`."""
        if self._admitted is None:
            self._admitted = await self._admission.response(
                self._principal, tokens, session_id=session_id, ending=ending
            )
            self.limits = self._admitted.limits
        return self._admitted.bill

    async def task(self, place: Place) -> None:
        """A task; its place is taken each time. Raises as `Admission.task`."""
        if self._place is not None:
            await place.take()
            return
        self.limits = [await self._admission.task(self._principal.payer, place.take)]
        self._place = place

    def keep(self) -> Purse | None:
        """What it holds is somebody else's from now on: the purse of the response, if there is one."""
        admitted, self._admitted, self._place = self._admitted, None, None
        return admitted.purse if admitted else None

    def drop(self) -> None:
        """It may have become somebody's, or may not: what it holds runs out, unless somebody renews it."""
        if (purse := self.keep()) is not None:
            purse.drop()

    def give_back(self) -> None:
        """Nothing was made of it."""
        if self._place is not None:
            self._place.give_back()
        if (purse := self.keep()) is not None:
            purse.settle(None)


class Admission:
    """Lets in, or raises the error that refuses. `till` is where tokens are paid."""

    def __init__(self, most: Most, rates: Rates, keeper: Keeper, till: Till) -> None:
        self.till = till
        self._most = most
        self._rates = rates
        self._keeper = keeper
        self._requests = MemoryRates()

    def ticket(self, principal: Principal) -> Ticket:
        """For a command of the principal's."""
        return Ticket(self, principal)

    def messages(self) -> Allowance:
        """How many messages a new connection may send."""
        return Allowance(self._most.messages)

    async def request(self, principal: Principal) -> None:
        """A request over HTTP, or an upgrade: as many may come of one payer to this process as messages may over one
        connection. Raises `RateLimited`."""
        await self._count(principal, 1)

    async def read(self, principal: Principal, size_bytes: int) -> None:
        """What is about to be read at once: it counts as a request for each `READ_BYTES`. Raises `RateLimited`."""
        await self._count(principal, min(size_bytes // READ_BYTES, self._most.messages.limit // 2))

    async def _count(self, principal: Principal, cost: int) -> None:
        taken = await self._requests.take("messages", principal.payer, self._most.messages, cost)
        if not taken.allowed:
            raise _too_often("messages", taken)

    async def session(self, principal: Principal) -> None:
        """A new session. Raises `RateLimited`."""
        with suppress(StoreError):  # it costs nothing
            await self._take("sessions", self._most.sessions, principal.payer)

    @asynccontextmanager
    async def connection(self, principal: Principal, connection_id: str) -> AsyncIterator[None]:
        """One more connection, for as long as the block lasts. Raises `RateLimited`."""
        slots: list[Held] = []
        try:
            for account in self._connection_accounts(principal):
                with suppress(StoreError):  # it costs nothing
                    slots.append(await self._keeper.hold(account, connection_id, 1))
            yield
        except Exceeded:
            raise _too_many_connections() from None
        finally:
            for slot in slots:
                slot.release(0)

    async def response(
        self,
        principal: Principal,
        tokens: Callable[[], Awaitable[int]],
        *,
        session_id: str | None = None,
        ending: int = 0,
    ) -> Admitted:
        """A response that may use so many `tokens`, which is asked once the rate allows it, and only where they are
        limited. Of those at once the ones that are `ending` count no more. Raises `RateLimited`, `BudgetError` and
        `StoreError`, and what `tokens` raises."""
        limit = await self._take("responses", self._most.responses, principal.payer)
        most = await tokens() if self.till.budgets else 0
        return await self.paid(limit, principal, most, session_id, ending)

    async def asked(self, principal: Principal) -> RateLimit:
        """A one-shot call is asked for: before anything is done for it. Raises `RateLimited` and `StoreError`."""
        return await self._take("oneshots", self._most.oneshots, principal.payer)

    async def oneshot(self, principal: Principal, tokens: int) -> Admitted:
        """Both in one, where it is known before what it may use. Raises as `asked` and `paid`."""
        return await self.paid(await self.asked(principal), principal, tokens)

    async def paid(
        self, limit: RateLimit, principal: Principal, tokens: int, session_id: str | None = None, ending: int = 0
    ) -> Admitted:
        """What was asked for within its `limit` may use `tokens`. Raises `RateLimited`, `BudgetError`, `StoreError`."""
        bill = self.till.bill(principal.payer, tokens, tasks=TASK in principal.scopes and principal.session_id is None)
        try:
            purse = await self.till.open(bill, session_id=session_id, ending=ending)
        except RateLimited as error:
            error.limits = [limit]
            with suppress(StoreError):  # it is refused anyway
                error.limits = _with(limit, await self.till.left(principal.payer))
            raise
        try:
            left = await self.till.left(principal.payer)
        except BaseException:
            purse.settle(None)
            raise
        return Admitted(bill, purse, _with(limit, left))

    async def task(self, payer: str, take_place: Callable[[], Awaitable[None]]) -> RateLimit:
        """A task, which has a place if `take_place` does not refuse it; what it costs its model calls pay. Raises
        `RateLimited` and `StoreError`. Where there is no place nothing counts against the rate."""
        limit = await self._take("tasks", self._most.tasks, payer)
        try:
            await take_place()
        except RateLimited as error:
            error.limits = [limit]
            with suppress(StoreError):  # it is refused anyway
                error.limits = [await self._give_back("tasks", self._most.tasks, payer)]
            raise
        return limit

    async def _take(self, name: str, rate: Rate, payer: str) -> RateLimit:
        taken = await self._rates.take(name, payer, rate)
        if not taken.allowed:
            raise _too_often(name, taken)
        return _limit(name, taken)

    async def _give_back(self, name: str, rate: Rate, payer: str) -> RateLimit:
        await self._rates.give_back(name, payer, rate)
        return _limit(name, await self._rates.take(name, payer, rate, cost=0))

    def _connection_accounts(self, principal: Principal) -> list[Account]:
        """What a connection takes a place of: an anonymous one is its address's alone."""
        by_address = joined("connections", "address", principal.address)
        if principal.is_anonymous:
            most = min(self._most.connections_per_user, self._most.connections_per_address)
            return [Account(by_address, most, keep_s=0.0)]
        by_user = joined("connections", "user", principal.user)
        return [
            Account(by_user, self._most.connections_per_user, keep_s=0.0),
            Account(by_address, self._most.connections_per_address, keep_s=0.0),
        ]


def _with(limit: RateLimit, left: RateLimit | None) -> list[RateLimit]:
    return [limit] if left is None else [limit, left]


def _limit(name: str, taken: Taken) -> RateLimit:
    return RateLimit(name=name, limit=taken.limit, remaining=taken.remaining, reset_s=round(taken.reset_s, 1))


def _too_often(name: str, taken: Taken) -> RateLimited:
    metrics.LIMITS_HIT.labels(name).inc()
    retry_after_ms = max(1, round(taken.retry_after_s * 1000))
    error = RateLimited("rate_limited", f"Too many {name} in too short a time.", retry_after_ms=retry_after_ms)
    error.limits = [_limit(name, taken)]
    return error


def _too_many_connections() -> RateLimited:
    metrics.LIMITS_HIT.labels("connections").inc()
    return RateLimited("too_many_connections", "Too many connections of yours are open.", retry_after_ms=FULL_WAIT_MS)
