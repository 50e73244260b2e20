"""One HTTP/1.1 connection as the server's side sees it, whose other end may leave at any moment."""

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Literal, TypeAlias

import msgspec

Closing: TypeAlias = Literal["peer_closed", "cut", "reset"]
Begin: TypeAlias = "Callable[[HttpConnection, HttpRequest], asyncio.Task[None]]"

RST_ON_CLOSE = struct.pack("ii", 1, 0)
"""The value of SO_LINGER with which closing a socket sends an RST."""


class HttpRequest(msgspec.Struct, frozen=True):
    """A request with its whole body; header names are in lower case."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


class HttpConnection(asyncio.Protocol):
    """Requests come in, and for each in turn `begin` starts the task that answers it through `send`.

    When the connection closes, the running answer is cancelled and every watcher is called once with how:
    the peer left (by FIN or RST), or `end` was called. Reading never pauses, which is what makes the peer's
    close visible at once, whatever an answer is waiting for. A FIN counts as a close: no client of this API
    half-closes.
    The connection is a member of `connections` for as long as it lives; `lost` is set after that.
    """

    def __init__(self, begin: Begin, connections: "set[HttpConnection]") -> None:
        self.watchers: list[Callable[[Closing], None]] = []
        self.lost = asyncio.Event()
        self._begin = begin
        self._connections = connections
        self._buffer = bytearray()
        self._answer: asyncio.Task[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Own the transport; a write counts as done when the kernel has it."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=0)
        self._connections.add(self)

    def data_received(self, data: bytes) -> None:
        """Begin with the next request when it is whole."""
        self._buffer += data
        self._next()

    def eof_received(self) -> None:
        """The peer's FIN, which ends the connection as an RST would."""
        self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The peer's RST, or the last act of a close from here."""
        self._over("peer_closed")
        self._connections.discard(self)
        self.lost.set()

    def pause_writing(self) -> None:
        """The kernel's buffer is full."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """All is written."""
        self._writable.set()

    def end(self, how: Literal["cut", "reset"]) -> None:
        """Close from this side, by FIN or by RST. What the kernel doesn't have yet is lost. Idempotent."""
        self._over(how)
        if self._transport.is_closing():
            return
        if how == "reset":
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_ON_CLOSE)
        self._transport.abort()

    async def send(self, data: bytes) -> None:
        """Write, and return when the kernel has it. Others get a turn in any case. Safe to cancel."""
        self._transport.write(data)
        await asyncio.sleep(0)
        await self._writable.wait()

    async def respond(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        """Send a whole response of JSON, with `headers` beside the usual ones. Safe to cancel."""
        fields = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
        lines = [f"HTTP/1.1 {status} Stand-in", *(f"{name}: {value}" for name, value in fields.items())]
        await self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    def _next(self) -> None:
        if self._answer is not None or self._transport.is_closing():
            return
        try:
            request = take_request(self._buffer)
        except ValueError:
            self.end("cut")
            return
        if request is not None:
            self._answer = self._begin(self, request)
            self._answer.add_done_callback(self._answered)

    def _answered(self, _answer: asyncio.Task[None]) -> None:
        self._answer = None
        self._next()

    def _over(self, how: Closing) -> None:
        watchers, self.watchers = self.watchers, []
        for watcher in watchers:
            watcher(how)
        if self._answer is not None and self._answer is not asyncio.current_task():
            self._answer.cancel()


def take_request(buffer: bytearray) -> HttpRequest | None:
    """The first request in the buffer, removed from it; None while it is not whole.

    Raises:
        ValueError: the bytes are no HTTP request, or one whose body has no content-length.
    """
    head, blank, rest = bytes(buffer).partition(b"\r\n\r\n")
    if not blank:
        return None
    request_line, *lines = head.decode("latin-1").split("\r\n")
    method, target, _version = request_line.split(" ")
    fields = (line.partition(":") for line in lines)
    headers = {name.strip().lower(): value.strip() for name, _, value in fields}
    if "transfer-encoding" in headers:
        raise ValueError("a body without a content-length")
    length = int(headers.get("content-length", "0"))
    if len(rest) < length:
        return None
    del buffer[: len(head) + len(blank) + length]
    return HttpRequest(method, target, headers, rest[:length])
