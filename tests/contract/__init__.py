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
    TaskCreated,
    TaskDone,
    TaskOutputTextDelta,
    TaskProgress,
    TaskStarted,
    Usage,
)
from realtime.session import task_created

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


def task_made(task_id: str, name: str = "work", task_input: str = "{}") -> TaskCreated:
    """A task is accepted."""
    return task_created(task_id, name, task_input, user="ann", payer=None, now=NOW)


def task_begun(task_id: str, attempt: int = 1, instance: str | None = None) -> TaskStarted:
    """An attempt at a task runs, on an instance."""
    return TaskStarted(task_id=task_id, attempt=attempt, instance=instance, at=NOW)


def task_told(task_id: str, progress: int, attempt: int = 1) -> TaskProgress:
    """It is so far."""
    return TaskProgress(task_id=task_id, attempt=attempt, progress=progress, total=None, message=None, at=NOW)


def task_wrote(task_id: str, *texts: str, attempt: int = 1) -> Deltas:
    """It writes something, a delta each."""
    return Deltas(TaskOutputTextDelta(task_id=task_id, attempt=attempt, delta=""), list(texts))


def task_done(task_id: str) -> TaskDone:
    """It ends."""
    return TaskDone(task_id=task_id, status="complete", result_json="null", at=NOW)


def flat(entries: Iterable[Entry]) -> list[ChannelEvent]:
    """Entries as one event a position, however they were grouped."""
    events: list[ChannelEvent] = []
    for entry in entries:
        if isinstance(entry, Deltas):
            events += [msgspec.structs.replace(entry.template, delta=text) for text in entry.texts]
        else:
            events.append(entry)
    return events
