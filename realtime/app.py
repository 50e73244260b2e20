"""Composes the server: settings and a responder in, an ASGI application out."""

from __future__ import annotations

import mimetypes
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from realtime.access.edge import edge
from realtime.connections import Connections
from realtime.drain import Drain, Work
from realtime.engine import Engine
from realtime.errors import InvalidRequest, NotFound, RealtimeError, ServerError, StoreError, Unavailable
from realtime.http import error_body, error_headers, send_answer, send_error, send_json
from realtime.observe import logs, metrics
from realtime.oneshot import OneShots
from realtime.pace import Pace
from realtime.parts import Parts, entered, make_parts, make_worker
from realtime.protocol import Session
from realtime.responders.base import Responder
from realtime.session import Limits
from realtime.sessions import Sessions
from realtime.settings import Settings, load_settings
from realtime.store.base import Store
from realtime.tasks.desk import Desk
from realtime.tasks.endpoints import TaskEndpoints
from realtime.tasks.tools import TaskTools
from realtime.tasks.worker import Worker
from realtime.turn import Turns
from realtime.upkeep import Upkeep
from realtime.websocket import RealtimeSocket

_HERE = Path(__file__).parent
STATIC = next(folder for folder in (_HERE / "static", _HERE.parent / "static") if folder.is_dir())
"""The page: inside the package where it was installed, beside it in a checkout."""

PAGE_HEADERS = {
    b"content-security-policy": b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    b"img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    b"permissions-policy": b"camera=(), display-capture=(), geolocation=(), microphone=(self), payment=(), usb=()",
    b"cache-control": b"no-cache",
}


def create_app(
    responder: Responder | None = None,
    settings: Settings | None = None,
    *,
    tasks: Sequence[Callable[..., Any]] = (),
) -> Starlette:
    """The server as an ASGI application.

    `responder` answers; without one it is the one that `settings` (default: the environment's) means. `tasks` are
    offered beside the built-in ones and those of the settings. Raises `SettingsError` where they can't work, and
    `ValueError` for a function that is no task.
    """
    settings = settings or load_settings()
    mimetypes.init()  # reads files, which the first answer with a static file would otherwise do in the event loop
    parts = make_parts(settings, responder, tasks)
    store, model = parts.store, parts.model
    limits = Limits(frozenset({model.default_model, *settings.allowed_models}), settings.max_output_tokens)
    desk = Desk(parts.registry, store, parts.queue, ttl_s=settings.task_ttl_s)
    turns = Turns(
        instance=parts.lease.instance,
        responder=model.responder,
        journal=parts.journal,
        pace=Pace(),
        idle_timeout_s=settings.upstream_idle_timeout_s,
        context_tokens=settings.model_context_tokens,
        truncation=settings.truncation,
        report=logs.report,
        tools=TaskTools(desk),
    )
    engine = Engine(
        store,
        turns,
        desk,
        defaults=_defaults(settings, model.default_model),
        limits=limits,
        ttl_s=settings.session_ttl_s,
    )
    worker = None if store.shared else make_worker(parts, settings)
    connections = Connections(max_connections=settings.max_connections, send_timeout_s=settings.send_timeout_s)
    sessions = Sessions(engine, connections, max_message_bytes=settings.max_message_bytes)
    oneshots = OneShots(
        model,
        limits,
        max_body_bytes=settings.max_body_bytes,
        send_timeout_s=settings.send_timeout_s,
    )
    endpoints = TaskEndpoints(
        engine,
        connections,
        model,
        max_body_bytes=settings.max_body_bytes,
        send_timeout_s=settings.send_timeout_s,
    )
    page = _Page(StaticFiles(directory=STATIC, html=True))
    app = Starlette(
        routes=[
            WebSocketRoute("/v1/realtime", RealtimeSocket(engine, connections)),
            _route("/v1/sessions", sessions.collection, "POST"),
            _route("/v1/sessions/{session_id}", sessions.session, "GET", "DELETE"),
            _route("/v1/sessions/{session_id}/events", sessions.events, "GET", "POST"),
            _route("/v1/sessions/{session_id}/tasks/{task_id}", endpoints.task, "GET", "DELETE"),
            _route("/v1/sessions/{session_id}/tasks/{task_id}/events", endpoints.events, "GET"),
            _route("/v1/sessions/{session_id}/tasks/{task_id}/result", endpoints.result, "GET"),
            _route("/v1/tasks/{task_id}", endpoints.task, "POST", "GET", "DELETE"),
            _route("/v1/tasks/{task_id}/events", endpoints.events, "GET"),
            _route("/v1/tasks/{task_id}/result", endpoints.result, "GET"),
            _route("/v1/analyse", endpoints.analyse, "POST"),
            _route("/v1/summarise", endpoints.summarise, "POST"),
            Route("/v1/stream", _Endpoint(oneshots.stream), methods=["POST"]),
            Route("/v1/complete", _Endpoint(oneshots.complete), methods=["POST"]),
            Route("/healthz", _Endpoint(_alive), methods=["GET"]),
            Route("/readyz", _Endpoint(partial(_ready, store, connections)), methods=["GET"]),
            Route("/metrics", _Endpoint(_metrics), methods=["GET"]),
            Route("/", page),
            Mount("/static", page),
        ],
        exception_handlers={HTTPException: _on_http_error, Exception: _on_fault},
        lifespan=lambda _app: _lifespan(settings, parts, engine, worker, connections),
    )
    app.router.default = _nothing
    app.middleware_stack = edge(app.build_middleware_stack(), settings)  # outside of what answers with 500, too
    app.state.engine = engine
    app.state.connections = connections
    works: list[Work] = [engine, oneshots] if worker is None else [engine, oneshots, worker]
    app.state.drain = Drain(connections, works, drain_s=settings.drain_s, shared=store.shared)
    return app


