"""The outermost layers of the application, which every request passes before anything is known of who asks."""

from __future__ import annotations

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from realtime.access.addresses import trusted_networks
from realtime.access.bodies import BodyCheck
from realtime.access.headers import ResponseHeaders
from realtime.access.origins import LOOPBACK, OriginCheck, allowed_origins
from realtime.settings import Settings

METHODS = ("GET", "POST", "DELETE")
REQUEST_HEADERS = ("Authorization", "Content-Type", "Last-Event-ID", "Idempotency-Key", "Prefer")
EXPOSED_HEADERS = ("Location", "Retry-After", "RateLimit", "RateLimit-Policy", "Preference-Applied")


def edge(app: ASGIApp, settings: Settings) -> ASGIApp:
    """`app` behind its edge. From the outside in: whose word about the client counts, what every answer carries, which
    pages may ask, what they may read, which bodies are read at all.

    Raises `SettingsError` for proxies and origins that are none.
    """
    origins = allowed_origins(settings.allowed_origins)
    limits_bytes = {"/v1/sessions": settings.max_message_bytes, "": settings.max_body_bytes}
    app = _readable(BodyCheck(app, limits_bytes=limits_bytes), origins)
    app = OriginCheck(app, hosts=_hosts(settings), origins=origins)
    return _behind_proxies(ResponseHeaders(app), settings)


def _behind_proxies(app: ASGIApp, settings: Settings) -> ASGIApp:
    """What a trusted proxy tells of the client's address and scheme stands in the scope."""
    return ProxyHeadersMiddleware(app, trusted_networks(settings.trusted_proxies))  # type: ignore[arg-type, return-value]  # its own types, which say the same


def _readable(app: ASGIApp, origins: frozenset[str]) -> ASGIApp:
    """Pages of these origins may read answers, errors too; what they ask in advance is answered before anybody looks
    for a token, which browsers don't send then."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=METHODS,
        allow_headers=REQUEST_HEADERS,
        allow_credentials=True,
        expose_headers=EXPOSED_HEADERS,
    )


def _hosts(settings: Settings) -> frozenset[str]:
    return frozenset({*LOOPBACK, settings.host.lower(), *map(str.lower, settings.allowed_hosts)})
