"""Composes the server: settings and a responder in, an ASGI application out."""

from __future__ import annotations

import mimetypes
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any

from msgspec import Struct
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from realtime.access.admission import Admission
from realtime.access.door import Door
from realtime.access.edge import edge
from realtime.access.endpoints import AccessEndpoints
from realtime.access.revocations import Revocations
from realtime.connections import Connections
from realtime.drain import Drain, Work
from realtime.engine import Engine
from realtime.errors import InvalidRequest, NotFound, RealtimeError, ServerError, StoreError, Unavailable
from realtime.http import error_body, error_headers, path_of, send_error, send_json
from realtime.observe import logs, traces
from realtime.observe.spans import Attributes, Span
from realtime.oneshot import OneShots
from realtime.pace import Pace
from realtime.page import Page
from realtime.parts import Parts, entered, make_admission, make_parts, make_worker
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


class _Site(Struct, frozen=True):
    """What the endpoints share."""

    settings: Settings
    parts: Parts
    connections: Connections
    revocations: Revocations
    door: Door
    admission: Admission
    limits: Limits
    engine: Engine


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
    mimetypes.guess_type("")  # the first one reads files, which must not happen in the event loop
    site = _site(settings, make_parts(settings, responder, tasks))
    worker = None if site.parts.store.shared else make_worker(site.parts, settings)
    oneshots = OneShots(
        site.parts.model,
        site.limits,
        site.door,
        site.admission,
        site.connections,
        max_body_bytes=settings.max_body_bytes,
        send_timeout_s=settings.send_timeout_s,
    )
    app = Starlette(
        routes=[*_session_routes(site), *_task_routes(site), *_other_routes(site, oneshots)],
        exception_handlers={HTTPException: _on_http_error, Exception: _on_fault},
        lifespan=lambda _app: _lifespan(site, worker),
    )
    app.router.default = _nothing
    inner = _with_socket(_socket(site), app.build_middleware_stack())
    app.middleware_stack = edge(inner, settings)  # outside of what answers with 500, too
    app.state.engine = site.engine
    app.state.connections = site.connections
    app.state.keeper = site.parts.keeper
    works: list[Work] = [site.engine, oneshots] if worker is None else [site.engine, oneshots, worker]
    app.state.drain = Drain(site.connections, works, drain_s=settings.drain_s, shared=site.parts.store.shared)
    return app


def mount(host: Starlette, app: Starlette, path: str) -> None:
    """Serve `app`, which `create_app` has made, under `path` of another Starlette or FastAPI application.

    It starts before what `host` itself starts in its lifespan, and ends after that. To be called once, before `host`
    starts. Where `host` is run by `realtime.server`, `app` drains as it does alone.
    """
    host.mount(path, app)
    own = host.router.lifespan_context

    @asynccontextmanager
    async def both(_host: Starlette) -> AsyncIterator[Any]:
        async with app.router.lifespan_context(app), own(host) as state:
            yield state

    host.router.lifespan_context = both
    host.state.drain = app.state.drain


def _site(settings: Settings, parts: Parts) -> _Site:
    revocations = Revocations(parts.register, lambda: connections.drop_revoked())
    connections = Connections(
        max_connections=settings.max_connections,
        send_timeout_s=settings.send_timeout_s,
        is_revoked=revocations.covers,
        name_of=parts.audit.name_of,
    )
    admission = make_admission(parts, settings)
    models = frozenset({parts.model.default_model, *settings.allowed_models})
    limits = Limits(models, settings.max_output_tokens)
    return _Site(
        settings=settings,
        parts=parts,
        connections=connections,
        revocations=revocations,
        door=Door(parts.verifier, revocations, parts.audit, admission),
        admission=admission,
        limits=limits,
        engine=_engine(settings, parts, admission, revocations, limits),
    )


def _engine(settings: Settings, parts: Parts, admission: Admission, revocations: Revocations, limits: Limits) -> Engine:
    desk = Desk(
        parts.registry, parts.store, parts.queue, ttl_s=settings.task_ttl_s, most_per_payer=settings.max_tasks_per_user
    )
    turns = Turns(
        instance=parts.lease.instance,
        responder=parts.model.responder,
        journal=parts.journal,
        pace=Pace(),
        idle_timeout_s=settings.upstream_idle_timeout_s,
        context_tokens=settings.model_context_tokens,
        truncation=settings.truncation,
        report=logs.report,
        tools=TaskTools(desk, admission.task),
        till=parts.till,
        prices=parts.model.prices,
        name_of=parts.audit.name_of,
    )
    return Engine(
        parts.store,
        turns,
        desk,
        admission,
        revocations,
        defaults=_defaults(settings, parts.model.default_model),
        limits=limits,
        ttl_s=settings.session_ttl_s,
    )


def _socket(site: _Site) -> RealtimeSocket:
    return RealtimeSocket(site.engine, site.connections, site.door, site.admission)


