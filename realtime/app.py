"""Composes the server: settings and a responder in, an ASGI application out."""

from __future__ import annotations

import asyncio
import mimetypes
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from realtime.connections import Connections
from realtime.drain import Drain
from realtime.engine import Engine
from realtime.errors import InvalidRequest, NotFound, RealtimeError, ServerError, StoreError, Unavailable
from realtime.http import error_body, error_headers, send_error, send_json
from realtime.journal import Journal
from realtime.observe import logs
from realtime.oneshot import OneShots
from realtime.origins import LOOPBACK, OriginCheck
from realtime.pace import Pace
from realtime.protocol import Session, new_id
from realtime.responders.base import Responder
from realtime.responders.choose import choose
from realtime.session import Limits
from realtime.sessions import Sessions
from realtime.settings import Settings, load_settings
from realtime.store.base import Store
from realtime.store.memory import MemoryStore
from realtime.turn import Turns
from realtime.upkeep import Upkeep
from realtime.websocket import RealtimeSocket

_HERE = Path(__file__).parent
STATIC = next(folder for folder in (_HERE / "static", _HERE.parent / "static") if folder.is_dir())
"""The page: inside the package where it was installed, beside it in a checkout."""

RESIGN_S = 0.5
"""How long an instance that ends waits for a store that does not answer."""
PAGE_HEADERS = {
    b"content-security-policy": b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    b"img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-cache",
}


def create_app(responder: Responder | None = None, settings: Settings | None = None) -> Starlette:
    """The server as an ASGI application.

    `responder` answers; without one it is the one that `settings` (default: the environment's) means. Raises
    `SettingsError` where they can't work.
    """
    settings = settings or load_settings()
    mimetypes.init()  # reads files, which the first answer with a static file would otherwise do in the event loop
    default_model = "default"
    if responder is None:
        responder, default_model = choose(settings)
    default_model = settings.model or default_model
    limits = Limits(frozenset({default_model, *settings.allowed_models}), settings.max_output_tokens)
    store = _store(settings)
    journal = Journal(store, interval_s=settings.journal_interval_ms / 1000)
    turns = Turns(
        instance=new_id("inst"),
        responder=responder,
        journal=journal,
        pace=Pace(),
        idle_timeout_s=settings.upstream_idle_timeout_s,
        context_tokens=settings.model_context_tokens,
        truncation=settings.truncation,
        report=logs.report,
    )
    engine = Engine(
        store,
        turns,
        defaults=_defaults(settings, default_model),
        limits=limits,
        ttl_s=settings.session_ttl_s,
    )
    upkeep = Upkeep(engine, lease_s=settings.lease_s, ttl_s=settings.session_ttl_s)
    connections = Connections(max_connections=settings.max_connections, send_timeout_s=settings.send_timeout_s)
    sessions = Sessions(engine, connections, max_message_bytes=settings.max_message_bytes)
    oneshots = OneShots(
        turns,
        limits,
        default_model=default_model,
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
            Route("/v1/stream", _Endpoint(oneshots.stream), methods=["POST"]),
            Route("/v1/complete", _Endpoint(oneshots.complete), methods=["POST"]),
            Route("/healthz", _Endpoint(_alive), methods=["GET"]),
            Route("/readyz", _Endpoint(partial(_ready, store, connections)), methods=["GET"]),
            Route("/", page),
            Mount("/static", page),
        ],
        exception_handlers={HTTPException: _on_http_error, Exception: _on_fault},
        middleware=[Middleware(OriginCheck, hosts=_hosts(settings), origins=_origins(settings))],
        lifespan=lambda _app: _lifespan(store, responder, engine, upkeep, connections),
    )
    app.state.engine = engine
    app.state.connections = connections
    app.state.drain = Drain(connections, [engine, oneshots], drain_s=settings.drain_s, shared=store.shared)
    return app


def _store(settings: Settings) -> Store:
    limits: dict[str, Any] = {"session_ttl_s": settings.session_ttl_s, "max_session_bytes": settings.max_session_bytes}
    if not settings.redis_url:
        return MemoryStore(**limits)
    from realtime.store.redis import RedisStore  # its client is loaded only where it is used

    return RedisStore(settings.redis_url, **limits)


def _route(path: str, endpoint: ASGIApp, *methods: str) -> Route:
    """A route without the HEAD that Starlette adds to a GET: a stream of events has no end to wait for."""
    route = Route(path, _Endpoint(endpoint), methods=methods)
    route.methods = set(methods)
    return route


def _hosts(settings: Settings) -> frozenset[str]:
    return frozenset({*LOOPBACK, settings.host.lower(), *map(str.lower, settings.allowed_hosts)})


def _origins(settings: Settings) -> frozenset[str]:
    return frozenset(origin.lower().rstrip("/") for origin in settings.allowed_origins)


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
    store: Store, responder: Responder, engine: Engine, upkeep: Upkeep, connections: Connections
) -> AsyncIterator[None]:
    """Everything that is shared lives here: the store, the model's client, the journal and the turns."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(store)
        if isinstance(responder, AbstractAsyncContextManager):
            await stack.enter_async_context(responder)
        stack.push_async_callback(_resign, store, engine.instance)
        await stack.enter_async_context(engine)
        for work in (upkeep.sign(), upkeep.look(), upkeep.use(), connections.watch()):
            engine.spawn(work)
        yield


async def _resign(store: Store, instance: str) -> None:
    with suppress(StoreError, TimeoutError):  # then its lease runs out
        async with asyncio.timeout(RESIGN_S):
            await store.resign(instance)


class _Endpoint:
    """Makes an ASGI application out of a function of three, which Starlette would take for one of a request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


class _Page:
    """Static files, with the headers that a page needs to be safe."""

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
