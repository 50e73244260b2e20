"""Users and sessions whose tokens count no more: those that were issued before the revocation.

Every instance knows all of them, and asks for new ones once a second: so what is revoked anywhere is closed everywhere
within two seconds, and a token costs no call to the store.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from typing import Protocol

from realtime.access.names import joined
from realtime.access.principal import Principal
from realtime.errors import AuthenticationError, StoreError
from realtime.observe import logs

LOOK_S = 1.0
"""How often an instance asks for new revocations."""


class Register(Protocol):
    """Where revocations are kept, for as long as it was made to keep them. Its methods raise `StoreError`."""

    async def add(self, subject: str) -> None:
        """Revoke now what was issued to a subject; again, if it was before."""

    async def all(self) -> dict[str, float]:
        """What was revoked, and when: seconds since the epoch."""


class MemoryRegister:
    """A register of this process alone."""

    def __init__(self, *, keep_s: float, clock: Callable[[], float] = time.time) -> None:
        self._keep_s = keep_s
        self._clock = clock
        self._revoked: dict[str, float] = {}

    async def add(self, subject: str) -> None:
        """As the interface says."""
        self._revoked[subject] = self._clock()

    async def all(self) -> dict[str, float]:
        """As the interface says."""
        oldest = self._clock() - self._keep_s
        self._revoked = {subject: at for subject, at in self._revoked.items() if at > oldest}
        return dict(self._revoked)


class Revocations:
    """What this instance knows of the register; `changed` is called when it learns of something. `watch` has to run
    beside it."""

    def __init__(self, register: Register, changed: Callable[[], None]) -> None:
        self._register = register
        self._changed = changed
        self._revoked: dict[str, float] = {}

    async def revoke(self, *, user: str | None = None, session_id: str | None = None) -> None:
        """Revoke every token of a user, or every right to look at a session, that was given before now. Raises
        `StoreError`."""
        await self._register.add(_user(user or "") if session_id is None else _session(session_id))
        await self.look()

    def check(self, principal: Principal, session_id: str | None) -> None:
        """Raise `AuthenticationError` if the principal's token counts no more, for that session if there is one."""
        if self.covers(principal, session_id):
            raise revoked()

    def covers(self, principal: Principal, session_id: str | None) -> bool:
        """Whether something was revoked that the principal's token has from before."""
        if not self._revoked or principal.is_anonymous:
            return False
        at = self._revoked.get(_user(principal.user), 0.0)
        if session_id is not None:
            at = max(at, self._revoked.get(_session(session_id), 0.0))
        return at > (principal.issued_at or 0.0)

    async def watch(self) -> None:
        """Ask for new revocations, for ever."""
        while True:
            try:
                await self.look()
            except StoreError:
                pass  # what is known goes on being known
            except Exception as error:  # whatever it is, the next look has to come
                logs.report(error)
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """Ask for new revocations. Raises `StoreError`."""
        before, self._revoked = self._revoked, await self._register.all()
        if self._revoked != before:
            self._changed()


def revoked() -> AuthenticationError:
    """The token was taken back."""
    return AuthenticationError("token_revoked", "The token counts no more.")


def _user(user: str) -> str:
    return _hashed("user", user)


def _session(session_id: str) -> str:
    return _hashed("session", session_id)


def _hashed(*parts: str) -> str:
    """What is revoked as it is registered: nobody learns from that who it is."""
    return hashlib.blake2b(joined(*parts).encode(errors="surrogatepass"), digest_size=16).hexdigest()
