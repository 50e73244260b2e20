"""WebSockets below the application: uvicorn's protocol, bounded in time and in what one client makes it do."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from http import HTTPStatus
from typing import Any

from uvicorn._types import ASGIReceiveEvent, ASGISendEvent
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets import http11
from websockets.frames import CloseCode as WireCloseCode
from websockets.frames import Frame
from websockets.http11 import Response
from websockets.server import ServerProtocol

from realtime.access.headers import USUAL
from realtime.access.rates import Allowance, Rate
from realtime.doorbell import Doorbell
from realtime.http_transport import MAX_HEAD_BYTES

ABORT_S = 2.0
"""How long after its close frame a connection may linger: its client takes nothing, or does not answer."""
MAX_FRAGMENTS = 1024
"""Frames that one message may come in: empty ones pass any limit on bytes."""
MAX_LATE = 64
"""Frames that are passed over after the close frame was sent; who sends more is not read any more."""
PINGS = Rate(100, 1.0)
"""How many pings and pongs a client may send."""
SLICE_BYTES = 512
"""How much is taken apart at once: frames can be as small as six bytes, and one read brings 250,000."""
NOTHING = memoryview(b"")
http11.MAX_LINE_LENGTH = (
    MAX_HEAD_BYTES  # otherwise an environment variable's; no longer token than over HTTP is too long
)


class Mailbox:
    """The messages that one task receives: an `asyncio.Queue` without its four deques of 600 bytes each."""

    __slots__ = ("_doorbell", "_messages")

    def __init__(self) -> None:
        self._messages: list[ASGIReceiveEvent] = []
        self._doorbell = Doorbell()

    def put_nowait(self, message: ASGIReceiveEvent) -> None:
        """Add a message."""
        self._messages.append(message)
        self._doorbell.ring()

    def __len__(self) -> int:
        """How many messages wait."""
        return len(self._messages)

    def empty(self) -> bool:
        """Whether no message waits."""
        return not self._messages

    async def get(self) -> ASGIReceiveEvent:
        """The next message, once there is one."""
        while not self._messages:
            await self._doorbell.wait()
        return self._messages.pop(0)


class Gate:
    """An `asyncio.Event`, open at first, that takes no memory while nobody waits."""

    __slots__ = ("_open", "_waiters")

    def __init__(self) -> None:
        self._open = True
        self._waiters: list[asyncio.Future[None]] = []

    def set(self) -> None:
        """Open it: who waits goes on."""
        self._open = True
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    def clear(self) -> None:
        """Close it."""
        self._open = False

    def is_set(self) -> bool:
        """Whether it is open."""
        return self._open

    async def wait(self) -> None:
        """Return once it is open."""
        while not self._open:
            self._waiters.append(asyncio.get_running_loop().create_future())
            await self._waiters[-1]


class Handshake(ServerProtocol):
    """As websockets', whose refusals of upgrades carry what every answer does."""

    def reject(self, status: HTTPStatus | int, text: str) -> Response:
        """As websockets'."""
        refusal = super().reject(status, text)
        refusal.headers.update((name.decode(), value.decode()) for name, value in USUAL)
        return refusal


