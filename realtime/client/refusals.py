"""What the server refuses over HTTP, in the WebSocket's close codes. No I/O."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from realtime.client.events import Fields
from realtime.client.wire import LOST, OVERLOADED, Closed, Target
from realtime.protocol import CloseCode

CODE_OF_STATUS = {
    204: CloseCode.NORMAL,
    400: CloseCode.TOO_MANY_MALFORMED,
    401: CloseCode.UNAUTHENTICATED,
    403: CloseCode.FORBIDDEN,
    404: CloseCode.NOT_FOUND,
    410: CloseCode.DELETED,
    429: CloseCode.LIMITED,
}
CODE_OF_ERROR = {
    "invalid_request_error": CloseCode.TOO_MANY_MALFORMED,
    "authentication_error": CloseCode.UNAUTHENTICATED,
    "permission_error": CloseCode.FORBIDDEN,
    "not_found_error": CloseCode.NOT_FOUND,
    "rate_limit_error": CloseCode.LIMITED,
}

LONGEST_RETRY_AFTER_S = 60
"""What is on the way may say when to come back, but not keep a session away for good."""


class Refused(Closed):
    """The server has said no; `error` is what it says."""

    def __init__(self, code: int, error: Fields) -> None:
        super().__init__(code, error["code"])
        self.error = error


def error_in(body: bytes) -> Fields | None:
    """The error in an answer; `None` where it is none of the server's, but of something on the way."""
    try:
        found = msgspec.json.decode(body, type=dict[str, Fields])["error"]
    except (msgspec.DecodeError, KeyError):
        return None
    is_error = all(isinstance(found.get(name), str) for name in ("type", "code", "message"))
    return found if is_error else None


def refusal(status: int, body: bytes) -> Refused | None:
    """What the server means by an answer; `None` where it is not the server's."""
    error = error_in(body)
    return Refused(CODE_OF_STATUS.get(status, OVERLOADED), error) if error else None


def stranger(target: Target, status: int, headers: Iterable[tuple[str, str]]) -> Closed:
    """What an answer means that is not the server's, but of something on the way. No redirect is followed."""
    known = {name.lower(): value for name, value in headers}
    if 300 <= status < 400:
        place = known.get("location", "")[:200]
        return Closed(LOST, target.told(f"HTTP {status}, a redirect to {place!r}"))
    return Closed(OVERLOADED, target.told(f"HTTP {status}"), retry_after_s=_seconds(known.get("retry-after", "")))


def _seconds(retry_after: str) -> int:
    is_number = retry_after.isascii() and retry_after.isdecimal()
    return min(int(retry_after[:9]), LONGEST_RETRY_AFTER_S) if is_number else 0


def fatal_error(last: Fields) -> Fields | None:
    """The error that a connection ends with, if its last message is one."""
    error: Fields | None = last["error"] if last.get("type") == "error" else None
    return error if error and error["fatal"] else None


def end_of_stream(last: Fields) -> Closed:
    """What the end of an event stream means after its last message."""
    if last.get("type") == "session.closed":
        return Closed(CloseCode.NORMAL, last["reason"])
    error = fatal_error(last)
    if error is None:
        return Closed(LOST, "the stream ended")
    deleted = error["code"] == "session_deleted"
    return Closed(CloseCode.DELETED if deleted else CODE_OF_ERROR.get(error["type"], LOST), error["code"])
