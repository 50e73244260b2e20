"""After many sessions that ended in many ways nothing is left: no task, socket, session, object or model call."""

from __future__ import annotations

import asyncio
import gc
import random
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from websockets.asyncio.client import connect

from realtime.connection import Connection
from realtime.cursor import Cursor
from realtime.feed import Feed
from realtime.live import LiveSession
from realtime.responders.anthropic import AnthropicResponder
from realtime.responders.base import Request, ResponderEvent
from realtime.turn import Turn
from realtime.view import View
from tests.conftest import open_descriptors
from tests.support.client import Client, attached
from tests.support.http_connection import RST_ON_CLOSE
from tests.support.model_server import ModelServer
from tests.support.scenarios import Scenario, Stall, Start, Stop, Text, answer
from tests.support.server import RunningServer, running_server

PATIENCE_S = 20.0
CYCLES = 60
KINDS = (Connection, Feed, Cursor, LiveSession, View, Turn)
"""What lives no longer than somebody looks or something runs."""


def alive() -> Counter[str]:
    """How many objects of `KINDS` there are."""
    gc.collect()
    return Counter(type(found).__name__ for found in gc.get_objects() if isinstance(found, KINDS))


def reset(client: Client) -> None:
    """Leave with a TCP reset."""
    client.socket.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_ON_CLOSE)
    client.socket.transport.abort()


async def leave(client: Client, chance: random.Random) -> None:
    """Go in one of the ways in which clients go."""
    match chance.randrange(5):
        case 0:
            await client.socket.close()
        case 1:
            reset(client)
        case 2:
            client.socket.transport.write_eof()
        case 3:
            await client.send("session.close")
            await client.until("session.closed")
        case _:
            await client.send("response.cancel", response_id="r")
            await client.until("response.done", response_id="r")


async def cycle(server: RunningServer, chance: random.Random) -> None:
    """One session with one or two viewers, whose response is left in some phase."""
    async with attached(server) as client:
        model = chance.choice(["headers", "first", "middle", "whole"])
        await client.send("response.create", response_id="r", input="go", model=model)
        if chance.random() < 0.3:
            more = {"response_id": "q", "multitask_strategy": "enqueue", "model": model}
            await client.send("response.create", input="go", **more)
        if model in {"middle", "whole"}:
            await client.until("response.output_text.delta")
        if chance.random() < 0.3:
            async with attached(server, client.session_id) as second:
                if chance.random() < 0.5:
                    reset(second)
        await leave(client, chance)


