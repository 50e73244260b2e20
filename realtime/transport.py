"""The connections below the application: uvicorn's protocols, bounded in time and in what one client makes them do."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from http import HTTPStatus
from typing import Any

from uvicorn._types import ASGIReceiveEvent, ASGISendEvent
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode as WireCloseCode
from websockets.frames import Frame
from websockets.http11 import Response
from websockets.server import ServerProtocol

from realtime.access.arrivals import Arrivals
from realtime.access.headers import USUAL
from realtime.access.rates import Allowance, Rate
from realtime.doorbell import Doorbell

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
HEAD_TIMEOUT_S = 10.0
"""How long the head of a request may take."""
MAX_HEAD_BYTES = 32 * 1024
"""How long the head of a request may be."""
NOTHING = memoryview(b"")


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
            self.transport.write(b"".join(self.conn.data_to_send()))
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


class PunctualHttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, with a deadline and a largest size for the head of each request.

    What comes after an answer and is no head, such as the rest of a body that nobody wanted, or empty lines, puts off
    uvicorn's timeout again and again. It does not put off this one.
    """

    def __init__(self, *args: Any, arrivals: Arrivals, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._arrivals = arrivals
        self._deadline: asyncio.TimerHandle | None = None
        self._head_bytes: int | None = 0
        """How much has come of a head; `None` while what comes is no head."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there: once it is its turn it has to say what it wants."""
        super().connection_made(transport)
        wait_s = self._arrivals.wait_s(self.client[0] if self.client else "", self.loop.time())
        if wait_s is None:
            transport.abort()
        elif wait_s:
            transport.pause_reading()
            self._deadline = self.loop.call_later(wait_s, self._begin)
        else:
            self._expect_head()

    def _begin(self) -> None:
        self.transport.resume_reading()
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Some of a request. Of its head no more is taken apart than a head may be long."""
        while data and self._head_bytes is not None:
            room = MAX_HEAD_BYTES - self._head_bytes
            piece, data = data[:room], data[room:]
            self._head_bytes += len(piece)
            super().data_received(piece)
            if self.transport.is_closing() or self.transport.get_protocol() is not self:
                return
            if self._has_endless_head():
                self._refuse("431 Request Header Fields Too Large", "")
                return
        if data:
            super().data_received(data)

    def _has_endless_head(self) -> bool:
        return self._head_bytes is not None and self._head_bytes >= MAX_HEAD_BYTES

    def send_400_response(self, msg: str) -> None:
        """As uvicorn's, with what every answer carries."""
        self._refuse("400 Bad Request", msg)

    def _refuse(self, status: str, text: str) -> None:
        headers = [*USUAL, (b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
        headers.append((b"content-length", b"%d" % len(text)))
        head = b"".join(b"%s: %s\r\n" % pair for pair in headers)
        self.transport.write(b"HTTP/1.1 %s\r\n%s\r\n%s" % (status.encode(), head, text.encode()))
        self.transport.close()

    def on_message_begin(self) -> None:
        """A request begins: what came until now in one piece with it counts as its head's."""
        super().on_message_begin()
        head_bytes = self._head_bytes
        self._expect_head()
        self._head_bytes = head_bytes or 0

    def on_headers_complete(self) -> None:
        """Its head is whole."""
        self._forget_deadline()
        self._head_bytes = None
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """It is answered: another may follow."""
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._forget_deadline()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._forget_deadline()
        self._head_bytes = 0
        self._deadline = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
