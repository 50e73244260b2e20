"""What every answer carries so that a browser makes no more of it than it is."""

from __future__ import annotations

from collections.abc import Awaitable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from realtime.http import Headers

STARTS = frozenset({"http.response.start", "websocket.http.response.start"})
USUAL: Headers = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    # Pages of allowed origins may still fetch: this is about what is embedded without CORS.
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
]
"""Where an answer has one of these, its own counts."""
OVER_TLS: Headers = [*USUAL, (b"strict-transport-security", b"max-age=31536000")]


class ResponseHeaders:
    """An ASGI application that adds them to the answers of `app`, refused upgrades among them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass on."""
        usual = OVER_TLS if scope.get("scheme") in {"https", "wss"} else USUAL

        def send_with_headers(message: Message) -> Awaitable[None]:
            if message["type"] in STARTS:
                given = list(message.get("headers", ()))
                names = {name.lower() for name, _ in given}
                message["headers"] = given + [pair for pair in usual if pair[0] not in names]
            return send(message)

        return self._app(scope, receive, send_with_headers)
