"""`/v1/sessions`: sessions for clients that have no WebSocket."""

from __future__ import annotations

import msgspec
from msgspec import Struct
from starlette.types import Receive, Scope, Send

from realtime.access import audit
from realtime.access.admission import Admission
from realtime.access.audit import Access, tag_of
from realtime.access.door import Action, Door
from realtime.access.rules import check_owner
from realtime.connections import Connections
from realtime.decoding import decode, invalid
from realtime.engine import Engine
from realtime.errors import InvalidRequest, session_not_found
from realtime.http import JSON_HEADERS, location_of, read_body, send_answer, send_json, send_nothing
from realtime.observe import logs
from realtime.opening import read_stream_opening
from realtime.protocol import JSON, AuthRefresh, Command, Overrides, Ping, is_task_id, new_id
from realtime.snapshot import encode_whole, take_snapshot
from realtime.sse import EventStream

MAX_KEY_CHARS = 64
"""As long as an `event_id` may be."""

CREATE = Action("session.create")
SHOW = Action("session.read", guests=True)
ERASE = Action("session.delete", guests=True)  # who may see it is told that it is not theirs to erase
STREAM = Action("session.stream", guests=True)
COMMAND = Action(audit.COMMAND, guests=True)


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

    def __init__(
        self, engine: Engine, connections: Connections, door: Door, admission: Admission, *, max_message_bytes: int
    ) -> None:
        self._engine = engine
        self._connections = connections
        self._door = door
        self._admission = admission
        self._max_message_bytes = max_message_bytes

    async def collection(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`POST` makes a session."""
        await self._door.answer(CREATE, scope, receive, send, self._create)

    async def session(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`GET` shows it, `DELETE` erases it."""
        action, work = (SHOW, self._show) if scope["method"] == "GET" else (ERASE, self._erase)
        await self._door.answer(action, scope, receive, send, work)

    async def events(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`GET` streams what happens in it, `POST` carries a command out."""
        action, work = (STREAM, self._stream) if scope["method"] == "GET" else (COMMAND, self._command)
        await self._door.answer(action, scope, receive, send, work)

    async def _create(self, access: Access, scope: Scope, receive: Receive, send: Send) -> None:
        self._connections.check_open()
        body = await read_body(receive, self._max_message_bytes)
        access.session_id = session_id = await self._engine.commands.create(access.principal, _overrides(body))
        async with self._engine.hub.use(session_id) as live:
            session = self._engine.describe(live)
        location = [location_of(scope, f"/v1/sessions/{session_id}")]
        await send_json(send, {"session": session}, status=201, headers=location)

    async def _show(self, access: Access, scope: Scope, _receive: Receive, send: Send) -> None:
        async with self._engine.use(session_id_in(scope), access.principal) as live:
            stored = await live.store.load(live.id)
            await self._admission.read(access.principal, stored.size_bytes)
            body = await encode_whole(await take_snapshot(live, self._engine.describe))
        await send_answer(send, 200, JSON_HEADERS, body)

    async def _erase(self, access: Access, scope: Scope, _receive: Receive, send: Send) -> None:
        session_id = session_id_in(scope)
        async with self._engine.use(session_id, access.principal) as live:
            check_owner(live.state.session, access.principal)
            await self._engine.store.erase(session_id)  # while it is in use: its tasks are let go of then
        await send_nothing(send)

    async def _command(self, access: Access, scope: Scope, receive: Receive, send: Send) -> None:
        """Once its body is here a command is carried out, whether or not the client waits for the answer."""
        self._connections.check_open()
        command = _command_in(await read_body(receive, self._max_message_bytes))
        access.action = tag_of(command)
        access.concerns(command)
        event_id = command.event_id or _idempotency_key(scope) or new_id("evt")
        command = msgspec.structs.replace(command, event_id=event_id)
        async with self._engine.use(session_id_in(scope), access.principal) as live:
            outcome = await self._engine.commands.execute(live, command, access.principal)
        access.concerns(outcome.made)
        access.limits = list(outcome.limits)
        made = msgspec.structs.asdict(outcome.made)
        accepted = Accepted(event_id=event_id, accepted=True, duplicate=outcome.duplicate, **made)
        await send_json(send, accepted, status=202)

    async def _stream(self, access: Access, scope: Scope, receive: Receive, send: Send) -> None:
        self._connections.admit()
        opening = read_stream_opening(scope, session_id_in(scope))
        stream = EventStream(opening, access, self._engine, receive, send)
        logs.bind(connection=stream.feed.name)
        async with self._admission.connection(access.principal, stream.feed.name):
            with self._connections.holding(stream.feed):
                await stream.run()


def session_id_in(scope: Scope) -> str:
    """The session that a path names. Raises `NotFound` for what can't be one."""
    session_id: str = scope["path_params"]["session_id"]
    if is_task_id(session_id):
        raise session_not_found()
    return session_id


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
    carries it out. Raises `InvalidRequest` for one that is too long."""
    key = dict(scope["headers"]).get(b"idempotency-key", b"").decode("latin-1")
    if len(key) > MAX_KEY_CHARS:
        most = f"An Idempotency-Key may have at most {MAX_KEY_CHARS} characters."
        raise InvalidRequest("invalid_message", most, param="Idempotency-Key")
    return key or None


def _command_in(body: bytes) -> Command:
    message = decode(JSON, body)
    if isinstance(message, Ping | AuthRefresh):
        raise InvalidRequest("unknown_type", "That is for WebSockets alone.", param="type")
    return message
