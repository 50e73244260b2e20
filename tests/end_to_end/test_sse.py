"""A session's events over HTTP: the same stream as over a WebSocket, for a plain `EventSource`."""

from __future__ import annotations

import asyncio
import copy
import json
from typing import Any

import httpx
import pytest

from realtime.responders.base import Reasoning
from realtime.sse import RETRY_MS, SOON_MS
from tests.end_to_end import PATIENCE_S, Model, echo
from tests.support.client import Event, attached
from tests.support.event_stream import StreamClient, connections_of, events_url, http_client, streaming
from tests.support.server import RunningServer, running_server

FAR = "session:999"


async def post(server: RunningServer, session_id: str, **command: Any) -> httpx.Response:
    """Send a command over HTTP."""
    async with http_client() as client:
        return await client.post(events_url(server, session_id), json=command)


async def refusal(url: str, *, last_event_id: str | None = None, query: str = "") -> tuple[int, Event | None]:
    """The status and the error of a request that is not answered by a stream."""
    headers = {"Last-Event-ID": last_event_id} if last_event_id is not None else {}
    async with http_client() as client:
        response = await client.get(f"{url}?{query}", headers=headers)
    return response.status_code, response.json()["error"] if response.content else None


def comparable(events: list[Event]) -> list[Event]:
    """The events of channels, without what differs from one connection to another."""
    return [{**event, "replay": None} for event in events if "seq" in event]


# --- the same stream -------------------------------------------------------------------------------------------------


async def test_history_comes_first_then_what_happens() -> None:
    """The whole session, marked `replay`, then each event as it comes, with the same JSON as over a WebSocket."""
    model = Model()
    async with running_server(model) as server, attached(server) as client:
        first = await client.respond("one", metadata={"n": 1, "s": None})
        turn = await model.turn()
        turn.end(Reasoning("hm"), "said ", "before")
        await client.until("response.done", response_id=first)
        async with streaming(events_url(server, client.session_id)) as stream:
            await stream.until("response.done", response_id=first)
            assert stream.first["session"] == {
                **client.first["session"],
                "expires_at": stream.first["session"]["expires_at"],
            }
            assert all(event.get("replay") for event in stream.transcript.events[1:])
            second = await client.respond("two")
            turn = await model.turn()
            for word in ("said ", "live ", "ü🙂\r\n"):
                turn.say(word)
                assert (await stream.until("response.output_text.delta"))["delta"] == word
                await client.until("response.output_text.delta")
            turn.end()
            await stream.until("response.done", response_id=second)
            await client.until("response.done", response_id=second)
        live = comparable(client.transcript.events)
        assert comparable(stream.transcript.events)[-len(live[-8:]) :] == live[-8:]
        assert stream.transcript.texts == client.transcript.texts
        assert stream.transcript.reasonings == client.transcript.reasonings


async def test_answer_says_what_it_is() -> None:
    """An event stream that nobody keeps or holds back, and a time to come back at that is within its grace."""
    async with running_server(echo) as server, attached(server) as client, http_client() as http:
        async with http.stream("GET", events_url(server, client.session_id)) as response:
            assert response.status_code == 200
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert response.headers["cache-control"] == "no-cache"
            assert response.headers["x-accel-buffering"] == "no"
            lines = response.aiter_lines()
            head = [await anext(lines) for _ in range(5)]
    assert head[:3] == [f"retry: {RETRY_MS}", "event: session.resumed", "id: session:0"]
    assert json.loads(head[3].removeprefix("data: "))["type"] == "session.resumed"
    assert head[4] == ""


async def test_stream_without_history_goes_on_from_now() -> None:
    """`history=none` sends what comes, from the positions of the first event."""
    async with running_server(echo) as server, attached(server) as client:
        await client.answer("before")
        async with streaming(events_url(server, client.session_id), history="none") as stream:
            await client.answer("after", response_id="r")
            await stream.until("response.done", response_id="r")
            assert [item["content"] for item in stream.transcript.items] == ["after"]


async def test_after_goes_on_from_positions() -> None:
    """As over a WebSocket, in the query."""
    async with running_server(echo) as server, attached(server) as client:
        await client.answer("before")
        seen = copy.deepcopy(client.transcript)
        async with streaming(events_url(server, client.session_id), transcript=seen, after=seen.after()) as stream:
            assert stream.first["positions"] == seen.positions
            await client.answer("after", response_id="r")
            await stream.until("response.done", response_id="r")


