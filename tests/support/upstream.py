"""Stands in for an instance behind a proxy: it does the same to every request, and keeps what it was asked."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from tests.support.http_connection import HttpConnection, HttpRequest

REFUSAL = b'{"error": {"type": "rate_limit_error", "code": "draining", "message": "Not now."}}'


class Upstream:
    """Answers every request alike. `requests` are those that arrived whole; the rest may be changed at any time."""

    def __init__(self, status: int = 200, body: bytes = b"{}", headers: dict[str, str] | None = None) -> None:
        self.requests: list[HttpRequest] = []
        self.status = status
        self.body = body
        self.headers = headers or {}
        self.port = 0
        self._connections: set[HttpConnection] = set()

    async def answer(self, connection: HttpConnection) -> None:
        """What is done to a request."""
        await connection.respond(self.status, self.body, self.headers)

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(
            lambda: HttpConnection(self._begin, self._connections), "127.0.0.1", 0
        )
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        for connection in list(self._connections):
            connection.end("cut")
            await connection.lost.wait()
        await self._listener.wait_closed()

    def _begin(self, connection: HttpConnection, request: HttpRequest) -> asyncio.Task[None]:
        self.requests.append(request)
        return asyncio.ensure_future(self.answer(connection))


class Dying(Upstream):
    """An instance that takes a request, and dies before it says anything."""

    async def answer(self, connection: HttpConnection) -> None:
        """Reset the connection."""
        connection.end("reset")


def refusing() -> Upstream:
    """An instance that drains, or is full."""
    return Upstream(503, REFUSAL, {"retry-after": "7"})
