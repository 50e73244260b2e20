"""`/v1/realtime`: admits or refuses the upgrade."""

from __future__ import annotations

from starlette.types import Receive, Scope, Send

from realtime.connection import Connection
from realtime.connections import Connections
from realtime.engine import Engine
from realtime.errors import InvalidRequest, Unavailable
from realtime.http import refuse_upgrade
from realtime.opening import ANONYMOUS, Opening, read_opening


class RealtimeSocket:
    """The WebSocket endpoint, an ASGI application."""

    def __init__(self, engine: Engine, connections: Connections) -> None:
        self._engine = engine
        self._connections = connections

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one WebSocket, from its upgrade to its end."""
        await receive()  # websocket.connect
        try:
            self._connections.admit()
            opening = read_opening(scope)
        except (InvalidRequest, Unavailable) as error:
            await refuse_upgrade(send, error)
            return
        connection = Connection(opening, ANONYMOUS, self._engine, receive, send)
        with self._connections.holding(connection.feed):
            try:
                await send({"type": "websocket.accept", "subprotocol": _selected(scope, opening)})
            except OSError:
                return  # the client was gone before it was accepted
            scope["headers"] = []  # a kilobyte that nobody needs any more, for as long as the connection lasts
            await connection.run()


def _selected(scope: Scope, opening: Opening) -> str | None:
    return opening.codec.subprotocol if scope["subprotocols"] else None