async def test_deltas_are_spaced_where_asked_for() -> None:
    """`delta_interval_ms` is honoured."""
    model = Model()
    async with running_server(model) as server, attached(server) as client:
        url = events_url(server, client.session_id)
        async with streaming(url, delta_interval_ms=1000) as stream:
            await client.respond()
            turn = await model.turn()
            turn.say("a")
            await stream.until("response.output_text.delta")
            for piece in "bcdef":
                turn.say(piece)
                await client.until("response.output_text.delta")
            merged = await stream.until("response.output_text.delta")
            assert (merged["delta"], merged["merged"]) == ("bcdef", 5)
            turn.end()
            await stream.until("response.done")


async def test_command_from_elsewhere_is_seen_with_its_event_id() -> None:
    """What was posted comes on the stream, as what it caused."""
    async with running_server(echo) as server, attached(server) as client:
        async with streaming(events_url(server, client.session_id)) as stream:
            answer = await post(server, client.session_id, type="response.create", input="hello", event_id="mine")
            assert answer.status_code == 202
            assert (await stream.until("conversation.item.created"))["for_event_id"] == "mine"
            created = await stream.until("response.created")
            assert created["for_event_id"] == "mine"
            assert created["response"]["id"] == answer.json()["response_id"]
            await stream.until("response.done")
            assert stream.transcript.texts[created["response"]["id"]] == "hello"


async def test_streams_are_participants() -> None:
    """Who comes and goes by a stream is told to the others, and is told of them."""
    async with running_server(echo) as server, attached(server) as client:
        async with streaming(events_url(server, client.session_id)) as stream:
            joined = (await client.until("participant.joined"))["participant"]
            assert joined["connection_id"] == stream.first["connection_id"]
            assert [one["connection_id"] for one in stream.first["participants"]] == [
                client.first["connection_id"],
                stream.first["connection_id"],
            ]
            async with attached(server, client.session_id) as third:
                told = await stream.until("participant.joined")
                assert told["participant"]["connection_id"] == third.first["connection_id"]
            await stream.until("participant.left", participant=told["participant"])
        async with asyncio.timeout(PATIENCE_S):
            await client.until("participant.left", participant=joined)


# --- coming back -----------------------------------------------------------------------------------------------------


async def test_last_event_id_goes_on_without_seam() -> None:
    """It wins over `after` and `history`: an `EventSource` repeats its query each time."""
    model = Model()
    async with running_server(model, disconnect_grace_ms=60_000) as server, attached(server) as client:
        url = events_url(server, client.session_id)
        response_id = await client.respond()
        turn = await model.turn()
        turn.say("one ")
        async with streaming(url) as stream:
            await stream.until("response.output_text.delta")
        turn.say("two ")
        await client.until("response.output_text.delta", seq=3)
        for query in ({}, {"history": "none"}, {"after": "session:0"}, {"after": "nonsense", "history": "all"}):
            back = {"transcript": stream.transcript, "last_event_id": stream.last_event_id}
            async with streaming(url, **back, **query) as stream:  # type: ignore[arg-type]
                turn.say("more ")
                await stream.until("response.output_text.delta")
        turn.end()
        async with streaming(url, transcript=stream.transcript, last_event_id=stream.last_event_id) as stream:
            await stream.until("response.done", response_id=response_id)
        await client.until("response.done", response_id=response_id)
        assert stream.transcript.texts[response_id] == client.transcript.texts[response_id]


async def test_every_event_says_where_its_reader_stands() -> None:
    """From each `id` on everything that follows comes, and nothing twice, wherever the stream was cut."""
    async with running_server(echo) as server, attached(server) as client:
        url = events_url(server, client.session_id)
        await client.send("session.update", session={"multitask_strategy": "enqueue"})
        for number in range(3):
            await client.send("response.create", input=f"text {number}", response_id=f"r{number}")
        for number in range(3):
            await client.until("response.done", response_id=f"r{number}")
        whole = await replayed(url)
        for cut in range(1, len(whole.transcript.events)):
            async with streaming(url) as stream:
                for _ in range(cut - 1):
                    await stream.receive()
            back = await replayed(url, transcript=stream.transcript, last_event_id=stream.last_event_id)
            assert back.transcript.texts == client.transcript.texts
            assert back.transcript.items == client.transcript.items
            assert back.transcript.done.keys() == client.transcript.done.keys()


