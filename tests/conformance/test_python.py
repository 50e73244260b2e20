"""What the Python client alone has: how its block begins and ends, and what it takes."""

from __future__ import annotations

import asyncio

import pytest

from realtime.client import SessionClosed, connect
from realtime.protocol import ItemCreate as Create
from realtime.protocol import NewItem, Pong, ResponseDone, SessionCreated
from tests.end_to_end import PATIENCE_S, echo
from tests.support.ports import free_port
from tests.support.server import running_server
from tests.support.tokens import SECRET, token


async def test_a_server_that_can_not_be_reached_ends_the_session() -> None:
    """After the time that was given, for whoever waits."""
    async with connect(f"http://127.0.0.1:{free_port()}", open_timeout_s=0.3) as session:
        stream = session.respond("Hello")
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(SessionClosed) as closed:
                await stream.text()
            with pytest.raises(SessionClosed):
                await session.opened()
    assert closed.value.close_code == 1006


async def test_the_loop_over_a_session_misses_nothing() -> None:
    """It begins with how the session was attached, and yields structs."""
    async with running_server(echo) as server, connect(server.ws_url) as session, asyncio.timeout(PATIENCE_S):
        session.send({"type": "ping"})
        session.send(Create(item=NewItem(role="user", content="Good day")))
        stream = session.respond("Hello")
        kinds = []
        async for event in session:
            kinds.append(type(event))
            if isinstance(event, ResponseDone):
                break
        assert kinds[0] is SessionCreated
        assert Pong not in kinds  # it was about a connection that was not there yet
        assert await stream.text() == "Hello"
        assert not session.unfinished


async def test_a_token_may_come_from_a_coroutine() -> None:
    """One that fails has none to show, and is asked again."""
    asked: list[None] = []

    async def fresh() -> str:
        asked.append(None)
        if len(asked) == 1:
            raise OSError("the provider is away")
        return token("ann")

    async with running_server(echo, auth_secret=SECRET) as server, asyncio.timeout(PATIENCE_S):
        async with connect(server.url, token=fresh) as session:
            assert await session.respond("Hello").text() == "Hello"
    assert len(asked) == 2
