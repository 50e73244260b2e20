"""A session's messages and commands over one WebSocket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.typing import Subprotocol

from realtime.client.events import Fields
from realtime.client.refusals import fatal_error, refusal, stranger
from realtime.client.wire import LOST, OPEN_S, Closed, NotOpened, Target, message
from realtime.protocol import JSON

REFUSALS = frozenset({400, 403, 503})
"""By which the server refuses an upgrade."""
FAILURES = (OSError, WebSocketException, ValueError, ImportError)
"""Of opening one: the network's, and those of a proxy that is none, or of a kind that takes another package."""


class WebSocketWire:
    """The open connection, and its first message."""

    acknowledges = False

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._last: Fields = {}

    async def receive(self) -> Fields:
        """The next message. Raises `Closed`."""
        try:
            self._last = message(await self._socket.recv(decode=False))
        except ConnectionClosed as error:
            raise self._closed(error) from None
        return self._last

    async def events(self) -> AsyncIterator[Fields]:
        """See `Wire`."""
        yield self._last
        while True:
            yield await self.receive()

    async def send(self, command: Fields) -> None:
        """See `Wire`."""
        try:
            await self._socket.send(msgspec.json.encode(command).decode())
        except ConnectionClosed as error:
            raise self._closed(error) from None

    def _closed(self, error: ConnectionClosed) -> Closed:
        if error.rcvd is None:
            return Closed(LOST, "lost")
        told = fatal_error(self._last)
        return Closed(error.rcvd.code, error.rcvd.reason or (told["code"] if told else ""))


@asynccontextmanager
async def websocket(target: Target) -> AsyncIterator[WebSocketWire]:
    """A WebSocket that is open: its first message is here, as there are networks that let the upgrade pass and nothing
    after it. Raises `NotOpened`, or `Closed` where the server itself refuses."""
    until = asyncio.get_running_loop().time() + OPEN_S
    socket = await _upgraded(target)
    try:
        wire = WebSocketWire(socket)
        await _begin(wire, target, until)
        yield wire
    finally:
        await socket.close()


async def _begin(wire: WebSocketWire, target: Target, until: float) -> None:
    try:
        async with asyncio.timeout_at(until):
            await wire.receive()
    except TimeoutError:
        raise NotOpened(LOST, target.told("nothing came")) from None
    except Closed as closed:
        if closed.code != LOST:
            raise
        raise NotOpened(LOST, target.told(closed.reason)) from None


class _Connect(connect):
    """Follows no redirect: the server makes none."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


async def _upgraded(target: Target) -> ClientConnection:
    try:
        return await _Connect(
            target.websocket(),
            subprotocols=[Subprotocol(JSON.subprotocol)],
            additional_headers=target.headers,
            compression=None,
            max_size=None,
            proxy=target.proxy,
            open_timeout=OPEN_S,
            close_timeout=1.0,
        )
    except InvalidStatus as error:
        raise _refusal(error, target) from None
    except FAILURES as error:  # TimeoutError among them
        raise NotOpened(LOST, target.told(str(error))) from None


def _refusal(error: InvalidStatus, target: Target) -> Closed:
    """What the server refuses an upgrade for; `NotOpened` where it has not seen one, or this is not its answer."""
    answer = error.response
    refused = refusal(answer.status_code, bytes(answer.body or b"")) if answer.status_code in REFUSALS else None
    if refused is not None:
        return refused
    closed = stranger(target, answer.status_code, answer.headers.raw_items())
    return NotOpened(LOST, closed.reason, retry_after_s=closed.retry_after_s)
