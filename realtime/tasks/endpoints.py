"""Tasks over HTTP: those that belong to no session under `/v1/tasks`, a session's under it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from realtime.access.admission import Admission
from realtime.access.audit import Access
from realtime.access.door import Action, Door
from realtime.access.principal import ONESHOT, SESSION, TASK
from realtime.call import ModelSettings
from realtime.connections import Connections
from realtime.endable import Endable
from realtime.engine import Engine
from realtime.errors import ConflictError, InvalidRequest, NotFound, task_not_found
from realtime.http import location_of, read_body, send_answer, send_json, while_connected
from realtime.live import LiveSession
from realtime.protocol import TaskCancel, is_task_id, new_id
from realtime.sessions import session_id_in
from realtime.tasks.context import Model
from realtime.tasks.record import read_created, read_record
from realtime.tasks.registry import Registry
from realtime.tasks.stream import TaskStream, read_position
from realtime.tasks.summarise import Document, summarise, summary_of

CREATE = Action("task.create", TASK)
SUMMARISE = Action("oneshot.summarise", ONESHOT)
RESPOND_ASYNC = b"respond-async"
SUMMARISER = Registry([summarise])
"""Checks what `/v1/summarise` is given, whatever an application has made of the task of that name."""


class TaskEndpoints:
    """The endpoints, each of them an ASGI application. `model` is what `/v1/summarise` asks."""

    def __init__(
        self,
        engine: Engine,
        connections: Connections,
        door: Door,
        admission: Admission,
        model: ModelSettings,
        *,
        max_body_bytes: int,
        send_timeout_s: float,
    ) -> None:
        self._engine = engine
        self._connections = connections
        self._door = door
        self._admission = admission
        self._model = model
        self._max_body_bytes = max_body_bytes
        self._send_timeout_s = send_timeout_s

    async def task(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`POST` makes a task of that name, `GET` shows the task of that id, `DELETE` cancels it."""
        match scope["method"]:
            case "POST":
                work = partial(self._create, scope["path_params"]["task_id"])
                await self._door.answer(CREATE, scope, receive, send, work)
            case "GET":
                await self._door.answer(_reading("task.read", scope), scope, receive, send, self._show)
            case _:
                action = Action("task.cancel", TASK, guests=_is_of_session(scope))  # as with sessions: they are told
                await self._door.answer(action, scope, receive, send, self._cancel)

    async def result(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`GET` answers with a task's result, whole."""
        await self._door.answer(_reading("task.result", scope), scope, receive, send, self._result)

    async def events(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`GET` streams a task's channel."""
        await self._door.answer(_reading("task.stream", scope), scope, receive, send, self._stream)

    async def analyse(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`POST /v1/analyse` makes the task of that name."""
        await self._door.answer(CREATE, scope, receive, send, partial(self._create, "analyse"))

    async def summarise(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`POST /v1/summarise` answers with a summary, or with the task that makes it where the client prefers that.
        Hanging up cancels the model calls."""
        prefers = b",".join(value for name, value in scope["headers"] if name == b"prefer").lower()
        if RESPOND_ASYNC in {one.partition(b";")[0].strip() for one in prefers.split(b",")}:
            applied = [(b"preference-applied", RESPOND_ASYNC)]
            work = partial(self._create, "summarise", headers=applied)
            await self._door.answer(CREATE, scope, receive, send, work)
        else:
            await self._door.answer(SUMMARISE, scope, receive, send, self._summarise)

    async def _create(
        self,
        name: str,
        access: Access,
        scope: Scope,
        receive: Receive,
        send: Send,
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        self._connections.check_open()
        given = _json(await read_body(receive, self._max_body_bytes))
        task_id, left = await self._engine.commands.create_task(access.principal, name, given)
        access.session_id = access.task_id = task_id
        access.limits = [left]
        body = {"task_id": task_id, "status": "pending"}
        await send_json(send, body, status=202, headers=[location_of(scope, f"/v1/tasks/{task_id}"), *headers])

    async def _show(self, access: Access, scope: Scope, _receive: Receive, send: Send) -> None:
        async with self._task(access, scope) as (live, task_id):
            created = await read_created(live.store, live.id, live.state.tasks[task_id].position)
            record = await read_record(live.store, live.id, task_id)
        await send_json(send, record.snapshot(created))

    async def _cancel(self, access: Access, scope: Scope, _receive: Receive, send: Send) -> None:
        async with self._task(access, scope) as (live, task_id):
            await self._engine.commands.execute(live, TaskCancel(task_id=task_id), access.principal)
        await send_json(send, {"task_id": task_id, "accepted": True}, status=202)

    async def _result(self, access: Access, scope: Scope, _receive: Receive, send: Send) -> None:
        async with self._task(access, scope) as (live, task_id):
            record = await read_record(live.store, live.id, task_id)
        if record.done is None or record.done.result_json is None:
            raise ConflictError("no_result", "The task has no result, or none yet.", param="task_id")
        headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
        await send_answer(send, 200, headers, record.done.result_json.encode())

    async def _stream(self, access: Access, scope: Scope, receive: Receive, send: Send) -> None:
        self._connections.admit()
        async with self._task(access, scope) as (live, task_id):
            stream = TaskStream(live, task_id, access.principal, send, send_timeout_s=self._send_timeout_s)
            await stream.open(read_position(scope, task_id))
            async with self._admission.connection(access.principal, new_id("conn")):
                with self._connections.holding(stream):
                    self._engine.check_may_see(live, access.principal)
                    access.tell()
                    await while_connected(receive, stream.run())

    async def _summarise(self, access: Access, _scope: Scope, receive: Receive, send: Send) -> None:
        self._connections.check_open()
        given = _json(await read_body(receive, self._max_body_bytes))
        document = msgspec.json.decode(SUMMARISER.check("summarise", given), type=Document)
        admitted = await self._admission.oneshot(access.principal, 0)
        access.limits = admitted.limits

        request = Endable(access.principal)

        async def work() -> None:
            model = Model(self._model, self._admission.till, access.principal.payer)
            async with request.endable():
                summary = await summary_of(document.text, model)
            await send_json(send, summary)

        try:
            with self._connections.holding(request):
                await while_connected(receive, work())
        finally:
            admitted.purse.settle(None)  # its model calls are paid each for itself

    @asynccontextmanager
    async def _task(self, access: Access, scope: Scope) -> AsyncIterator[tuple[LiveSession, str]]:
        """The session of the task that a path names, and the task's id. Raises `NotFound`."""
        task_id: str = scope["path_params"]["task_id"]
        access.task_id = task_id
        is_alone = not _is_of_session(scope)
        if is_alone and not is_task_id(task_id):
            raise task_not_found()
        try:
            access.session_id = session_id = task_id if is_alone else session_id_in(scope)
            async with self._engine.use(session_id, access.principal) as live:
                if task_id not in live.state.tasks:
                    await live.refresh()
                if task_id not in live.state.tasks:
                    raise task_not_found()
                yield live, task_id
        except NotFound as error:
            raise task_not_found() if is_alone else error from None


def _is_of_session(scope: Scope) -> bool:
    return "session_id" in scope["path_params"]


def _reading(name: str, scope: Scope) -> Action:
    """A session's tasks are read as all that is in it, by its guests, too; others are their owner's alone."""
    return Action(name, SESSION, guests=True) if _is_of_session(scope) else Action(name, TASK)


def _json(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise InvalidRequest("invalid_json", "The body is not JSON.") from None
