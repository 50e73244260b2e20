"""What the Python client alone has: how its block begins and ends, and what it takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

import pytest

import realtime.client.event_stream  # noqa: F401  a test that gives up would leave its import under way in a thread
from realtime.client import RealtimeError, SessionClosed, connect
from realtime.client.connection import Connection, Options, Transport
from realtime.client.events import Fields
from realtime.client.wire import Closed, Left
from realtime.protocol import ItemCreate as Create
from realtime.protocol import NewItem, Pong, ResponseDone, SessionCreated
from tests.end_to_end import PATIENCE_S, Model, echo
from tests.support.no_websockets import swallowed, without_websockets
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


@pytest.mark.parametrize(
    "proxy", ["http://{}127.0.0.1:9", "socks5://{}127.0.0.1:9", "foo://{}127.0.0.1:9", "foo://{}x"]
)
async def test_a_proxy_that_leads_nowhere_is_named(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    """Without its password. Also one of a kind that the client can't use."""
    for name, value in {"http_proxy": proxy.format("ann:secret@"), "no_proxy": ""}.items():
        monkeypatch.setenv(name, value)
        monkeypatch.delenv(name.upper(), raising=False)
    async with running_server(echo) as server, asyncio.timeout(PATIENCE_S):
        losses = Losses()
        async with connect(server.url, on_lost=losses):
            reason = (await losses.next()).reason
            assert reason.endswith(f", by way of the proxy {proxy.format('')}")
            assert "secret" not in reason


@pytest.mark.parametrize("transport", ["websocket", "sse"])
async def test_a_redirect_is_named(transport: Transport) -> None:
    """As it is not followed."""
    answer = b"HTTP/1.1 301 Moved Permanently\r\nLocation: https://h/\r\nContent-Length: 0\r\n\r\n"
    async with answering(answer) as url, asyncio.timeout(PATIENCE_S):
        losses = Losses()
        async with connect(url, transport=transport, on_lost=losses):
            assert (await losses.next()).reason == "HTTP 301, a redirect to 'https://h/'"


class Loss(NamedTuple):
    """What is told of one."""

    code: int
    reason: str
    reconnect_in_s: float


class Losses:
    """An `on_lost` that keeps them."""

    def __init__(self) -> None:
        self._told: asyncio.Queue[Loss] = asyncio.Queue()

    def __call__(self, code: int, reason: str, reconnect_in_s: float) -> None:
        self._told.put_nowait(Loss(code, reason, reconnect_in_s))

    async def next(self) -> Loss:
        """The next one, once there is one."""
        return await self._told.get()


@asynccontextmanager
async def answering(*answers: bytes) -> AsyncIterator[str]:
    """The URL of what answers one request after the other with these; the last stands for all that follow."""
    left = list(answers)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(left.pop(0) if len(left) > 1 else left[0])
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 201 Created\r\nContent-Length: 6\r\nConnection: close\r\n\r\n<html>",
        b"HTTP/1.1 201 Created\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}",
        STREAM + b"data: <html>\n\n",
        STREAM + b"data: [1]\n\n",
        STREAM + b"data: " + b"x" * 1_500_000 + b"\n\n",
    ],
)
async def test_what_can_not_be_read_over_http_is_a_loss(answer: bytes) -> None:
    """And it comes back."""
    session_id = None if b"201" in answer else "sess_1"
    async with answering(answer) as url, asyncio.timeout(PATIENCE_S):
        losses = Losses()
        async with connect(url, session_id=session_id, transport="sse", on_lost=losses):
            for _ in range(2):
                assert (await losses.next())[:2] == (1006, "unreadable")


@pytest.mark.parametrize("transport", ["websocket", "sse"])
async def test_what_is_on_the_way_is_waited_for_as_long_as_it_says(transport: Transport) -> None:
    """By `Retry-After`."""
    answer = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 30\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    async with answering(answer) as url, asyncio.timeout(PATIENCE_S):
        losses = Losses()
        async with connect(url, transport=transport, on_lost=losses):
            assert 30 < (await losses.next()).reconnect_in_s < 31


async def test_a_websocket_by_which_nothing_comes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """After as long as one may take to open: a network may let the upgrade pass, and nothing after it."""
    monkeypatch.setattr("realtime.client.websocket.OPEN_S", 0.3)
    async with running_server(echo) as server, asyncio.timeout(PATIENCE_S):
        async with without_websockets(server.port, swallowed) as url, connect(url) as session:
            assert await session.respond("Hello").text() == "Hello"
            assert session.transport == "sse"


async def test_what_on_lost_raises_ends_the_session_and_its_block() -> None:
    """It is how to give up."""
    given_up = LookupError("enough")

    def lost(_code: int, _reason: str, _reconnect_in_s: float) -> None:
        raise given_up

    async def block(url: str) -> None:
        async with connect(url, on_lost=lost) as session:
            await session.opened()
            stream = session.respond("Hello")
            session.drop()
            with pytest.raises(SessionClosed) as closed:
                await stream.text()
            assert closed.value.__cause__ is given_up

    async with running_server(echo) as server, asyncio.timeout(PATIENCE_S):
        with pytest.raises(LookupError) as raised:
            await block(server.url)
    assert raised.value is given_up


async def test_what_has_no_type_is_no_message() -> None:
    """A mistake is told at once."""
    async with connect(f"http://127.0.0.1:{free_port()}") as session:
        with pytest.raises(ValueError, match="type"):
            session.send({"no": "type"})


async def test_what_is_in_the_place_of_a_result_has_a_code() -> None:
    """Also where its status says that all is well."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\n<html>"
    async with answering(answer) as url, asyncio.timeout(PATIENCE_S):
        async with connect(url) as session:
            with pytest.raises(RealtimeError) as error:
                await session.fetch_result("/v1/tasks/x/result")
    assert error.value.code == "unreachable"


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
