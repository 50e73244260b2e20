"""Bodies that are refused by what their heads say of them, before anything of them is read."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from realtime.access.audit import tell_refused
from realtime.errors import InvalidRequest
from realtime.http import body_too_large, path_of, send_error


class UnsupportedEncoding(InvalidRequest):
    """The body is packed in a way that is not taken here."""

    status = 415


class BodyCheck:
    """An ASGI application that passes on to `app` what has a body of a size and an encoding that is taken.

    `limits_bytes` are the largest sizes, by the beginning of a path; the first one that fits counts. They are about
    what is declared: what comes in chunks is counted where it is read, by `read_body`.
    """

    def __init__(self, app: ASGIApp, *, limits_bytes: Mapping[str, int]) -> None:
        self._app = app
        self._limits_bytes = limits_bytes

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Refuse with 413 or 415, or pass on."""
        error = self._fault(scope) if scope["type"] == "http" else None
        if error is None:
            return self._app(scope, receive, send)
        tell_refused(scope, error)
        return send_error(send, error)

    def _fault(self, scope: Scope) -> InvalidRequest | None:
        headers = dict(scope["headers"])
        asked = path_of(scope)
        if scope["method"] in {"GET", "HEAD"} and (
            headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers
        ):
            return InvalidRequest("body_not_allowed", "What is only read takes no body.")
        limit = next(limit for path, limit in self._limits_bytes.items() if asked.startswith(path))
        if int(headers.get(b"content-length", b"0")) > limit:  # the server has refused what is no number
            return body_too_large(limit)
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            return UnsupportedEncoding("encoding_not_supported", "A body has to come as it is, without an encoding.")
        return None
