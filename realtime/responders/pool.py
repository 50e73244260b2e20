"""The model client's connection pool: the one that the SDK's aiohttp transport would make, but patient.

A response is read from the network only while somebody waits for more of it. So what comes while a stream rests (see
`realtime.pace`), or while its reader is slow, waits in the kernel and is read in one go, and the provider feels it.
Importing this imports aiohttp: it is done lazily.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
from aiohttp.client_reqrep import ClientResponse
from aiohttp.connector import Connection

KEEPALIVE_S = 30.0


class PatientReader:
    """A response's body; `iter_chunked` pauses the connection while its caller does something else."""

    def __init__(self, reader: aiohttp.StreamReader, connection: Connection) -> None:
        self._reader = reader
        self._protocol = connection.protocol

    async def iter_chunked(self, size: int) -> AsyncIterator[bytes]:
        """The body in pieces of at most `size` bytes."""
        async for chunk in self._reader.iter_chunked(size):
            if self._reader.is_eof() or self._protocol is None:
                yield chunk  # the connection is back in the pool already: it is not ours to pause
            else:
                self._protocol.pause_reading()
                yield chunk
                self._protocol.resume_reading()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


class PatientResponse(ClientResponse):
    """A response whose body is a `PatientReader`."""

    async def start(self, connection: Connection) -> ClientResponse:
        """As aiohttp's."""
        await super().start(connection)
        self.content = PatientReader(self.content, connection)  # type: ignore[assignment]
        return self


def make_session(max_connections: int, ssl_context: ssl.SSLContext) -> aiohttp.ClientSession:
    """A pool of at most `max_connections`. To be called in the event loop that uses it."""
    connector = aiohttp.TCPConnector(limit=max_connections, ssl=ssl_context, keepalive_timeout=KEEPALIVE_S)
    return aiohttp.ClientSession(connector=connector, response_class=PatientResponse)
