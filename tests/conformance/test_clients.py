"""The list of cases, held against both clients, over WebSockets and server-sent events, direct and through nginx."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest

from realtime.settings import Settings
from tests.conformance.cases import CASES, CONNECTIONS, Site
from tests.conformance.clients import javascript, python
from tests.conformance.tasks import repeat
from tests.end_to_end import Model
from tests.support.nginx import nginx
from tests.support.no_websockets import Answer, cut, garbled, redirected, without_websockets
from tests.support.ports import free_port
from tests.support.sample_tasks import MODULE
from tests.support.server import RunningServer, running_server
from tests.support.tcp_proxy import TcpProxy
from tests.support.tokens import SECRET

CLIENTS = {"python": python, "javascript": javascript}
BLOCKED = {'"~*^websocket$" websocket;': '"~*^websocket$" "";'}
"""What has nginx pass on no upgrade."""


@asynccontextmanager
async def way(server: RunningServer, name: str) -> AsyncIterator[int]:
    """The port by which a client reaches the server."""
    if name == "direct":
        yield server.port
        return
    async with nginx(server.port) as proxy:
        yield proxy.port


@pytest.mark.parametrize("path", ["direct", "nginx"])
@pytest.mark.parametrize("transport", ["websocket", "sse"])
@pytest.mark.parametrize("client", CLIENTS)
async def test_a_client_conforms(client: str, transport: str, path: str, subtests: pytest.Subtests) -> None:
    """Each case is a subtest, with a user and sessions of its own."""
    model = Model()
    limits = {"max_connections_per_user": CONNECTIONS, "auth_secret": SECRET, "rate_messages": Settings().rate_messages}
    async with (
        running_server(model, tasks=(MODULE,), functions=(repeat,), **limits) as server,
        way(server, path) as port,
        TcpProxy("127.0.0.1", port) as proxy,
        CLIENTS[client]() as open_session,
    ):
        site = Site(server, model, proxy, open_session, transport)
        for one in CASES:
            with subtests.test(one.__name__):
                async with site.case():
                    await one(site)


@pytest.mark.parametrize("client", CLIENTS)
async def test_where_websockets_are_blocked_events_are_streamed(client: str) -> None:
    """By itself, with nothing lost on the way; and once that is known no WebSocket is tried again."""
    model = Model()
    async with running_server(model) as server, nginx(server.port, replacing=BLOCKED) as proxy:
        async with CLIENTS[client]() as open_session:
            session = await open_session(proxy.url)
            answer = await session.call("respond", "Hello", {})
            (await model.turn()).end("one")
            assert await session.call("text", answer) == "one"
            assert (await session.call("show"))["transport"] == "sse"
            assert session.told == []
            assert [event["type"] for event in session.attached] == ["session.created"]
            other = await open_session(proxy.url, session_id=session.session_id)
            await other.until("response.done")
        await proxy.quit()
        assert len([line for line in proxy.access_log if "/v1/realtime" in line]) == 1


@pytest.mark.parametrize("answer", [redirected, cut, garbled])
@pytest.mark.parametrize("client", CLIENTS)
async def test_where_no_message_comes_by_a_websocket_events_are_streamed(client: str, answer: Answer) -> None:
    """Whether the upgrade is sent elsewhere, or goes through and nothing after it, or something else."""
    model = Model()
    async with (
        running_server(model) as server,
        without_websockets(server.port, answer) as url,
        CLIENTS[client]() as open_session,
    ):
        session = await open_session(url)
        said = await session.call("respond", "Hello", {})
        (await model.turn()).end("one")
        assert await session.call("text", said) == "one"
        assert (await session.call("show"))["transport"] == "sse"
        assert session.told == []


@pytest.mark.parametrize("answer", [redirected, cut, garbled])
@pytest.mark.parametrize("client", CLIENTS)
async def test_where_no_message_comes_any_more_events_are_streamed(client: str, answer: Answer) -> None:
    """The network may be another one in the middle of an answer."""
    model = Model()
    async with (
        running_server(model) as server,
        without_websockets(server.port, answer) as url,
        TcpProxy("127.0.0.1", server.port) as proxy,
        CLIENTS[client]() as open_session,
    ):
        session = await open_session(f"http://127.0.0.1:{proxy.port}")
        said = await session.call("respond", "Hello", {"disconnect_grace_ms": 60_000})
        turn = await model.turn()
        turn.say("one ")
        await session.until_text(said, "one ")
        proxy.target = "127.0.0.1", urlsplit(url).port or 0
        await session.call("drop", 0)
        turn.end("two")
        assert await session.call("text", said) == "one two"
        assert (await session.call("show"))["transport"] == "sse"


@pytest.mark.parametrize("client", CLIENTS)
async def test_a_server_that_is_away_is_no_reason_to_leave_websockets(client: str) -> None:
    """It is waited for, and then reached by one."""
    model = Model()
    async with running_server(model) as server, TcpProxy("127.0.0.1", server.port) as proxy:
        async with CLIENTS[client]() as open_session:
            proxy.target = "127.0.0.1", free_port()
            session = await open_session(f"http://127.0.0.1:{proxy.port}")
            answer = await session.call("respond", "Hello", {})
            await session.until_told("disconnect")
            proxy.target = "127.0.0.1", server.port
            (await model.turn()).end("one")
            assert await session.call("text", answer) == "one"
            assert (await session.call("show"))["transport"] == "websocket"


@pytest.mark.parametrize("client", CLIENTS)
async def test_where_websockets_do_not_open_any_more_events_are_streamed(client: str) -> None:
    """After three in a row, though they got through before: the network may be another one."""
    model = Model()
    async with (
        running_server(model) as server,
        nginx(server.port, replacing=BLOCKED) as blocked,
        TcpProxy("127.0.0.1", server.port) as proxy,
        CLIENTS[client]() as open_session,
    ):
        session = await open_session(f"http://127.0.0.1:{proxy.port}")
        await session.until_open()
        proxy.target = "127.0.0.1", blocked.port
        await session.call("drop", 0)
        await session.until_open(2)
        assert (await session.call("show"))["transport"] == "sse"
        assert len(session.told) == 3