async def replayed(url: str, **options: Any) -> StreamClient:
    """Read a stream until it has told of everything that its first event names and more comes live."""
    async with streaming(url, **options) as stream:
        while stream.transcript.positions != stream.first["positions"]:
            await stream.receive()
        return stream


async def test_positions_of_the_websocket_are_the_same() -> None:
    """A client may change from one transport to the other in mid-answer."""
    model = Model()
    async with running_server(model, disconnect_grace_ms=60_000) as server:
        async with attached(server) as client:
            response_id = await client.respond()
            turn = await model.turn()
            turn.say("one ")
            await client.until("response.output_text.delta")
        seen, url = client.transcript, events_url(server, client.session_id)
        turn.say("two ")
        async with streaming(url, transcript=seen, last_event_id=seen.after()) as stream:
            await stream.until("response.output_text.delta")
        turn.say("three")
        async with attached(server, client.session_id, transcript=seen, after=stream.last_event_id) as client:
            turn.end()
            await client.until("response.done")
        assert seen.texts[response_id] == "one two three"


# --- ends ------------------------------------------------------------------------------------------------------------


async def test_closed_session_is_told_and_ends_the_stream() -> None:
    """Live, and to who comes later without a `Last-Event-ID`: history, `session.closed`, and the end."""
    async with running_server(echo) as server:
        async with attached(server) as client:
            url = events_url(server, client.session_id)
            await client.answer("hello")
            async with streaming(url) as stream:
                await client.send("session.close")
                await stream.until("session.closed")
                await stream.until_end()
        async with streaming(url) as late:
            await late.until_end()
        assert late.transcript.events[-1]["type"] == "session.closed"
        assert late.transcript.texts == client.transcript.texts
        async with streaming(url, transcript=late.transcript, after=late.transcript.after()) as again:
            await again.until_end()
        assert again.transcript.events[-1]["type"] == "session.resumed"


async def test_event_source_is_stopped_where_there_is_nothing_to_come_back_for() -> None:
    """204 for a session that is closed, deleted or unknown, wherever the reader stood."""
    async with running_server(echo) as server, attached(server) as client, attached(server) as other:
        url, deleted = events_url(server, client.session_id), events_url(server, other.session_id)
        await client.answer("hello")
        await client.send("session.close")
        await client.until("session.closed")
        for last_event_id in ("session:0", client.transcript.after(), FAR):
            assert await refusal(url, last_event_id=last_event_id) == (204, None)
        async with http_client() as http:
            assert (await http.delete(deleted.removesuffix("/events"))).status_code == 204
        assert await refusal(deleted, last_event_id="session:0") == (204, None)
        for unknown in ("sess_" + "0" * 32, "x", "%F0%9F%99%82", "%00", "s" * 4000):
            assert await refusal(events_url(server, unknown), last_event_id="session:0") == (204, None)


async def test_deleted_session_ends_its_streams_with_the_reason() -> None:
    """A fatal `server_error`, then the end."""
    async with running_server(echo) as server, attached(server) as client:
        url = events_url(server, client.session_id)
        async with streaming(url) as stream:
            await server.engine.store.erase(client.session_id)
            error = (await stream.until("error"))["error"]
            assert (error["code"], error["fatal"]) == ("session_deleted", True)
            await stream.until_end()
        assert await refusal(url, last_event_id=stream.last_event_id) == (204, None)


async def test_clients_are_told_that_their_instance_goes_away() -> None:
    """`session.going_away` comes with a `retry:` of its own for each client."""
    async with running_server(echo) as server, attached(server) as client:
        async with streaming(events_url(server, client.session_id)) as stream:
            connections_of(server).say_goodbye(20, 10)
            told = await stream.until("session.going_away")
            assert told["time_left_ms"] == 20_000
            assert 0 <= told["reconnect_after_ms"] <= 10_000
            assert stream.retries == [RETRY_MS, max(told["reconnect_after_ms"] - told["time_left_ms"], SOON_MS)]


async def test_shutdown_completes_the_streams(caplog: pytest.LogCaptureFixture) -> None:
    """They are told to go, and then end as an answer does; nobody calls that a fault."""
    async with running_server(echo) as server, attached(server) as client:
        async with streaming(events_url(server, client.session_id)) as stream:
            await client.answer("hello")
            server.stop()
            told = await stream.until("session.going_away")
            assert told["time_left_ms"] > 0
            async with asyncio.timeout(PATIENCE_S):
                await stream.until_end()
    assert [record.getMessage() for record in caplog.records if record.levelname in {"ERROR", "WARNING"}] == []


