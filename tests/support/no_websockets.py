"""A proxy on 127.0.0.1 that lets no WebSocket through, as there are on the way in some firms and hotels."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from websockets.utils import accept_key

READ_BYTES = 64 * 1024
Answer = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]
"""Answers an upgrade with that head. The connection is closed then."""


async def forbidden(_head: bytes, writer: asyncio.StreamWriter) -> None:
    """As a firm's proxy says no."""
    writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


async def redirected(_head: bytes, writer: asyncio.StreamWriter) -> None:
    """To where no WebSocket is: a hotel's page."""
    writer.write(b"HTTP/1.1 302 Found\r\nLocation: http://portal.invalid/login\r\nContent-Length: 0\r\n\r\n")


async def cut(head: bytes, writer: asyncio.StreamWriter) -> None:
    """Upgraded, and then closed."""
    writer.write(_upgrade(head))


async def garbled(head: bytes, writer: asyncio.StreamWriter) -> None:
    """Upgraded, and then there is a page in a frame."""
    page = b"<html>"
    writer.write(_upgrade(head) + bytes([0x81, len(page)]) + page)


async def swallowed(head: bytes, writer: asyncio.StreamWriter) -> None:
    """Upgraded, and then nothing comes."""
    writer.write(_upgrade(head))
    await asyncio.Event().wait()


def _upgrade(head: bytes) -> bytes:
    found = re.search(rb"sec-websocket-key: (\S+)", head, re.IGNORECASE)
    assert found is not None
    lines = [
        "HTTP/1.1 101 Switching Protocols",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Protocol: realtime.v1",
        f"Sec-WebSocket-Accept: {accept_key(found[1].decode())}",
    ]
    return "\r\n".join([*lines, "", ""]).encode()


@asynccontextmanager
async def without_websockets(port: int, answer: Answer = forbidden) -> AsyncIterator[str]:
    """Its URL; everything but upgrades goes to 127.0.0.1 at `port`."""
    serving: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(_serve(reader, writer, port, answer))
        serving.add(task)
        task.add_done_callback(serving.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int, answer: Answer) -> None:
    """A browser opens a connection of its own for a WebSocket: the first request tells."""
    with suppress(OSError, asyncio.IncompleteReadError):
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if b"\r\nupgrade: websocket\r\n" in head.lower():
                await answer(head, writer)
                await writer.drain()
                return
            await _pass_on(head, reader, writer, port)
        finally:
            writer.close()


async def _pass_on(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
    """Both ways, until one side is done."""
    answers, requests = await asyncio.open_connection("127.0.0.1", port)
    try:
        requests.write(head)
        ways = [asyncio.create_task(_pump(reader, requests)), asyncio.create_task(_pump(answers, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
    finally:
        requests.close()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(READ_BYTES):
        sink.write(data)
        await sink.drain()
