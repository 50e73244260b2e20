"""This process's sign of life, and what may be concluded from the lack of others'."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from realtime.errors import StoreError
from realtime.live import RETRY_S
from realtime.observe import logs
from realtime.store.base import Store

BEATS_PER_LEASE = 3


class Confidence:
    """Whether a lease that is missing may be believed to have run out. Pure: `now` is monotonic seconds.

    After an outage of the store, or of this process, every lease may be gone, and nobody can conclude anything from
    that until everybody has had the time to renew: one whole lease of unbroken answers.
    """

    __slots__ = ("_answered_at", "_lease_s", "_since")

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._since: float | None = None
        self._answered_at = 0.0

    def answered(self, now: float) -> bool:
        """The store has answered; returns whether it has done so without a break for a whole lease.

        A long time after the last answer is a break, whoever has stood still meanwhile.
        """
        if self._since is None or now - self._answered_at > self._lease_s * 2 / BEATS_PER_LEASE:
            self._since = now
        self._answered_at = now
        return now - self._since >= self._lease_s

    def failed(self) -> None:
        """The store has not answered, or has lost leases."""
        self._since = None


class Lease:
    """The lease of `instance`. `sign` renews it for ever, in a task of its own; `lost` is about the others'."""

    def __init__(self, store: Store, instance: str, *, lease_s: float) -> None:
        self.instance = instance
        self.lease_s = lease_s
        self._store = store
        self._confidence = Confidence(lease_s)

    async def sign(self) -> None:
        """Say that this instance lives."""
        has_signed = False
        while True:
            try:
                if has_signed and self.instance not in await self._store.living({self.instance}):
                    self._confidence.failed()  # and not only this one's lease may be gone
                await self._store.sign(self.instance, self.lease_s)
                has_signed = True
                self._confidence.answered(asyncio.get_running_loop().time())
            except Exception as error:  # whatever it is, an instance that lives has to go on saying so
                self.note(error)
                await asyncio.sleep(RETRY_S)
            else:
                await asyncio.sleep(self.lease_s / BEATS_PER_LEASE)

    def note(self, error: Exception) -> None:
        """Nothing may be concluded from what the store did not say."""
        self._confidence.failed()
        if not isinstance(error, StoreError):
            logs.report(error)

    async def lost(self, instances: Collection[str]) -> set[str]:
        """Those whose leases have run out, as far as that can be known. Raises `StoreError`."""
        asked = {self.instance, *instances}
        lost = asked - await self._store.living(asked)
        if self.instance in lost:
            self._confidence.failed()
        return lost if self._confidence.answered(asyncio.get_running_loop().time()) else set()
