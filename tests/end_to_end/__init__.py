"""The real server and real clients; the model is the test itself."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlencode

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from realtime.responders.base import Request, ResponderEvent
from tests.support.client import Client, Event
from tests.support.server import RunningServer

ERROR_TYPES = {
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "not_found_error",
    "conflict_error",
    "rate_limit_error",
    "budget_error",
    "upstream_error",
    "store_error",
    "server_error",
}
PATIENCE_S = 14.0
"""How long what has to come may take, so that what never comes fails its own test, also on a busy machine.

Below the floors of 15 s after which a response that nobody looks at ends by itself."""
_numbers = itertools.count()


class Turn:
    """One answer that the test gives, piece by piece. `closed` is set once the server has let go of the model."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.closed = asyncio.Event()
        self._pieces: asyncio.Queue[ResponderEvent | Exception | None] = asyncio.Queue()

    @property
    def conversation(self) -> list[tuple[str, str]]:
        """What the model was asked to answer, as pairs of role and content."""
        return [(message.role, message.content) for message in self.request.messages]

    def say(self, *pieces: ResponderEvent) -> None:
        """Have the model say these, all at once."""
        for piece in pieces:
            self._pieces.put_nowait(piece)

    def end(self, *pieces: ResponderEvent) -> None:
        """Have it say these and return."""
        self.say(*pieces)
        self._pieces.put_nowait(None)

    def fail(self, error: Exception) -> None:
        """Have it raise."""
        self._pieces.put_nowait(error)

    async def pieces(self) -> AsyncIterator[ResponderEvent]:
        """The responder's side."""
        try:
            while (piece := await self._pieces.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            self.closed.set()


class Model:
    """A responder whose every answer waits for the test: `turn()` is the next one that was asked for."""

    def __init__(self) -> None:
        self.calls = 0
        self._turns: asyncio.Queue[Turn] = asyncio.Queue()

    def __call__(self, request: Request) -> AsyncIterator[ResponderEvent]:
        turn = Turn(request)
        self.calls += 1
        self._turns.put_nowait(turn)
        return turn.pieces()

    async def turn(self) -> Turn:
        """The next answer that was asked for; waits for it."""
        async with asyncio.timeout(PATIENCE_S):
            return await self._turns.get()


async def echo(request: Request) -> AsyncIterator[ResponderEvent]:
    """A responder that says back what it was told last, in two pieces."""
    said = request.messages[-1].content
    middle = len(said) // 2
    yield said[:middle]
    yield said[middle:]


async def settled(client: Client) -> None:
    """Return once all that this connection sent before was carried out: commands keep their order."""
    marker = f"settled-{next(_numbers)}"
    await client.send("session.update", session={}, event_id=marker)
    async with asyncio.timeout(PATIENCE_S):
        await client.until("session.updated", for_event_id=marker)


async def refused(client: Client, kind: str, **fields: Any) -> Event:
    """Send what has to be refused; returns the error, after seeing that the connection lives on."""
    async with asyncio.timeout(PATIENCE_S):
        await client.send(kind, **fields)
        error: Event = (await client.until("error"))["error"]
        assert error["type"] in ERROR_TYPES
        assert error["fatal"] is False
        assert error["message"]
        assert error.get("event_id") == fields.get("event_id")
        await client.send("ping", event_id="lives-on")
        await client.until("pong", event_id="lives-on")
    return error


def events_of(client: Client, kind: str) -> list[Event]:
    """Every event of that type that the client has received."""
    return [event for event in client.transcript.events if event["type"] == kind]


async def until_closed(client: Client) -> int:
    """Receive until the server closes, whatever the code; returns it."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                await client.receive()
    except ConnectionClosed:
        assert client.socket.close_code is not None
        return client.socket.close_code


async def frames_until_closed(socket: ClientConnection) -> list[Event]:
    """Everything that the server sends until it closes, which has to be soon. For JSON."""
    frames: list[Event] = []
    try:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                frames.append(json.loads(await socket.recv()))
    except ConnectionClosed:
        return frames


@asynccontextmanager
async def dialled(
    server: RunningServer, query: dict[str, Any] | str = "", *, subprotocols: tuple[str, ...] = (), **options: Any
) -> AsyncIterator[ClientConnection]:
    """A WebSocket as it comes: nothing is received yet. `subprotocols` are offered as they are."""
    text = query if isinstance(query, str) else urlencode(query)
    offered = [Subprotocol(name) for name in subprotocols] or None
    socket = await connect(
        f"{server.ws_url}?{text}",
        subprotocols=offered,
        compression=None,
        proxy=None,
        max_size=None,
        max_queue=None,
        **options,
    )
    try:
        yield socket
    finally:
        async with asyncio.timeout(PATIENCE_S):
            await socket.close()
