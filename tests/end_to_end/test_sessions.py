"""Sessions over HTTP: made, shown, sent commands and erased by clients that have no WebSocket."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from realtime import pace
from realtime.protocol import Overrides
from realtime.responders.base import Reasoning, Request
from tests.end_to_end import PATIENCE_S, Model, echo, until_closed
from tests.support.client import Client, Event, Transcript, attached
from tests.support.event_stream import events_url, http_client, streaming
from tests.support.server import RunningServer, running_server

UNKNOWN = ["sess_" + "0" * 32, "x", "%F0%9F%99%82", "%00", "s" * 4000, "a,b:c", "%7Bx%7D"]
"""Ids of no session, and what can't be one."""

READ_EVERY_S = 0.003


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with http_client() as http:
        yield http


def session_url(server: RunningServer, session_id: str) -> str:
    """Where a session is."""
    return f"{server.url}/v1/sessions/{session_id}"


async def made(server: RunningServer, http: httpx.AsyncClient, **overrides: Any) -> str:
    """Make a session; returns its id."""
    response = await http.post(f"{server.url}/v1/sessions", json=overrides)
    assert response.status_code == 201
    return str(response.json()["session"]["id"])


async def command(server: RunningServer, http: httpx.AsyncClient, session_id: str, **fields: Any) -> Event:
    """Send a command that has to be accepted."""
    response = await http.post(events_url(server, session_id), json=fields)
    assert response.status_code == 202, response.text
    body: Event = response.json()
    assert body["accepted"] is True
    return body


async def shown(server: RunningServer, http: httpx.AsyncClient, session_id: str) -> Event:
    """The session's state."""
    response = await http.get(session_url(server, session_id))
    assert response.status_code == 200
    assert response.headers["cache-control"] == "no-store"
    body: Event = response.json()
    return body


async def settled_state(server: RunningServer, http: httpx.AsyncClient, session_id: str) -> Event:
    """The session's state once nothing runs in it."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            state = await shown(server, http, session_id)
            if list(state["positions"]) == ["session"]:
                return state
            await asyncio.sleep(0.005)


def assert_error(response: httpx.Response, status: int, code: str, param: str | None = None) -> None:
    """The answer is that error, in the protocol's shape."""
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert (error["code"], error.get("param")) == (code, param)
    assert error["message"]
    assert "fatal" not in error


# --- POST /v1/sessions -----------------------------------------------------------------------------------------------


async def test_made_session_is_there(http: httpx.AsyncClient) -> None:
    """With what was asked for and the defaults for the rest; its place is named, and it can be attached to."""
    async with running_server(echo) as server:
        asked = {"instructions": "Be brief.", "max_output_tokens": 7, "multitask_strategy": "enqueue"}
        response = await http.post(f"{server.url}/v1/sessions", json=asked)
        assert response.status_code == 201
        session = response.json()["session"]
        assert set(response.json()) == {"session"}
        assert {name: session[name] for name in asked} == asked
        assert session["owner"] == "anonymous"
        assert session["created_at"] < session["expires_at"]
        assert response.headers["location"] == f"/v1/sessions/{session['id']}"
        assert (await http.get(server.url + response.headers["location"])).status_code == 200
        async with attached(server, session["id"]) as client:
            assert client.first["type"] == "session.resumed"
            assert await client.answer("hello") == "hello"


async def test_session_needs_no_body(http: httpx.AsyncClient) -> None:
    """Nothing, or an empty object: the defaults."""
    async with running_server(echo) as server, attached(server) as client:
        settings = set(Overrides.__struct_fields__)
        for content in (b"", b"{}"):
            session = (await http.post(f"{server.url}/v1/sessions", content=content)).json()["session"]
            assert {name: session[name] for name in settings} == {
                name: client.first["session"][name] for name in settings
            }


BAD_SETTINGS = [
    (b"{", "invalid_json", None),
    (b"[]", "invalid_message", None),
    (b'"x"', "invalid_message", None),
    (b"\xff", "invalid_json", None),
    (b'{"model": ' * 5_000, "invalid_message", "model"),
    (b'{"instructions": 1}', "invalid_message", "instructions"),
    (b'{"on_disconnect": "maybe"}', "invalid_message", "on_disconnect"),
    (b'{"disconnect_grace_ms": -1}', "invalid_message", "disconnect_grace_ms"),
    (b'{"max_output_tokens": 4097}', "max_output_tokens_too_large", "max_output_tokens"),
    (b'{"model": "other"}', "model_not_found", "model"),
    (b'{"id": "mine"}', "unknown_field", "id"),
    (b'{"type": "session.update", "session": {}}', "unknown_field", "type"),
]


