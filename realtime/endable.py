"""A request that may be ended from outside while it is answered: its token was taken back, or the server stops."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from realtime.access.principal import Principal
from realtime.errors import RealtimeError, ServerError
from realtime.feed import Closing
from realtime.protocol import SessionGoingAway


class Endable:
    """One that is answered outside of any session. A `realtime.connections.Held`: whose token counts no more is told no
    more."""

    def __init__(self, principal: Principal) -> None:
        self.principal = principal
        self.session_id = None
        self.name = self.transport = "oneshot"
        self.is_warned = True  # there is no word for that
        self.sending_since = math.inf  # it lets go of a client that stalls by itself
        self._running: asyncio.Timeout | None = None
        self._error: RealtimeError | None = None

    def end(self, error: RealtimeError) -> None:
        """End the block of `endable` with `error`, be it entered or not yet. Once it is left this does nothing."""
        if self._error is None and self._running is not None:
            self._running.reschedule(0)
        self._error = self._error or error

    def warn(self) -> None:
        """Nobody is warned here."""

    def send_away(self, _message: SessionGoingAway) -> None:
        """It is waited for."""

    def drop(self, closing: Closing) -> None:
        """End it with the closing's error."""
        self.end(closing.error or ServerError("internal_error", "Something went wrong here."))

    @asynccontextmanager
    async def endable(self) -> AsyncIterator[None]:
        """A block that `end` ends: its error comes out of it."""
        try:
            async with asyncio.timeout(None) as self._running:
                if self._error is not None:
                    raise self._error
                yield
        except TimeoutError:
            if self._error is None:
                raise
            raise self._error from None
        finally:
            self._running = None
