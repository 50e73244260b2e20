"""What this process holds: renewed while it is held, and settled for certain, however the ledger fails meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from realtime.access.ledger import Account, Exceeded, Hold, Ledger
from realtime.errors import StoreError
from realtime.observe import logs

RENEWALS_PER_LEASE = 3
RETRY_S = 0.5
"""How long to wait before the ledger is tried again that did not answer."""
MAX_OWED = 10_000
"""Settlements that wait for the ledger; beyond that the oldest is left to the lease to end."""
BATCH = 500
"""Settlements under way at once."""

_Key = tuple[str, str]


class Held:
    """One hold of this process. Whoever has it keeps `spent` up to date: it is told to the ledger at each renewal."""

    __slots__ = ("_keeper", "account", "amount", "hold_id", "is_sure", "spent")

    def __init__(self, keeper: Keeper, account: Account, hold_id: str, amount: int, *, is_sure: bool) -> None:
        self._keeper = keeper
        self.account = account
        self.hold_id = hold_id
        self.amount = amount
        self.spent = 0
        self.is_sure = is_sure
        """Whether the ledger has said that it is held; one that was adopted may have run out before."""

    async def settle(self, spent: int) -> None:
        """End it, which came to `spent`: now if the ledger answers, else later, also if cancelled. Raises nothing."""
        await self._keeper.settle(self, spent)

    def release(self, spent: int) -> None:
        """The same without waiting for it. Only the first call counts, and none after `Keeper.drop`."""
        self._keeper.release(self, spent)

    def drop(self) -> None:
        """Forget it without settling it: somebody else does."""
        self._keeper.drop(self)


class Keeper:
    """The holds of this process. `run` has to run, in a task of its own, while there are any."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._live: dict[_Key, Held] = {}
        self._owed: dict[_Key, Hold] = {}
        self._has_owed = asyncio.Event()

    def __len__(self) -> int:
        """How many holds are live here."""
        return len(self._live)

    async def hold(self, account: Account, hold_id: str, amount: int) -> Held:
        """Hold an amount; one that is held here already is changed to it, and is the same `Held`.

        Raises `Exceeded` or `StoreError`; then, or if cancelled, a new hold is given back whatever became of the call,
        and its id is used up. An old hold stays.
        """
        try:
            await self._ledger.hold(account, hold_id, amount)
        except Exceeded:
            raise
        except BaseException:
            if (account.name, hold_id) not in self._live:
                self._owe(Hold(account, hold_id, amount))
                self._has_owed.set()
            raise
        held = self._live.setdefault((account.name, hold_id), Held(self, account, hold_id, amount, is_sure=True))
        held.amount, held.is_sure = amount, True
        return held

    def adopt(self, account: Account, hold_id: str, amount: int) -> Held:
        """Take over what somebody else holds, here or in another process. A `Held` of it that there is here does
        nothing any more: whoever had that may still drop or settle it, as they would have."""
        held = Held(self, account, hold_id, amount, is_sure=False)
        if (before := self._live.get(_key(held))) is not None:
            held.amount, held.spent, held.is_sure = before.amount, before.spent, before.is_sure
        self._live[_key(held)] = held
        return held

    def drop(self, held: Held) -> None:
        """Forget a hold without settling it: somebody else does."""
        if self._live.get(_key(held)) is held:
            del self._live[_key(held)]

    async def settle(self, held: Held, spent: int) -> None:
        """See `Held.settle`."""
        if (owed := self._end(held, spent)) is not None:
            try:
                await self._pay(owed)
            finally:
                if _key(owed) in self._owed:
                    self._has_owed.set()

    def release(self, held: Held, spent: int) -> None:
        """See `Held.release`."""
        if self._end(held, spent) is not None:
            self._has_owed.set()

    async def pay_all(self) -> None:
        """Settle now all that is released, as far as the ledger answers."""
        while batch := list(self._owed.values())[:BATCH]:
            if not all(await asyncio.gather(*map(self._pay, batch))):
                return

    async def run(self) -> None:
        """Renew what is live, settle what is released, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._again(self._renew), name="keeper: renew")
            group.create_task(self._again(self._settle), name="keeper: settle")

    async def _again(self, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await step()
            except Exception as error:  # whatever it is, what is held here has to be kept, and given back
                if not isinstance(error, StoreError):
                    logs.report(error)
                await asyncio.sleep(RETRY_S)

    async def _renew(self) -> None:
        """Raises `StoreError`, and is at once tried again then: it begins with the call, not with the rest."""
        if self._live:
            await self._ledger.renew([Hold(h.account, h.hold_id, h.amount, h.spent) for h in self._live.values()])
        await asyncio.sleep(self._ledger.lease_s / RENEWALS_PER_LEASE)

    async def _settle(self) -> None:
        await self._has_owed.wait()
        self._has_owed.clear()
        await self.pay_all()
        if self._owed:
            self._has_owed.set()
            await asyncio.sleep(RETRY_S)

    async def _pay(self, owed: Hold) -> bool:
        """Whether the ledger has answered."""
        try:
            await self._ledger.settle(owed.account, owed.hold_id, owed.spent)
        except StoreError:
            return False
        if self._owed.get(_key(owed)) is owed:
            del self._owed[_key(owed)]
        return True

    def _end(self, held: Held, spent: int) -> Hold | None:
        """What is owed for a hold that ends now; `None` if it is not live."""
        if self._live.get(_key(held)) is not held:
            return None
        del self._live[_key(held)]
        return self._owe(Hold(held.account, held.hold_id, held.amount, spent))

    def _owe(self, hold: Hold) -> Hold:
        if len(self._owed) >= MAX_OWED:
            del self._owed[next(iter(self._owed))]
            logs.warning("a hold is left to run out: too many wait to be settled")
        return self._owed.setdefault(_key(hold), hold)


def _key(hold: Held | Hold) -> _Key:
    return hold.account.name, hold.hold_id