async def test_settings_that_are_not_allowed_make_no_session(http: httpx.AsyncClient) -> None:
    """As in `session.update`."""
    async with running_server(echo, allowed_models=()) as server:
        for body, code, param in BAD_SETTINGS:
            assert_error(await http.post(f"{server.url}/v1/sessions", content=body), 400, code, param)


async def test_bodies_have_a_limit(http: httpx.AsyncClient) -> None:
    """That of a message, on both endpoints that take one."""
    async with running_server(echo, max_message_bytes=1000) as server:
        session_id = await made(server, http)
        item = {"type": "conversation.item.create", "item": {"role": "user", "content": "x"}}
        for url, body in ((f"{server.url}/v1/sessions", {}), (events_url(server, session_id), item)):
            fitting = json.dumps(body).encode().ljust(1000)
            assert (await http.post(url, content=fitting)).status_code in {201, 202}
            assert_error(await http.post(url, content=fitting + b" "), 413, "body_too_large")


# --- POST …/events ---------------------------------------------------------------------------------------------------


async def test_conversation_without_a_websocket(http: httpx.AsyncClient) -> None:
    """Make a session, ask, read the answer, close: over plain HTTP alone."""
    async with running_server(echo) as server:
        session_id = await made(server, http)
        item = await command(
            server, http, session_id, type="conversation.item.create", item={"role": "system", "content": "Be brief."}
        )
        asked = await command(server, http, session_id, type="response.create", input="hello", metadata={"n": 1})
        state = await settled_state(server, http, session_id)
        assert [(one["role"], one["content"]) for one in state["items"]] == [("system", "Be brief."), ("user", "hello")]
        assert [one["id"] for one in state["items"]] == [item["item_id"], asked["item_id"]]
        [response] = state["responses"]
        assert (response["id"], response["status"], response["text"]) == (asked["response_id"], "completed", "hello")
        await command(server, http, session_id, type="session.close")
        assert_error(
            await http.post(events_url(server, session_id), json={"type": "response.create", "input": "x"}),
            409,
            "session_closed",
        )


COMMANDS: list[tuple[dict[str, Any], set[str]]] = [
    ({"type": "session.update", "session": {"instructions": "x"}}, set()),
    ({"type": "conversation.item.create", "item": {"role": "user", "content": "x"}}, {"item_id"}),
    ({"type": "conversation.item.create", "item": {"role": "user", "content": "x", "id": "mine"}}, {"item_id"}),
    ({"type": "conversation.item.truncate", "response_id": "first", "heard_chars": 2}, set()),
    ({"type": "response.cancel", "response_id": "first"}, set()),
    ({"type": "response.create"}, {"response_id"}),
    ({"type": "response.create", "input": "x", "response_id": "mine"}, {"response_id", "item_id"}),
    ({"type": "session.close"}, set()),
]


@pytest.mark.parametrize(("fields", "ids"), COMMANDS)
async def test_command_sent_again_is_answered_alike(
    fields: dict[str, Any], ids: set[str], http: httpx.AsyncClient
) -> None:
    """It is carried out once; the second answer has the same ids, and says that it is a duplicate."""
    async with running_server(echo) as server, attached(server) as client:
        await client.answer("hello", response_id="first")
        first = await command(server, http, client.session_id, event_id="again", **fields)
        assert first.keys() == {"event_id", "accepted"} | ids
        assert first["event_id"] == "again"
        assert await command(server, http, client.session_id, event_id="again", **fields) == {
            **first,
            "duplicate": True,
        }
        other = {"type": "response.create", "input": "another", "event_id": "again"}
        assert_error(
            await http.post(events_url(server, client.session_id), json=other), 409, "event_id_reused", "event_id"
        )


async def test_command_is_the_same_over_both_transports(http: httpx.AsyncClient) -> None:
    """One that was sent over the WebSocket is not carried out again over HTTP."""
    model = Model()
    async with running_server(model) as server, attached(server) as client:
        fields = {"event_id": "again", "response_id": "r", "input": "question"}
        await client.send("response.create", **fields)
        await client.until("response.created")
        again = await command(server, http, client.session_id, type="response.create", **fields)
        assert (again["duplicate"], again["response_id"]) == (True, "r")
        (await model.turn()).end("answer")
        await client.until("response.done")
        assert model.calls == 1


