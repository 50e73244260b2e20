"""`/v1/sessions`: sessions for clients that have no WebSocket."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

import msgspec
from msgspec import Struct
from starlette.types import Receive, Scope, Send

from realtime.connections import Connections
from realtime.decoding import decode, invalid
from realtime.engine import Engine
from realtime.errors import InvalidRequest, RealtimeError, session_not_found
from realtime.http import read_body, send_error, send_json, send_nothing
from realtime.opening import ANONYMOUS, read_stream_opening
from realtime.protocol import JSON, Command, Overrides, Ping, is_task_id, new_id
from realtime.snapshot import take_snapshot
from realtime.sse import EventStream

MAX_KEY_CHARS = 64
"""As long as an `event_id` may be."""


class Accepted(Struct, kw_only=True, frozen=True, omit_defaults=True):
    """The answer to a command: what it has made, and whether that was before, under the same `event_id`."""

    event_id: str
    accepted: bool
    duplicate: bool = False
    response_id: str | None = None
    item_id: str | None = None
    task_id: str | None = None


class Sessions:
    """The endpoints, each of them an ASGI application: `collection`, `session`, and the session's `events`."""

    def __init__(self, engine: Engine, connections: Connections, *, max_message_bytes: int) -> None:
        self._engine = engine
        self._connections = connections
        self._max_message_bytes = max_message_bytes

    async def collection(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """`POST` makes a session."""
        await answer(self._create(receive, send), send)

    async def session(self, scope: Scope, _receive: Receive, send: Send) -> None:
        """`GET` shows it, `DELETE` erases it."""
        action = self._show if scope["method"] == "GET" else self._erase
        await answer(action(scope, send), send)

    async def events(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`GET` streams what happens in it, `POST` carries a command out."""
        action = self._stream if scope["method"] == "GET" else self._command
        await answer(action(scope, receive, send), send)

    async def _create(self, receive: Receive, send: Send) -> None:
        self._connections.check_open()
        body = await read_body(receive, self._max_message_bytes)
        session_id = await self._engine.create(ANONYMOUS, _overrides(body))
        async with self._engine.hub.use(session_id) as live:
            session = self._engine.describe(live)
        location = [(b"location", f"/v1/sessions/{session_id}".encode())]
        await send_json(send, {"session": session}, status=201, headers=location)

    async def _show(self, scope: Scope, send: Send) -> None:
        async with self._engine.hub.use(session_id_in(scope)) as live:
            snapshot = await take_snapshot(live, self._engine.describe)
        await send_json(send, snapshot)

    async def _erase(self, scope: Scope, send: Send) -> None:
        await self._engine.store.erase(session_id_in(scope))
        await send_nothing(send)

    async def _command(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Once its body is here a command is carried out, whether or not the client waits for the answer."""
        self._connections.check_open()
        command = _command_in(await read_body(receive, self._max_message_bytes))
        event_id = command.event_id or _idempotency_key(scope) or new_id("evt")
        async with self._engine.hub.use(session_id_in(scope)) as live:
            outcome = await self._engine.execute(live, msgspec.structs.replace(command, event_id=event_id), ANONYMOUS)
        made = msgspec.structs.asdict(outcome.made)
        accepted = Accepted(event_id=event_id, accepted=True, duplicate=outcome.duplicate, **made)
        await send_json(send, accepted, status=202)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._connections.admit()
        opening = read_stream_opening(scope, session_id_in(scope))
        stream = EventStream(opening, ANONYMOUS, self._engine, receive, send)
        with self._connections.holding(stream.feed):
            await stream.run()


def session_id_in(scope: Scope) -> str:
    """The session that a path names. Raises `NotFound` for what can't be one."""
    session_id: str = scope["path_params"]["session_id"]
    if is_task_id(session_id):
        raise session_not_found()
    return session_id


async def answer(work: Coroutine[Any, Any, None], send: Send) -> None:
    """Do `work`, and tell the client of the error that refuses it."""
    try:
        await work
    except RealtimeError as error:
        await send_error(send, error)


def _overrides(body: bytes) -> Overrides:
    if not body:
        return Overrides()
    try:
        return msgspec.json.decode(body, type=Overrides)
    except msgspec.ValidationError as error:
        raise invalid(error) from None
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise InvalidRequest("invalid_json", "The body is not JSON.") from None


def _idempotency_key(scope: Scope) -> str | None:
    """What the client or its proxy calls the request: the same for each instance that is tried, so that one of them
    carries it out."""
    key = dict(scope["headers"]).get(b"idempotency-key", b"").decode("latin-1")
    return key if 0 < len(key) <= MAX_KEY_CHARS else None


def _command_in(body: bytes) -> Command:
    message = decode(JSON, body)
    if isinstance(message, Ping):
        raise InvalidRequest("unknown_type", "A ping is for WebSockets alone.", param="type")
    return message
