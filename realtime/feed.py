"""What one reader of a session is sent next, whatever it is sent by: the one loop that every transport shares."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import islice
from typing import NoReturn

from realtime.access.principal import Principal
from realtime.asides import Asides
from realtime.cursor import Cursor, find_start
from realtime.doorbell import Doorbell
from realtime.errors import NotFound, RealtimeError, StoreError
from realtime.live import RETRY_S, LiveSession
from realtime.observe import traces
from realtime.observe.delivery import DELIVERIES, DeliverySpans
from realtime.opening import Opening
from realtime.protocol import (
    SESSION_CHANNEL,
    AuthExpiring,
    CloseCode,
    Participant,
    ServerMessage,
    Session,
    SessionClosed,
    SessionCreated,
    SessionGoingAway,
    SessionResumed,
    new_id,
    timestamp,
    timestamp_of,
)
from realtime.store.base import Gone
from realtime.viewers import SERVER_ENDED_FLOOR_S

CLOSE_TIMEOUT_S = 1.0
"""How long a client may take for the last word."""
MAX_TOLD_PARTICIPANTS = 1000
"""How many participants the first message names, so that it stays within a frame's limit."""


class Closing(Exception):
    """Ends a connection with a close code. `error` is told before it; `by_server` if it isn't the client's doing."""

    def __init__(self, code: int, *, error: RealtimeError | None = None, by_server: bool = False) -> None:
        super().__init__(code)
        self.code = code
        self.error = error
        self.by_server = by_server

    @classmethod
    def told(cls, error: RealtimeError) -> Closing:
        """The end that an error means."""
        return cls(error.close_code, error=error)


