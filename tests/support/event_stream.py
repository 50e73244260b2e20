"""A client of a session's events over HTTP, which holds the server to the protocol as the one over WebSocket does."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import httpx
from httpx_sse import EventSource, ServerSentEvent

from realtime.connections import Connections
from realtime.log import parse_positions
from tests.support.client import Event, Transcript
from tests.support.server import RunningServer


class StreamClient:
    """One stream of a reader, parsed by `httpx-sse`. Everything that is received goes through its `transcript`."""

    def __init__(self, events: AsyncGenerator[ServerSentEvent, None], transcript: Transcript) -> None:
        self.transcript = transcript
        self.first: Event = {}
        self.last_event_id = ""
        self.retries: list[int] = []
        """What `retry:` has said so far, in milliseconds."""
        self._events = events

    @property
    def session_id(self) -> str:
        """The session whose events these are."""
        return str(self.first["session"]["id"])

    async def start(self, *, adopt: bool = False) -> None:
        """Receive the first event; `adopt` its positions, as a client that asked for no history does."""
        self.first = await self.receive(adopt=adopt)
        assert self.first["type"] == "session.resumed", self.first

    async def receive(self, *, adopt: bool = False) -> Event:
        """The next event, applied; raises `StopAsyncIteration` at the stream's end."""
        told = await anext(self._events)
        event: Event = json.loads(told.data)
        assert told.event == ("server_error" if event["type"] == "error" else event["type"])
        if adopt:
            self.transcript.positions = dict(event["positions"])
        self.transcript.apply(event)
        assert parse_positions(told.id) == self.transcript.positions, (told.id, event)
        self.last_event_id = told.id
        if told.retry is not None:
            self.retries.append(told.retry)
        return event

    async def until(self, kind: str, **fields: Any) -> Event:
        """Receive until an event of that type with those top-level fields; returns it."""
        while True:
            event = await self.receive()
            if event["type"] == kind and all(event.get(name) == value for name, value in fields.items()):
                return event

    async def until_end(self) -> None:
        """Receive until the server has ended the stream."""
        async for _ in self:
            pass

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            try:
                event = await self.receive()
            except StopAsyncIteration:
                return
            yield event


def events_url(server: RunningServer, session_id: str) -> str:
    """Where a session's events are."""
    return f"{server.url}/v1/sessions/{session_id}/events"


def connections_of(server: RunningServer) -> Connections:
    """The open connections of a server."""
    assert server.connections is not None
    return server.connections


@asynccontextmanager
async def http_client(*, base_url: str = "") -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client that waits for a while, and asks no proxy."""
    async with httpx.AsyncClient(base_url=base_url, trust_env=False, timeout=20) as client:
        yield client


@asynccontextmanager
async def streaming(
    url: str,
    *,
    transcript: Transcript | None = None,
    last_event_id: str | None = None,
    headers: Any = None,
    **query: Any,
) -> AsyncIterator[StreamClient]:
    """A client that is attached to the session whose events are at `url`, and has its first event."""
    headers = {**(headers or {}), "Accept": "text/event-stream"}
    headers |= {"Last-Event-ID": last_event_id} if last_event_id else {}
    async with http_client() as client, client.stream("GET", url, headers=headers, params=query) as response:
        assert response.status_code == 200, await response.aread()
        async with aclosing(EventSource(response).aiter_sse()) as events:
            stream = StreamClient(events, transcript or Transcript())
            await stream.start(adopt=query.get("history") == "none" and not last_event_id)
            yield stream
