"""The suites that every implementation of an interface passes, and the small events that they are told with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from realtime.log import Deltas, Entry
from realtime.protocol import (
    ChannelEvent,
    Item,
    ItemCreated,
    OutputTextDelta,
    Overrides,
    Participant,
    Response,
    ResponseCreated,
    ResponseDone,
    ResponseInProgress,
    Session,
    SessionClosed,
    Usage,
)

NOW = "2026-01-01T00:00:00.000000Z"


def session(session_id: str = "sess_1", **settings: Any) -> Session:
    """A session of user `ann`'s, with the defaults that a server would give it."""
    plain = Session(
        id=session_id,
        owner="ann",
        created_at=NOW,
        expires_at="",
        instructions="",
        model="m",
        max_output_tokens=1000,
        on_disconnect="cancel",
        disconnect_grace_ms=0,
        multitask_strategy="reject",
    )
    return msgspec.structs.replace(plain, **settings)


def participant(connection_id: str, user: str = "ann") -> Participant:
    """A connection that looks at a session."""
    return Participant(user=user, connection_id=connection_id, since=NOW)


def item(text: str, item_id: str = "item_1") -> ItemCreated:
    """The conversation gets a user item."""
    return ItemCreated(item=Item(id=item_id, role="user", content=text, user="ann", created_at=NOW))


def created(response_id: str, overrides: Overrides | None = None) -> ResponseCreated:
    """A response is accepted."""
    response = Response(id=response_id, status="in_progress", model="m", created_at=NOW, metadata={}, user="ann")
    return ResponseCreated(response=response, overrides=overrides)


def begun(response_id: str, instance: str | None = None) -> ResponseInProgress:
    """A response runs, on an instance."""
    return ResponseInProgress(response_id=response_id, instance=instance)


def spoken(response_id: str, *texts: str) -> Deltas:
    """A response says something, a delta each."""
    return Deltas(OutputTextDelta(response_id=response_id, delta=""), list(texts))


def done(response_id: str) -> ResponseDone:
    """A response ends."""
    usage = Usage(input_tokens=1, output_tokens=1, total_tokens=2, estimated=True)
    return ResponseDone(
        response_id=response_id, status="completed", stop_reason="end_turn", usage=usage, output_chars=0
    )


def closed() -> SessionClosed:
    """The session is over."""
    return SessionClosed(reason="closed by client")


def flat(entries: Iterable[Entry]) -> list[ChannelEvent]:
    """Entries as one event a position, however they were grouped."""
    events: list[ChannelEvent] = []
    for entry in entries:
        if isinstance(entry, Deltas):
            events += [msgspec.structs.replace(entry.template, delta=text) for text in entry.texts]
        else:
            events.append(entry)
    return events
