"""One WebSocket: a reader that only dispatches, a sender that follows its feed, and commands in their order."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from starlette.types import Message, Receive, Send

from realtime.access.audit import COMMAND, Access
from realtime.access.door import TOO_OFTEN_S, Door
from realtime.access.rates import Allowance
from realtime.decoding import decode, event_id_of
from realtime.engine import Engine
from realtime.errors import InvalidRequest, RateLimited, RealtimeError, ServerError
from realtime.feed import CLOSE_TIMEOUT_S, Closing, Feed
from realtime.inbox import Inbox
from realtime.live import LiveSession
from realtime.observe import logs, metrics
from realtime.opening import Opening
from realtime.protocol import (
    AuthRefresh,
    AuthRefreshed,
    CloseCode,
    Codec,
    Command,
    Ping,
    Pong,
    RateLimit,
    RateLimitsUpdated,
    ServerMessage,
    timestamp_of,
)
from realtime.viewers import SERVER_ENDED_FLOOR_S

MAX_MALFORMED = 100
"""Malformed messages in a row until a connection is closed."""
MAX_REFUSED = 100
"""Messages that came too soon, without a pause that gives all of the allowance back, until a connection is closed."""
THROTTLE_S = 0.02
"""How long nothing is read, at the most, after a message that came too soon."""
LAST_COMMANDS_S = 1.0
"""How long commands that came before a disconnect may take."""
SERVER_CODES = frozenset({1001, 1012})
"""The close codes with which the ASGI server says that it was the one that ended the connection."""


class _Disconnected(Exception):
    """The ASGI server has closed the connection, and takes no more."""


class Connection:
    """One accepted WebSocket, from its first frame to its close; `run` is its life."""

    __slots__ = (
        "_access",
        "_allowance",
        "_asgi_send",
        "_door",
        "_engine",
        "_malformed",
        "_opening",
        "_receive",
        "_refused",
        "feed",
    )

    def __init__(
        self,
        opening: Opening,
        access: Access,
        door: Door,
        allowance: Allowance,
        engine: Engine,
        receive: Receive,
        send: Send,
    ) -> None:
        self.feed = Feed(opening, access.principal, transport="websocket")
        self._opening = opening
        self._access = access
        self._door = door
        self._engine = engine
        self._receive = receive
        self._asgi_send = send
        self._allowance = allowance
        self._malformed = 0
        self._refused = 0

    async def run(self) -> None:
        """Attach, serve, and close. Returns when the client is gone or the close frame is sent."""
        closing = await self._until_closed()
        if closing is not None:
            await close(self._opening.codec, closing, self._asgi_send)

    async def _until_closed(self) -> Closing | None:
        """Serve until something ends the connection; `None` where the client itself has."""
        try:
            principal = self.feed.principal
            session_id = self._opening.session_id or await self._engine.commands.create(principal)
            logs.bind(session=self._door.audit.name_of(session_id))
            async with self._engine.attach(session_id, self.feed, principal) as live:
                self._tell_access(session_id)
                return await self._serve(live)
        except RealtimeError as error:
            self._tell_access(self._opening.session_id, error)
            return Closing.told(error)
        except Exception as error:  # a fault of ours ends this connection, and no other
            logs.report(error)
            failure = ServerError("internal_error", "Something went wrong here.")
            self._access.tell(failure)
            self.feed.left(SERVER_ENDED_FLOOR_S)
            return Closing.told(failure)

    def _tell_access(self, session_id: str | None, error: RealtimeError | None = None) -> None:
        """Tell in the audit log that it is attached, or was refused."""
        self._access.session_id = session_id
        self._access.tell(error)

    async def _serve(self, live: LiveSession) -> Closing | None:
        inbox = Inbox(partial(self._execute, live))
        closing: Closing | None = None
        try:
            async with asyncio.TaskGroup() as group:
                sender = group.create_task(self._send_all(live))
                disconnect = await self._read_all(inbox)
                self.feed.left(SERVER_ENDED_FLOOR_S if _by_server(disconnect) else 0.0)
                await inbox.finish(LAST_COMMANDS_S)
                sender.cancel()
        except* Closing as ended:
            closing = _first_closing(ended)
            self.feed.left(SERVER_ENDED_FLOOR_S if closing.by_server else 0.0)
        finally:
            inbox.stop()
        return closing

    async def _read_all(self, inbox: Inbox) -> Message:
        """Read until the client is gone; returns the ASGI message that says so."""
        while True:
            message = await self._receive()
            if message["type"] == "websocket.disconnect":
                return message
            frame = message.get(self._opening.codec.frame)
            if frame is None:
                raise Closing(CloseCode.UNSUPPORTED_DATA)
            await self._dispatch(frame, inbox)

    async def _dispatch(self, frame: str | bytes, inbox: Inbox) -> None:
        now = asyncio.get_running_loop().time()
        if self._allowance.full_at <= now:  # it has calmed down
            self._refused = 0
        if wait_s := self._allowance.take(now):
            await self._refuse(frame, wait_s)
            return
        try:
            message = decode(self._opening.codec, frame)
        except InvalidRequest as error:
            self._tell_unread(error)
            self._malformed += 1
            if self._malformed > MAX_MALFORMED:
                raise Closing.told(InvalidRequest("too_many_malformed", "Too many malformed messages.")) from None
            await self.feed.reply(error.as_message(event_id=event_id_of(self._opening.codec, frame)))
            return
        self._malformed = 0
        if isinstance(message, Ping):
            await self.feed.reply(Pong(event_id=message.event_id))
        else:
            await inbox.put(message)

    async def _refuse(self, frame: str | bytes, wait_s: float) -> None:
        """There are too many messages: this one is not looked at, and after too many of these the connection ends.

        Nothing is read for a moment after it: who floods is slowed down, and costs next to nothing.
        """
        self._refused += 1
        metrics.LIMITS_HIT.labels("messages").inc()
        retry_after_ms = max(1, round(wait_s * 1000))
        error = RateLimited("rate_limited", "Too many messages in too short a time.", retry_after_ms=retry_after_ms)
        self._tell_unread(error)
        if self._refused > MAX_REFUSED:
            raise Closing.told(error)
        await self.feed.reply(error.as_message(event_id=event_id_of(self._opening.codec, frame)))
        await asyncio.sleep(min(wait_s, THROTTLE_S))

    def _tell_unread(self, error: RealtimeError) -> None:
        """Tell in the audit log of a message of which nobody knows what it asks for."""
        access = Access(self._door.audit, COMMAND, address=self.feed.principal.address, session_id=self.feed.session_id)
        access.principal = self.feed.principal
        access.tell(error)

    async def _execute(self, live: LiveSession, message: Command | AuthRefresh) -> None:
        access = Access.of_message(self._door.audit, message, self.feed.principal, live.id)
        try:
            if isinstance(message, AuthRefresh):
                await self._refresh(live, message)
            else:
                outcome = await self._engine.commands.execute(live, message, self.feed.principal)
                access.concerns(outcome.made)
                access.tell()
                await self._tell_limits(outcome.limits)
        except RealtimeError as error:
            access.tell(error)
            await self._tell_limits(getattr(error, "limits", ()))
            await self.feed.reply(error.as_message(event_id=message.event_id))
            if isinstance(error, RateLimited):
                await asyncio.sleep(TOO_OFTEN_S)
        except Exception as error:  # a fault of ours: the client is told that there is one, the log where
            logs.report(error)
            failure = ServerError("internal_error", "Something went wrong here.")
            access.tell(failure)
            await self.feed.reply(failure.as_message(event_id=message.event_id))
        finally:
            access.tell()

    async def _tell_limits(self, limits: Sequence[RateLimit]) -> None:
        if limits:
            await self.feed.reply(RateLimitsUpdated(rate_limits=list(limits)))

    async def _refresh(self, live: LiveSession, message: AuthRefresh) -> None:
        principal = await self._door.refresh(self.feed.principal, message.token, live.id)
        self.feed.renew(principal)
        assert principal.expires_at is not None
        await self.feed.reply(AuthRefreshed(expires_at=timestamp_of(principal.expires_at)))

    async def _send_all(self, live: LiveSession) -> None:
        try:
            await self.feed.run(live, self._engine.describe, self._send)
        except _Disconnected:  # the reader is told how
            self.feed.close()

    async def _send(self, message: ServerMessage | None) -> None:
        assert message is not None
        codec = self._opening.codec
        frame = codec.encode(message)
        try:
            await self._asgi_send({"type": "websocket.send", codec.frame: frame})
        except (OSError, RuntimeError) as error:
            raise _Disconnected from error


async def refuse(codec: Codec, error: RealtimeError, send: Send) -> None:
    """Tell a client that was accepted why it is refused, and close."""
    await close(codec, Closing.told(error), send)


async def close(codec: Codec, closing: Closing, send: Send) -> None:
    """Tell the client why, as far as it still takes anything, and close."""
    if closing.error is not None:
        frame = codec.encode(closing.error.as_message(fatal=True))
        await _try(send, {"type": "websocket.send", codec.frame: frame})
    await _try(send, {"type": "websocket.close", "code": int(closing.code)})


async def _try(send: Send, message: Message) -> None:
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await send(message)
    except (OSError, RuntimeError):  # closed already, or the client takes nothing (TimeoutError)
        return


def _by_server(disconnect: Message) -> bool:
    """Whether the ASGI server has ended the connection. A client's close, whatever its code, comes with a reason."""
    return disconnect.get("code") in SERVER_CODES and "reason" not in disconnect


def _first_closing(group: ExceptionGroup[Closing]) -> Closing:
    first = group.exceptions[0]
    return first if isinstance(first, Closing) else _first_closing(first)
