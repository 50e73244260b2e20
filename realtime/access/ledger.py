"""The interface of whatever is held for a while and maybe paid for: slots, reservations of a budget.

Every implementation passes `tests/access/test_ledger.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from msgspec import Struct

REMEMBER_S = 3600.0
"""How long it is remembered what was charged for a hold that has ended, so that it is not charged twice."""


class Account(Struct, frozen=True):
    """Something of which there is a limited amount. Make the name with `realtime.access.names.joined`.

    It is remembered for `keep_s` after its last use, and at least for a lease.
    """

    name: str
    limit: int
    keep_s: float


class Balance(Struct, frozen=True):
    """How an account stands: what was charged, and what live holds keep."""

    limit: int
    used: int
    held: int

    @property
    def free(self) -> int:
        """What may still be held; negative where holds were made again, or cost more than they held."""
        return self.limit - self.used - self.held


class Hold(Struct, frozen=True):
    """An amount that is kept of an account, and what it has come to so far. The id is unique, and used once."""

    account: Account
    hold_id: str
    amount: int
    spent: int = 0


class Exceeded(Exception):
    """An account has not enough left. Nothing was held."""

    def __init__(self, balance: Balance) -> None:
        super().__init__("not enough left")
        self.balance = balance


class Ledger(Protocol):
    """Accounts, and what is held of them. Owned by `async with`.

    A hold is a lease: it lives for `lease_s` after it was made or last renewed. One that has run out ends with the next
    use of its account: what it was known to have spent is charged, the rest is free again.

    Every call raises `StoreError` where the ledger does not answer within 1.5 s. Then, as with a caller that is
    cancelled, it may have had its effect, or have it later. All calls may be repeated, and whatever comes after a hold
    was settled changes nothing: so who settles after such an error, and repeats that until it is answered, leaves
    nothing held, and is charged once. Two things are not promised: a late call that comes more than `REMEMBER_S` after
    the end (more than a lease, if nothing was charged) counts as a new one, and what the ledger has lost with its data
    is forgotten, but for the holds that are renewed.
    """

    @property
    def lease_s(self) -> float:
        """How long a hold lives that is not renewed."""

    async def hold(self, account: Account, hold_id: str, amount: int) -> Balance:
        """Hold an amount, if used and held together stay within the limit; returns how the account stands with it.

        A hold of this id is replaced, even one that has run out. Raises `Exceeded` if it does not fit, with an old hold
        left as it was, or if the hold of this id was settled.
        """

    async def renew(self, holds: Sequence[Hold]) -> None:
        """Prolong holds, all in one go, and note what they keep and have spent so far (neither ever less than before).

        One that was lost or has run out is made again, whether it fits or not: what it keeps is in use. One that was
        settled is left alone.
        """

    async def settle(self, account: Account, hold_id: str, spent: int) -> None:
        """End a hold, which came to `spent` in all: what was charged when it ran out counts towards that.

        Whoever is first says what it came to; settling again changes nothing. A hold that the ledger does not know is
        charged as well: it knew it once, or `spent` is 0.
        """

    async def balance(self, account: Account) -> Balance:
        """How an account stands; counts as use of it."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
