"""Runs the application under uvicorn, with what uvicorn does not do by itself: let go of a client that stalls."""

from __future__ import annotations

import asyncio
import gc
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.types import ASGIApp
from uvicorn._types import ASGIReceiveEvent, ASGISendEvent
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode as WireCloseCode
from websockets.frames import Frame

from realtime import __version__
from realtime.doorbell import Doorbell
from realtime.settings import Settings, SettingsError

GOODBYE_S = 0.1
"""Between the last word to the clients and the end of their connections."""
ABORT_S = 2.0
"""How long after its close frame a connection may linger: its client takes nothing, or does not answer."""
MAX_FRAGMENTS = 1024
"""Frames that one message may come in: empty ones pass any limit on bytes."""
SEND_BUFFER_BYTES = 128 * 1024
"""The kernel's buffer per client; Linux doubles it. Without a limit it grows to megabytes for one that stalls."""
KERNEL_MARGIN_S = 5.0
"""How much later than the server the kernel gives up on a client: the server's end is the one that is told."""
HEAD_TIMEOUT_S = 10.0
"""How long the head of a request may take."""
BACKLOG = 4096
GC_THRESHOLDS = (20_000, 20, 20)
"""Fewer collections than Python's 700 allocations: what a token allocates is freed by its reference count."""


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


class StallProofProtocol(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket protocol, whose every end is bounded in time, and which keeps less per connection.

    uvicorn closes a connection once its write buffer is empty, which for a client that has stopped reading is never;
    and it would wait for room in the buffer before it even sends the close frame.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.queue = Mailbox()  # type: ignore[assignment]  # all of a queue that uvicorn uses
        self.writable = Gate()  # type: ignore[assignment]  # all of an event that it uses

    async def send(self, message: ASGISendEvent) -> None:
        """As uvicorn's, but a close waits for nobody, and what was needed for the handshake does not outlive it."""
        if message["type"] == "websocket.close":
            self.writable.set()
            self._abort_later()
        await super().send(message)
        if message["type"] == "websocket.accept":
            del self.request, self.response
        if self.initial_response is not None and self.close_sent:
            self.handshake_complete = True  # a refusal is an answer too, and no fault to be logged

    def data_received(self, data: bytes) -> None:
        """As uvicorn's, which lets a connection linger whose upgrade request the parser refused."""
        super().data_received(data)
        if self.conn.handshake_exc is not None and not self.handshake_initiated:
            self.transport.close()

    def send_receive_event_to_app(self) -> None:
        """As uvicorn's, which logs a traceback for text that is not UTF-8."""
        if self.curr_msg_data_type == "text" and not _is_utf8(b"".join(self.frames)):
            self.frames = []
            self.conn.fail(WireCloseCode.INVALID_DATA)
            self.handle_parser_exception()
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
        """The server stops."""
        super().shutdown()
        self._abort_later()

    def handle_parser_exception(self) -> None:
        """The client broke the WebSocket protocol."""
        super().handle_parser_exception()
        self._abort_later()

    def handle_cont(self, event: Frame) -> None:
        """The next fragment of a message."""
        if len(self.frames) >= MAX_FRAGMENTS and not self.close_sent:
            self.conn.fail(WireCloseCode.MESSAGE_TOO_BIG, "too many fragments")
            self.frames = []
            self.handle_parser_exception()
        if not self.close_sent:
            super().handle_cont(event)

    def _abort_later(self) -> None:
        self.loop.call_later(ABORT_S, self.transport.abort)


class PunctualHttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, with a deadline for the head of each request."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there: it has to say what it wants."""
        super().connection_made(transport)
        self._expect_head()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        """Its head is whole."""
        self._forget_deadline()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._forget_deadline()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._forget_deadline()
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


class Server(uvicorn.Server):
    """uvicorn's server, for which to be asked to stop is no failure: the process ends with status 0.

    `say_goodbye` is called with the seconds left, before the connections are closed.
    """

    say_goodbye: Callable[[float], None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """As uvicorn's."""
        super().handle_exit(sig, frame)
        self._captured_signals.clear()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, which closes every WebSocket with 1012 at once: their clients are told before."""
        if self.say_goodbye is not None:
            self.say_goodbye(GOODBYE_S)
            await asyncio.sleep(GOODBYE_S)
        await super().shutdown(sockets)


class OnlyServer(Server):
    """The server of a process that does nothing else: once it is up, it says so and settles the garbage collector.

    The model SDK alone brings hundreds of thousands of objects that live for ever; to walk them stops the loop for
    tenths of a second, again and again.
    """

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's."""
        await super().startup(sockets)
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        for listener in sockets or ():
            print(f"realtime {__version__} on {_url(listener)}", file=sys.stderr, flush=True)


def run(app: ASGIApp, settings: Settings) -> None:
    """Serve `app` until the process is asked to stop. Raises `SettingsError` where it can't listen."""
    try:
        listener = listen(settings)
    except OSError as error:
        raise SettingsError(f"can't listen on {settings.host}:{settings.port}: {error.strerror or error}") from None
    make_server(app, settings, OnlyServer).run(sockets=[listener])


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def listen(settings: Settings) -> socket.socket:
    """A listening socket whose connections stall neither for ever nor in megabytes. Raises `OSError`."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sets TCP_NODELAY on these
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        user_timeout = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux
        if user_timeout is not None:
            milliseconds = min(int((settings.send_timeout_s + KERNEL_MARGIN_S) * 1000), 2**31 - 1)
            listener.setsockopt(socket.IPPROTO_TCP, user_timeout, milliseconds)
        listener.bind((settings.host, settings.port))
    except BaseException:
        listener.close()
        raise
    return listener


def make_server(app: ASGIApp, settings: Settings, kind: type[Server] = Server) -> Server:
    """A server that is ready to run on a socket of `listen`."""
    options: dict[str, Any] = {
        "http": PunctualHttpProtocol,
        "ws": StallProofProtocol,
        "ws_max_size": settings.max_message_bytes,
        "ws_ping_interval": settings.ping_interval_s,
        "ws_ping_timeout": settings.ping_interval_s,
        "ws_per_message_deflate": False,
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
        "lifespan": "on",
        "backlog": BACKLOG,
        "timeout_graceful_shutdown": max(1, round(settings.drain_s)),
    }
    server = kind(uvicorn.Config(app, **options))
    if isinstance(app, Starlette):
        server.say_goodbye = getattr(app.state, "say_goodbye", None)
    return server
