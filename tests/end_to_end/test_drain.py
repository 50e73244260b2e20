"""An instance that is told to end, from its clients' side: what still works, what is refused, how each answer ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from realtime.responders.base import Request
from tests.end_to_end import PATIENCE_S, Model, Turn, events_of, refused, until_closed
from tests.support.client import Client, attached
from tests.support.redis_server import redis_server
from tests.support.server import RunningServer, running_server

LONG_S = 30.0
"""A drain that is longer than its test."""


@asynccontextmanager
async def draining(model: Model, **settings: Any) -> AsyncIterator[tuple[RunningServer, Client, Turn]]:
    """A server that drains, with a client whose response runs and has said one word."""
    async with running_server(model, **{"drain_s": LONG_S, **settings}) as server, attached(server) as client:
        await client.respond(response_id="r1")
        turn = await model.turn()
        try:
            turn.say("one")
            await client.until("response.output_text.delta")
            server.stop()
            await drained(server)
            yield server, client, turn
        finally:
            turn.end()


async def drained(server: RunningServer) -> None:
    """Return once the server has begun to drain."""
    async with asyncio.timeout(PATIENCE_S), http_to(server) as http:
        while (await http.get("/readyz")).status_code == 200:
            pass


def http_to(server: RunningServer) -> httpx.AsyncClient:
    """An HTTP client."""
    return httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=PATIENCE_S)


async def test_it_is_alive_but_not_ready() -> None:
    """Who watches over it sends nobody more, and does not restart it either."""
    async with draining(Model()) as (server, _, _), http_to(server) as http:
        ready = await http.get("/readyz")
        assert (ready.status_code, ready.json()["error"]["code"]) == (503, "draining")
        assert int(ready.headers["retry-after"]) > 0
        assert (await http.get("/healthz")).status_code == 200


async def test_upgrades_are_refused_with_a_status() -> None:
    """By an answer that lets a proxy try the next instance."""
    async with draining(Model()) as (server, client, _):
        for query in ("", f"?session_id={client.session_id}"):
            with pytest.raises(InvalidStatus) as refusal:
                await connect(server.ws_url + query, proxy=None)
            assert refusal.value.response.status_code == 503
            assert int(refusal.value.response.headers["Retry-After"]) > 0
            assert refusal.value.response.body is not None
            assert json.loads(refusal.value.response.body)["error"]["code"] == "draining"


@pytest.mark.parametrize("path", ["/v1/stream", "/v1/complete"])
async def test_one_shots_are_refused(path: str) -> None:
    """Before any model call."""
    model = Model()
    async with draining(model) as (server, _, _), http_to(server) as http:
        answer = await http.post(path, json={"prompt": "Hi"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
        assert "retry-after" in answer.headers
    assert model.calls == 1


async def test_attached_clients_may_do_all_but_ask_for_more() -> None:
    """A response is refused so that it can be asked for elsewhere, under the same id; the rest is carried out."""
    model = Model()
    async with draining(model) as (_, client, turn):
        error = await refused(client, "response.create", input="more", event_id="e1", multitask_strategy="enqueue")
        assert error["code"] == "draining"
        assert error["retry_after_ms"] > 0
        await client.send("conversation.item.create", item={"role": "user", "content": "still here"})
        await client.until("conversation.item.created")
        await client.send("response.cancel", response_id="r1")
        assert (await client.until("response.done"))["status"] == "cancelled"
        await turn.closed.wait()
    assert model.calls == 1


async def test_response_that_finishes_in_time_is_whole() -> None:
    """The client is told to go, at the latest when there is nothing left to wait for, and then cut off."""
    async with draining(Model()) as (_, client, turn):
        turn.end(" two")
        assert (await client.until("response.done"))["status"] == "completed"
        assert client.transcript.texts["r1"] == "one two"
        assert await until_closed(client) == 1012
        [told] = events_of(client, "session.going_away")
        assert told["reason"] == "shutdown"
        assert told["time_left_ms"] > 0


@pytest.mark.parametrize("says", ["one", None])
async def test_response_that_does_not_finish_fails_by_name(says: str | None) -> None:
    """With what it has said, which may be nothing; the model call is closed."""
    model = Model()
    async with running_server(model, drain_s=1) as server, attached(server) as client:
        await client.respond(response_id="r1")
        turn = await model.turn()
        if says:
            turn.say(says)
            await client.until("response.output_text.delta")
        server.stop()
        done = await client.until("response.done")
        assert (done["status"], done["error"]["type"]) == ("failed", "server_error")
        assert done["error"]["code"] == "instance_shutdown"
        assert client.transcript.texts["r1"] == (says or "")
        assert turn.closed.is_set()
        assert await until_closed(client) == 1012


async def test_queued_response_does_not_start_in_the_last_moment() -> None:
    """The next one of the session is another instance's, if there is one."""
    model = Model()
    async with running_server(model, drain_s=1) as server, attached(server) as client:
        await client.respond(response_id="r1")
        await client.respond(response_id="r2", multitask_strategy="enqueue")
        turn = await model.turn()
        server.stop()
        await drained(server)
        turn.end("one")
        assert (await client.until("response.done"))["status"] == "completed"
        assert await until_closed(client) == 1012
    assert model.calls == 1