async def settled(holds: Callable[[], bool]) -> None:
    """Return once something holds, or after a while."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not holds():  # noqa: ASYNC110
                await asyncio.sleep(0.005)
    except TimeoutError:
        return


@pytest.mark.parametrize("at_once", [1, 10])
async def test_many_sessions_leave_nothing(at_once: int) -> None:
    """As many tasks, descriptors and objects as before, one after the other and together; no model call is open."""
    chance = random.Random(6)
    async with ModelServer(default=answer("Whole.")) as model:
        model.scenarios["headers"] = Scenario([Stall()])
        model.scenarios["first"] = Scenario([Start(), Stall()])
        model.scenarios["middle"] = Scenario([Text("a"), Stall()])
        model.scenarios["whole"] = Scenario([Text("a"), Text("b"), Stop()])
        responder = AnthropicResponder(base_url=model.url, api_key="test")
        async with running_server(responder) as server:
            engine = server.engine
            objects = alive()
            tasks, background = len(asyncio.all_tasks()), len(engine._background._tasks)
            descriptors = len(open_descriptors())
            for _ in range(CYCLES // at_once):
                await asyncio.gather(*(cycle(server, chance) for _ in range(at_once)))
            await settled(lambda: not (engine._running or server.busy_sessions or model.active))
            await settled(lambda: len(engine._background._tasks) == background and len(asyncio.all_tasks()) <= tasks)
            assert (engine._running, server.busy_sessions, model.active) == ({}, 0, [])
            assert (len(engine._background._tasks), engine.hub._sessions) == (background, {})
            kept = model.connections  # the SDK's pool keeps what it can use again
            await settled(lambda: len(open_descriptors()) <= descriptors + 2 * kept)
            assert len(open_descriptors()) <= descriptors + 2 * kept
            await settled(lambda: alive() == objects)
            assert alive() == objects


async def test_who_never_gets_in_leaves_nothing() -> None:
    """Half a handshake, a refused one, an unknown session, a client that is gone before it is accepted."""

    async def unknown(server: RunningServer) -> None:
        async with connect(server.ws_url + "?session_id=nobody", proxy=None) as client:
            await client.wait_closed()
        assert client.close_code == 4404

    async def half(server: RunningServer) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /v1/realtime HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        writer.close()
        await writer.wait_closed()

    async def gone_at_once(server: RunningServer) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_ON_CLOSE)
        writer.write(
            b"GET /v1/realtime HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        writer.transport.abort()

    async def refused(server: RunningServer) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(
            b"GET /v1/realtime?after=nonsense HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        assert b" 400 " in await reader.readline()
        writer.close()
        await writer.wait_closed()

    ways: list[Callable[[RunningServer], Awaitable[None]]] = [unknown, half, gone_at_once, refused]
    async with running_server() as server:
        objects, descriptors = alive(), len(open_descriptors())
        for _ in range(10):
            for way in ways:
                await way(server)
        await settled(lambda: alive() == objects and not server.busy_sessions)
        assert (alive(), server.busy_sessions, server.engine.hub._sessions) == (objects, 0, {})
        await settled(lambda: len(open_descriptors()) <= descriptors)
        assert len(open_descriptors()) <= descriptors


@pytest.mark.parametrize("pieces", range(6))
async def test_closed_at_any_of_its_yields_a_responder_leaves_nothing_to_complain_of(pieces: int) -> None:
    """In asyncio's debug mode, with a responder that nests generators and holds a resource."""
    loop = asyncio.get_running_loop()
    loop.set_debug(True)
    complaints: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _loop, context: complaints.append(context))
    held = 0

    async def inner() -> AsyncIterator[str]:
        nonlocal held
        held += 1
        try:
            for number in range(5):
                yield f"{number} "
                await asyncio.sleep(0)
            await loop.create_future()
        finally:
            await asyncio.sleep(0)
            held -= 1

    async def responder(request: Request) -> AsyncIterator[ResponderEvent]:
        async with asyncio.timeout(60):
            pieces_of = inner()
            try:
                async for piece in pieces_of:
                    yield piece
            finally:
                await pieces_of.aclose()  # type: ignore[attr-defined]

    async with running_server(responder) as server:
        async with attached(server) as client:
            await client.respond()
            said = 0
            while said < pieces and said < 5:
                said = len((await client.until("response.output_text.delta"))["delta"].split()) + said
        await settled(lambda: not (server.engine._running or server.busy_sessions))
        assert (held, server.engine._running, server.busy_sessions) == (0, {}, 0)
    gc.collect()
    assert complaints == []


async def test_a_resumed_session_keeps_no_trace_of_its_earlier_connections() -> None:
    """One session, a hundred connections one after the other."""

    async def brief(request: Request) -> AsyncIterator[ResponderEvent]:
        yield "brief"

    async with running_server(brief) as server, attached(server) as first:
        await first.answer()
        live = next(iter(server.engine.hub.sessions()))
        await settled(lambda: set(live.views) == {"session"})
        objects, tasks = alive(), len(asyncio.all_tasks())
        for number in range(100):
            async with attached(server, first.session_id, history="none") as again:  # whose history nobody would read
                if number % 10 == 0:
                    await again.answer()
                    await first.until("response.done")
                if number % 3 == 0:
                    reset(again)
            await first.until("participant.left")
        await settled(lambda: len(live.readers) == 1 and len(asyncio.all_tasks()) <= tasks)
        await settled(lambda: alive() == objects)
        assert (alive(), len(live.readers), len(live.audience.participants)) == (objects, 1, 1)
        assert set(live.views) == {"session"}
