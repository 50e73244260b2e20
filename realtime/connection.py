"""One WebSocket: a reader that only dispatches, a sender that follows a cursor, and commands in their order."""

from __future__ import annotations

import asyncio
import math
from functools import partial
from itertools import islice

from starlette.types import Message, Receive, Send

from realtime.asides import Asides
from realtime.cursor import Cursor, find_start
from realtime.decoding import decode, event_id_of
from realtime.doorbell import Doorbell
from realtime.engine import Engine
from realtime.errors import InvalidRequest, NotFound, RealtimeError, ServerError, session_not_found
from realtime.hub import LiveSession
from realtime.inbox import Inbox
from realtime.observe import logs
from realtime.opening import Opening
from realtime.protocol import (
    SESSION_CHANNEL,
    CloseCode,
    Command,
    Participant,
    Ping,
    Pong,
    ServerMessage,
    SessionClosed,
    SessionCreated,
    SessionResumed,
    new_id,
    timestamp,
)
from realtime.store.base import Gone
from realtime.viewers import SERVER_ENDED_FLOOR_S

MAX_MALFORMED = 100
"""Malformed messages in a row until a connection is closed."""
CLOSE_TIMEOUT_S = 1.0
LAST_COMMANDS_S = 1.0
"""How long commands that came before a disconnect may take."""
MAX_TOLD_PARTICIPANTS = 1000
"""How many participants the first frame names, so that it stays within a frame's limit."""
SERVER_CODES = frozenset({1001, 1012})
"""The close codes with which the ASGI server says that it was the one that ended the connection."""


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


class _Disconnected(Exception):
    """The ASGI server has closed the connection, and takes no more."""