async def test_stream_that_finishes_in_time_is_whole() -> None:
    """A one-shot is waited for like a response."""
    model = Model()
    async with running_server(model, drain_s=LONG_S) as server, http_to(server) as http:
        async with http.stream("POST", "/v1/stream", json={"prompt": "Hi"}) as answer:
            turn = await model.turn()
            lines = answer.aiter_lines()
            turn.say("one")
            assert await anext(lines) == 'data: {"text":"one"}'
            server.stop()
            await drained(server)
            turn.end(" two")
            rest = [line async for line in lines if line]
    assert (rest[0], rest[1], rest[-1]) == ('data: {"text":" two"}', "event: done", "data: [DONE]")


async def test_one_shots_that_do_not_finish_fail_by_name() -> None:
    """A stream by an event and its last word, a whole answer by its status; the model calls are closed."""
    model = Model()
    async with running_server(model, drain_s=1) as server, http_to(server) as http:
        whole = asyncio.create_task(http.post("/v1/complete", json={"prompt": "Hi"}))
        first = await model.turn()
        async with http.stream("POST", "/v1/stream", json={"prompt": "Hi"}) as answer:
            second = await model.turn()
            second.say("one")
            server.stop()
            said, name, failure, last = [line async for line in answer.aiter_lines() if line]
        assert (said, name, last) == ('data: {"text":"one"}', "event: server_error", "data: [DONE]")
        assert json.loads(failure.removeprefix("data: "))["code"] == "instance_shutdown"
        assert (await whole).status_code == 500, "a proxy would repeat a 503, and the model was asked already"
        assert (await whole).json()["error"]["code"] == "instance_shutdown"
        assert first.closed.is_set()
        assert second.closed.is_set()


async def test_idle_clients_of_the_only_instance_are_let_go_at_once() -> None:
    """However long the drain may take: there is nowhere they could go meanwhile."""
    async with running_server(Model(), drain_s=LONG_S) as server, attached(server) as client:
        server.stop()
        assert await until_closed(client) == 1012
        assert [event["type"] for event in client.transcript.events] == ["session.created", "session.going_away"]


async def floods(request: Request) -> AsyncIterator[str]:
    """A responder that never stops talking."""
    while True:
        yield "x" * 10_000


async def test_client_that_takes_nothing_of_a_stream_holds_up_nobody() -> None:
    """Its end can't be told; it is cut off."""
    async with running_server(floods, drain_s=1, send_timeout_s=60) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1)
        writer.write(b"POST /v1/stream HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 16\r\n\r\n" + b'{"prompt": "Hi"}')
        await ends_soon(server)
        writer.transport.abort()


async def test_stream_of_events_holds_up_nobody() -> None:
    """Its client has nowhere to go, and nothing runs."""
    async with running_server(Model(), drain_s=LONG_S) as server, http_to(server) as http:
        session_id = (await http.post("/v1/sessions")).json()["session"]["id"]
        async with http.stream("GET", f"/v1/sessions/{session_id}/events") as events:
            lines = events.aiter_lines()
            while await anext(lines) != "event: session.resumed":
                pass
            await ends_soon(server)
            with suppress(httpx.RemoteProtocolError):
                assert "event: session.going_away" in [line async for line in lines]