class Feed:
    """One connection's share of a session: a `Reader` of it that says what its client is sent, and in which order.

    It keeps no queue of events, only a cursor, and the few answers that belong to no log. `begin` is to be called
    first, then `next`, again and again; or both by `run`.
    """

    __slots__ = (
        "_asides",
        "_cursor",
        "_deliveries",
        "_doorbell",
        "_dropped",
        "_live",
        "_loop",
        "_opening",
        "_over",
        "_sender",
        "_sent_away",
        "_woken_at",
        "floor_s",
        "is_warned",
        "participant",
        "principal",
        "sending_since",
        "transport",
    )

    def __init__(self, opening: Opening, principal: Principal, *, transport: str, floor_s: float = 0.0) -> None:
        self.principal = principal
        """Who reads; replaced where the client shows a new token."""
        self.is_warned = False
        """Whether the client was told that its token expires."""
        self.participant = Participant(user=principal.user, connection_id=new_id("conn"), since=timestamp())
        self.floor_s = floor_s
        self.sending_since = math.inf
        """Loop time since when a message waits for the client to take it."""
        self.transport = transport
        self._deliveries = DELIVERIES[transport]
        self._opening = opening
        self._loop = asyncio.get_running_loop()
        self._doorbell = Doorbell()
        self._asides = Asides()
        self._live: LiveSession | None = None
        self._cursor: Cursor | None = None
        self._over = False
        self._sent_away = False
        self._sender: asyncio.Task[object] | None = None
        self._dropped: Closing | None = None
        self._woken_at = math.inf
        """Loop time since when something that is new waits to be sent."""

    @property
    def session_id(self) -> str | None:
        """The session that is read; `None` for a new one before the first message."""
        return self._live.id if self._live else self._opening.session_id

    @property
    def name(self) -> str:
        """What the connection is called."""
        return self.participant.connection_id

    @property
    def positions(self) -> dict[str, int]:
        """Where the client stands once it has all that `begin` and `next` have returned."""
        return self._cursor.positions if self._cursor else {}

    def wake(self) -> None:
        """Something may be new for this reader."""
        if self._woken_at is math.inf:
            self._woken_at = self._loop.time()
        self._doorbell.ring()

    def follows(self, channel: str) -> bool:
        """Whether the client has not been sent the channel's end yet."""
        return self._cursor is not None and channel in self._cursor.positions

    def tell(self, message: ServerMessage) -> None:
        """Have the client told something that belongs to no log."""
        self._asides.add(message)
        self._doorbell.ring()

    async def reply(self, message: ServerMessage) -> None:
        """The same, and wait while too much of that kind waits already."""
        self._doorbell.ring()
        await self._asides.put(message)

    def warn(self) -> None:
        """Have the client told that its token expires soon."""
        assert self.principal.expires_at is not None
        self.is_warned = True
        self.tell(AuthExpiring(expires_at=timestamp_of(self.principal.expires_at)))

    def renew(self, principal: Principal) -> None:
        """The client has shown a new token."""
        self.principal = principal
        self.is_warned = False

    def send_away(self, message: SessionGoingAway) -> None:
        """Have the client told to go: however it leaves after that, it was the server's doing."""
        self._sent_away = True
        self.tell(message)

    def left(self, floor_s: float) -> None:
        """Note what grace the connection's end deserves."""
        self.floor_s = SERVER_ENDED_FLOOR_S if self._sent_away else floor_s

    def close(self) -> None:
        """The client takes nothing more: nobody who replies has to wait for it."""
        self._asides.close()

    def drop(self, closing: Closing) -> None:
        """End `run` from outside, even while a message waits for the client to take it."""
        self._dropped = closing
        self.sending_since = math.inf
        if self._sender is not None:
            self._sender.cancel()

    async def run(
        self,
        live: LiveSession,
        describe: Callable[[LiveSession], Session],
        send: Callable[[ServerMessage | None], Awaitable[None]],
        *,
        beat_s: float = math.inf,
    ) -> NoReturn:
        """Send what there is to send, for ever, and `None` every `beat_s`. Raises the `Closing` that ends it."""
        self._sender = asyncio.current_task()
        beat_at = self._loop.time() + beat_s
        spans = DeliverySpans(partial(_traceparent_of, live)) if traces.is_on() else None
        try:
            if self._dropped is not None:
                raise self._dropped
            await send(await self.begin(live, describe))
            while True:
                message = await self.next(beat_at)
                if message is None:
                    beat_at += beat_s
                woken_at, self._woken_at = self._woken_at, math.inf
                await send(message)
                self._deliveries.sent(message, self._loop.time() - woken_at)
                if spans is not None:
                    spans.sent(message)
        except asyncio.CancelledError:
            if self._dropped is not None:
                raise self._dropped from None
            raise
        except RealtimeError as error:
            raise Closing.told(error) from None
        finally:
            if spans is not None:
                spans.close()

    async def begin(self, live: LiveSession, describe: Callable[[LiveSession], Session]) -> ServerMessage:
        """The first message. Raises the `RealtimeError` that refuses the reader."""
        start = await find_start(live, self._opening.after) if self._opening.history else None
        self._live = live
        self._cursor = Cursor(live, start, interval_s=self._opening.delta_interval_s)
        self._over = live.state.closed and self.positions[SESSION_CHANNEL] >= live.state.position
        self.sending_since = self._loop.time()
        participants = self._asides.known = live.audience.participants
        first = SessionCreated if self._opening.session_id is None else SessionResumed
        return first(
            session=describe(live),
            connection_id=self.participant.connection_id,
            positions=live.positions(),
            participants=list(islice(participants.values(), MAX_TOLD_PARTICIPANTS)),
        )

    async def next(self, until: float = math.inf) -> ServerMessage | None:
        """The next message, once there is one: first what belongs to no log, then what the cursor finds. `None` at
        loop time `until`. Who asks says that the client has taken what was returned before.

        Raises the `Closing` that the session's end means, or a `RealtimeError`. While the store does not answer it
        waits for it.
        """
        assert self._cursor is not None
        assert self._live is not None
        live, cursor = self._live, self._cursor
        self.sending_since = math.inf
        if self._over:
            raise Closing(CloseCode.NORMAL)
        while (now := self._loop.time()) < until:
            try:
                message = self._asides.next(live.audience.participants) or await cursor.next(now)
            except StoreError:
                await asyncio.sleep(RETRY_S)
                continue
            if message is not None:
                self.sending_since = now
                self._over = isinstance(message, SessionClosed)
                return message
            if live.gone:
                raise _gone(live.gone)
            await self._doorbell.wait(min(cursor.due, until))
        self.sending_since = now
        return None


def _traceparent_of(live: LiveSession, response_id: str) -> str | None:
    response = live.state.responses.get(response_id)
    return response.traceparent if response else None


def _gone(gone: Gone) -> Closing:
    if gone.reason == "deleted":
        return Closing(CloseCode.DELETED, error=NotFound("session_deleted", "The session was deleted."))
    lost = NotFound("store_lost", "The store does not have the session any more; start a new one.")
    return Closing.told(lost)
