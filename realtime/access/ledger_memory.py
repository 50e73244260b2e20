"""The ledger in this process, gone with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from msgspec import Struct

from realtime.access.ledger import REMEMBER_S, Account, Balance, Exceeded, Hold

SWEEP_S = 60.0


class _Held(Struct):
    amount: int
    spent: int
    deadline: float


class _Ended(Struct):
    charged: int
    is_settled: bool
    until: float


NEVER = _Ended(0, False, 0.0)


class _Book:
    """One account. It is looked through for what has run out when something may have, and not at each use."""

    __slots__ = ("deadline", "ended", "held", "holds", "look_at", "used")

    def __init__(self) -> None:
        self.used = 0
        self.held = 0
        self.holds: dict[str, _Held] = {}
        self.ended: dict[str, _Ended] = {}
        self.look_at = 0.0
        self.deadline = 0.0

    def amount(self, hold_id: str) -> int:
        """What a hold keeps; 0 if there is none."""
        return self.holds[hold_id].amount if hold_id in self.holds else 0

    def put(self, hold_id: str, amount: int, spent: int, deadline: float) -> None:
        """Make a hold, prolong it, or take back that it has run out."""
        old = self.holds.get(hold_id)
        lapsed = self.ended.pop(hold_id, NEVER)
        self.held += amount - (old.amount if old else 0)
        self.used -= lapsed.charged
        self.holds[hold_id] = _Held(amount, max(spent, old.spent if old else lapsed.charged), deadline)

    def end(self, hold_id: str, charge: int, *, is_settled: bool, now: float, lease_s: float) -> None:
        """End a hold, which comes to `charge`."""
        old = self.holds.pop(hold_id, None)
        self.held -= old.amount if old else 0
        self.used += charge - self.ended.get(hold_id, NEVER).charged
        self.ended[hold_id] = _Ended(charge, is_settled, now + (REMEMBER_S if charge else lease_s))

    def look(self, now: float, lease_s: float) -> None:
        """End what has run out, forget what has ended long ago."""
        if now < self.look_at:
            return
        for hold_id, hold in list(self.holds.items()):
            if hold.deadline <= now:
                self.end(hold_id, hold.spent, is_settled=False, now=now, lease_s=lease_s)
        self.ended = {hold_id: ended for hold_id, ended in self.ended.items() if ended.until > now}
        self.look_at = min([now + lease_s, *(hold.deadline for hold in self.holds.values())])


class MemoryLedger:
    """See `realtime.access.ledger.Ledger`. `clock` gives monotonic seconds; tests pass their own."""

    def __init__(self, *, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.lease_s = lease_s
        self._clock = clock
        self._books: dict[str, _Book] = {}
        self._sweep_at = 0.0

    def __len__(self) -> int:
        """How many accounts are remembered."""
        return len(self._books)

    async def hold(self, account: Account, hold_id: str, amount: int) -> Balance:
        book = self._used(account)
        old, ended = book.holds.get(hold_id), book.ended.get(hold_id, NEVER)
        others = book.used - ended.charged + book.held - (old.amount if old else 0)
        if ended.is_settled or others + amount > account.limit:
            raise Exceeded(Balance(account.limit, book.used, book.held))
        book.put(hold_id, amount, 0, self._clock() + self.lease_s)
        return Balance(account.limit, book.used, book.held)

    async def renew(self, holds: Sequence[Hold]) -> None:
        for hold in holds:
            book = self._used(hold.account)
            if not book.ended.get(hold.hold_id, NEVER).is_settled:
                amount = max(hold.amount, book.amount(hold.hold_id))  # it may have grown while this was under way
                book.put(hold.hold_id, amount, hold.spent, self._clock() + self.lease_s)

    async def settle(self, account: Account, hold_id: str, spent: int) -> None:
        book = self._used(account)
        if not book.ended.get(hold_id, NEVER).is_settled:
            book.end(hold_id, spent, is_settled=True, now=self._clock(), lease_s=self.lease_s)

    async def balance(self, account: Account) -> Balance:
        book = self._used(account)
        return Balance(account.limit, book.used, book.held)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._books.clear()

    def _used(self, account: Account) -> _Book:
        """The book of an account, without what has run out; it was used now."""
        now = self._clock()
        self._sweep(now)
        book = self._books.get(account.name)
        if book is None or book.deadline <= now:
            book = self._books[account.name] = _Book()
        book.look(now, self.lease_s)
        book.deadline = now + max(account.keep_s, self.lease_s)
        return book

    def _sweep(self, now: float) -> None:
        if now >= self._sweep_at:
            self._books = {name: book for name, book in self._books.items() if book.deadline > now}
            self._sweep_at = now + SWEEP_S
