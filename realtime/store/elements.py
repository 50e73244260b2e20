"""How entries are written where they are bytes: one element holds what was appended in one step.

A run of deltas is a list of texts without the names around them, so that a thousand deltas cost little more than their
characters; which channel they are of, the key says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from realtime.control import CancelResponse
from realtime.log import Deltas, Entry
from realtime.protocol import (
    Delta,
    ItemCreated,
    ItemTruncated,
    OutputTextDelta,
    ReasoningDelta,
    ResponseCreated,
    ResponseDone,
    ResponseInProgress,
    SessionClosed,
    SessionUpdated,
)


class _Text(Struct, tag_field="type", tag="t"):
    texts: list[str] = msgspec.field(name="x")


class _Reasoning(Struct, tag_field="type", tag="r"):
    texts: list[str] = msgspec.field(name="x")


_Event = (
    SessionUpdated
    | SessionClosed
    | ItemCreated
    | ItemTruncated
    | ResponseCreated
    | ResponseInProgress
    | ResponseDone
    | CancelResponse
)
_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(list[_Text | _Reasoning | _Event])
_RUNS: dict[type[Delta], type[_Text | _Reasoning]] = {OutputTextDelta: _Text, ReasoningDelta: _Reasoning}


def encode_entries(entries: Sequence[Entry]) -> bytes:
    """The element of what is appended in one step."""
    return _encode([_written(entry) for entry in entries])


def decode_entries(element: bytes, channel: str) -> list[Entry]:
    """The entries of an element of `channel`."""
    return [_read(part, channel) for part in _decoder.decode(element)]


def _written(entry: Entry) -> Any:
    if isinstance(entry, Deltas):
        return _RUNS[type(entry.template)](list(entry.texts))
    return entry


def _read(part: _Text | _Reasoning | _Event, channel: str) -> Entry:
    match part:
        case _Text(texts=texts):
            return Deltas(OutputTextDelta(response_id=channel, delta=""), texts)
        case _Reasoning(texts=texts):
            return Deltas(ReasoningDelta(response_id=channel, delta=""), texts)
        case _:
            return part
