"""Readers: each follows one session over WebSocket and SSE in turn, leaves at random, and goes on where it was."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from contextlib import aclosing, suppress
from typing import Any
from urllib.parse import urlencode

import httpx
import msgspec
from httpx_sse import EventSource, SSEError
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage
from websockets.typing import Subprotocol

from realtime.log import parse_positions
from tests.chaos.sessions import Session
from tests.chaos.site import Site
from tests.support.client import Event, Transcript

WAYS = ("realtime.v1", "realtime.v1.msgpack", "sse")
LONGEST_STAY_S = 15.0
LONGEST_ABSENCE_S = 1.5
HANDSHAKE_S = 5.0
SILENCE_S = 35.0
GONE_CODES = frozenset({"session_not_found", "store_lost", "session_deleted"})
BROKEN = (OSError, ConnectionClosed, InvalidHandshake, InvalidMessage, TimeoutError, httpx.HTTPError, SSEError)
"""What a connection may come to in chaos. Its reader comes back."""


class _Left(Exception):
    """The server says that there is nothing more to come back for."""


class Reading(Transcript):
    """A transcript that counts what it is sent and keeps no events."""

    def __init__(self) -> None:
        super().__init__()
        self.resets: list[str] = []

    def apply(self, event: Event) -> None:
        """Take one event."""
        super().apply(event)
        self.events.clear()
        if event.get("reset"):
            self.resets.append(event["response_id"])


class Reader:
    """One reader. `run` is its life; `broken` says what it was sent that it should not have been."""

    def __init__(self, site: Site, session: Session, name: str) -> None:
        self.site = site
        self.session = session
        self.name = name
        self.transcript = Reading()
        self.broken = ""
        self.gone = ""
        self.socket: ClientConnection | None = None
        self.ways: Sequence[str] = WAYS
        self._chance = site.chance(name)
        self._connection: asyncio.Task[None] | None = None
        self._last_event_id = ""
        self._back_after_s = 0.0
        self._is_attached = False

    async def run(self) -> None:
        """Read for ever, over one connection after the other, until there is nothing to come back for."""
        while not self.gone and not self.broken:
            self._back_after_s = 0.0
            self._connection = asyncio.create_task(self._connect(), name=self.name)
            try:
                await asyncio.wait([self._connection])
            finally:
                self._connection.cancel()
                await asyncio.wait([self._connection])
                self._detach()
            self._judge(self._connection)
            absence_s = self._chance.uniform(0, 0.3 if self.site.calm else LONGEST_ABSENCE_S)
            await asyncio.sleep(max(absence_s, self._back_after_s))

    def cut(self) -> bool:
        """Have its connection break; returns whether there is one."""
        if self.socket is not None:
            self.socket.transport.abort()
        elif self._is_attached and self._connection is not None:
            self._connection.cancel()
        return self._is_attached

    async def send(self, command: dict[str, Any]) -> None:
        """Send a command over its WebSocket. Raises `ConnectionClosed`."""
        assert self.socket is not None
        packed = self.socket.subprotocol == "realtime.v1.msgpack"
        await self.socket.send(msgspec.msgpack.encode(command) if packed else json.dumps(command))

    def _judge(self, connection: asyncio.Task[None]) -> None:
        if connection.cancelled():
            return
        match error := connection.exception():
            case None:
                return
            case _Left():
                self.gone = self.session.gone = str(error)
                self.site.note(f"{self.name} is told: {error}")
            case AssertionError():
                self.broken = str(error)[:2000] or repr(error)
                self.site.violated("a seam", self.name, self.broken)
            case _ if isinstance(error, BROKEN):
                self.site.counts[f"connections lost: {type(error).__name__}"] += 1
                self._back_after_s = max(self._back_after_s, self._chance.uniform(0.1, 0.6))
            case _:
                self.broken = repr(error)
                self.site.violated("a reader that failed", self.name, self.broken)

    async def _connect(self) -> None:
        self.site.counts["connections"] += 1
        way = self._chance.choice(self.ways)
        stay_s = 3600.0 if self.site.calm else self._chance.uniform(0.2, LONGEST_STAY_S)
        leaving = random.Random(self._chance.random())
        with suppress(TimeoutError):
            async with asyncio.timeout(stay_s) as stay:
                await (self._stream(stay) if way == "sse" else self._listen(way, stay, leaving))

    def _detach(self) -> None:
        self.socket = None
        if self._is_attached:
            self._is_attached = False
            self.session.detach(self.site.now())

    def _attach(self) -> None:
        self._is_attached = True
        self.session.attach(self.site.now())

    @property
    def _after(self) -> dict[str, str]:
        is_new = self.transcript.positions == {"session": 0}
        return {} if is_new else {"after": self.transcript.after()}

    async def _listen(self, way: str, stay: asyncio.Timeout, leaving: random.Random) -> None:
        url = f"{self.site.proxy.ws_url}?{urlencode({'session_id': self.session.id, **self._after})}"
        socket = await connect(
            url,
            subprotocols=[Subprotocol(way)],
            compression=None,
            max_size=None,
            proxy=None,
            open_timeout=HANDSHAKE_S,
            ping_interval=None,
            close_timeout=1,
        )
        try:
            await self._follow(socket, stay)
        finally:
            if leaving.random() < 0.5:
                socket.transport.abort()
            await socket.close()

    async def _follow(self, socket: ClientConnection, stay: asyncio.Timeout) -> None:
        while True:
            async with asyncio.timeout(SILENCE_S * 2):
                frame = await socket.recv()
            self._take(msgspec.msgpack.decode(frame) if isinstance(frame, bytes) else json.loads(frame), stay)
            self.socket = socket

    async def _stream(self, stay: asyncio.Timeout) -> None:
        url = f"{self.site.proxy.url}/v1/sessions/{self.session.id}/events"
        headers = {"Last-Event-ID": self._last_event_id} if self._last_event_id and self._chance.random() < 0.7 else {}
        limits = httpx.Timeout(HANDSHAKE_S, read=SILENCE_S)
        query = {} if headers else self._after
        async with self.site.http.stream("GET", url, headers=headers, params=query, timeout=limits) as response:
            await self._check_status(response)
            async with aclosing(EventSource(response).aiter_sse()) as events:
                async for told in events:
                    event: Event = json.loads(told.data)
                    self._take(event, stay)
                    assert parse_positions(told.id) == self.transcript.positions, (self.transcript.positions, told)
                    self._last_event_id = told.id

    async def _check_status(self, response: httpx.Response) -> None:
        if response.status_code == 204:
            raise _Left("204")
        if response.status_code != 200:
            body = (await response.aread()).decode(errors="replace")
            if response.status_code == 404:
                raise _Left(body)
            raise httpx.HTTPError(f"{response.status_code} {body}")

    def _take(self, event: Event, stay: asyncio.Timeout) -> None:
        if not self._is_attached and event["type"] == "session.resumed":
            self._attach()
        self.transcript.apply(event)
        self._last_event_id = self.transcript.after()
        self.site.counts["events read"] += 1
        self.session.heard(event)
        match event["type"]:
            case "session.going_away":
                self.site.counts["told to go away"] += 1
                stay.reschedule(asyncio.get_running_loop().time() + event["reconnect_after_ms"] / 1000)
            case "error" if event["error"].get("fatal"):
                if event["error"]["code"] in GONE_CODES:
                    raise _Left(event["error"]["code"])
                raise OSError(event["error"]["code"])
            case _:
                pass
