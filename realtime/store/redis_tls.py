"""TLS to Redis with one context for all connections of a process that are alike.

Making one reads the certificates of all authorities, which takes a tenth of a second. redis-py makes one for each
connection, on the loop: after an outage of Redis, when all of them are made anew, every session would stand still.
"""

from __future__ import annotations

import asyncio
from typing import Any

from redis.asyncio.connection import ConnectionPool, RedisSSLContext, SSLConnection

_contexts: dict[tuple[str, ...], RedisSSLContext] = {}


class SharedTls(SSLConnection):
    """A connection whose context is that of the others like it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        own = self.ssl_context
        alike = tuple(repr(getattr(own, name)) for name in own.__slots__ if name != "context")
        self.ssl_context = _contexts.setdefault(alike, own)


def share_tls(pool: ConnectionPool) -> None:
    """Have the connections of a pool share their context, if they are over TLS."""
    if issubclass(pool.connection_class, SSLConnection):
        pool.connection_class = SharedTls


async def read_authorities(pool: ConnectionPool) -> None:
    """Make that context now, off the loop. Raises `OSError` for files that can't be read."""
    if issubclass(pool.connection_class, SSLConnection):
        connection: SSLConnection = pool.make_connection()  # type: ignore[no-untyped-call]
        await asyncio.to_thread(connection.ssl_context.get)