async def test_command_without_an_id_is_given_one(http: httpx.AsyncClient) -> None:
    """The events that it causes carry it."""
    async with running_server(echo) as server, attached(server) as client:
        answer = await command(server, http, client.session_id, type="session.update", session={})
        assert answer["event_id"].startswith("evt_")
        await client.until("session.updated", for_event_id=answer["event_id"])


BAD_COMMANDS = [
    (b"", "invalid_json", None),
    (b"nonsense", "invalid_json", None),
    (b'{"type": "ping"}', "unknown_type", "type"),
    (b'{"type": "auth.refresh", "token": "x"}', "unknown_type", "type"),
    (b'{"type": "nonsense"}', "unknown_type", "type"),
    (b"{}", "unknown_type", "type"),
    (b'{"type": "response.create", "nonsense": 1}', "unknown_field", "nonsense"),
    (b'{"type": "response.create", "input": 1}', "invalid_message", "input"),
    (b'{"type": "response.create"}', "empty_conversation", "input"),
    (b'{"type": "session.close", "event_id": ""}', "invalid_message", "event_id"),
]


async def test_bad_commands_are_refused(http: httpx.AsyncClient) -> None:
    """With the same errors as over the WebSocket, and their status; nothing comes of them."""
    async with running_server(echo) as server:
        session_id = await made(server, http)
        for body, code, param in BAD_COMMANDS:
            assert_error(await http.post(events_url(server, session_id), content=body), 400, code, param)
        for fields in ({"type": "response.cancel"}, {"type": "conversation.item.truncate", "heard_chars": 1}):
            response = await http.post(events_url(server, session_id), json={**fields, "response_id": "none"})
            assert_error(response, 404, "response_not_found", "response_id")
        assert (await shown(server, http, session_id))["positions"] == {"session": 0}


async def test_response_in_progress_is_a_conflict(http: httpx.AsyncClient) -> None:
    """409, and after the first has ended the command may be sent again under its id."""
    model = Model()
    async with running_server(model) as server, attached(server) as client:
        await client.respond()
        create = {"type": "response.create", "input": "second", "event_id": "second"}
        refused = await http.post(events_url(server, client.session_id), json=create)
        assert_error(refused, 409, "response_in_progress")
        (await model.turn()).end("done")
        await client.until("response.done")
        assert "duplicate" not in await command(server, http, client.session_id, **create)
        (await model.turn()).end("done")
        await client.until("response.done")


async def test_command_is_carried_out_though_its_sender_hangs_up() -> None:
    """Once the whole of it is here."""
    model = Model()
    async with running_server(model) as server, attached(server) as client:
        body = json.dumps({"type": "response.create", "input": "question", "response_id": "r"}).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        path = events_url(server, client.session_id).removeprefix(server.url)
        writer.write(b"POST %s HTTP/1.1\r\nHost: localhost\r\n" % path.encode())
        writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        writer.transport.abort()
        assert (await client.until("response.created"))["response"]["id"] == "r"
        (await model.turn()).end("answer")
        await client.until("response.done")


async def test_response_that_nobody_has_seen_waits_for_a_reader(http: httpx.AsyncClient) -> None:
    """Who asks over HTTP and attaches then finds the answer running."""
    model = Model()
    async with running_server(model) as server:
        session_id = await made(server, http)
        await command(server, http, session_id, type="response.create", input="question")
        turn = await model.turn()
        turn.say("an ")
        async with streaming(events_url(server, session_id)) as stream:
            await stream.until("response.output_text.delta")
            turn.end("answer")
            assert (await stream.until("response.done"))["status"] == "completed"
        assert list(stream.transcript.texts.values()) == ["an answer"]


# --- GET /v1/sessions/{session_id} -----------------------------------------------------------------------------------


async def test_new_session_is_empty(http: httpx.AsyncClient) -> None:
    """Nothing has been said in it."""
    async with running_server(echo) as server:
        session_id = await made(server, http)
        state = await shown(server, http, session_id)
        assert state.pop("session")["id"] == session_id
        assert state == {"positions": {"session": 0}, "items": [], "responses": [], "tasks": []}