def _with_socket(socket: ASGIApp, app: ASGIApp) -> ASGIApp:
    """`app`, and `socket` for what has a path of its own: Starlette's layers take two kilobytes of each WebSocket."""

    def with_socket(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        is_socket = scope["type"] == "websocket" and path_of(scope) == "/v1/realtime"
        return (socket if is_socket else app)(scope, receive, send)

    return with_socket


def _session_routes(site: _Site) -> list[BaseRoute]:
    most_bytes = site.settings.max_message_bytes
    sessions = Sessions(site.engine, site.connections, site.door, site.admission, max_message_bytes=most_bytes)
    return [
        _route("/v1/sessions", sessions.collection, "POST"),
        _route("/v1/sessions/{session_id}", sessions.session, "GET", "DELETE"),
        _route("/v1/sessions/{session_id}/events", sessions.events, "GET", "POST"),
    ]


def _task_routes(site: _Site) -> list[BaseRoute]:
    tasks = TaskEndpoints(
        site.engine,
        site.connections,
        site.door,
        site.admission,
        site.parts.model,
        max_body_bytes=site.settings.max_body_bytes,
        send_timeout_s=site.settings.send_timeout_s,
    )
    return [
        _route("/v1/sessions/{session_id}/tasks/{task_id}", tasks.task, "GET", "DELETE"),
        _route("/v1/sessions/{session_id}/tasks/{task_id}/events", tasks.events, "GET"),
        _route("/v1/sessions/{session_id}/tasks/{task_id}/result", tasks.result, "GET"),
        _route("/v1/tasks/{task_id}", tasks.task, "POST", "GET", "DELETE"),
        _route("/v1/tasks/{task_id}/events", tasks.events, "GET"),
        _route("/v1/tasks/{task_id}/result", tasks.result, "GET"),
        _route("/v1/analyse", tasks.analyse, "POST"),
        _route("/v1/summarise", tasks.summarise, "POST"),
    ]


def _other_routes(site: _Site, oneshots: OneShots) -> list[BaseRoute]:
    access = AccessEndpoints(site.door, site.revocations)
    page = Page()
    return [
        _route("/v1/stream", oneshots.stream, "POST"),
        _route("/v1/complete", oneshots.complete, "POST"),
        _route("/v1/auth/cookie", access.cookie, "POST", "DELETE"),
        _route("/v1/admin/revoke", access.revoke, "POST"),
        Route("/healthz", _Endpoint(_alive), methods=["GET"]),
        Route("/readyz", _Endpoint(partial(_ready, site.parts.store, site.connections)), methods=["GET"]),
        Route("/metrics", _Endpoint(access.metrics), methods=["GET"]),
        Route("/", page),
        Mount("/static", page),
    ]


def _route(path: str, endpoint: ASGIApp, *methods: str) -> Route:
    """A route without the HEAD that Starlette adds to a GET: a stream of events has no end to wait for."""
    route = Route(path, _Endpoint(endpoint, traced=path), methods=methods)
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
async def _lifespan(site: _Site, worker: Worker | None) -> AsyncIterator[None]:
    """Everything that is shared lives here: the store, the model's client, the journal, the turns and the tasks."""
    parts, engine = site.parts, site.engine
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(entered(parts, site.settings))
        await stack.enter_async_context(engine)
        with suppress(StoreError):  # then it is asked again and again
            await site.revocations.look()
        for work in _work(site):
            engine.spawn(work)
        if worker is not None:
            await stack.enter_async_context(worker)
        yield


def _work(site: _Site) -> list[Coroutine[Any, Any, None]]:
    """What goes on for as long as the server does."""
    parts = site.parts
    upkeep = Upkeep(site.engine, parts.lease, ttl_s=site.settings.session_ttl_s)
    return [
        parts.lease.sign(),
        upkeep.look(),
        upkeep.use(),
        site.connections.watch(),
        site.revocations.watch(),
        parts.sweeper.run(),
    ]


class _Endpoint:
    """Makes an ASGI application out of a function of three, which Starlette would take for one of a request.

    A `POST` to what is `traced` by that name is a span, a part of what the request says that it is a part of.
    """

    def __init__(self, app: ASGIApp, *, traced: str | None = None) -> None:
        self._app = app
        self._route = traced

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._route is None or scope["method"] != "POST" or not traces.is_on():
            await self._app(scope, receive, send)
            return
        told: Attributes = {"http.request.method": "POST", "http.route": self._route}
        parent = traces.named_in(scope["headers"])
        with traces.span(f"POST {self._route}", kind="SERVER", parent=parent, attributes=told) as span:
            await self._app(scope, receive, _noting(span, send))


def _noting(span: Span, send: Send) -> Send:
    """The same, and the span knows the status of the answer."""

    async def send_noted(message: Message) -> None:
        if message["type"] == "http.response.start":
            span.set({"http.response.status_code": message["status"]})
            if message["status"] >= 500:
                span.fail(str(message["status"]))
        await send(message)

    return send_noted


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