class Connection:
    """One accepted WebSocket, from its first frame to its close; `run` is its life. It is a `Reader` of its session.

    It keeps no queue of events, only a cursor, and the few answers that belong to no log.
    """

    __slots__ = (
        "_asgi_send",
        "_asides",
        "_cursor",
        "_doorbell",
        "_dropped",
        "_engine",
        "_loop",
        "_malformed",
        "_opening",
        "_receive",
        "_sender",
        "floor_s",
        "participant",
        "sending_since",
    )

    def __init__(self, opening: Opening, user: str, engine: Engine, receive: Receive, send: Send) -> None:
        self.participant = Participant(user=user, connection_id=new_id("conn"), since=timestamp())
        self.floor_s = 0.0
        self.sending_since = math.inf
        """Loop time since when a frame waits for the client to take it."""
        self._opening = opening
        self._engine = engine
        self._receive = receive
        self._asgi_send = send
        self._loop = asyncio.get_running_loop()
        self._doorbell = Doorbell()
        self._asides = Asides()
        self._cursor: Cursor | None = None
        self._sender: asyncio.Task[None] | None = None
        self._dropped: Closing | None = None
        self._malformed = 0

    def wake(self) -> None:
        """Something may be new for this connection."""
        self._doorbell.ring()

    def follows(self, channel: str) -> bool:
        """Whether the client has not been sent the channel's end yet."""
        return self._cursor is not None and channel in self._cursor.positions

    async def run(self) -> None:
        """Attach, serve, and close. Returns when the client is gone or the close frame is sent."""
        closing = await self._until_closed()
        if closing is not None:
            await self._close(closing)

    def tell(self, message: ServerMessage) -> None:
        """Have the client told something that belongs to no log."""
        self._asides.add(message)
        self._doorbell.ring()

    def drop(self, closing: Closing) -> None:
        """End the connection from outside, even while a frame waits for the client to take it."""
        self._dropped = closing
        if self._sender is not None:
            self._sender.cancel()

    async def _until_closed(self) -> Closing | None:
        """Serve until something ends the connection; `None` where the client itself has."""
        try:
            is_new = self._opening.session_id is None
            session_id = self._opening.session_id or await self._engine.create(self.participant.user)
            async with self._engine.attach(session_id, self) as live:
                return await self._serve(live, is_new)
        except RealtimeError as error:
            return Closing.told(error)
        except Exception as error:  # a fault of ours ends this connection, and no other
            logs.report(error)
            self.floor_s = SERVER_ENDED_FLOOR_S
            return Closing.told(ServerError("internal_error", "Something went wrong here."))

    async def _serve(self, live: LiveSession, is_new: bool) -> Closing | None:
        inbox = Inbox(partial(self._execute, live))
        closing: Closing | None = None
        try:
            async with asyncio.TaskGroup() as group:
                self._sender = group.create_task(self._send_all(live, is_new))
                disconnect = await self._read_all(inbox)
                self.floor_s = SERVER_ENDED_FLOOR_S if _by_server(disconnect) else 0.0
                await inbox.finish(LAST_COMMANDS_S)
                self._sender.cancel()
        except* Closing as ended:
            closing = _first_closing(ended)
            self.floor_s = SERVER_ENDED_FLOOR_S if closing.by_server else 0.0
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
        try:
            message = decode(self._opening.codec, frame)
        except InvalidRequest as error:
            self._malformed += 1
            if self._malformed > MAX_MALFORMED:
                raise Closing.told(InvalidRequest("too_many_malformed", "Too many malformed messages.")) from None
            await self._reply(error.as_message(event_id=event_id_of(self._opening.codec, frame)))
            return
        self._malformed = 0
        if isinstance(message, Ping):
            await self._reply(Pong(event_id=message.event_id))
        else:
            await inbox.put(message)

    async def _execute(self, live: LiveSession, command: Command) -> None:
        try:
            await self._engine.execute(live, command, self.participant.user)
        except RealtimeError as error:
            await self._reply(error.as_message(event_id=command.event_id))
        except Exception as error:  # a fault of ours: the client is told that there is one, the log where
            logs.report(error)
            failure = ServerError("internal_error", "Something went wrong here.")
            await self._reply(failure.as_message(event_id=command.event_id))

    async def _reply(self, message: ServerMessage) -> None:
        """Tell the client something that belongs to no log; waits while too much of that kind waits already."""
        self._doorbell.ring()
        await self._asides.put(message)

    async def _send_all(self, live: LiveSession, is_new: bool) -> None:
        """Send what there is to send, for ever: first what belongs to no log, then what the cursor finds."""
        try:
            cursor = self._cursor = await self._begin(live, is_new)
            while True:
                now = self._loop.time()
                message = self._asides.next(live.audience.participants) or await cursor.next(now)
                if message is not None:
                    await self._send(message, now)
                elif live.gone:
                    raise _gone(live.gone)
                else:
                    await self._doorbell.wait(cursor.due)
        except asyncio.CancelledError:
            if self._dropped is not None:
                raise self._dropped from None
            raise
        except RealtimeError as error:
            raise Closing.told(error) from None
        except _Disconnected:  # the reader is told how
            self._asides.close()

    async def _begin(self, live: LiveSession, is_new: bool) -> Cursor:
        """Send the first frame; returns the cursor that goes on from it."""
        start = await find_start(live, self._opening.after) if self._opening.history else None
        cursor = Cursor(live, start, interval_s=self._opening.delta_interval_s)
        first = SessionCreated if is_new else SessionResumed
        participants = self._asides.known = live.audience.participants
        frame = first(
            session=self._engine.describe(live),
            connection_id=self.participant.connection_id,
            positions=live.positions(),
            participants=list(islice(participants.values(), MAX_TOLD_PARTICIPANTS)),
        )
        await self._send(frame, self._loop.time())
        if live.state.closed and cursor.positions[SESSION_CHANNEL] >= live.state.position:
            raise Closing(CloseCode.NORMAL)  # the client has seen the end already
        return cursor

    async def _send(self, message: ServerMessage, now: float) -> None:
        codec = self._opening.codec
        self.sending_since = now
        frame = codec.encode(message)
        try:
            await self._asgi_send({"type": "websocket.send", codec.frame: frame})
        except (OSError, RuntimeError) as error:
            raise _Disconnected from error
        self.sending_since = math.inf
        if isinstance(message, SessionClosed):
            raise Closing(CloseCode.NORMAL)

    async def _close(self, closing: Closing) -> None:
        """Tell the client why, as far as it still takes anything, and close."""
        if closing.error is not None:
            frame = self._opening.codec.encode(closing.error.as_message(fatal=True))
            await self._try({"type": "websocket.send", self._opening.codec.frame: frame})
        await self._try({"type": "websocket.close", "code": int(closing.code)})

    async def _try(self, message: Message) -> None:
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._asgi_send(message)
        except (OSError, RuntimeError):  # closed already, or the client takes nothing (TimeoutError)
            return


def _by_server(disconnect: Message) -> bool:
    """Whether the ASGI server has ended the connection. A client's close, whatever its code, comes with a reason."""
    return disconnect.get("code") in SERVER_CODES and "reason" not in disconnect


def _gone(gone: Gone) -> Closing:
    if gone.reason == "deleted":
        return Closing(CloseCode.DELETED, error=NotFound("session_deleted", "The session was deleted."))
    return Closing.told(session_not_found())


def _first_closing(group: ExceptionGroup[Closing]) -> Closing:
    first = group.exceptions[0]
    return first if isinstance(first, Closing) else _first_closing(first)