async def test_state_has_every_response_as_far_as_it_has_come(http: httpx.AsyncClient) -> None:
    """Done, failed, running, waiting: each with what is known of it, and no more."""
    model = Model()
    async with running_server(model) as server, attached(server) as client:
        await client.send("session.update", session={"multitask_strategy": "enqueue", "instructions": "new"})
        for number in range(4):
            await client.send("response.create", input=f"{number}", response_id=f"r{number}", metadata={"n": number})
        (await model.turn()).end(Reasoning("hm"), "zero 🙂")
        (await model.turn()).fail(RuntimeError("secret"))
        turn = await model.turn()
        turn.say(Reasoning("well"), "two ", "so far")
        await client.until("response.output_text.delta", response_id="r2", seq=4)
        await client.send("conversation.item.truncate", response_id="r0", heard_chars=4)
        await client.until("conversation.item.truncated")
        state = await shown(server, http, client.session_id)
        assert state["session"]["instructions"] == "new"
        assert state["positions"] == client.transcript.positions
        assert state["items"] == client.transcript.items
        zero, one, two, three = state["responses"]
        assert (zero["status"], zero["text"], zero["stop_reason"]) == ("completed", "zero 🙂", "end_turn")
        assert (zero["output_chars"], zero["heard_chars"], zero["metadata"]) == (7, 4, {"n": 0})
        assert zero["usage"] == client.transcript.done["r0"]["usage"]
        assert (one["status"], one["text"], one["error"]["code"]) == ("failed", "", "responder_failed")
        assert "stop_reason" not in one
        assert "secret" not in json.dumps(state)
        assert (two["status"], two["text"]) == ("in_progress", "two so far")
        assert (three["status"], three["text"]) == ("queued", "")
        unfinished = {"id", "status", "model", "created_at", "metadata", "user", "text"}
        assert two.keys() == three.keys() == unfinished
        for asked in (turn, await ended(model, turn)):
            asked.end()


async def ended(model: Model, turn: Any) -> Any:
    """End a turn; returns the next one."""
    turn.end()
    return await model.turn()


async def test_state_of_a_closed_session_stays_readable(http: httpx.AsyncClient) -> None:
    """Who goes on from its positions is still told that it is closed."""
    async with running_server(echo) as server, attached(server) as client:
        await client.answer("hello", response_id="r")
        await client.send("session.close")
        await client.until("session.closed")
        state = await shown(server, http, client.session_id)
        assert state["responses"][0]["text"] == "hello"
        assert state["positions"] == {"session": client.transcript.positions["session"] - 1}
        after = ",".join(f"{channel}:{position}" for channel, position in state["positions"].items())
        async with attached(server, client.session_id, transcript=resumed(state), after=after) as late:
            assert await until_closed(late) == 1000
            assert late.transcript.events[-1]["type"] == "session.closed"


