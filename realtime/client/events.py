"""The server's messages as a client gets them: the protocol's structs, and what a newer server may send besides."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from realtime.protocol import (
    SESSION_CHANNEL,
    AuthExpiring,
    AuthRefreshed,
    ErrorMessage,
    ItemCreated,
    ItemTruncated,
    OutputTextDelta,
    ParticipantJoined,
    ParticipantLeft,
    Pong,
    RateLimitsUpdated,
    ReasoningDelta,
    ResponseCreated,
    ResponseDone,
    ResponseInProgress,
    SessionClosed,
    SessionCreated,
    SessionGoingAway,
    SessionResumed,
    SessionUpdated,
    TaskCreated,
    TaskDone,
    TaskOutputTextDelta,
    TaskProgress,
    TaskStarted,
)

Fields = dict[str, Any]
"""A message as it came."""


class UnknownEvent(Struct, kw_only=True, frozen=True):
    """A message of a kind, or in a form, that this client does not know."""

    type: str
    fields: Fields


ResponseEvent = ResponseCreated | ResponseInProgress | OutputTextDelta | ReasoningDelta | ResponseDone | UnknownEvent
"""What an answer's stream yields."""
TaskEvent = TaskCreated | TaskStarted | TaskProgress | TaskOutputTextDelta | TaskDone | UnknownEvent
"""What a task's stream yields."""
KnownEvent = (
    SessionCreated
    | SessionResumed
    | SessionGoingAway
    | SessionUpdated
    | SessionClosed
    | ParticipantJoined
    | ParticipantLeft
    | ItemCreated
    | ItemTruncated
    | ResponseCreated
    | ResponseInProgress
    | OutputTextDelta
    | ReasoningDelta
    | ResponseDone
    | TaskCreated
    | TaskStarted
    | TaskProgress
    | TaskOutputTextDelta
    | TaskDone
    | RateLimitsUpdated
    | AuthExpiring
    | AuthRefreshed
    | ErrorMessage
    | Pong
)
Event = KnownEvent | UnknownEvent
"""What a session yields."""


def typed(fields: Fields) -> Event:
    """A message as a struct. What a newer server says is no error."""
    try:
        event: Event = msgspec.convert(fields, KnownEvent)
    except msgspec.ValidationError:
        return UnknownEvent(type=str(fields.get("type")), fields=fields)
    return event


def channel_of(fields: Fields) -> str:
    """The channel that a message belongs to."""
    return fields.get("response_id") or fields.get("task_id") or SESSION_CHANNEL
