"""A proxy on 127.0.0.1 that lets no WebSocket through, as there are on the way in some firms and hotels."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

READ_BYTES = 64 * 1024
REFUSAL = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@asynccontextmanager
async def without_websockets(port: int) -> AsyncIterator[str]:
    """Its URL; everything but upgrades goes to 127.0.0.1 at `port`."""
    serving: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(_serve(reader, writer, port))
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


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
    """A browser opens a connection of its own for a WebSocket: the first request tells."""
    with suppress(OSError, asyncio.IncompleteReadError):
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if b"\r\nupgrade: websocket\r\n" in head.lower():
                writer.write(REFUSAL)
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