def resumed(state: Event) -> Transcript:
    """What a client has that was shown this."""
    transcript = Transcript()
    transcript.positions = dict(state["positions"])
    transcript.items = list(state["items"])
    for response in state["responses"]:
        transcript.texts[response["id"]] = response["text"]
        if response["status"] not in {"queued", "in_progress"}:
            transcript.done[response["id"]] = response
    return transcript


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("journal_interval_ms", [1, 40])
async def test_who_goes_on_from_a_state_has_the_whole(
    seed: int, journal_interval_ms: int, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever it is read while others write, what comes after it makes it whole: no seam, nothing twice."""
    monkeypatch.setattr(pace, "MAX_REST_S", 0.0)  # all this in one process is busy: each piece would wait for long
    chance = random.Random(seed)

    async def responder(request: Request) -> AsyncIterator[str]:
        for number in range(chance.randrange(200)):
            yield f"{request.messages[-1].content}-{number} " + chance.choice(["", "\u2028", "🙂", "\x00", "\r\n"])
            if number % 7 == 0:
                await asyncio.sleep(chance.choice([0, 0.002, 0.004]))

    async with running_server(responder, journal_interval_ms=journal_interval_ms) as server, attached(server) as client:
        await client.send("session.update", session={"multitask_strategy": "enqueue"})
        states: list[Event] = []
        reading = asyncio.create_task(keep_reading(server, http, client.session_id, states))
        try:
            await write(client, chance)
            await read_to_the_end(client)
        finally:
            reading.cancel()
            await asyncio.wait([reading])
        assert len(states) > 20
        for state in chance.sample(states, 20):
            await assert_goes_on(server, client, state)


async def keep_reading(server: RunningServer, http: httpx.AsyncClient, session_id: str, states: list[Event]) -> None:
    """Read the session's state again and again."""
    while True:
        states.append(await shown(server, http, session_id))
        await asyncio.sleep(READ_EVERY_S)


async def write(client: Client, chance: random.Random) -> None:
    """Ask, add, truncate and cancel, at random."""
    for number in range(12):
        await client.send("response.create", input=f"q{number}", response_id=f"r{number}", event_id=f"e{number}")
        await client.send("conversation.item.create", item={"role": "user", "content": f"note {number}"})
        while chance.random() < 0.7:
            await client.receive()
        if chance.random() < 0.3:
            await client.send("response.cancel", response_id=f"r{chance.randrange(number + 1)}", heard_chars=3)


async def read_to_the_end(client: Client) -> None:
    """Receive until everything that was asked for is done."""
    async with asyncio.timeout(PATIENCE_S):
        while len(client.transcript.done) < 12:
            await client.receive()


async def assert_goes_on(server: RunningServer, client: Client, state: Event) -> None:
    """A client that has `state` and attaches with its positions comes to have all that `client` has."""
    transcript = resumed(state)
    async with attached(server, client.session_id, transcript=transcript, after=transcript.after()) as late:
        while transcript.positions != late.first["positions"]:
            await late.receive()
    assert transcript.items == client.transcript.items
    assert {name: text for name, text in transcript.texts.items() if text} == {
        name: text for name, text in client.transcript.texts.items() if text
    }
    assert transcript.done.keys() == client.transcript.done.keys()


# --- DELETE ----------------------------------------------------------------------------------------------------------


async def test_deleted_session_is_gone_with_everything_of_it(http: httpx.AsyncClient) -> None:
    """At once: the model call is closed, every connection told, and nothing is left."""
    model = Model()
    async with running_server(model) as server, attached(server) as client:
        url = events_url(server, client.session_id)
        async with streaming(url) as stream:
            await client.respond()
            turn = await model.turn()
            turn.say("so far")
            await stream.until("response.output_text.delta")
            deleted = await http.delete(session_url(server, client.session_id))
            assert (deleted.status_code, deleted.content) == (204, b"")
            assert "content-length" not in deleted.headers
            async with asyncio.timeout(PATIENCE_S):
                await turn.closed.wait()
            assert await until_closed(client) == 4410
            assert client.transcript.events[-1]["error"]["code"] == "session_deleted"
            assert (await stream.until("error"))["error"]["code"] == "session_deleted"
            await stream.until_end()
        await assert_unknown(server, http, client.session_id)


async def test_unknown_sessions_are_all_alike(http: httpx.AsyncClient) -> None:
    """404 with one body, on every verb, for what never was and for what can't be."""
    async with running_server(echo) as server:
        bodies = set()
        for session_id in UNKNOWN:
            bodies |= await assert_unknown(server, http, session_id)
        assert len(bodies) == 1


async def assert_unknown(server: RunningServer, http: httpx.AsyncClient, session_id: str) -> set[str]:
    """Every verb answers that there is no such session; returns the bodies."""
    command = {"json": {"type": "response.create", "input": "x"}}
    responses = [
        await http.get(session_url(server, session_id)),
        await http.delete(session_url(server, session_id)),
        await http.get(events_url(server, session_id)),
        await http.post(events_url(server, session_id), **command),  # type: ignore[arg-type]
    ]
    for response in responses:
        assert_error(response, 404, "session_not_found", "session_id")
    return {response.text for response in responses}


async def test_other_methods_are_refused(http: httpx.AsyncClient) -> None:
    """In the error's shape, with those that are allowed."""
    async with running_server(echo) as server:
        session_id = await made(server, http)
        for url, methods, allowed in (
            (f"{server.url}/v1/sessions", ("GET", "PUT", "DELETE", "OPTIONS"), "POST"),
            (session_url(server, session_id), ("POST", "PUT", "PATCH", "OPTIONS"), "DELETE, GET"),
        ):
            for method in methods:
                response = await http.request(method, url)
                assert_error(response, 405, "method_not_allowed")
                assert ", ".join(sorted(response.headers["allow"].split(", "))) == allowed
            assert (await http.head(url)).status_code == 405


async def test_sessions_go_by_over_http_too(http: httpx.AsyncClient) -> None:
    """Use keeps a session; without any it expires."""
    async with running_server(echo, session_ttl_s=0.2) as server:
        session_id = await made(server, http)
        async with asyncio.timeout(PATIENCE_S):
            while (await http.get(session_url(server, "x" + session_id))).status_code != 404:
                pass
            await asyncio.sleep(0.3)
        await assert_unknown(server, http, session_id)
