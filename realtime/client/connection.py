"""Keeps a connection open until it is told otherwise: chooses what carries it, comes back, knows when not to."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from importlib import import_module
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from msgspec import Struct

from realtime.client.backoff import Backoff
from realtime.client.events import Fields
from realtime.client.pace import Pace
from realtime.client.refusals import Refused
from realtime.client.websocket import websocket
from realtime.client.wire import LOST, SILENCE_S, Closed, Left, NotOpened, Target, Wire
from realtime.protocol import CloseCode

RECONNECT_CODES = frozenset({1001, 1005, 1006, 1011, 1012, 1013, 4408, 4429})
FAREWELL_S = 2.0
"""How long what was sent may take to go out once the session is left."""
TOKEN = re.compile(r"[\w.~+/=-]+", re.ASCII)

TransportName = Literal["websocket", "sse"]
Transport = Literal["auto", "websocket", "sse"]
ConnectionState = Literal["idle", "connecting", "open", "waiting", "closed"]
Token = str | Callable[[], str | Awaitable[str]]

DOUBTFUL = 3
"""After so many in a row that did not open, it is asked anew whether WebSockets get through."""

_websockets_pass: dict[str, bool] = {}
"""Whether WebSockets get through to a host: what this process has learnt."""


def is_token(text: str) -> bool:
    """Whether it can be a bearer token, by its characters; whether a server takes it is another matter."""
    return TOKEN.fullmatch(text) is not None


class Options(Struct, frozen=True, kw_only=True):
    """What a connection is asked for: see `connect`."""

    url: str
    token: Token | None
    transport: Transport
    delta_interval_ms: int


class Owner(Protocol):
    """Whom a connection asks and tells."""

    def resumption(self) -> tuple[str | None, dict[str, str]]:
        """The session, and the query that says where to go on."""

    def event(self, event: Fields) -> None:
        """A message came. Raises `Closed` where the connection is no good any more."""

    def settled(self, event_id: str) -> None:
        """The server has carried a command out."""

    def lost(self, closed: Closed, reconnect_in_s: float) -> None:
        """The connection is lost, and will be back."""


class Connection:
    """`run` is its life. `transport` is what carries it, or did last."""

    def __init__(self, options: Options, owner: Owner) -> None:
        self.state: ConnectionState = "idle"
        self.transport: TransportName | None = None
        self.retry_after_s = 0.0
        """How long the last error said to wait."""
        self._options = options
        self._owner = owner
        self._backoff = Backoff()
        self._outgoing: asyncio.Queue[Fields] = asyncio.Queue()
        self._leaving: asyncio.Future[Closed] | None = None
        self._left: Left | None = None
        self._token_error: Exception | None = None
        self._shown: str | None = None
        """The token that this connection was opened with."""
        self._fresh: str | None = None
        """One for the next."""
        self._unopened = 0
        """WebSockets in a row that did not open."""
        self._timer: asyncio.TimerHandle | None = None

    async def run(self) -> Closed:
        """Keep a connection until it is over for good; returns why. Cancelling leaves."""
        try:
            while True:
                closed = await self._unless_left(self._live())
                if closed.code == CloseCode.UNAUTHENTICATED:
                    closed.__cause__ = self._token_error
                if not self._comes_back(closed):
                    return closed
                delay_s = self._delay_s(closed)
                self.state = "waiting"
                self._owner.lost(closed, delay_s)
                closed = await self._unless_left(asyncio.sleep(delay_s, closed))
                if not self._comes_back(closed):
                    return closed
        finally:
            self.state = "closed"

    def leave(self, closed: Closed) -> None:
        """Leave the connection, for good or not, as `closed` means. But for good does nothing where there is none."""
        if isinstance(closed, Left):
            self._left = self._left or closed
        if self._leaving is not None and not self._leaving.done():
            self._leaving.set_result(closed)

    def leave_in(self, delay_s: float, closed: Closed) -> None:
        """The same after a while, unless it is lost before."""
        self._cancel_timer()
        self._timer = asyncio.get_running_loop().call_later(delay_s, self.leave, closed)

    def attached(self, waiting: list[Fields]) -> None:
        """The first message is here: from now on commands go out, first those that waited."""
        self.state = "open"
        self._backoff.opened(asyncio.get_running_loop().time())
        if self.transport == "sse" and self._is_undecided():
            _websockets_pass[self._host] = False
        for command in waiting:
            self._outgoing.put_nowait(command)

    def send(self, command: Fields) -> None:
        """Does nothing while there is no connection."""
        if self.state == "open":
            self._outgoing.put_nowait(command)

    async def refresh(self) -> None:
        """Replace a token that will expire, if there is a way to. An open stream can't be shown one: the next is."""
        leaving = self._leaving
        token = await self.token() if callable(self._options.token) else None
        if token is None or leaving is not self._leaving:
            return
        if self.transport == "websocket":
            self.send({"type": "auth.refresh", "token": token})
        elif token != self._shown:  # else there is no other yet
            self._fresh = token
            self.leave(Closed(LOST, "new token", reconnect_in_s=0.0))

    async def token(self) -> str | None:
        """None where getting one fails, or it is none: the server then refuses, and the next try asks again."""
        given: Any = self._options.token
        if callable(given):
            given = await self._ask(given)
        return given if isinstance(given, str) and is_token(given) else None

    async def _ask(self, get: Callable[[], Any]) -> Any:
        self._token_error = None
        try:
            async with asyncio.timeout(SILENCE_S):
                given = get()
                return await given if inspect.isawaitable(given) else given
        except Exception as error:  # the application's; whatever it is, there is no token
            self._token_error = error
            return None

    async def target(self) -> Target:
        """Where the next connection leads."""
        token, self._fresh = self._fresh or await self.token(), None
        session_id, query = self._owner.resumption()
        if self._options.delta_interval_ms:
            query["delta_interval_ms"] = str(self._options.delta_interval_ms)
        return Target(url=self._options.url, session_id=session_id, query=query, token=token)

    async def _unless_left(self, work: Coroutine[Any, Any, Closed]) -> Closed:
        """What comes first: the end of the work, or that the connection is to be left."""
        left = self._left
        if left is not None:  # between two of them, as by whom a loss was told
            work.close()
            return left
        self._leaving = leaving = asyncio.get_running_loop().create_future()
        working = asyncio.ensure_future(work)
        both: set[asyncio.Future[Closed]] = {working, leaving}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if self._left is not None and self.state == "open":
                await self._say_farewell(working)
        finally:
            self._cancel_timer()
            working.cancel()
            await asyncio.wait({working})
        return self._left or (leaving.result() if leaving.done() else working.result())

    async def _say_farewell(self, working: asyncio.Future[Closed]) -> None:
        """What was sent before goes out, unless the connection ends or it takes too long."""
        sent = asyncio.ensure_future(self._outgoing.join())
        both: set[asyncio.Future[Any]] = {working, sent}
        try:
            await asyncio.wait(both, timeout=FAREWELL_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            sent.cancel()

    async def _live(self) -> Closed:
        """One connection, from its opening to its end."""
        self.state = "connecting"
        self._outgoing = asyncio.Queue()
        try:
            async with self._open() as wire:
                await self._talk(wire)
        except Refused as refused:
            self._owner.event({"type": "error", "error": {**refused.error, "fatal": True}})
            return refused
        except Closed as closed:
            return closed
        raise AssertionError("a wire ends by raising")

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[Wire]:
        """What gets through. Where no WebSocket can even be opened, the other transport tells if the server is away."""
        target = await self.target()
        self._shown = target.token
        async with AsyncExitStack() as stack:
            if self._choice() == "websocket":
                try:
                    yield await self._websocket(stack, target)
                    return
                except NotOpened:
                    self._doubt()
                    if not self._is_undecided():
                        raise
            self.transport = "sse"
            # In a thread: it takes a while, and few need it.
            module = await asyncio.to_thread(import_module, "realtime.client.event_stream")
            yield await stack.enter_async_context(module.event_stream(target))

    async def _websocket(self, stack: AsyncExitStack, target: Target) -> Wire:
        self.transport = "websocket"
        wire = await stack.enter_async_context(websocket(target))
        _websockets_pass[self._host] = True
        self._unopened = 0
        return wire

    def _doubt(self) -> None:
        """What was learnt before is void where too many did not open."""
        self._unopened += 1
        if self._unopened >= DOUBTFUL and self._options.transport == "auto":
            _websockets_pass.pop(self._host, None)

    async def _talk(self, wire: Wire) -> None:
        """Send and receive until one of them ends, which raises `Closed`."""
        tasks = [asyncio.create_task(self._receive_all(wire)), asyncio.create_task(self._send_all(wire))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended = [task for task in tasks if task.done()]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        for task in ended:
            task.result()

    async def _receive_all(self, wire: Wire) -> None:
        async for event in wire.events():
            self._owner.event(event)

    async def _send_all(self, wire: Wire) -> None:
        pace, loop = Pace(), asyncio.get_running_loop()
        while True:
            command = await self._outgoing.get()
            await asyncio.sleep(pace.wait_s(loop.time()))
            refused = await wire.send(command)
            if refused is not None:
                self._owner.event(refused)
            elif wire.acknowledges:
                self._owner.settled(command["event_id"])
            self._outgoing.task_done()

    def _comes_back(self, closed: Closed) -> bool:
        fresh_token = closed.code == CloseCode.UNAUTHENTICATED and callable(self._options.token)
        return not isinstance(closed, Left) and (closed.code in RECONNECT_CODES or fresh_token)

    def _delay_s(self, closed: Closed) -> float:
        if closed.reconnect_in_s is not None:
            return closed.reconnect_in_s
        wait_s, self.retry_after_s = self.retry_after_s, 0.0
        backoff_s = self._backoff.delay_s(asyncio.get_running_loop().time())
        return backoff_s + (wait_s if closed.code == CloseCode.LIMITED else closed.retry_after_s)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _choice(self) -> TransportName:
        if self._options.transport != "auto":
            return self._options.transport
        return "sse" if _websockets_pass.get(self._host) is False else "websocket"

    def _is_undecided(self) -> bool:
        return self._options.transport == "auto" and self._host not in _websockets_pass

    @property
    def _host(self) -> str:
        return urlsplit(self._options.url).netloc
