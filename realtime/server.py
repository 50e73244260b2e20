"""Runs the application under uvicorn, with what uvicorn does not do by itself: let go of a client that stalls."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import sys
from collections.abc import Awaitable
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from realtime import __version__
from realtime.access.addresses import trusted_networks
from realtime.access.arrivals import Arrivals
from realtime.access.rates import parse_rate
from realtime.check import check_reach
from realtime.drain import Drain
from realtime.http_transport import PunctualHttpProtocol
from realtime.observe import logs, traces
from realtime.settings import Settings, SettingsError, parsed
from realtime.transport import StallProofProtocol

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
SEND_BUFFER_BYTES = 128 * 1024
"""The kernel's buffer per client; Linux doubles it. Without a limit it grows to megabytes for one that stalls."""
RECEIVE_BUFFER_BYTES = 128 * 1024
"""Likewise for what a client sends and nobody has asked for yet."""
KERNEL_MARGIN_S = 5.0
"""How much later than the server the kernel gives up on a client: the server's end is the one that is told."""
BACKLOG = 4096
GC_THRESHOLDS = (20_000, 20, 20)
"""Fewer collections than Python's 700 allocations: what a token allocates is freed by its reference count."""


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

    Raises `SettingsError` where it can't listen, or make the traces that are asked for; and unless `insecure_no_auth`
    for an address that others can reach where nobody has to show a token.
    """
    if not insecure_no_auth:
        check_reach(settings)
    traces.check(settings.traces)
    if not logging.getLogger().handlers:
        logs.configure(settings.log_format, settings.log_level)
    make_server(app, settings, OnlyServer).run(sockets=[open_listener(settings)])


def _arrivals(settings: Settings) -> Arrivals:
    rate = parsed(settings, "rate_connections", parse_rate)
    return Arrivals(rate, trusted_networks(settings.trusted_proxies))


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
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
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
        "http": partial(PunctualHttpProtocol, arrivals=_arrivals(settings)),
        "ws": StallProofProtocol,
        "ws_max_size": settings.max_message_bytes,
        "ws_ping_interval": settings.ping_interval_s,
        "ws_ping_timeout": settings.ping_interval_s,
        "ws_per_message_deflate": False,
        "root_path": settings.root_path,
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
        "interface": "asgi3",
        "lifespan": "on",
        "backlog": BACKLOG,
        "timeout_graceful_shutdown": GRACE_S if drain else max(1, round(settings.drain_s)),
    }
    server = kind(uvicorn.Config(_telling(app), **options))
    server.drain = drain
    return server


def _telling(app: ASGIApp) -> ASGIApp:
    """The same, and why it could not start, or end, is logged as every error is: uvicorn would log it as a text."""

    async def tell(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, partial(_send_bare, send))
        except Exception as error:
            logs.report(error)
            raise

    def telling(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        return (tell if scope["type"] == "lifespan" else app)(scope, receive, send)

    return telling


async def _send_bare(send: Send, message: Message) -> None:
    """Send what the lifespan has come to, without the text of what has failed, which may hold content."""
    await send({"type": message["type"]})
