"""A client that holds the server to the protocol: it checks every event against its positions, and keeps the texts."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol, Self
from urllib.parse import urlencode

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

Event = dict[str, Any]
NO_CHANNEL = {
    "session.created",
    "session.resumed",
    "session.going_away",
    "participant.joined",
    "participant.left",
    "rate_limits.updated",
    "auth.expiring",
    "auth.refreshed",
    "error",
    "pong",
}


class Server(Protocol):
    """Something to attach to, in this process or in another."""

    @property
    def ws_url(self) -> str:
        """The WebSocket endpoint."""


class Transcript:
    """What one reader has applied of a session, over any number of connections.

    `apply` checks that positions are contiguous, that channels are created before they speak, that nothing comes after
    an end, that a task's attempts count up, and that within one its progress never goes backwards.
    """

    def __init__(self) -> None:
        self.positions: dict[str, int] = {"session": 0}
        self.texts: dict[str, str] = defaultdict(str)
        self.reasonings: dict[str, str] = defaultdict(str)
        self.done: dict[str, Event] = {}
        self.attempts: dict[str, int] = {}
        self.progress: dict[str, float] = {}
        """Of each task, in its newest attempt."""
        self.items: list[Event] = []
        self.events: list[Event] = []

    def apply(self, event: Event) -> None:
        """Take one event as a client has to."""
        self.events.append(event)
        if event["type"] in NO_CHANNEL:
            assert "seq" not in event, event
            return
        channel = event.get("response_id") or event.get("task_id") or "session"
        assert channel not in self.done, f"an event after the end: {event}"
        assert channel in self.positions, f"an event of a channel that was not created: {event}"
        if event.get("reset"):
            self.positions[channel] = 0
            self.texts[channel] = self.reasonings[channel] = ""
        assert event["seq"] - event.get("merged", 1) == self.positions[channel], (self.positions, event)
        self.positions[channel] = event["seq"]
        self._fold(channel, event)

    def after(self) -> str:
        """The positions, in the form of the query parameter."""
        return ",".join(f"{channel}:{position}" for channel, position in self.positions.items())

    def _fold(self, channel: str, event: Event) -> None:
        match event["type"]:
            case "response.created":
                self.positions.setdefault(event["response"]["id"], 0)
            case "response.output_text.delta":
                self.texts[channel] += event["delta"]
            case "response.reasoning.delta":
                self.reasonings[channel] += event["delta"]
            case "response.done" | "task.done":
                self.done[channel] = event
                del self.positions[channel]
            case "task.created":
                self.positions.setdefault(event["task"]["id"], 0)
            case "task.started":
                assert event["attempt"] > self.attempts.get(channel, 0), event
                self.attempts[channel] = event["attempt"]
                self.texts[channel] = ""
                self.progress.pop(channel, None)
            case "task.progress":
                assert event["attempt"] == self.attempts[channel], event
                assert event["progress"] >= self.progress.get(channel, event["progress"]), event
                self.progress[channel] = event["progress"]
            case "task.output_text.delta":
                assert event["attempt"] == self.attempts[channel], event
                self.texts[channel] += event["delta"]
            case "conversation.item.created":
                self.items.append(event["item"])
            case _:
                pass


class Client:
    """One connection of a reader. Everything that is received goes through its `transcript`."""

    def __init__(self, socket: ClientConnection, transcript: Transcript) -> None:
        self.socket = socket
        self.transcript = transcript
        self.first: Event = {}

    @property
    def session_id(self) -> str:
        """The session that this connection is attached to."""
        return str(self.first["session"]["id"])

    async def start(self, *, adopt: bool = False) -> Self:
        """Receive the first frame; `adopt` its positions, as a client that asked for no history does."""
        self.first = await self.receive()
        assert self.first["type"] in {"session.created", "session.resumed"}, self.first
        if adopt:
            self.transcript.positions = dict(self.first["positions"])
        return self

    async def send(self, kind: str, **fields: Any) -> None:
        """Send one message."""
        await self.send_raw({"type": kind, **fields})

    async def send_raw(self, message: Any) -> None:
        """Send a value as one frame, in the subprotocol's encoding."""
        if self.socket.subprotocol == "realtime.v1.msgpack":
            await self.socket.send(msgspec.msgpack.encode(message))
        else:
            await self.socket.send(json.dumps(message))

    async def receive(self) -> Event:
        """The next frame, decoded and applied."""
        frame = await self.socket.recv()
        assert len(frame if isinstance(frame, bytes) else frame.encode()) <= 256 * 1024
        event: Event = msgspec.msgpack.decode(frame) if isinstance(frame, bytes) else json.loads(frame)
        self.transcript.apply(event)
        return event

    async def until(self, kind: str, **fields: Any) -> Event:
        """Receive until an event of that type with those top-level fields; returns it."""
        while True:
            event = await self.receive()
            if event["type"] == kind and all(event.get(name) == value for name, value in fields.items()):
                return event

    async def respond(self, text: str = "go", **fields: Any) -> str:
        """Start a response and wait until it is created; returns its id."""
        await self.send("response.create", input=text, **fields)
        return str((await self.until("response.created"))["response"]["id"])

    async def answer(self, text: str = "go", **fields: Any) -> str:
        """Start a response and wait for its end; returns its text."""
        response_id = await self.respond(text, **fields)
        await self.until("response.done", response_id=response_id)
        return self.transcript.texts[response_id]

    async def until_closed(self) -> int:
        """Receive until the server closes; returns the close code."""
        with suppress(ConnectionClosed):
            while True:
                await self.receive()
        assert self.socket.close_code is not None
        return self.socket.close_code

    def reset(self) -> None:
        """Cut the connection with a TCP reset."""
        self.socket.transport.abort()


@asynccontextmanager
async def attached(
    server: Server,
    session_id: str | None = None,
    *,
    transcript: Transcript | None = None,
    subprotocol: str = "realtime.v1",
    headers: Mapping[str, str] | None = None,
    bearer: str | None = None,
    **query: Any,
) -> AsyncIterator[Client]:
    """A client that is attached: to a new session, or to `session_id`, by the token `bearer` if there is one. `query`
    are more query parameters, and `headers` come with the upgrade."""
    url = server.ws_url + "?" + urlencode({**({"session_id": session_id} if session_id else {}), **query})
    sent = {**(headers or {}), **({"Authorization": f"Bearer {bearer}"} if bearer else {})}
    socket = await connect(
        url,
        subprotocols=[Subprotocol(subprotocol)],
        additional_headers=sent,
        compression=None,
        max_size=None,
        max_queue=None,
        proxy=None,
    )
    try:
        client = Client(socket, transcript or Transcript())
        yield await client.start(adopt=query.get("history") == "none")
    finally:
        async with asyncio.timeout(20):
            await socket.close()
