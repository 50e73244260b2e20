"""`/v1/realtime`: admits or refuses the upgrade."""

from __future__ import annotations

from starlette.types import Receive, Scope, Send

from realtime.access.admission import Admission
from realtime.access.audit import Access
from realtime.access.door import Door
from realtime.access.principal import SESSION
from realtime.access.rules import check_no_guest, check_scope
from realtime.connection import Connection, refuse
from realtime.connections import Connections
from realtime.engine import Engine
from realtime.errors import AuthenticationError, InvalidRequest, RateLimited, RealtimeError, Unavailable
from realtime.http import refuse_upgrade
from realtime.observe import logs, traces
from realtime.opening import Opening, read_opening


class RealtimeSocket:
    """The WebSocket endpoint, an ASGI application."""

    def __init__(self, engine: Engine, connections: Connections, door: Door, admission: Admission) -> None:
        self._engine = engine
        self._connections = connections
        self._door = door
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one WebSocket, from its upgrade to its end."""
        await receive()  # websocket.connect
        access = self._door.access("session.attach", scope)
        try:
            await self._answer(access, scope, receive, send)
        finally:
            access.tell()

    async def _answer(self, access: Access, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._connections.admit()
            opening = read_opening(scope)
        except (InvalidRequest, Unavailable) as error:
            access.tell(error)
            await refuse_upgrade(send, error)
            return
        access.session_id = opening.session_id
        refusal = await self._identify(access, scope, opening)
        try:
            await send({"type": "websocket.accept", "subprotocol": _selected(scope, opening)})
        except OSError:
            return  # the client was gone before it was accepted
        if refusal is not None:  # after the upgrade, so that a browser can read it
            await refuse(opening.codec, refusal, send)
            return
        traces.link(traces.named_in(scope["headers"]))
        scope["headers"] = []  # a kilobyte that nobody needs any more, for as long as the connection lasts
        allowance = self._admission.messages()
        connection = Connection(opening, access, self._door, allowance, self._engine, receive, send)
        logs.bind(connection=connection.feed.name)
        try:
            async with self._admission.connection(access.principal, connection.feed.name):
                with self._connections.holding(connection.feed):
                    await connection.run()
        except (AuthenticationError, RateLimited) as error:
            access.tell(error)
            await refuse(opening.codec, error, send)

    async def _identify(self, access: Access, scope: Scope, opening: Opening) -> RealtimeError | None:
        """Find out who it is; returns the error that refuses them."""
        try:
            access.principal = await self._door.identify(scope)
            await self._admission.request(access.principal)
            check_scope(access.principal, SESSION)
            if opening.session_id is None:
                check_no_guest(access.principal)
        except RealtimeError as error:
            access.tell(error)
            return error
        return None


def _selected(scope: Scope, opening: Opening) -> str | None:
    return opening.codec.subprotocol if scope["subprotocols"] else None
