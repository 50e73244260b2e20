"""Runs the application under uvicorn, with what uvicorn does not do by itself: let go of a client that stalls."""

from __future__ import annotations

import socket
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn._types import ASGISendEvent
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode as WireCloseCode
from websockets.frames import Frame

from realtime.settings import Settings

ABORT_S = 2.0
"""How long after its close frame a connection may linger: its client takes nothing, or does not answer."""
MAX_FRAGMENTS = 1024
"""Frames that one message may come in: empty ones pass any limit on bytes."""
SEND_BUFFER_BYTES = 128 * 1024
"""The kernel's buffer per client; Linux doubles it. Without a limit it grows to megabytes for one that stalls."""
BACKLOG = 4096


class StallProofProtocol(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket protocol, whose every end is bounded in time.

    uvicorn closes a connection once its write buffer is empty, which for a client that has stopped reading is never;
    and it would wait for room in the buffer before it even sends the close frame.
    """

    async def send(self, message: ASGISendEvent) -> None:
        """As uvicorn's, but a close waits for nobody."""
        if message["type"] == "websocket.close":
            self.writable.set()
            self._abort_later()
        await super().send(message)

    def keepalive_timeout(self) -> None:
        """No pong came in time: the client has vanished."""
        super().keepalive_timeout()
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


def listen(settings: Settings) -> socket.socket:
    """A listening socket whose connections stall neither for ever nor in megabytes. Raises `OSError`."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        user_timeout = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux
        if user_timeout is not None:
            listener.setsockopt(socket.IPPROTO_TCP, user_timeout, int(settings.send_timeout_s * 1000))
        listener.bind((settings.host, settings.port))
    except BaseException:
        listener.close()
        raise
    return listener


def make_server(app: ASGIApp, settings: Settings) -> uvicorn.Server:
    """A uvicorn server that is ready to run on a socket of `listen`."""
    options: dict[str, Any] = {
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
    return uvicorn.Server(uvicorn.Config(app, **options))