class StallProofProtocol(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket protocol, whose every end is bounded in time, and which keeps less per connection.

    uvicorn closes a connection once its write buffer is empty, which for a client that has stopped reading is never;
    and it would wait for room in the buffer before it even sends the close frame.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = Handshake(max_size=self.config.ws_max_size, logger=self.logger)
        self.queue = Mailbox()  # type: ignore[assignment]  # all of a queue that uvicorn uses
        self.writable = Gate()  # type: ignore[assignment]  # all of an event that it uses
        self._pings: Allowance | None = None  # once there is one
        self._is_failed = False
        self._late = 0
        self._unread = NOTHING

    def send(self, message: ASGISendEvent) -> Coroutine[Any, Any, None]:
        """As uvicorn's, but a close waits for nobody, and what was needed for the handshake does not outlive it."""
        return super().send(message) if message["type"] == "websocket.send" else self._send_other(message)

    async def _send_other(self, message: ASGISendEvent) -> None:
        if message["type"] == "websocket.close":
            self.writable.set()
            self._abort_later()
        await super().send(message)
        if message["type"] == "websocket.accept":
            self._forget_handshake()
        if self.initial_response is not None and self.close_sent:
            self.handshake_complete = True  # a refusal is an answer too, and no fault to be logged

    def _forget_handshake(self) -> None:
        """A parser holds on to the request, and attributes that are set one by one to twice the room that they need."""
        self.request.headers.clear()
        del self.request, self.response
        self.__dict__ = {**self.__dict__}

    async def receive(self) -> ASGIReceiveEvent:
        """As uvicorn's; then the next of what has come is taken apart."""
        message = await super().receive()
        self._take_apart()
        return message

    def data_received(self, data: bytes) -> None:
        """As uvicorn's, but no more is taken apart than the application asks for: a client that sends more than it may
        waits, and costs nothing. A connection whose upgrade request the parser refused does not linger."""
        self._unread = memoryview(bytes(self._unread) + data)
        self._take_apart()
        if self.conn.handshake_exc is not None and not self.handshake_initiated:
            refusal = b"".join(self.conn.data_to_send()) or self.conn.reject(400, "No body is taken.\n").serialize()
            self.transport.write(refusal)
            self.transport.close()

    def _take_apart(self) -> None:
        while self._unread and not self._is_failed and (self.close_sent or self.queue.empty()):
            piece, self._unread = self._unread[:SLICE_BYTES], self._unread[SLICE_BYTES:]
            super().data_received(piece)  # type: ignore[arg-type]  # whatever can be added to a bytearray
        if self._is_failed or not self._unread:
            self._unread = NOTHING  # an empty piece holds on to the whole

    def send_receive_event_to_app(self) -> None:
        """As uvicorn's, which logs a traceback for text that is not UTF-8."""
        if self.close_sent:
            self.frames = []
            self._count_late()
        elif self.curr_msg_data_type == "text" and not _is_utf8(b"".join(self.frames)):
            self._fail(WireCloseCode.INVALID_DATA)
        else:
            super().send_receive_event_to_app()

    def keepalive_timeout(self) -> None:
        """No pong came in time: the client has vanished, unless the ping waits behind what it does not read.

        Who takes nothing is the application's to judge, by its send timeout.
        """
        if self.writable.is_set():
            super().keepalive_timeout()
            self._abort_later()
        else:
            self.pong_timer = self.pending_ping_payload = None
            self.schedule_ping()

    def shutdown(self) -> None:
        """The server stops. Who has said goodbye already is not told, which uvicorn would take for a fault."""
        if not self.transport.is_closing():
            super().shutdown() if self.handshake_complete else self._refuse()
        self._abort_later()

    def handle_parser_exception(self) -> None:
        """The client broke the WebSocket protocol."""
        super().handle_parser_exception()
        self._abort_later()

    def handle_cont(self, event: Frame) -> None:
        """The next fragment of a message."""
        if len(self.frames) >= MAX_FRAGMENTS:
            self._fail(WireCloseCode.MESSAGE_TOO_BIG, "too many fragments")
        if self.close_sent:
            self._count_late()
        else:
            super().handle_cont(event)

    def handle_ping(self) -> None:
        """As uvicorn's, whose answers pile up where the client doesn't read them; only the last one counts, anyway."""
        self._count_ping()
        if self.writable.is_set():
            super().handle_ping()
        else:
            self.conn.data_to_send()

    def handle_pong(self, event: Frame) -> None:
        """As uvicorn's."""
        self._count_ping()
        super().handle_pong(event)

    def _count_ping(self) -> None:
        if self._pings is None:
            self._pings = Allowance(PINGS)
        if self._pings.take(self.loop.time()):
            self._fail(WireCloseCode.POLICY_VIOLATION, "too many pings")

    def _count_late(self) -> None:
        """A frame has come after the end: its sender has not read yet that it is over, or does not care."""
        self._late += 1
        if self._late > MAX_LATE:
            self._is_failed = True
            self.transport.pause_reading()

    def _fail(self, code: WireCloseCode, reason: str = "") -> None:
        """Close, for what the client did; what still comes of it is passed over."""
        self.frames = []
        self._is_failed = True
        if not self.close_sent:
            self.conn.fail(code, reason)
            self.handle_parser_exception()

    def _refuse(self) -> None:
        """Answer an upgrade that comes too late. What the application has to say to it is not heard any more.

        uvicorn's 500 would be the last word, where a 503 lets a proxy try the next instance.
        """
        self.disconnected = True
        refusal = self.conn.reject(503, "This instance is shutting down.\n")
        refusal.headers["Retry-After"] = "1"
        self.conn.send_response(refusal)
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.transport.close()

    def _abort_later(self) -> None:
        self.loop.call_later(ABORT_S, self.transport.abort)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
