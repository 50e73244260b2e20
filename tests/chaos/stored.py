"""What the store holds at the end, read past all instances; and what an instance says that it holds."""

from __future__ import annotations

import sys
from typing import Any

from msgspec import Struct

from realtime.log import Deltas, Entry, length
from realtime.protocol import (
    CONTROL_CHANNEL,
    SESSION_CHANNEL,
    ChannelEvent,
    ItemCreated,
    OutputTextDelta,
    ResponseCreated,
    ResponseDone,
    ResponseInProgress,
)
from realtime.store.base import Store
from tests.chaos.site import Site

ENDS = frozenset({"completed", "cancelled", "failed", "incomplete"})


class StoredResponse(Struct, kw_only=True):
    """One response. `faults` are what is wrong with its log."""

    id: str
    status: str
    text: str
    stop_reason: str | None = None
    error: str | None = None
    message: str = ""
    output_chars: int | None = None
    instance: str | None = None
    position: int = 0
    faults: list[str] = []


class StoredSession(Struct, kw_only=True):
    """One session. `for_event_ids` are the commands of its events, in order, with each event's type;
    `None` where only a log would tell."""

    position: int
    items: list[dict[str, Any]]
    responses: dict[str, StoredResponse]
    for_event_ids: list[tuple[str, str | None]] | None = None

    @property
    def is_settled(self) -> bool:
        """Whether every response has ended."""
        return all(response.status in ENDS for response in self.responses.values())


async def read_stored(store: Store, session_id: str) -> StoredSession:
    """A session as its logs are. Raises the store's errors."""
    snapshot = await store.load(session_id)
    events = await _events(store, session_id, SESSION_CHANNEL)
    created = [event.response.id for event in events if isinstance(event, ResponseCreated)]
    responses = {}
    for response_id in created:
        entries = await store.read(session_id, response_id, 0, sys.maxsize)
        head = snapshot.heads.get(response_id)
        response = _response(response_id, entries)
        if head is not None and head.finished and head.position != response.position:
            response.faults.append(f"its head is {head}, its log ends at {response.position}")
        responses[response_id] = response
    foreign = snapshot.heads.keys() - {SESSION_CHANNEL, CONTROL_CHANNEL, *created}
    return StoredSession(
        position=len(events),
        items=[_item(event) for event in events if isinstance(event, ItemCreated)],
        responses={**responses, **{name: StoredResponse(id=name, status="not created", text="") for name in foreign}},
        for_event_ids=[(type(event).__name__, event.for_event_id) for event in events],
    )


async def read_shown(site: Site, session_id: str) -> StoredSession | None:
    """A session as `GET` shows it; `None` if it is not shown."""
    answer = await site.http.get(f"{site.proxy.url}/v1/sessions/{session_id}", timeout=20)
    if answer.status_code != 200:
        return None
    body = answer.json()
    return StoredSession(
        position=body["positions"]["session"],
        items=body["items"],
        responses={response["id"]: _shown(response) for response in body["responses"]},
    )


def _shown(response: dict[str, Any]) -> StoredResponse:
    return StoredResponse(
        id=response["id"],
        status=response["status"],
        text=response["text"],
        stop_reason=response.get("stop_reason"),
        error=(response.get("error") or {}).get("code"),
        message=(response.get("error") or {}).get("message", ""),
        output_chars=response.get("output_chars"),
    )


async def _events(store: Store, session_id: str, channel: str) -> list[ChannelEvent]:
    entries = await store.read(session_id, channel, 0, sys.maxsize)
    return [entry for entry in entries if not isinstance(entry, Deltas)]


def _item(event: ItemCreated) -> dict[str, Any]:
    return {"id": event.item.id, "role": event.item.role, "content": event.item.content}


def _response(response_id: str, entries: list[Entry]) -> StoredResponse:
    texts = [
        text
        for entry in entries
        if isinstance(entry, Deltas) and isinstance(entry.template, OutputTextDelta)
        for text in entry.texts
    ]
    response = StoredResponse(id=response_id, status="in_progress", text="".join(texts), faults=[])
    response.position = sum(map(length, entries))
    ends = [entry for entry in entries if isinstance(entry, ResponseDone)]
    claims = [entry for entry in entries if isinstance(entry, ResponseInProgress)]
    if len(ends) > 1 or (ends and entries[-1] is not ends[0]):
        response.faults.append(f"{len(ends)} ends, the last entry is {type(entries[-1]).__name__}")
    if len(claims) > 1 or (claims and entries[0] is not claims[0]) or (texts and not claims):
        response.faults.append(f"{len(claims)} claims, the first entry is {type(entries[0]).__name__}")
    if claims:
        response.instance = claims[0].instance
    if ends:
        _end(response, ends[0])
    return response


def _end(response: StoredResponse, done: ResponseDone) -> None:
    response.status = done.status
    response.stop_reason = done.stop_reason
    response.error = done.error.code if done.error else None
    response.message = done.error.message if done.error else ""
    response.output_chars = done.output_chars
