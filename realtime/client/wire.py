"""What carries a session: where it leads, what it has to do, and how it ends."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol, TypeVar
from urllib.parse import urlencode, urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

import msgspec
from msgspec import Struct

from realtime.client.events import Fields

LOST = 1006
OVERLOADED = 1013
ENDPOINT = "/v1/realtime"
OPEN_S = 10.0
"""How long it may take to open a connection; a WebSocket is open once its first message is here."""
SILENCE_S = 45.0
"""A connection on which nothing came for so long is dead."""

T = TypeVar("T")


def checked_url(url: str) -> str:
    """The same. Raises `ValueError` for what can't be a server's address."""
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https", "ws", "wss"} or not parts.hostname or parts.port == 0:
        raise ValueError(f"not the address of a server by http, https, ws or wss: {url!r}")
    return url


class Closed(Exception):
    """The connection has ended, by a close code or what would be one.

    `reconnect_in_s` is when to come back; else `retry_after_s` is added to what the client would wait. Its `__cause__`,
    if any, is the application's own failure.
    """

    def __init__(
        self, code: int, reason: str = "", *, reconnect_in_s: float | None = None, retry_after_s: float = 0.0
    ) -> None:
        super().__init__(f"{code} {reason}")
        self.code = code
        self.reason = reason
        self.reconnect_in_s = reconnect_in_s
        self.retry_after_s = retry_after_s


class Left(Closed):
    """The client itself has ended it, for good."""


class NotOpened(Closed):
    """There was not even an answer of the server: it is away, or something on the way lets nothing through."""


def decoded(data: bytes, kind: type[T]) -> T:
    """What came as JSON. Raises `Closed` where it is something else: then something on the way speaks in its place."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (ValueError, RecursionError):
        raise Closed(LOST, "unreadable") from None


def message(data: bytes) -> Fields:
    """A message of the server. Raises `Closed` likewise."""
    fields = decoded(data, Fields)
    if not isinstance(fields.get("type"), str):
        raise Closed(LOST, "unreadable")
    return fields


class Target(Struct, frozen=True, kw_only=True):
    """Where a connection leads, and who asks. `url` is the WebSocket endpoint, or the server's address."""

    url: str
    session_id: str | None
    query: dict[str, str]
    token: str | None

    @property
    def headers(self) -> dict[str, str]:
        """What every request says of who asks."""
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    def websocket(self) -> str:
        """The address of the WebSocket."""
        query = {"session_id": self.session_id, **self.query} if self.session_id else self.query
        return self._address("ws", ENDPOINT) + (f"?{urlencode(query)}" if query else "")

    def http(self, path: str) -> str:
        """The address of a path below `/v1/` over HTTP."""
        return self._address("http", f"/v1/{path}")

    @property
    def proxy(self) -> str | None:
        """The proxy that the environment names for it."""
        parts = urlsplit(self.http(""))
        proxy = None if proxy_bypass(parts.netloc.rpartition("@")[2]) else getproxies().get(parts.scheme)
        return f"http://{proxy}" if proxy and "://" not in proxy else proxy

    def told(self, why: str) -> str:
        """Why it could not be reached, for a person: with the proxy, and without its password."""
        if self.proxy is None:
            return why
        scheme, _, place = self.proxy.partition("://")
        user, _, host = place.rpartition("@")
        seen = why.replace(f"{user}@", "") if user else why
        return f"{seen}, by way of the proxy {scheme}://{host}"

    def _address(self, scheme: str, path: str) -> str:
        parts = urlsplit(self.url)
        secure = parts.scheme in {"https", "wss"}
        base = parts.path.rstrip("/").removesuffix(ENDPOINT).rstrip("/")
        return urlunsplit((scheme + "s" * secure, parts.netloc, base + path, "", ""))


class Wire(Protocol):
    """An open connection. Where it `acknowledges`, a command that was sent was carried out."""

    @property
    def acknowledges(self) -> bool:
        """See above."""

    def events(self) -> AsyncIterator[Fields]:
        """What comes. Raises `Closed` at the end, and ends in no other way."""

    async def send(self, command: Fields) -> Fields | None:
        """Send a command. Returns the message that refuses it if that won't come by `events`. Raises `Closed`."""
