"""Many WebSocket clients in one process that keep the positions of their session, as every client has to."""

from __future__ import annotations

import asyncio
import json
import struct
import time
from collections.abc import Mapping
from typing import cast

import msgspec

TEXT, CLOSE, PING, PONG = 1, 8, 9, 10
SHORT, LONG = 126, 127
MASK_OF_ZEROS = bytes(4)
UNKNOWN = -1


class Named(msgspec.Struct, frozen=True):
    """Something with an id."""

    id: str = ""


class Frame(msgspec.Struct, frozen=True):
    """What a client needs of a frame."""

    type: str
    seq: int = UNKNOWN
    merged: int = 1
    response_id: str = ""
    positions: dict[str, int] = {}
    session: Named = Named()
    response: Named = Named()


decode = msgspec.json.Decoder(Frame).decode


class Visitor(asyncio.Protocol):
    """One connection to ws://127.0.0.1:port/path. `positions` are those that it comes with, and is kept up to date.

    `first_us` and `live_us` are when its first frame came, and when it had all that the first frame says there is, in
    µs from the call of `visit`. `gaps` counts events that did not follow the one before.
    """

    def __init__(self, path: str, positions: Mapping[str, int] | None = None) -> None:
        self.path = path
        self.positions = dict(positions or {"session": 0})
        self.session_id = ""
        self.gaps = 0
        self.first_us = self.live_us = 0
        self.live: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended: set[str] = set()
        self._started = time.perf_counter()
        self._wanted: dict[str, int] | None = None
        self._received = bytearray()
        self._is_open = False
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the upgrade."""
        self._transport = cast(asyncio.Transport, transport)
        head = f"GET {self.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        self._transport.write((head + key).encode())

    def connection_lost(self, error: Exception | None) -> None:
        """Say so, if it was not live yet."""
        if not self.live.done():
            self.live.set_exception(error or ConnectionError("the server hung up"))

    def data_received(self, data: bytes) -> None:
        """Take whole frames apart."""
        self._received += data
        if not self._is_open:
            head, end, rest = self._received.partition(b"\r\n\r\n")
            if not end:
                return
            if not head.startswith(b"HTTP/1.1 101"):
                self.hang_up()
                return
            self._is_open, self._received = True, rest
        while (frame := self._next_frame()) is not None:
            self._take(*frame)

    def send(self, message: dict[str, object]) -> None:
        """Send a message."""
        self._send_frame(TEXT, json.dumps(message).encode())

    def hang_up(self) -> None:
        """Close the socket, without a close frame."""
        if self._transport is not None:
            self._transport.abort()

    def _next_frame(self) -> tuple[int, bytes] | None:
        received = self._received
        if len(received) < 2:
            return None
        size, start = received[1] & 127, 2
        if size == SHORT and len(received) >= 4:
            size, start = int.from_bytes(received[2:4], "big"), 4
        elif size == LONG and len(received) >= 10:
            size, start = int.from_bytes(received[2:10], "big"), 10
        elif size >= SHORT:
            return None
        if len(received) < start + size:
            return None
        payload = bytes(received[start : start + size])
        opcode = received[0] & 15
        del received[: start + size]
        return opcode, payload

    def _take(self, opcode: int, payload: bytes) -> None:
        if opcode == TEXT:
            self._apply(decode(payload))
        elif opcode == PING:
            self._send_frame(PONG, payload)
        elif opcode == CLOSE:
            self.hang_up()

    def _apply(self, frame: Frame) -> None:
        if self._wanted is None:
            self._begin(frame)
        elif frame.seq != UNKNOWN:
            channel = frame.response_id or "session"
            self.gaps += self.positions.get(channel, 0) != frame.seq - frame.merged
            self.positions[channel] = frame.seq
            if frame.type == "response.created":
                self.positions.setdefault(frame.response.id, 0)
            elif frame.type == "response.done":
                self.ended.add(channel)
                del self.positions[channel]
        if not self.live.done() and self._has_all():
            self.live_us = self._elapsed_us()
            self.live.set_result(None)

    def _begin(self, frame: Frame) -> None:
        if frame.type not in {"session.created", "session.resumed"}:
            self.hang_up()
            return
        self.first_us = self._elapsed_us()
        self.session_id = frame.session.id
        self._wanted = frame.positions

    def _has_all(self) -> bool:
        wanted = (self._wanted or {}).items()
        return all(name in self.ended or self.positions.get(name, UNKNOWN) >= position for name, position in wanted)

    def _elapsed_us(self) -> int:
        return round((time.perf_counter() - self._started) * 1e6)

    def _send_frame(self, opcode: int, payload: bytes) -> None:
        size = len(payload)
        length = struct.pack("!B", 0x80 | size) if size < SHORT else struct.pack("!BH", 0x80 | SHORT, size)
        if self._transport is not None:
            self._transport.write(bytes([0x80 | opcode]) + length + MASK_OF_ZEROS + payload)


async def visit(port: int, path: str, positions: Mapping[str, int] | None = None) -> Visitor:
    """Connect; returns once the visitor is live. Raises OSError if it is refused or hung up on."""
    visitor = Visitor(path, positions)
    try:
        await asyncio.get_running_loop().create_connection(lambda: visitor, "127.0.0.1", port)
        await visitor.live
    except BaseException:
        visitor.live.cancel()
        visitor.hang_up()
        raise
    return visitor


def again(visitor: Visitor) -> str:
    """Return the path by which a visitor comes back to its session with the positions that it has."""
    after = ",".join(f"{channel}:{position}" for channel, position in visitor.positions.items())
    return f"/v1/realtime?session_id={visitor.session_id}&after={after}"
