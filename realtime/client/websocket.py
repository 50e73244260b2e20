"""A session's messages and commands over one WebSocket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.typing import Subprotocol

from realtime.client.events import Fields
from realtime.client.refusals import Refused, refusal
from realtime.client.wire import LOST, OPEN_S, Closed, NotOpened, Target
from realtime.protocol import JSON

REFUSALS = frozenset({400, 403, 503})
"""By which the server refuses an upgrade."""


class WebSocketWire:
    """The open connection."""

    acknowledges = False

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket

    async def events(self) -> AsyncIterator[Fields]:
        """See `Wire`."""
        while True:
            try:
                frame = await self._socket.recv()
            except ConnectionClosed as error:
                raise _closed(error) from None
            yield msgspec.json.decode(frame)

    async def send(self, command: Fields) -> None:
        """See `Wire`."""
        try:
            await self._socket.send(msgspec.json.encode(command).decode())
        except ConnectionClosed as error:
            raise _closed(error) from None


@asynccontextmanager
async def websocket(target: Target) -> AsyncIterator[WebSocketWire]:
    """A WebSocket that is open. Raises `NotOpened`, or `Closed` where the server itself refuses the upgrade."""
    socket = await _opened(target)
    try:
        yield WebSocketWire(socket)
    finally:
        await socket.close()


async def _opened(target: Target) -> ClientConnection:
    try:
        return await connect(
            target.websocket(),
            subprotocols=[Subprotocol(JSON.subprotocol)],
            additional_headers=target.headers,
            compression=None,
            max_size=None,
            open_timeout=OPEN_S,
            close_timeout=1.0,
        )
    except InvalidStatus as error:
        raise _refusal(error) or NotOpened(LOST, str(error)) from None
    except (OSError, InvalidHandshake) as error:  # TimeoutError among them
        raise NotOpened(LOST, str(error)) from None


def _refusal(error: InvalidStatus) -> Refused | None:
    """What the server refuses an upgrade for; `None` where it has not seen one, or it is not the server's answer."""
    answer = error.response
    return refusal(answer.status_code, bytes(answer.body or b"")) if answer.status_code in REFUSALS else None


def _closed(error: ConnectionClosed) -> Closed:
    return Closed(error.rcvd.code, error.rcvd.reason) if error.rcvd else Closed(LOST, "lost")
