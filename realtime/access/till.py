"""What model calls cost, and who pays: reserved before a call, watched while it says something, settled at its end."""

from __future__ import annotations

import time
from collections.abc import Sequence

from msgspec import Struct

from realtime.access.keeper import Held, Keeper
from realtime.access.ledger import Account, Balance, Exceeded, Ledger
from realtime.access.names import joined
from realtime.access.prices import weighted_tokens
from realtime.errors import BudgetError, RateLimited, StoreError
from realtime.observe import metrics
from realtime.protocol import Bill, RateLimit, Usage, new_id
from realtime.settings import SettingsError

PERIODS_S = {"hour": 3600, "day": 86_400}
SLACK_TOKENS, SLACK_PARTS = 64, 4
"""How much more than was reserved an answer may be estimated at: so many tokens, or that part of it."""
SLOT_WAIT_MS = 1000
"""When who has too many responses at once may try again."""


class Budget(Struct, frozen=True):
    """So many tokens in each period: of hours or days, in UTC."""

    tokens: int
    period_s: int

    def account(self, payer: str, at: float) -> Account:
        """The account of the period that holds `at`, in seconds since the epoch."""
        period = int(at // self.period_s)
        return Account(joined("tokens", payer, str(period)), self.tokens, keep_s=2.0 * self.period_s)

    def reset_s(self, at: float) -> float:
        """In how many seconds the next period begins."""
        return self.period_s - at % self.period_s


def parse_budget(text: str) -> Budget | None:
    """The budget that a setting such as `200000/day` means; `None` where it is empty. Raises `SettingsError`."""
    if not text:
        return None
    tokens, _, period = text.partition("/")
    if period not in PERIODS_S or not tokens.isdecimal():
        raise SettingsError(f"{text!r} is no budget: expected for example 200000/day")
    return Budget(int(tokens), PERIODS_S[period])


class Allowances(Struct, frozen=True, kw_only=True):
    """What a payer may have: responses at once, tokens in a period, tokens in one session (`None`: any number)."""

    responses: int
    budget: Budget | None = None
    session_tokens: int | None = None
    session_ttl_s: float = 3600.0


class Purse:
    """What one response, or one model call, may cost. Without holds it may cost anything.

    It is settled or dropped at its end, once: whatever comes after that does nothing.
    """

    def __init__(self, keeper: Keeper | None = None, slots: Sequence[Held] = (), funds: Sequence[Held] = ()) -> None:
        self._keeper = keeper
        self._slots = slots
        self._funds = funds
        self._promised = max((held.amount for held in funds), default=0)
        self._is_over = False

    def covers(self, tokens: int) -> bool:
        """Whether it holds so many."""
        return all(tokens <= held.amount for held in self._funds)

    async def cover(self, tokens: int) -> None:
        """Have it hold so many tokens, in all, for certain. Raises `BudgetError` where there are not so many, and
        `StoreError`."""
        await self._hold(tokens)
        self._promised = max(self._promised, tokens)

    async def _hold(self, tokens: int) -> None:
        for held in self._funds:
            if self._keeper is not None and (tokens > held.amount or not held.is_sure):
                try:
                    await self._keeper.hold(held.account, held.hold_id, max(tokens, held.amount))
                except Exceeded as exceeded:
                    raise spent(exceeded.balance) from None

    async def affords(self, usage: Usage) -> bool:
        """Note what was used so far; returns whether there is more.

        Until its provider has counted, what an answer uses is an estimate. So where all that is held is used up the
        purse asks once for a little more, which spares an answer in long words that would be whole in a moment. Where
        the ledger does not answer there is no more.
        """
        if self._is_over:
            return False
        tokens = weighted_tokens(usage)
        for held in self._funds:
            held.spent = tokens
        if self.covers(tokens + 1):
            return True
        most = self._promised + max(SLACK_TOKENS, self._promised // SLACK_PARTS)
        if tokens >= most:
            return False
        try:
            await self._hold(most)
        except (BudgetError, StoreError):
            return False
        return True

    @property
    def is_limited(self) -> bool:
        """Whether it has to be told what is used."""
        return bool(self._funds)

    def settle(self, usage: Usage | None) -> None:
        """End it, with what was used (`None`: nothing): the rest is free again."""
        self._is_over = True
        tokens = weighted_tokens(usage) if usage is not None else 0
        for held in self._slots:
            held.release(0)
        for held in self._funds:
            held.release(tokens)

    def drop(self) -> None:
        """Forget it: somebody else settles it."""
        self._is_over = True
        for held in (*self._slots, *self._funds):
            held.drop()


class Till:
    """Where purses come from."""

    def __init__(self, ledger: Ledger, keeper: Keeper, allowances: Allowances) -> None:
        self._ledger = ledger
        self._keeper = keeper
        self._allowances = allowances

    @property
    def budgets(self) -> bool:
        """Whether tokens are limited, so that it has to be known how many a call may need."""
        return self._allowances.budget is not None or self._allowances.session_tokens is not None

    def bill(self, payer: str, tokens: int, *, tasks: bool = True) -> Bill:
        """A new bill, nothing of which is held yet. `tasks`: whether the model may make tasks for the payer."""
        return Bill(payer=payer, hold_id=new_id("hold"), tokens=tokens, made_at=time.time(), tasks=tasks)

    async def open(self, bill: Bill, *, session_id: str | None = None, slot: bool = True, ending: int = 0) -> Purse:
        """Hold what a bill needs: tokens, and if it is to take a `slot`, one of the payer's responses at once, of which
        those that are `ending` already count no more.

        Raises `RateLimited` (too many at once), `BudgetError` and `StoreError`; then nothing is held.
        """
        slots: list[Held] = []
        funds: list[Held] = []
        try:
            for account in self._slots(bill, ending) if slot else ():
                slots.append(await self._keeper.hold(account, bill.hold_id, 1))
            for account in self._funds(bill, session_id):
                funds.append(await self._keeper.hold(account, bill.hold_id, bill.tokens))
        except BaseException as error:
            Purse(self._keeper, slots, funds).settle(None)
            if isinstance(error, Exceeded):
                raise (self._spent(error.balance, bill, funds) if slots or not slot else busy()) from None
            raise
        return Purse(self._keeper, slots, funds)

    def adopt(self, bill: Bill | None, *, session_id: str | None = None) -> Purse:
        """The purse of a bill whose amounts are held already, wherever that was; `None` costs nobody anything."""
        if bill is None:
            return Purse()
        slots = [self._keeper.adopt(account, bill.hold_id, 1) for account in self._slots(bill)]
        funds = [self._keeper.adopt(account, bill.hold_id, bill.tokens) for account in self._funds(bill, session_id)]
        return Purse(self._keeper, slots, funds)

    async def left(self, payer: str) -> RateLimit | None:
        """What is left of a payer's tokens; `None` where they are not limited. Raises `StoreError`."""
        budget, now = self._allowances.budget, time.time()
        if budget is None:
            return None
        balance = await self._ledger.balance(budget.account(payer, now))
        remaining = max(0, balance.free)
        return RateLimit(name="tokens", limit=budget.tokens, remaining=remaining, reset_s=round(budget.reset_s(now), 1))

    def _spent(self, balance: Balance, bill: Bill, held: Sequence[Held]) -> BudgetError:
        """The refusal of a bill by the account after those that are `held`: when it may be asked for again."""
        error = spent(balance)
        if bill.tokens > balance.limit:
            return error  # it never fits
        if balance.used + bill.tokens <= balance.limit:  # what is held now may come to less
            error.retry_after_ms = SLOT_WAIT_MS
        elif self._allowances.budget is not None and not held:
            error.retry_after_ms = round(self._allowances.budget.reset_s(time.time()) * 1000)
        return error

    def _slots(self, bill: Bill, ending: int = 0) -> list[Account]:
        return [Account(joined("responses", bill.payer), self._allowances.responses + ending, keep_s=0.0)]

    def _funds(self, bill: Bill, session_id: str | None) -> list[Account]:
        allowances, funds = self._allowances, []
        if allowances.budget is not None:
            funds.append(allowances.budget.account(bill.payer, bill.made_at))
        if allowances.session_tokens is not None and session_id is not None:
            name = joined("session", session_id)
            funds.append(Account(name, allowances.session_tokens, keep_s=2 * allowances.session_ttl_s))
        return funds


def count(usage: Usage) -> None:
    """Count in the metrics what a model call used."""
    metrics.TOKENS.labels("input").inc(usage.input_tokens)
    metrics.TOKENS.labels("output").inc(usage.output_tokens)
    metrics.TOKENS.labels("cache_read").inc(usage.cache_read_input_tokens or 0)
    metrics.TOKENS.labels("cache_write").inc(usage.cache_creation_input_tokens or 0)
    metrics.COST_USD.inc(usage.cost_usd or 0.0)


def spent(balance: Balance) -> BudgetError:
    """There are not enough tokens left for what was asked."""
    metrics.LIMITS_HIT.labels("tokens").inc()
    left = f"It may need more tokens than the {max(0, balance.free)} that are left of {balance.limit}."
    return BudgetError("budget_exceeded", left)


def busy() -> RateLimited:
    """As many responses run or wait as a user may have."""
    metrics.LIMITS_HIT.labels("responses_at_once").inc()
    return RateLimited(
        "too_many_responses_at_once", "Too many responses of yours run or wait.", retry_after_ms=SLOT_WAIT_MS
    )
