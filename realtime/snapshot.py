"""A session at one moment, folded from its logs: what a client without a stream reads, and may go on from."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from realtime.live import LiveSession, in_turns
from realtime.log import Deltas, Entry, length
from realtime.protocol import (
    SESSION_CHANNEL,
    Failure,
    Item,
    ItemCreated,
    ItemTruncated,
    OutputTextDelta,
    Response,
    ResponseCreated,
    ResponseDone,
    ResponseInProgress,
    ResponseStatus,
    Scalar,
    Session,
    SessionClosed,
    SessionUpdated,
    TaskCreated,
    Usage,
)
from realtime.tasks.record import TaskSnapshot, read_record

BYTES_A_TURN = 256 * 1024
_JSON = msgspec.json.Encoder()


class ResponseSnapshot(Struct, kw_only=True, frozen=True, omit_defaults=True):
    """A response as far as it has come. What is not known before its end is left out until then."""

    id: str
    status: Literal["queued", "in_progress"] | ResponseStatus
    model: str
    created_at: str
    metadata: dict[str, Scalar]
    user: str
    text: str
    stop_reason: str | None = None
    usage: Usage | None = None
    output_chars: int | None = None
    error: Failure | None = None
    heard_chars: int | None = None


class SessionSnapshot(Struct, kw_only=True, frozen=True):
    """A session; who attaches with these `positions` is sent all that is not in it, and nothing that is."""

    session: Session
    positions: dict[str, int]
    items: list[Item]
    responses: list[ResponseSnapshot]
    tasks: list[TaskSnapshot]


async def take_snapshot(live: LiveSession, describe: Callable[[LiveSession], Session]) -> SessionSnapshot:
    """The session as its logs have it. Raises `NotFound` where the store has it no more.

    Its own channel is read first, then those of the responses and tasks that it names: each may go on meanwhile, and
    its position says how far it was read.
    """
    fold = _Fold(describe(live))
    async for entry in in_turns(await live.entries(SESSION_CHANNEL)):
        fold.apply(entry)
    responses = []
    for response in fold.responses:
        entries = await live.entries(response.id)
        responses.append(_response(response, entries, fold.heard.get(response.id)))
        if not _is_done(entries):
            fold.positions[response.id] = sum(map(length, entries))
    tasks = []
    for created in fold.tasks:
        record = await read_record(live.store, live.id, created.task.id)
        tasks.append(record.snapshot(created))
        if record.done is None:
            fold.positions[created.task.id] = record.position
    return SessionSnapshot(
        session=fold.session, positions=fold.positions, items=fold.items, responses=responses, tasks=tasks
    )


async def encode_whole(snapshot: SessionSnapshot) -> bytes:
    """The snapshot as JSON. Others have their turn meanwhile: it may be as long as all that a session may hold."""
    body, turn_at = bytearray(), BYTES_A_TURN
    for name in snapshot.__struct_fields__:
        body += b"," if body else b"{"
        body += b'"%b":' % name.encode()
        value = getattr(snapshot, name)
        if not isinstance(value, list):
            _JSON.encode_into(value, body, -1)
            continue
        body += b"["
        for index, element in enumerate(value):
            if index:
                body += b","
            _JSON.encode_into(element, body, -1)
            if len(body) > turn_at:
                await asyncio.sleep(0)
                turn_at = len(body) + BYTES_A_TURN
        body += b"]"
    return bytes(body + b"}")


class _Fold:
    """The session's channel, event by event."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.positions = {SESSION_CHANNEL: 0}
        self.items: list[Item] = []
        self.responses: list[Response] = []
        self.heard: dict[str, int] = {}
        self.tasks: list[TaskCreated] = []

    def apply(self, entry: Entry) -> None:
        match entry:
            case SessionClosed():
                return  # who goes on from here is still to be told of it
            case ItemCreated(item=item):
                self.items.append(item)
            case ItemTruncated(item=truncation):
                self.heard[truncation.response_id] = truncation.heard_chars
            case ResponseCreated(response=response):
                self.responses.append(response)
            case TaskCreated():
                self.tasks.append(entry)
            case SessionUpdated(session=session):
                self.session = replace(session, expires_at=self.session.expires_at)
        self.positions[SESSION_CHANNEL] += length(entry)


def _is_done(entries: Sequence[Entry]) -> bool:
    return bool(entries) and isinstance(entries[-1], ResponseDone)


def _response(response: Response, entries: Sequence[Entry], heard_chars: int | None) -> ResponseSnapshot:
    runs = [entry for entry in entries if isinstance(entry, Deltas)]
    now = ResponseSnapshot(
        id=response.id,
        status="in_progress" if any(isinstance(entry, ResponseInProgress) for entry in entries) else response.status,
        model=response.model,
        created_at=response.created_at,
        metadata=response.metadata,
        user=response.user,
        text="".join("".join(run.texts) for run in runs if isinstance(run.template, OutputTextDelta)),
        heard_chars=heard_chars,
    )
    return _ended(now, entries[-1]) if entries else now


def _ended(response: ResponseSnapshot, last: Entry) -> ResponseSnapshot:
    if not isinstance(last, ResponseDone):
        return response
    return replace(
        response,
        status=last.status,
        stop_reason=last.stop_reason,
        usage=last.usage,
        output_chars=last.output_chars,
        error=last.error,
        heard_chars=response.heard_chars if response.heard_chars is not None else last.heard_chars,
    )
