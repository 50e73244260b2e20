"""A WebSocket client on a bare socket, which can hang up in every way that a network can.

Libraries close in order, whatever one does with them. Blocking; every wait is bounded by TIMEOUT_S.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from types import TracebackType
from typing import Any

TIMEOUT_S = 10.0
TEXT, CLOSE, PING, PONG = 1, 8, 9, 10
NORMAL_CLOSURE = 1000
SWITCHING = b"HTTP/1.1 101"
SHORT, LONG = 126, 127


class Client:
    """One connection to ws://127.0.0.1:port/path, from the address `source`.

    Raises OSError when the server refuses, ends or stalls.
    """

    def __init__(self, port: int, path: str, source: str = "127.0.0.1") -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), TIMEOUT_S, (source, 0))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.received = b""
        request = (
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        self.socket.sendall(request.encode())
        head = self.read_head()
        if not head.startswith(SWITCHING):
            raise OSError(f"no upgrade: {head[:200]!r}")

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, message: dict[str, object]) -> None:
        """Send a message as a JSON text frame."""
        self.send_frame(TEXT, json.dumps(message).encode())

    def receive_until(self, kind: str) -> dict[str, Any]:
        """Receive messages until one of this type comes, and return it. Raises RuntimeError on an `error`."""
        end = time.monotonic() + TIMEOUT_S
        while time.monotonic() < end:
            message: dict[str, Any] = json.loads(self.receive())
            if message["type"] == "error":
                raise RuntimeError(f"the server says: {message['error']}")
            if message["type"] == kind:
                return message
        raise TimeoutError(f"no {kind} in {TIMEOUT_S:g} s")

    def receive(self) -> bytes:
        """Return the next data frame's payload, answering pings before it."""
        while True:
            opcode, payload = self.read_frame()
            if opcode == PING:
                self.send_frame(PONG, payload)
            elif opcode == CLOSE:
                raise ConnectionError(f"the server closed: {payload!r}")
            elif opcode != PONG:
                return payload

    def send_close(self) -> int:
        """Send a close frame, and leave the socket open; return when (µs since 1970)."""
        at_us = now_us()
        self.send_frame(CLOSE, struct.pack("!H", NORMAL_CLOSURE))
        return at_us

    def reset(self) -> int:
        """Abort the TCP connection with a RST; return when (µs since 1970)."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        at_us = now_us()
        self.socket.close()
        return at_us

    def half_close(self) -> int:
        """Send a FIN without a close frame, and leave the socket open; return when (µs since 1970)."""
        at_us = now_us()
        self.socket.shutdown(socket.SHUT_WR)
        return at_us

    def send_frame(self, opcode: int, payload: bytes) -> None:
        """Send a frame of at most 65,535 bytes, masked with 0."""
        size = len(payload)
        length = struct.pack("!B", 0x80 | size) if size < SHORT else struct.pack("!BH", 0x80 | SHORT, size)
        self.socket.sendall(bytes([0x80 | opcode]) + length + bytes(4) + payload)

    def read_head(self) -> bytes:
        """Return the HTTP head of the answer to the upgrade."""
        while b"\r\n\r\n" not in self.received:
            self.fill()
        head, _, self.received = self.received.partition(b"\r\n\r\n")
        return head

    def read_frame(self) -> tuple[int, bytes]:
        """Return the next frame's opcode and payload. Fragments are not known: this server sends none."""
        first, second = self.take(2)
        size = second & 127
        if size == SHORT:
            (size,) = struct.unpack("!H", self.take(2))
        elif size == LONG:
            (size,) = struct.unpack("!Q", self.take(8))
        return first & 15, self.take(size)

    def take(self, size: int) -> bytes:
        """Return the next bytes."""
        while len(self.received) < size:
            self.fill()
        taken, self.received = self.received[:size], self.received[size:]
        return taken

    def fill(self) -> None:
        """Read what there is."""
        more = self.socket.recv(65536)
        if not more:
            raise ConnectionError("the server hung up")
        self.received += more


def now_us() -> int:
    """Return µs since 1970, on the clock that the upstream reads too."""
    return time.time_ns() // 1000
