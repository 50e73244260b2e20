"""Streams of events whose readers go, stall, or say nothing for long, and a store or a server that fails meanwhile."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from unittest import mock

import httpx

from realtime.engine import Engine
from realtime.errors import StoreError
from realtime.sse import COMMENT_S, LOST_FLOOR_S
from realtime.viewers import SERVER_ENDED_FLOOR_S
from tests.end_to_end import PATIENCE_S, Model, Turn, echo
from tests.faults.test_slow_reader import Flood
from tests.support.client import attached
from tests.support.clock import advancing_clock
from tests.support.event_stream import StreamClient, connections_of, events_url, http_client, streaming
from tests.support.sdk import turns
from tests.support.server import RunningServer, running_server


@asynccontextmanager
async def only_reader(server: RunningServer, model: Model) -> AsyncIterator[tuple[StreamClient, Turn]]:
    """A stream that is all that looks at its session, in which a response runs."""
    async with http_client() as http:
        session_id = (await http.post(f"{server.url}/v1/sessions")).json()["session"]["id"]
        async with streaming(events_url(server, session_id)) as stream:
            create = {"type": "response.create", "input": "go", "response_id": "r"}
            await http.post(events_url(server, session_id), json=create)
            turn = await model.turn()
            turn.say("so far")
            await stream.until("response.output_text.delta")
            yield stream, turn


async def left(server: RunningServer) -> None:
    """Wait until the server knows that nobody looks any more."""
    async with asyncio.timeout(PATIENCE_S):
        while connections_of(server) or any(looked_at(server)):  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def looked_at(server: RunningServer) -> list[bool]:
    """Of each session that is open here, whether somebody looks at it."""
    return [bool(live.audience.participants) for live in server.engine.hub.sessions()]


async def runs_for(turn: Turn, seconds: float, advance: Callable[[float], None]) -> None:
    """The model call lives for so long, and not longer."""
    advance(seconds - 0.5)
    await turns()
    assert not turn.closed.is_set()
    advance(1.0)
    async with asyncio.timeout(PATIENCE_S):
        await turn.closed.wait()


# --- the grace of a lost stream --------------------------------------------------------------------------------------


async def test_lost_stream_has_five_seconds_to_come_back() -> None:
    """An `EventSource` needs them; then the response is cancelled."""
    assert LOST_FLOOR_S == 5
    model = Model()
    with advancing_clock() as advance:
        async with running_server(model) as server:
            async with only_reader(server, model) as (stream, turn):
                pass
            await left(server)
            await runs_for(turn, LOST_FLOOR_S, advance)
            async with streaming(events_url(server, stream.session_id)) as late:
                assert (await late.until("response.done"))["stop_reason"] == "disconnected"


async def test_longer_grace_counts() -> None:
    """The floor is only the least."""
    model = Model()
    with advancing_clock() as advance:
        async with running_server(model, disconnect_grace_ms=30_000) as server:
            async with only_reader(server, model) as (_, turn):
                pass
            await left(server)
            await runs_for(turn, 30, advance)


async def test_who_comes_back_in_time_stops_the_clock() -> None:
    """And the answer goes on."""
    model = Model()
    with advancing_clock() as advance:
        async with running_server(model) as server:
            async with only_reader(server, model) as (stream, turn):
                pass
            await left(server)
            advance(LOST_FLOOR_S / 2)  # the real clock runs too
            url = events_url(server, stream.session_id)
            async with streaming(url, transcript=stream.transcript, last_event_id=stream.last_event_id) as back:
                advance(30)
                await turns()
                assert not turn.closed.is_set()
                turn.end(", and on")
                assert (await back.until("response.done"))["status"] == "completed"
                assert back.transcript.texts["r"] == "so far, and on"


async def test_stream_that_the_server_ends_has_longer() -> None:
    """One that was dropped, and one that was told to go, however it then went."""
    model = Model()
    with advancing_clock() as advance:
        async with running_server(model) as server:
            async with only_reader(server, model) as (stream, turn):
                connections_of(server).say_goodbye(20, 10)
                await stream.until("session.going_away")
            await left(server)
            await runs_for(turn, SERVER_ENDED_FLOOR_S, advance)


async def test_websocket_that_was_told_to_go_has_longer() -> None:
    """It closes by itself, as it was told to, and comes back elsewhere."""
    model = Model()
    with advancing_clock() as advance:
        async with running_server(model) as server:
            async with attached(server) as client:
                await client.respond()
                turn = await model.turn()
                connections_of(server).say_goodbye(20, 10)
                await client.until("session.going_away")
            await left(server)
            await runs_for(turn, SERVER_ENDED_FLOOR_S, advance)


async def test_hanging_up_is_noticed_at_once() -> None:
    """While nothing is sent, too: the others are told, and there is room for another."""
    async with running_server(echo) as server, attached(server) as client:
        for _ in range(20):
            async with streaming(events_url(server, client.session_id)):
                await client.until("participant.joined")
            async with asyncio.timeout(PATIENCE_S):
                await client.until("participant.left")
        assert len(connections_of(server)) == 1


# --- silence ---------------------------------------------------------------------------------------------------------


async def test_comments_go_out_in_silence_and_between_events() -> None:
    """Every 15 s."""
    assert COMMENT_S == 15
    with advancing_clock() as advance:
        async with running_server(echo) as server, attached(server) as client, http_client() as http:
            async with http.stream("GET", events_url(server, client.session_id)) as response:
                lines = response.aiter_lines()
                while await anext(lines):
                    pass
                for _ in range(3):
                    advance(COMMENT_S - 1)
                    await client.answer("hello")
                    advance(1)
                    seen = []
                    async with asyncio.timeout(PATIENCE_S):
                        while not (line := await anext(lines)).startswith(":"):
                            seen.append(line)
                    assert "event: response.done" in seen


# --- a client that stops reading -------------------------------------------------------------------------------------


@asynccontextmanager
async def stalled(url: str) -> AsyncIterator[socket.socket]:
    """A request by hand whose answer nobody reads, into a small buffer."""
    parts = httpx.URL(url)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((parts.host, parts.port))
        client.sendall(f"GET {parts.path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        client.setblocking(False)
        yield client


async def test_stalled_stream_is_dropped_and_nobody_else() -> None:
    """After the send timeout: it is told to have left, and the others go on."""
    flood = Flood()
    async with running_server(flood, send_timeout_s=1.0) as server, attached(server) as client:
        async with stalled(events_url(server, client.session_id)):
            joined = (await client.until("participant.joined"))["participant"]
            response_id = await client.respond()
            async with asyncio.timeout(PATIENCE_S):
                await client.until("participant.left", participant=joined)
            assert len(connections_of(server)) <= 2
            flood.gate.set()
            await client.until("response.done", response_id=response_id)
            assert client.transcript.texts[response_id] == flood.answer


async def test_who_was_dropped_comes_back_and_has_everything() -> None:
    """Its response waits for it as for any that the server has cut off."""
    flood = Flood()
    async with running_server(flood, send_timeout_s=1.0) as server, http_client() as http:
        session_id = (await http.post(f"{server.url}/v1/sessions")).json()["session"]["id"]
        url = events_url(server, session_id)
        async with stalled(url):
            await http.post(url, json={"type": "response.create", "input": "go", "response_id": "r"})
            while not connections_of(server):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await left(server)
        assert not flood.closed.is_set()
        async with streaming(url) as stream:
            flood.gate.set()
            await stream.until("response.done")
            assert stream.transcript.texts["r"] == flood.answer


# --- a store and a server that fail ----------------------------------------------------------------------------------


async def test_store_that_is_away_refuses_streams_with_a_status() -> None:
    """503, as long as nothing was sent."""
    async with running_server(echo) as server, attached(server) as client, http_client() as http:
        away = StoreError("store_unavailable", "The store does not answer.")
        for method in ("join", "load"):
            with mock.patch.object(server.engine.store, method, side_effect=away):
                response = await http.get(events_url(server, client.session_id))
                assert (response.status_code, response.json()["error"]["type"]) == (503, "store_error")
                assert int(response.headers["retry-after"]) >= 1


async def test_fault_within_a_stream_is_told_in_it() -> None:
    """A `server_error`, fatal, without its text; then the stream ends."""
    async with running_server(echo) as server, attached(server) as client:
        async with streaming(events_url(server, client.session_id)) as stream:
            with mock.patch("realtime.cursor.Cursor.next", side_effect=ValueError("secret")):
                for reader in {reader for live in server.engine.hub.sessions() for reader in live.readers}:
                    reader.wake()
                error = (await stream.until("error"))["error"]
                await stream.until_end()
    assert (error["code"], error["fatal"]) == ("internal_error", True)
    assert "secret" not in json.dumps(error)


async def test_fault_before_a_stream_is_a_status() -> None:
    """500, in the error's shape."""
    async with running_server(echo) as server, attached(server) as client, http_client() as http:
        with mock.patch.object(Engine, "describe", side_effect=ValueError("secret")):
            response = await http.get(events_url(server, client.session_id))
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in response.text