# --- refusals --------------------------------------------------------------------------------------------------------


async def test_what_can_not_be_honoured_is_refused_by_status() -> None:
    """With the error as the body, before any event."""
    async with running_server(echo) as server, attached(server) as client:
        url, unknown = events_url(server, client.session_id), events_url(server, "sess_" + "0" * 32)
        for query, code, param in (
            ("after=nonsense", "invalid_positions", "after"),
            ("history=some", "invalid_query", "history"),
            ("delta_interval_ms=x", "invalid_query", "delta_interval_ms"),
        ):
            status, error = await refusal(url, query=query)
            assert error is not None
            assert (status, error["code"], error["param"]) == (400, code, param)
        for malformed in ("nonsense", "session:", "session:1,", "session:-1"):
            status, error = await refusal(url, last_event_id=malformed)
            assert error is not None
            assert (status, error["code"], error["param"]) == (400, "invalid_positions", "Last-Event-ID")
        status, error = await refusal(unknown)
        assert error is not None
        assert (status, error["code"]) == (404, "session_not_found")
        for options in ({"last_event_id": FAR}, {"query": f"after={FAR}"}):
            status, error = await refusal(url, **options)
            assert error is not None
            assert (status, error["code"]) == (404, "store_lost")


async def test_empty_last_event_id_is_none() -> None:
    """An `EventSource` that has seen no event has none to send."""
    async with running_server(echo) as server, attached(server) as client, http_client() as http:
        url = events_url(server, client.session_id)
        async with http.stream("GET", url, headers={"Last-Event-ID": ""}) as response:
            assert response.status_code == 200


async def test_other_methods_are_refused() -> None:
    """Also HEAD, which would wait for an end that does not come."""
    async with running_server(echo) as server, attached(server) as client, http_client() as http:
        for method in ("HEAD", "PUT", "DELETE", "PATCH", "OPTIONS"):
            response = await http.request(method, events_url(server, client.session_id))
            assert response.status_code == 405
            assert set(response.headers["allow"].split(", ")) == {"GET", "POST"}
            assert response.headers["content-type"] == "application/json"


async def test_full_instance_counts_both_transports() -> None:
    """503 with `Retry-After`, and others go on; who leaves makes room."""
    async with running_server(echo, max_connections=2) as server, attached(server) as client:
        url = events_url(server, client.session_id)
        async with streaming(url) as stream:
            async with http_client() as http:
                response = await http.get(url)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "too_many_connections")
            assert int(response.headers["retry-after"]) >= 1
            assert await refused_upgrade(server) == 503
            await client.answer("still served")
            await stream.until("response.done")
        await client.until("participant.left")
        async with streaming(url):
            pass


async def refused_upgrade(server: RunningServer) -> int:
    """The status with which a WebSocket is refused."""
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    async with http_client() as http:
        key = {"Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}
        return (await http.get(server.ws_url.replace("ws:", "http:"), headers={**headers, **key})).status_code


async def test_draining_instance_begins_nothing() -> None:
    """No stream, no session, no command: another instance takes them. What is there may be read, and deleted."""
    async with running_server(echo) as server, attached(server) as client, http_client() as http:
        url = events_url(server, client.session_id)
        connections_of(server).draining = True
        for response in (
            await http.get(url),
            await http.post(url, json={"type": "response.create", "input": "x"}),
            await http.post(f"{server.url}/v1/sessions"),
        ):
            assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
            assert int(response.headers["retry-after"]) >= 1
        assert await refused_upgrade(server) == 503
        assert (await http.get(url.removesuffix("/events"))).status_code == 200
        assert (await http.delete(url.removesuffix("/events"))).status_code == 204


@pytest.mark.parametrize("header", ["Origin", "Host"])
async def test_pages_of_other_origins_and_names(header: str) -> None:
    """Neither may read or send."""
    async with running_server(echo) as server, attached(server) as client, http_client() as http:
        url = events_url(server, client.session_id)
        async with http.stream("GET", url, headers={header: "http://evil.example"}) as response:
            assert response.status_code == 403
            assert "access-control-allow-credentials" not in response.headers
        posted = await http.post(url, json={"type": "session.close"}, headers={header: "http://evil.example"})
        assert posted.status_code == 403