def _route(path: str, endpoint: ASGIApp, *methods: str) -> Route:
    """A route without the HEAD that Starlette adds to a GET: a stream of events has no end to wait for."""
    route = Route(path, _Endpoint(endpoint), methods=methods)
    route.methods = set(methods)
    return route


def _defaults(settings: Settings, model: str) -> Session:
    return Session(
        id="",
        owner="",
        created_at="",
        expires_at="",
        instructions="",
        model=model,
        max_output_tokens=settings.max_output_tokens,
        on_disconnect=settings.on_disconnect,
        disconnect_grace_ms=settings.disconnect_grace_ms,
        multitask_strategy="reject",
    )


@asynccontextmanager
async def _lifespan(
    settings: Settings, parts: Parts, engine: Engine, worker: Worker | None, connections: Connections
) -> AsyncIterator[None]:
    """Everything that is shared lives here: the store, the model's client, the journal, the turns and the tasks."""
    upkeep = Upkeep(engine, parts.lease, ttl_s=settings.session_ttl_s)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(entered(parts, settings))
        await stack.enter_async_context(engine)
        for work in (parts.lease.sign(), upkeep.look(), upkeep.use(), connections.watch(), parts.sweeper.run()):
            engine.spawn(work)
        if worker is not None:
            await stack.enter_async_context(worker)
        yield


class _Endpoint:
    """Makes an ASGI application out of a function of three, which Starlette would take for one of a request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


class _Page:
    """Static files, with what a page may do."""

    def __init__(self, files: StaticFiles) -> None:
        self._files = files

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise HTTPException(404)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *PAGE_HEADERS.items()]
            await send(message)

        await self._files(scope, receive, send_with_headers)


async def _nothing(_scope: Scope, _receive: Receive, _send: Send) -> None:
    """What is at all other paths, for WebSockets, too."""
    raise HTTPException(404)


async def _alive(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send_json(send, {"status": "ok"})


async def _ready(store: Store, connections: Connections, _scope: Scope, _receive: Receive, send: Send) -> None:
    try:
        connections.check_open()
        await store.ping()
    except (StoreError, Unavailable) as error:
        await send_error(send, error)
        return
    await send_json(send, {"status": "ready"})


async def _metrics(_scope: Scope, _receive: Receive, send: Send) -> None:
    body, content_type = metrics.render()
    await send_answer(send, 200, [(b"content-type", content_type.encode())], body)


async def _on_http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    answer = _answer(_CLIENT_ERRORS.get(error.status_code, _BAD_REQUEST), error.status_code)
    answer.headers.update(error.headers or {})
    return answer


async def _on_fault(_request: Request, error: Exception) -> Response:
    logs.report(error)
    return _answer(ServerError("internal_error", "Something went wrong here."), 500)


_BAD_REQUEST = InvalidRequest("invalid_request", "The request can't be carried out.")
_CLIENT_ERRORS: dict[int, RealtimeError] = {
    404: NotFound("not_found", "There is nothing here."),
    405: InvalidRequest("method_not_allowed", "That method is not allowed here."),
}


def _answer(error: RealtimeError, status: int) -> Response:
    headers = {name.decode(): value.decode() for name, value in error_headers(error)}
    return Response(error_body(error), status, headers)
