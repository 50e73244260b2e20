"""Runs the real server for a test: the application under uvicorn, on a free port, in the test's own event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from realtime.access.keeper import Keeper
from realtime.app import create_app
from realtime.connections import Connections
from realtime.engine import Engine
from realtime.responders.base import Responder
from realtime.responders.demo import demo
from realtime.server import Server, listen, make_server
from realtime.settings import Settings
from tests.support.limits import GENEROUS


class RunningServer:
    """A server that is up: `url` is `http://127.0.0.1:PORT`, `ws_url` the WebSocket endpoint."""

    def __init__(
        self,
        port: int,
        engine: Engine,
        server: Server | None = None,
        serving: asyncio.Task[None] | None = None,
        keeper: Keeper | None = None,
        connections: Connections | None = None,
    ) -> None:
        self.port = port
        self._server = server
        self._serving = serving
        self.engine = engine
        self._keeper = keeper
        self.connections = connections
        self.url = f"http://127.0.0.1:{port}"
        self.ws_url = f"ws://127.0.0.1:{port}/v1/realtime"

    def stop(self) -> None:
        """Have it shut down, as a signal does."""
        assert self._server is not None
        self._server.should_exit = True

    async def ended(self) -> None:
        """Return once it has shut down."""
        assert self._serving is not None
        await asyncio.shield(self._serving)

    @property
    def holds(self) -> int:
        """How many slots and reservations it has now."""
        assert self._keeper is not None
        return len(self._keeper)

    @property
    def busy_sessions(self) -> int:
        """Sessions that somebody looks at, or in which a response runs."""
        return len(list(self.engine.hub.sessions()))


@asynccontextmanager
async def running_server(responder: Responder = demo, **settings: Any) -> AsyncIterator[RunningServer]:
    """A server with `responder` and `settings`: any field of `Settings`, and `functions`, the tasks of the application.
    Any model may be asked for."""
    functions: Sequence[Callable[..., Any]] = settings.pop("functions", ())
    chosen = Settings(**{"port": 0, "allowed_models": ("*",), "drain_s": 1, **GENEROUS, **settings})
    app = create_app(responder, chosen, tasks=functions)
    listener = listen(chosen)
    server = make_server(app, chosen)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started:
            await asyncio.sleep(0)
            if serving.done():
                serving.result()
        port = listener.getsockname()[1]
        yield RunningServer(port, app.state.engine, server, serving, app.state.keeper, app.state.connections)
    finally:
        server.should_exit = True
        await serving
