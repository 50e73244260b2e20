"""Runs the application under uvicorn, with what uvicorn does not do by itself: let go of a client that stalls."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import sys
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
from realtime.access.rates import Allowance, Rate
from realtime.check import check_reach
from realtime.doorbell import Doorbell
from realtime.drain import Drain
from realtime.observe import logs
from realtime.settings import Settings, SettingsError

LOOK_S = 0.1
"""How often a drain looks whether somebody is in a hurry, which is as often as uvicorn looks."""
LINGER_S = 0.5
"""How long after the drain a connection may still take what it was sent."""
GRACE_S = 1
"""How long after the drain a request may need to notice that its connection is gone."""
LEAVE_S = 1.5
"""How long all may take that comes after the drain."""
STUCK_S = 0.2
"""How long a task may take to be cancelled when everything has ended."""
ABORT_S = 2.0
"""How long after its close frame a connection may linger: its client takes nothing, or does not answer."""
MAX_FRAGMENTS = 1024
"""Frames that one message may come in: empty ones pass any limit on bytes."""
MAX_AT_ONCE = 1024
"""Messages that may wait: meanwhile no more is read from the network, but these may have come in one piece."""
PINGS = Rate(100, 1.0)
"""How many pings and pongs a client may send."""
SLICE_BYTES = 4096
"""How much is taken apart before one looks whether that was enough: frames can be as small as six bytes."""
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


class StallProofProtocol(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket protocol, whose every end is bounded in time, and which keeps less per connection.

    uvicorn closes a connection once its write buffer is empty, which for a client that has stopped reading is never;
    and it would wait for room in the buffer before it even sends the close frame.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.queue = Mailbox()  # type: ignore[assignment]  # all of a queue that uvicorn uses
        self.writable = Gate()  # type: ignore[assignment]  # all of an event that it uses
        self._pings: Allowance | None = None  # once there is one
        self._is_failed = False

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
        """As uvicorn's, which lets a connection linger whose upgrade request the parser refused; and a flood of small
        frames is cut off before all that came with it is taken apart."""
        for start in range(0, len(data), SLICE_BYTES):
            if self._is_failed:
                return  # what comes now is not even looked at
            super().data_received(data[start : start + SLICE_BYTES])
        if self.conn.handshake_exc is not None and not self.handshake_initiated:
            self.transport.close()

    def send_receive_event_to_app(self) -> None:
        """As uvicorn's, which logs a traceback for text that is not UTF-8."""
        if len(self.queue) >= MAX_AT_ONCE:  # type: ignore[arg-type]  # a mailbox
            self._fail(WireCloseCode.POLICY_VIOLATION, "too many messages")
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
        if not self.close_sent:
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
    """uvicorn's HTTP protocol, with a deadline for the head of each request.

    What comes after an answer and is no head, such as the rest of a body that nobody wanted, or empty lines, puts off
    uvicorn's timeout again and again. It does not put off this one.
    """

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
    """uvicorn's server, which drains before it shuts down, and in bounded time.

    For it to be asked to stop is no failure: the process ends with status 0. A second Ctrl-C ends the drain, a third
    one the rest.
    """

    drain: Drain | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """As uvicorn's."""
        super().handle_exit(sig, frame)
        self._captured_signals.clear()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, which closes every WebSocket with 1012 at once, and waits for requests for as long as it may.

        Where the application can drain, that was the time for them.
        """
        if self.drain is None:
            await super().shutdown(sockets)
            return
        await self._run(self.drain)
        cut = asyncio.get_running_loop().call_later(LINGER_S, self._cut)
        try:
            async with asyncio.timeout(LEAVE_S):
                await super().shutdown(sockets)
        except TimeoutError:
            logs.warning("shutdown took too long")
        finally:
            cut.cancel()

    async def _run(self, drain: Drain) -> None:
        draining = asyncio.ensure_future(drain.run())
        while not draining.done() and not self.force_exit:
            await asyncio.wait([draining], timeout=LOOK_S)
        self.force_exit = False  # what comes now takes no time to speak of, and leaves nothing for others to find out
        draining.cancel()
        [outcome] = await asyncio.gather(draining, return_exceptions=True)
        if isinstance(outcome, Exception):  # a fault of ours, which must not keep the process from ending
            logs.report(outcome)

    def _cut(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


class OnlyServer(Server):
    """The server of a process that does nothing else: once it is up, it says so and settles the garbage collector.

    The model SDK alone brings hundreds of thousands of objects that live for ever; to walk them stops the loop for
    tenths of a second, again and again.
    """

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, and the end of the process where a task is left that would not stop: a responder is somebody
        else's code."""
        await super().serve(sockets)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        stuck = (await asyncio.wait(left, timeout=STUCK_S))[1] if left else left
        if stuck:
            logs.warning("tasks would not stop", count=len(stuck))
            os._exit(0)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's. Raises `SettingsError` where another process has begun to listen there first."""
        await super().startup(sockets)
        if any(listener.fileno() < 0 for listener in sockets or ()):  # all that uvloop lets one know of it
            await self.lifespan.shutdown()
            raise SettingsError("can't listen: the address is in use already")
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        for listener in sockets or ():
            self.announce(listener)

    def announce(self, listener: socket.socket) -> None:
        """Say that it is up."""
        say_where(listener)


def run(app: ASGIApp, settings: Settings, *, insecure_no_auth: bool = False) -> None:
    """Serve `app` until the process is asked to stop. It logs as the settings say, unless logging was set up before.

    Raises `SettingsError` where it can't listen, and unless `insecure_no_auth` for an address that others can reach
    where nobody has to show a token.
    """
    if not insecure_no_auth:
        check_reach(settings)
    if not logging.getLogger().handlers:
        logs.configure(settings.log_format, settings.log_level)
    make_server(app, settings, OnlyServer).run(sockets=[open_listener(settings)])


def say_where(listener: socket.socket, note: str = "") -> None:
    """The one line that tells an operator that the server is up."""
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"realtime {__version__} on {url}{note}", file=sys.stderr, flush=True)


def open_listener(settings: Settings) -> socket.socket:
    """As `listen`. Raises `SettingsError`."""
    try:
        return listen(settings)
    except OSError as error:
        raise SettingsError(f"can't listen on {settings.host}:{settings.port}: {error.strerror or error}") from None


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
    drain: Drain | None = getattr(app.state, "drain", None) if isinstance(app, Starlette) else None
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
        "timeout_graceful_shutdown": GRACE_S if drain else max(1, round(settings.drain_s)),
    }
    server = kind(uvicorn.Config(app, **options))
    server.drain = drain
    return server