async def test_body_that_does_not_come_holds_up_nobody() -> None:
    """It has not begun, so it does not count."""
    async with running_server(Model(), drain_s=LONG_S) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"POST /v1/stream HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 16\r\n\r\n{")
        await writer.drain()
        await ends_soon(server)
        assert await reader.read() == b""
        writer.close()


async def ends_soon(server: RunningServer) -> None:
    """Tell the server to end, and see that it does soon."""
    server.stop()
    async with asyncio.timeout(PATIENCE_S):
        await server.ended()


# --- with other instances on the same store --------------------------------------------------------------------------


@asynccontextmanager
async def two_servers(model: Model, *, drain_s: float = LONG_S) -> AsyncIterator[tuple[RunningServer, RunningServer]]:
    """Two servers on one Redis: the one that drains in a test, and the one that stays."""
    async with (
        redis_server() as redis,
        running_server(model, redis_url=redis.url, drain_s=1) as stays,
        running_server(model, redis_url=redis.url, drain_s=drain_s) as goes,
    ):
        yield goes, stays


async def test_idle_clients_get_the_time_to_leave() -> None:
    """Each has a time of its own within the drain; when all have left it is over."""
    async with two_servers(Model()) as (goes, _), attached(goes) as client, attached(goes) as other:
        goes.stop()
        told = [await one.until("session.going_away") for one in (client, other)]
        assert all(0 <= event["reconnect_after_ms"] <= event["time_left_ms"] < LONG_S * 1000 for event in told)
        await client.socket.close()
        await other.send("ping")
        await other.until("pong")
        await other.socket.close()
        async with asyncio.timeout(PATIENCE_S):
            await goes.ended()


async def test_idle_clients_that_stay_are_cut_off() -> None:
    """At the deadline, as from any server that restarts."""
    async with two_servers(Model(), drain_s=1) as (goes, _), attached(goes) as client:
        goes.stop()
        assert await until_closed(client) == 1012


async def test_response_goes_on_while_its_reader_moves() -> None:
    """For its last viewer to leave because it was told to is no reason to stop it."""
    model = Model()
    async with two_servers(model) as (goes, stays), attached(goes) as client:
        await client.respond(response_id="r1")
        turn = await model.turn()
        turn.say("one")
        await client.until("response.output_text.delta")
        goes.stop()
        await client.until("session.going_away")
        await client.socket.close()
        transcript, session_id = client.transcript, client.session_id
        async with attached(stays, session_id, transcript=transcript, after=transcript.after()) as moved:
            assert moved.first["positions"].keys() == {"session", "r1"}
            turn.say(" two")
            async with asyncio.timeout(PATIENCE_S):
                await moved.until("response.output_text.delta")
                turn.end(" three")
                assert (await moved.until("response.done"))["status"] == "completed"
                await goes.ended()
        assert transcript.texts["r1"] == "one two three"
    assert model.calls == 1


async def test_queued_response_is_run_by_an_instance_that_stays() -> None:
    """The one that drains begins nothing more."""
    model = Model()
    async with two_servers(model) as (goes, stays), attached(goes) as client:
        await client.respond(response_id="r1")
        await client.respond(response_id="r2", multitask_strategy="enqueue")
        first = await model.turn()
        goes.stop()
        await client.until("session.going_away")
        await client.socket.close()
        async with attached(stays, client.session_id) as moved:
            first.end("one")
            second = await model.turn()
            second.end("two")
            async with asyncio.timeout(PATIENCE_S):
                await goes.ended()
                assert (await moved.until("response.done", response_id="r2"))["status"] == "completed"
        assert moved.transcript.texts == {"r1": "one", "r2": "two"}
    assert model.calls == 2


async def test_response_that_outlives_the_drain_is_ended_for_readers_everywhere() -> None:
    """As failed, with what it has said."""
    model = Model()
    async with two_servers(model, drain_s=1) as (goes, stays), attached(goes) as client:
        await client.respond(response_id="r1")
        turn = await model.turn()
        turn.say("one")
        async with attached(stays, client.session_id) as other:
            await other.until("response.output_text.delta")
            goes.stop()
            async with asyncio.timeout(PATIENCE_S):
                done = await other.until("response.done")
        assert (done["status"], done["error"]["code"]) == ("failed", "instance_shutdown")
        assert other.transcript.texts["r1"] == "one"
        assert turn.closed.is_set()
