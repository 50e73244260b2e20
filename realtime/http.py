"""The least of HTTP that the endpoints share: JSON answers, errors in the protocol's shape, bodies with a limit."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any
from urllib.parse import quote

import msgspec
from msgspec import Struct
from starlette.types import Receive, Scope, Send

from realtime.errors import InvalidRequest, RealtimeError

BODY_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 1.0
Headers = list[tuple[bytes, bytes]]

STREAM_HEADERS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
"""What comes with server-sent events: nobody on the way is to keep them, not even for a moment."""
JSON_HEADERS: Headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
_SEPARATORS = {"\u0085".encode(): rb"\u0085", "\u2028".encode(): rb"\u2028", "\u2029".encode(): rb"\u2029"}


class ErrorAnswer(Struct, omit_defaults=True):
    """What every error answer holds, as its `error`."""

    type: str
    code: str
    message: str
    param: str | None = None
    retry_after_ms: int | None = None


class BodyTooLarge(InvalidRequest):
    """The body is larger than a body may be."""

    status = 413


def body_too_large(max_bytes: int) -> BodyTooLarge:
    """The error for a body that is."""
    return BodyTooLarge("body_too_large", f"A body may have at most {max_bytes} bytes.")


def error_body(error: RealtimeError) -> bytes:
    """`{"error": {…}}` as JSON."""
    answer = ErrorAnswer(error.type, error.code, error.message, error.param, error.retry_after_ms)
    return msgspec.json.encode({"error": answer})


def error_headers(error: RealtimeError) -> Headers:
    """What an error answer carries beside its body."""
    headers = [*JSON_HEADERS]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.status in {429, 503}:
        headers.append((b"retry-after", str(-(-(error.retry_after_ms or 1000) // 1000)).encode()))
    return headers


def path_of(scope: Scope) -> str:
    """The path that is asked for, without what this is mounted under."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def location_of(scope: Scope, path: str) -> tuple[bytes, bytes]:
    """The header that names a path of this server, wherever it is mounted."""
    return b"location", quote(scope.get("root_path", "") + path).encode()


def one_line(value: Any) -> bytes:
    """A value as JSON that is one line for those clients too that take U+0085, U+2028 and U+2029 for line ends."""
    body = msgspec.json.encode(value)
    if not body.isascii():
        for separator, escape in _SEPARATORS.items():
            body = body.replace(separator, escape)
    return body


async def send_json(send: Send, value: Any, *, status: int = 200, headers: Headers | None = None) -> None:
    """Answer with a value as JSON, and with `headers` beside the usual ones."""
    await send_answer(send, status, [*JSON_HEADERS, *(headers or ())], msgspec.json.encode(value))


async def send_nothing(send: Send, *, headers: Headers | None = None) -> None:
    """Answer with 204: done, and nothing to say but `headers`."""
    usual = [(b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 204, "headers": [*usual, *(headers or ())]})
    await send({"type": "http.response.body"})


async def send_error(send: Send, error: RealtimeError, *, headers: Headers | None = None) -> None:
    """Answer with an error and its status, and with `headers` beside the usual ones."""
    await send_answer(send, error.status, [*error_headers(error), *(headers or ())], error_body(error))


async def send_answer(send: Send, status: int, headers: Headers, body: bytes) -> None:
    """Answer with a body that is whole."""
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


async def refuse_upgrade(send: Send, error: RealtimeError) -> None:
    """Refuse a WebSocket before its upgrade, by an HTTP status."""
    start = {"type": "websocket.http.response.start", "status": error.status, "headers": error_headers(error)}
    await send(start)
    await send({"type": "websocket.http.response.body", "body": error_body(error)})


async def read_body(receive: Receive, max_bytes: int) -> bytes:
    """The request's body. Raises `BodyTooLarge`, or `InvalidRequest` if it does not come within `BODY_TIMEOUT_S`."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise InvalidRequest("body_incomplete", "The client left within its body.")
                body += message.get("body", b"")
                if len(body) > max_bytes:
                    raise body_too_large(max_bytes)
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        raise InvalidRequest("body_timeout", "The body did not come in time.") from None


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do `work`, and cancel it the moment the client hangs up. Raises what `work` raises."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.wait([task, gone], timeout=STOP_TIMEOUT_S)  # a responder that won't stop holds up nobody
    if task.done() and not task.cancelled():
        task.result()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
