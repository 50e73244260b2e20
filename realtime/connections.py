"""The connections of this process, over every transport: how many there may be, who stalls, and how all of them end."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from realtime.access.audit import hidden
from realtime.access.principal import Principal
from realtime.access.revocations import revoked
from realtime.errors import AuthenticationError, Unavailable
from realtime.feed import Closing
from realtime.observe import logs, metrics
from realtime.observe.delivery import tell_deliveries
from realtime.protocol import CloseCode, SessionGoingAway

LOOKS_PER_TIMEOUT = 10
MAX_LOOK_S = 1.0
RETRY_MS = 1000
"""When a client that was not let in may try again."""
WARN_S = 60.0
"""How long before its token expires a client is told."""


class Held(Protocol):
    """An open connection, over whichever transport."""

    principal: Principal
    transport: str
    is_warned: bool
    sending_since: float

    @property
    def session_id(self) -> str | None:
        """The session that it reads; `None` before that is known."""

    @property
    def name(self) -> str:
        """What it is called in the log."""

    def warn(self) -> None:
        """Have the client told that its token expires soon."""

    def send_away(self, message: SessionGoingAway) -> None:
        """Have the client told to go."""

    def drop(self, closing: Closing) -> None:
        """End it."""


def _never(_principal: Principal, _session_id: str | None) -> bool:
    return False


class Connections:
    """The open connections. `watch` has to run beside it. `is_revoked` says whose tokens count no more for the session
    that they read, `name_of` what a session is called in the log.

    While it is `draining` nothing new is let in.
    """

    def __init__(
        self,
        *,
        max_connections: int,
        send_timeout_s: float,
        is_revoked: Callable[[Principal, str | None], bool] = _never,
        name_of: Callable[[str], str] = hidden,
    ) -> None:
        self.draining = False
        self._is_revoked = is_revoked
        self._name_of = name_of
        self._max_connections = max_connections
        self._send_timeout_s = send_timeout_s
        self._held: set[Held] = set()
        self._emptied = asyncio.Event()

    def __len__(self) -> int:
        return len(self._held)

    def admit(self) -> None:
        """Raise `Unavailable` if there may not be one more connection."""
        self.check_open()
        if len(self._held) >= self._max_connections:
            raise Unavailable("too_many_connections", "This instance is full.", retry_after_ms=RETRY_MS)

    def check_open(self) -> None:
        """Raise `Unavailable` if this instance is about to end, and begins nothing any more."""
        if self.draining:
            raise Unavailable("draining", "This instance is shutting down.", retry_after_ms=RETRY_MS)

    @contextmanager
    def holding(self, connection: Held) -> Iterator[None]:
        """Count a connection as open for as long as the block lasts. Raises `AuthenticationError` for one whose user's
        tokens were taken back since it was looked at; that of a session is to be asked for inside of the block."""
        if self._is_revoked(connection.principal, None):
            raise revoked()
        self._held.add(connection)
        metrics.CONNECTIONS_OPENED.labels(connection.transport).inc()
        metrics.CONNECTIONS.labels(connection.transport).inc()
        try:
            yield
        finally:
            metrics.CONNECTIONS.labels(connection.transport).dec()
            self._held.discard(connection)
            if not self._held:
                self._emptied.set()

    async def empty(self) -> None:
        """Return once there is none."""
        while self._held:
            self._emptied.clear()
            await self._emptied.wait()

    async def watch(self) -> None:
        """Drop, for ever, the connections whose clients have taken nothing for the send timeout, and those whose
        tokens have expired, which are warned before; and count what the others were sent."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(MAX_LOOK_S, self._send_timeout_s / LOOKS_PER_TIMEOUT))
            self._drop_stalled(loop.time() - self._send_timeout_s)
            self._drop_expired(time.time())
            tell_deliveries()

    def drop_revoked(self) -> None:
        """Drop the connections whose tokens count no more. One that is not let into its session yet is told nothing of
        it, unless it is."""
        for one in [one for one in self._held if self._is_revoked(one.principal, one.session_id)]:
            _drop(one, Closing.told(revoked()))

    def say_goodbye(self, time_left_s: float, spread_s: float) -> None:
        """Tell every client that its connection ends in `time_left_s`, and to come back at a random time of its own
        within the next `spread_s`."""
        for one in list(self._held):
            after_ms = round(random.uniform(0, spread_s) * 1000)
            one.send_away(
                SessionGoingAway(reason="shutdown", time_left_ms=round(time_left_s * 1000), reconnect_after_ms=after_ms)
            )

    def _drop_stalled(self, since: float) -> None:
        for one in [one for one in self._held if one.sending_since <= since]:
            session = self._name_of(one.session_id) if one.session_id else None
            logs.info("slow reader dropped", connection=one.name, session=session)
            metrics.SLOW_READERS.inc()
            _drop(one, Closing(CloseCode.SLOW_READER, by_server=True))

    def _drop_expired(self, now: float) -> None:
        for one in [one for one in self._held if one.principal.expires_at is not None]:
            left_s = (one.principal.expires_at or 0.0) - now
            if left_s <= 0:
                expired = AuthenticationError("token_expired", "The token has expired.")
                _drop(one, Closing(expired.close_code, error=expired, by_server=True))
            elif left_s <= WARN_S and not one.is_warned:
                one.warn()


def _drop(one: Held, closing: Closing) -> None:
    """End one, whatever is wrong with it: the others have to be ended, too."""
    try:
        one.drop(closing)
    except Exception as error:  # a fault of ours in one connection
        logs.report(error)
