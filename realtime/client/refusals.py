"""What the server refuses over HTTP, in the WebSocket's close codes. No I/O."""

from __future__ import annotations

import msgspec

from realtime.client.events import Fields
from realtime.client.wire import LOST, OVERLOADED, Closed
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
    return found if {"type", "code", "message"} <= found.keys() else None


def refusal(status: int, body: bytes) -> Refused | None:
    """What the server means by an answer; `None` where it is not the server's."""
    error = error_in(body)
    return Refused(CODE_OF_STATUS.get(status, OVERLOADED), error) if error else None


def end_of_stream(last: Fields) -> Closed:
    """What the end of an event stream means after its last message."""
    if last.get("type") == "session.closed":
        return Closed(CloseCode.NORMAL, last["reason"])
    if last.get("type") != "error" or not last["error"]["fatal"]:
        return Closed(LOST, "the stream ended")
    error = last["error"]
    deleted = error["code"] == "session_deleted"
    return Closed(CloseCode.DELETED if deleted else CODE_OF_ERROR.get(error["type"], LOST), error["code"])
