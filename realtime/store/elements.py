"""How entries are written where they are bytes: one element holds what was appended in one step.

A run of deltas is a list of texts without the names around them, so that a thousand deltas cost little more than their
characters; which channel they are of, the key says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from realtime.control import CancelResponse, CancelTask
from realtime.log import Deltas, Entry
from realtime.protocol import (
    ItemCreated,
    ItemTruncated,
    OutputTextDelta,
    ReasoningDelta,
    ResponseCreated,
    ResponseDone,
    ResponseInProgress,
    SessionClosed,
    SessionUpdated,
    TaskCreated,
    TaskDone,
    TaskOutputTextDelta,
    TaskProgress,
    TaskStarted,
)


class _Text(Struct, tag_field="type", tag="t"):
    texts: list[str] = msgspec.field(name="x")


class _Reasoning(Struct, tag_field="type", tag="r"):
    texts: list[str] = msgspec.field(name="x")


class _TaskText(Struct, tag_field="type", tag="o"):
    texts: list[str] = msgspec.field(name="x")
    attempt: int = msgspec.field(name="a")


_Event = (
    SessionUpdated
    | SessionClosed
    | ItemCreated
    | ItemTruncated
    | ResponseCreated
    | ResponseInProgress
    | ResponseDone
    | TaskCreated
    | TaskStarted
    | TaskProgress
    | TaskDone
    | CancelResponse
    | CancelTask
)
_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(list[_Text | _Reasoning | _TaskText | _Event])


def encode_entries(entries: Sequence[Entry]) -> bytes:
    """The element of what is appended in one step."""
    return _encode([_written(entry) for entry in entries])


def decode_entries(element: bytes, channel: str) -> list[Entry]:
    """The entries of an element of `channel`."""
    return [_read(part, channel) for part in _decoder.decode(element)]


def _written(entry: Entry) -> Any:
    if not isinstance(entry, Deltas):
        return entry
    match entry.template:
        case OutputTextDelta():
            return _Text(list(entry.texts))
        case ReasoningDelta():
            return _Reasoning(list(entry.texts))
        case TaskOutputTextDelta(attempt=attempt):
            return _TaskText(list(entry.texts), attempt)


def _read(part: _Text | _Reasoning | _TaskText | _Event, channel: str) -> Entry:
    match part:
        case _Text(texts=texts):
            return Deltas(OutputTextDelta(response_id=channel, delta=""), texts)
        case _Reasoning(texts=texts):
            return Deltas(ReasoningDelta(response_id=channel, delta=""), texts)
        case _TaskText(texts=texts, attempt=attempt):
            return Deltas(TaskOutputTextDelta(task_id=channel, attempt=attempt, delta=""), texts)
        case _:
            return part
