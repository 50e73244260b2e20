"""Which pages and which names a request may come by: a page of another origin must not use a server that it can reach.

Browsers send `Origin` with every WebSocket upgrade and every POST, and let no page change it; CORS does not cover
WebSockets, so the server itself has to look. `Host` is looked at because a page may have its own name resolve to this
machine (DNS rebinding). Clients that are no browsers send no `Origin` and pass.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from realtime.errors import PermissionDenied
from realtime.http import refuse_upgrade, send_error

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
DEFAULT_PORTS = {"http": 80, "https": 443}


class OriginCheck:
    """An ASGI application that passes on to `app` what comes from allowed origins, by allowed names.

    `hosts` are names without ports, `*` any. An origin is allowed if it is one of `origins`, or has the name and port
    by which the server was asked.
    """

    def __init__(self, app: ASGIApp, *, hosts: frozenset[str], origins: frozenset[str]) -> None:
        self._app = app
        self._hosts = hosts
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse with 403, or pass on."""
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except PermissionDenied as error:
            await (send_error if scope["type"] == "http" else refuse_upgrade)(send, error)
        else:
            await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if "*" not in self._hosts and _name(host) not in self._hosts:
            raise PermissionDenied("host_not_allowed", "This server does not answer to that name.")
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        changes = scope["type"] == "websocket" or scope["method"] not in SAFE_METHODS
        if changes and origin and origin not in self._origins and not _same(origin, host):
            raise PermissionDenied("origin_not_allowed", "Pages of that origin may not use this server.")


def _name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _same(origin: str, host: str) -> bool:
    """Whether an origin has the name and port of `host`. The scheme is a proxy's affair."""
    try:
        parts, asked = urlsplit(origin), urlsplit(f"//{host}")
        default = DEFAULT_PORTS.get(parts.scheme)
        return (parts.hostname, parts.port or default) == (asked.hostname, asked.port or default)
    except ValueError:
        return False
