"""What the Python client alone has: how its block begins and ends, and what it takes."""

from __future__ import annotations

import asyncio

import pytest

import realtime.client.event_stream  # noqa: F401  a test that gives up would leave its import under way in a thread
from realtime.client import SessionClosed, connect
from realtime.client.connection import Connection, Options
from realtime.client.events import Fields
from realtime.client.wire import Closed, Left
from realtime.protocol import ItemCreate as Create
from realtime.protocol import NewItem, Pong, ResponseDone, SessionCreated
from tests.end_to_end import PATIENCE_S, Model, echo
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


async def test_to_leave_a_block_can_be_cancelled() -> None:
    """Whoever is cancelled meanwhile is cancelled."""
    leaving = asyncio.Event()

    async def block(url: str) -> None:
        async with connect(url, transport="sse") as session:
            await session.opened()
            leaving.set()
        await asyncio.Event().wait()  # would never end if the cancelling was lost

    async with running_server(echo) as server, asyncio.timeout(PATIENCE_S):
        task = asyncio.create_task(block(server.url))
        await leaving.wait()
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()


class Leaver:
    """An owner that leaves as soon as a loss is told."""

    def __init__(self, url: str) -> None:
        options = Options(url=url, token=None, transport="auto", delta_interval_ms=0)
        self.connection = Connection(options, self)
        self.losses: list[int] = []

    def resumption(self) -> tuple[str | None, dict[str, str]]:
        return None, {}

    def event(self, event: Fields) -> None:
        raise AssertionError(event)

    def settled(self, event_id: str) -> None:
        raise AssertionError(event_id)

    def lost(self, closed: Closed, reconnect_in_s: float) -> None:
        self.losses.append(closed.code)
        self.connection.leave(Left(1000, "left"))


async def test_who_is_told_of_a_loss_may_close() -> None:
    """It does not come back."""
    leaver = Leaver(f"http://127.0.0.1:{free_port()}")
    async with asyncio.timeout(PATIENCE_S):
        assert (await leaver.connection.run()).code == 1000
    assert leaver.losses == [1006]


async def test_what_was_sent_goes_out_before_the_block_ends() -> None:
    """Over server-sent events each command is a request, which is waited for."""
    model = Model()
    async with running_server(model) as server, asyncio.timeout(PATIENCE_S):
        async with connect(server.url, transport="sse") as session:
            answer = session.respond("Hello", disconnect_grace_ms=60_000)
            turn = await model.turn()
            answer.cancel()
        await turn.closed.wait()


async def test_a_mistake_in_the_address_is_raised_at_once() -> None:
    """It is no loss of a connection."""
    with pytest.raises(ValueError, match="localhost"):
        await connect("localhost:8000").__aenter__()


async def test_why_there_is_no_token_is_the_cause() -> None:
    """Of the end that it leads to."""

    def fresh() -> str:
        raise OSError("the provider is away")

    async with running_server(echo, auth_secret=SECRET) as server, asyncio.timeout(PATIENCE_S):
        async with connect(server.url, token=fresh, open_timeout_s=0.5) as session:
            with pytest.raises(SessionClosed) as closed:
                await session.opened()
    assert closed.value.close_code == 4401
    assert isinstance(closed.value.__cause__, OSError)


async def test_a_token_that_never_comes_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """After as long as a silent connection may last."""
    monkeypatch.setattr("realtime.client.connection.SILENCE_S", 0.05)
    asked: list[None] = []

    async def fresh() -> str:
        asked.append(None)
        if len(asked) == 1:
            await asyncio.Event().wait()
        return token("ann")

    async with running_server(echo, auth_secret=SECRET) as server, asyncio.timeout(PATIENCE_S):
        async with connect(server.url, token=fresh) as session:
            await session.opened()
    assert len(asked) == 2
