"""Which pages and which names a request may come by: a page of another origin must not use a server that it can reach.

Browsers send `Origin` with every WebSocket upgrade, every POST, and every read of another origin, and let no page
change it; CORS does not cover WebSockets, so the server itself has to look. What a page only embeds comes without
`Origin`, but with `Sec-Fetch-Site`. `Host` is looked at because a page may have its own name resolve to this machine
(DNS rebinding). Clients that are no browsers send neither and pass.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from realtime.access.audit import tell_refused
from realtime.errors import PermissionDenied
from realtime.http import Headers, refuse_upgrade, send_error
from realtime.observe import logs
from realtime.settings import SettingsError

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
FOREIGN = frozenset({b"cross-site", b"same-site"})
"""What `Sec-Fetch-Site` says where a page of another origin asks."""
_AUTHORITY = r"(?:\[(?P<address>[0-9a-f:.]+)\]|(?P<name>[a-z0-9_](?:[a-z0-9._-]*[a-z0-9_])?))(?::\d{1,5})?"
HOST = re.compile(_AUTHORITY)
ORIGIN = re.compile(rf"[a-z][a-z0-9+.-]*://{_AUTHORITY}")
LOCAL_ORIGIN = re.compile(r"https?://(?:localhost|127\.0\.0\.1|\[::1\])(?::\d{1,5})?")
DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_FROM_PAGE = "realtime.from_page"
_READABLE: Headers = [(b"access-control-allow-origin", b"*")]
"""Any page may read that it is refused, so that a client of it can tell that from a server that is away."""
MAX_WARNED = 20


class OriginCheck:
    """An ASGI application that passes on to `app` what comes from allowed origins, by allowed names.

    `hosts` are names without ports, `*` any. An origin is allowed if it is one of `origins`, or the scheme, name and
    port by which the server was asked; it is compared as browsers write it, to the letter.
    """

    def __init__(self, app: ASGIApp, *, hosts: frozenset[str], origins: frozenset[str]) -> None:
        self._app = app
        self._hosts = hosts
        self._origins = origins
        self._warned: set[str] = set()

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Refuse with 403, or pass on."""
        if scope["type"] not in {"http", "websocket"}:
            return self._app(scope, receive, send)
        try:
            self._check_page(scope, self._checked_host(scope))
        except PermissionDenied as error:
            tell_refused(scope, error)
            if scope["type"] == "websocket":
                return refuse_upgrade(send, error)
            return send_error(send, error, headers=_READABLE if error.code == "origin_not_allowed" else None)
        return self._app(scope, receive, send)

    def _checked_host(self, scope: Scope) -> str:
        hosts = _values(scope, b"host")
        host = hosts[0].decode("latin-1").lower() if hosts else ""
        if len(hosts) > 1 or ("*" not in self._hosts and _name(host) not in self._hosts):
            raise PermissionDenied("host_not_allowed", "This server does not answer to that name.")
        return host

    def _check_page(self, scope: Scope, host: str) -> None:
        origins, sites = _values(scope, b"origin"), _values(scope, b"sec-fetch-site")
        is_embedded = not FOREIGN.isdisjoint(sites) and _values(scope, b"sec-fetch-mode") != [b"navigate"]
        if origins and not (len(origins) == 1 and self._allows(origins[0].decode("latin-1"), _own(scope, host))):
            self._warn(origins[0].decode("latin-1"))
            raise PermissionDenied("origin_not_allowed", "Pages of that origin may not use this server.")
        if not origins and is_embedded:
            raise PermissionDenied("origin_not_allowed", "Pages of other origins may not embed what is here.")
        scope[_FROM_PAGE] = bool(origins) or sites == [b"same-origin"]

    def _allows(self, origin: str, own: str) -> bool:
        return origin in self._origins or origin == own

    def _warn(self, origin: str) -> None:
        """Say which setting would let its pages in: of each origin once, and of a few. What anybody can send is not
        told as it is: only this machine's own are named, where pages are developed."""
        told = origin if LOCAL_ORIGIN.fullmatch(origin) else "another"
        if told not in self._warned and len(self._warned) < MAX_WARNED:
            self._warned.add(told)
            logs.warning("pages of an origin are refused", origin=told, setting="REALTIME_ALLOWED_ORIGINS")


def is_from_page(scope: Scope) -> bool:
    """Whether a browser vouches that an allowed page asks, so that a cookie may count.

    It has sent an allowed `Origin`, or `Sec-Fetch-Site: same-origin`. False where no `OriginCheck` came before.
    """
    return scope.get(_FROM_PAGE, False) is True


def allowed_origins(entries: Iterable[str]) -> frozenset[str]:
    """The origins of `REALTIME_ALLOWED_ORIGINS`, as browsers write them. Raises `SettingsError` for what is none."""
    return frozenset(map(_canonical, entries))


def _canonical(entry: str) -> str:
    origin = entry.lower().removesuffix("/")
    if not ORIGIN.fullmatch(origin):
        raise SettingsError(
            f"REALTIME_ALLOWED_ORIGINS={entry!r} is not allowed: "
            "expected what browsers send, such as https://app.example.org (and xn--… for other letters)"
        )
    return origin.removesuffix(DEFAULT_PORTS.get(origin.partition(":")[0], "/"))


def _own(scope: Scope, host: str) -> str:
    """The origin of a page that comes from this server, by the name that it was asked by."""
    scheme = "https" if scope.get("scheme") in {"https", "wss"} else "http"
    return f"{scheme}://{host.removesuffix(DEFAULT_PORTS[scheme])}"


def _name(host: str) -> str | None:
    """The name in a `Host` header in lower case; `None` where it can't be one, as with a dot at its end."""
    found = HOST.fullmatch(host)
    return found and (found["address"] or found["name"])


def _values(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]
