"""What a client asks for when it connects: read from its request, or refused before anything is sent."""

from __future__ import annotations

from urllib.parse import parse_qs

from msgspec import Struct
from starlette.types import Scope

from realtime.errors import InvalidRequest
from realtime.log import parse_positions
from realtime.protocol import CODECS, JSON, Codec

MAX_DELTA_INTERVAL_MS = 1000


class Opening(Struct, frozen=True):
    """How a connection begins. `after` is what the client has, and has precedence over `history`.

    `comes_back` says that an `EventSource` has lost its connection: it will come back again, unless told not to.
    """

    codec: Codec
    session_id: str | None = None
    after: dict[str, int] | None = None
    history: bool = True
    delta_interval_s: float = 0.0
    comes_back: bool = False


def read_opening(scope: Scope) -> Opening:
    """The opening that a WebSocket's ASGI scope asks for. Raises `InvalidRequest`."""
    query = _query(scope)
    session_id = query.get("session_id")
    if session_id == "":
        raise InvalidRequest("invalid_query", "session_id is empty.", param="session_id")
    after = _after(query)
    codec = _codec(scope["subprotocols"])
    return _opening(query, codec=codec, session_id=session_id, after=after, comes_back=False)


def read_stream_opening(scope: Scope, session_id: str) -> Opening:
    """The opening that a request for a session's events asks for, whose `Last-Event-ID` wins over its query.

    Raises `InvalidRequest`.
    """
    query = _query(scope)
    last = dict(scope["headers"]).get(b"last-event-id")  # empty: an EventSource that has seen nothing yet
    after = _positions(last.decode("latin-1"), "Last-Event-ID") if last else _after(query)
    return _opening(query, codec=JSON, session_id=session_id, after=after, comes_back=bool(last))


def _opening(
    query: dict[str, str], *, codec: Codec, session_id: str | None, after: dict[str, int] | None, comes_back: bool
) -> Opening:
    history = query.get("history", "all")
    if history not in {"all", "none"}:
        raise InvalidRequest("invalid_query", "history is all or none.", param="history")
    return Opening(
        codec=codec,
        session_id=session_id,
        after=after if session_id else None,
        history=history == "all" or after is not None,
        delta_interval_s=_interval_ms(query.get("delta_interval_ms", "0")) / 1000,
        comes_back=comes_back,
    )


def _query(scope: Scope) -> dict[str, str]:
    try:
        pairs = parse_qs(
            scope["query_string"].decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=100
        )
    except ValueError:
        raise InvalidRequest("invalid_query", "The query can't be read.") from None
    return {name: values[-1] for name, values in pairs.items()}


def _after(query: dict[str, str]) -> dict[str, int] | None:
    after = query.get("after")
    return _positions(after, "after") if after is not None else None


def _positions(text: str, param: str) -> dict[str, int]:
    try:
        return parse_positions(text)
    except InvalidRequest as error:
        raise InvalidRequest("invalid_positions", error.message, param=param) from None


def _codec(offered: list[str]) -> Codec:
    """The first of our subprotocols that is offered, JSON where none at all is."""
    for name in offered:
        if name in CODECS:
            return CODECS[name]
    if offered:
        expected = " or ".join(CODECS)
        raise InvalidRequest("unknown_subprotocol", f"Offer {expected} as a subprotocol, or none at all.")
    return JSON


def _interval_ms(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and int(text) <= MAX_DELTA_INTERVAL_MS):
        allowed = f"delta_interval_ms is a number from 0 to {MAX_DELTA_INTERVAL_MS}."
        raise InvalidRequest("invalid_query", allowed, param="delta_interval_ms")
    return int(text)
