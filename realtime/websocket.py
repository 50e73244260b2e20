"""`/v1/realtime`: admits or refuses the upgrade, and watches over the connections of this process."""

from __future__ import annotations

import asyncio
import random

from starlette.types import Receive, Scope, Send

from realtime.connection import Closing, Connection
from realtime.engine import Engine
from realtime.errors import InvalidRequest, Unavailable
from realtime.http import refuse_upgrade
from realtime.observe import logs
from realtime.opening import Opening, read_opening
from realtime.protocol import CloseCode, SessionGoingAway

ANONYMOUS = "anonymous"
LOOKS_PER_TIMEOUT = 10
MAX_LOOK_S = 1.0
MAX_RETURN_S = 2.0
"""Over how long the clients of an instance that ends are spread when they come back."""


class RealtimeSocket:
    """The WebSocket endpoint, an ASGI application. `watch` has to run beside it."""

    def __init__(self, engine: Engine, *, max_connections: int, send_timeout_s: float) -> None:
        self._engine = engine
        self._max_connections = max_connections
        self._send_timeout_s = send_timeout_s
        self._connections: set[Connection] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one WebSocket, from its upgrade to its end."""
        await receive()  # websocket.connect
        try:
            opening = self._admit(scope)
        except (InvalidRequest, Unavailable) as error:
            await refuse_upgrade(send, error)
            return
        connection = Connection(opening, ANONYMOUS, self._engine, receive, send)
        self._connections.add(connection)
        try:
            await send({"type": "websocket.accept", "subprotocol": _selected(scope, opening)})
            scope["headers"] = []  # a kilobyte that nobody needs any more, for as long as the connection lasts
            await connection.run()
        except OSError:
            return  # the client was gone before it was accepted
        finally:
            self._connections.discard(connection)

    async def watch(self) -> None:
        """Drop, for ever, the connections whose clients have taken nothing for the send timeout."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(MAX_LOOK_S, self._send_timeout_s / LOOKS_PER_TIMEOUT))
            stalled_since = loop.time() - self._send_timeout_s
            for connection in [one for one in self._connections if one.sending_since <= stalled_since]:
                logs.info("slow reader dropped", connection=connection.participant.connection_id)
                connection.drop(Closing(CloseCode.SLOW_READER, by_server=True))

    def say_goodbye(self, time_left_s: float) -> None:
        """Tell every client that this instance ends, and to come back at a time of its own: not all at once."""
        for connection in self._connections:
            after_ms = round((time_left_s + random.uniform(0, MAX_RETURN_S)) * 1000)
            connection.tell(
                SessionGoingAway(reason="shutdown", time_left_ms=round(time_left_s * 1000), reconnect_after_ms=after_ms)
            )

    def _admit(self, scope: Scope) -> Opening:
        if len(self._connections) >= self._max_connections:
            raise Unavailable("too_many_connections", "This instance is full.", retry_after_ms=1000)
        return read_opening(scope)


def _selected(scope: Scope, opening: Opening) -> str | None:
    return opening.codec.subprotocol if scope["subprotocols"] else None
