"""What a client asks for when it connects: read from the upgrade request, or refused before it."""

from __future__ import annotations

from urllib.parse import parse_qs

from msgspec import Struct
from starlette.types import Scope

from realtime.errors import InvalidRequest
from realtime.log import parse_positions
from realtime.protocol import CODECS, JSON, Codec

MAX_DELTA_INTERVAL_MS = 1000


class Opening(Struct, frozen=True):
    """How a connection begins. `after` is what the client has, and has precedence over `history`."""

    codec: Codec
    session_id: str | None = None
    after: dict[str, int] | None = None
    history: bool = True
    delta_interval_s: float = 0.0


def read_opening(scope: Scope) -> Opening:
    """The opening that a WebSocket's ASGI scope asks for. Raises `InvalidRequest`."""
    query = _query(scope)
    after = query.get("after")
    session_id = query.get("session_id")
    if session_id == "":
        raise InvalidRequest("invalid_query", "session_id is empty.", param="session_id")
    history = query.get("history", "all")
    if history not in {"all", "none"}:
        raise InvalidRequest("invalid_query", "history is all or none.", param="history")
    positions = parse_positions(after) if after is not None else None
    return Opening(
        codec=_codec(scope["subprotocols"]),
        session_id=session_id,
        after=positions if session_id else None,
        history=history == "all" or positions is not None,
        delta_interval_s=_interval_ms(query.get("delta_interval_ms", "0")) / 1000,
    )


def _query(scope: Scope) -> dict[str, str]:
    try:
        pairs = parse_qs(
            scope["query_string"].decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=100
        )
    except ValueError:
        raise InvalidRequest("invalid_query", "The query can't be read.") from None
    return {name: values[-1] for name, values in pairs.items()}


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
