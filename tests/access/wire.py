"""Requests as they are written, to the letter, and a server that tells what its edge has made of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from realtime.access.addresses import client_address
from realtime.access.edge import edge
from realtime.access.origins import is_from_page
from realtime.http import send_json
from realtime.server import listen, make_server
from realtime.settings import Settings

PATIENCE_S = 10.0
UPGRADE = (
    b"Connection: Upgrade",
    b"Upgrade: websocket",
    b"Sec-WebSocket-Version: 13",
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
)


class Answer(msgspec.Struct):
    """The beginning of an answer: `headers` as they came, with names in lower case; `body` where its length is told."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def all(self, name: str) -> list[str]:
        """The values of a header."""
        return [value for key, value in self.headers if key == name]

    @property
    def code(self) -> str:
        """The code of the error that it tells."""
        found: str = json.loads(self.body)["error"]["code"]
        return found


async def ask(port: int, line: str, *headers: bytes, body: bytes = b"", host: bytes | None = None) -> Answer:
    """Send one request, and read the answer's beginning; an event stream or a WebSocket is then left.

    `Host` is this machine's, unless `headers` or `host` say otherwise; an empty `host` sends none.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    hosts = [b"Host: " + (b"127.0.0.1:%d" % port if host is None else host)] if host != b"" else []
    try:
        writer.write(b"\r\n".join([f"{line} HTTP/1.1".encode(), *hosts, *headers, b"", body]))
        async with asyncio.timeout(PATIENCE_S):
            return await read_answer(reader, without_body=line.startswith("HEAD "))
    finally:
        writer.transport.abort()


async def read_answer(reader: asyncio.StreamReader, *, without_body: bool = False) -> Answer:
    """The beginning of an answer."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
    pairs = [line.partition(":") for line in lines]
    answer = Answer(int(first.split(" ")[1]), [(name.lower(), value.strip()) for name, _, value in pairs], b"")
    for length in [] if without_body else answer.all("content-length"):
        answer.body = await reader.readexactly(int(length))
    return answer


async def tell(scope: Scope, _receive: Receive, send: Send) -> None:
    """An application that answers with what stands in the scope."""
    if scope["type"] == "lifespan":
        for kind in ("startup", "shutdown"):
            await _receive()
            await send({"type": f"lifespan.{kind}.complete"})
        return
    seen = {"client": client_address(scope), "scheme": scope["scheme"], "page": is_from_page(scope)}
    if scope["type"] == "http":
        await send_json(send, seen)
    else:
        length = str(len(json.dumps(seen))).encode()
        headers = [(b"content-length", length)]
        await send({"type": "websocket.http.response.start", "status": 200, "headers": headers})
        await send({"type": "websocket.http.response.body", "body": json.dumps(seen).encode()})


@asynccontextmanager
async def telling_server(**settings: Any) -> AsyncIterator[int]:
    """The port of a server that is nothing but `tell` behind the edge."""
    chosen = Settings(**{"port": 0, "drain_s": 1, **settings})
    listener = listen(chosen)
    server = make_server(edge(tell, chosen), chosen)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started:
            await asyncio.sleep(0)
            if serving.done():
                serving.result()
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await serving


async def told(port: int, *headers: bytes, line: str = "GET /v1/x", **options: Any) -> dict[str, Any]:
    """What such a server says."""
    found: dict[str, Any] = json.loads((await ask(port, line, *headers, **options)).body)
    return found


def fields(pairs: Iterable[tuple[str, str]]) -> list[bytes]:
    """Headers as they are written."""
    return [f"{name}: {value}".encode() for name, value in pairs]
