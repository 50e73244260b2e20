"""A command is carried out once, however often and wherever it is sent under its `event_id`."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tests.end_to_end import Model, echo, events_of, refused, settled
from tests.support.client import attached
from tests.support.event_stream import http_client
from tests.support.server import running_server

COMMANDS: list[tuple[str, str, dict[str, Any]]] = [
    ("session.update", "session.updated", {"session": {"instructions": "x"}}),
    ("conversation.item.create", "conversation.item.created", {"item": {"role": "user", "content": "x"}}),
    ("conversation.item.create", "conversation.item.created", {"item": {"role": "user", "content": "x", "id": "mine"}}),
    ("conversation.item.truncate", "conversation.item.truncated", {"response_id": "first", "heard_chars": 2}),
    ("response.cancel", "conversation.item.truncated", {"response_id": "first", "heard_chars": 2}),
    ("response.create", "response.created", {"input": "x"}),
    ("response.create", "response.created", {"input": "x", "response_id": "mine"}),
]


@pytest.mark.parametrize(("kind", "effect", "fields"), COMMANDS)
async def test_command_sent_again_has_one_effect(kind: str, effect: str, fields: dict[str, Any]) -> None:
    """The same command under the same id is carried out once and is no error, on this connection and on the next."""
    async with running_server(echo) as server:
        async with attached(server) as client:
            await client.answer("hello", response_id="first")
            for _ in range(3):
                await client.send(kind, event_id="again", **fields)
            await settled(client)
            session_id, transcript = client.session_id, client.transcript
        async with attached(server, session_id, transcript=transcript, after=transcript.after()) as client:
            await client.send(kind, event_id="again", **fields)
            await settled(client)
            caused = [event for event in events_of(client, effect) if event.get("for_event_id") == "again"]
            assert len(caused) == 1
            assert events_of(client, "error") == []


async def test_command_of_a_lost_connection_is_sent_again_without_harm() -> None:
    """A client that never heard what became of its command sends it again: one response, one model call."""
    model = Model()
    async with running_server(model, on_disconnect="continue") as server, attached(server) as witness:
        for number in range(10):
            create = {"input": "question", "response_id": f"r{number}", "event_id": f"e{number}"}
            async with attached(server, witness.session_id, history="none") as client:
                await client.send("response.create", **create)
                client.reset()
            async with attached(server, witness.session_id, history="none") as client:
                await client.send("response.create", **create)
                turn = await model.turn()
                assert turn.request.response_id == f"r{number}"
                turn.end("answer")
                await witness.until("response.done", response_id=f"r{number}")
                await settled(client)
                assert events_of(client, "error") == []
        assert model.calls == len(events_of(witness, "response.created")) == 10
        assert len(witness.transcript.items) == 10


async def test_command_sent_on_two_connections_at_once_has_one_effect() -> None:
    """Several tabs that send the same command at the same moment have it carried out once, and none gets an error."""
    model = Model()
    async with running_server(model) as server, AsyncExitStack() as stack:
        one = await stack.enter_async_context(attached(server))
        clients = [one]
        clients += [await stack.enter_async_context(attached(server, one.session_id)) for _ in range(4)]
        for number in range(10):
            fields = {"input": "question", "metadata": {"n": number}, "event_id": f"e{number}"}
            await asyncio.gather(*(client.send("response.create", **fields) for client in clients))
            turn = await model.turn()
            turn.end("answer")
            for client in clients:
                await settled(client)
            await one.until("response.done") if len(one.transcript.done) <= number else None
        for client in clients:
            assert events_of(client, "error") == []
            assert len(events_of(client, "response.created")) == 10
            assert len(client.transcript.items) == 10
        assert model.calls == 10


OTHER_COMMANDS: list[tuple[str, dict[str, Any]]] = [
    ("conversation.item.create", {"item": {"role": "user", "content": "other"}}),
    ("conversation.item.create", {"item": {"role": "system", "content": "one"}}),
    ("session.update", {"session": {"instructions": "other"}}),
    ("response.create", {"input": "other"}),
    ("response.create", {}),
]


async def test_id_of_another_command_is_refused() -> None:
    """The same id with other content is an `event_id_reused` error on any connection, and nothing happens."""
    async with running_server(echo) as server:
        for kind, fields in OTHER_COMMANDS:
            async with attached(server) as one, attached(server, one.session_id) as two:
                item = {"role": "user", "content": "one"}
                await one.send("conversation.item.create", item=item, event_id="used")
                await two.until("conversation.item.created")
                for client in (one, two):
                    error = await refused(client, kind, event_id="used", **fields)
                    assert (error["type"], error["code"], error["param"]) == (
                        "conflict_error",
                        "event_id_reused",
                        "event_id",
                    )
                    await settled(client)
                await settled(one)
                assert [entry["content"] for entry in one.transcript.items] == ["one"]
                assert events_of(one, "response.created") == []


async def test_refused_command_may_be_retried_under_its_id() -> None:
    """A refusal is not recorded: the same command, or one that is put right, may come under its id."""
    model = Model()
    async with running_server(model) as server, attached(server) as client:
        await client.respond("one")
        turn = await model.turn()
        error = await refused(client, "response.create", input="two", event_id="retry")
        assert error["code"] == "response_in_progress"
        turn.end()
        await client.until("response.done")
        await client.send("response.create", input="two", event_id="retry")
        created = await client.until("response.created")
        assert created["for_event_id"] == "retry"
        (await model.turn()).end()
        await client.until("response.done")
        error = await refused(client, "response.cancel", response_id="unknown", event_id="mended")
        assert error["code"] == "response_not_found"
        await client.send("conversation.item.create", item={"role": "user", "content": "x"}, event_id="mended")
        assert (await client.until("conversation.item.created"))["for_event_id"] == "mended"


async def test_malformed_command_may_be_put_right_under_its_id() -> None:
    """A message that was none is not recorded either."""
    async with running_server(echo) as server, attached(server) as client:
        await refused(client, "conversation.item.create", item={"role": "nobody", "content": "x"}, event_id="e1")
        await client.send("conversation.item.create", item={"role": "user", "content": "x"}, event_id="e1")
        assert (await client.until("conversation.item.created"))["for_event_id"] == "e1"


async def test_ids_belong_to_their_session() -> None:
    """The same id in two sessions are two commands."""
    async with running_server(echo) as server, attached(server) as one, attached(server) as two:
        for client, content in ((one, "a"), (two, "b")):
            await client.send("conversation.item.create", item={"role": "user", "content": content}, event_id="e1")
            assert (await client.until("conversation.item.created"))["item"]["content"] == content


async def test_commands_without_an_id_are_carried_out_each_time() -> None:
    """Only an `event_id` makes two commands one."""
    async with running_server(echo) as server, attached(server) as client:
        for _ in range(3):
            await client.send("conversation.item.create", item={"role": "user", "content": "x"})
        await settled(client)
        assert len(client.transcript.items) == 3


async def test_name_of_a_request_is_its_command_s_id() -> None:
    """Where that has none. One that is too long to be an id is refused: without one, each copy would be carried out."""
    async with running_server(echo) as server, attached(server) as client, http_client(base_url=server.url) as http:
        url = f"/v1/sessions/{client.session_id}/events"
        said = {"type": "conversation.item.create", "item": {"role": "user", "content": "hi"}}
        for key, answers in (("k" * 64, [(202, False), (202, True)]), ("k" * 65, [(400, False)] * 2)):
            for expected in answers:
                answer = await http.post(url, json=said, headers={"Idempotency-Key": key})
                assert (answer.status_code, answer.json().get("duplicate", False)) == expected
                assert answer.status_code == 202 or answer.json()["error"]["param"] == "Idempotency-Key"
        named = await http.post(url, json={**said, "event_id": "mine"}, headers={"Idempotency-Key": "k" * 65})
        assert named.json()["event_id"] == "mine"
        items = (await http.get(f"/v1/sessions/{client.session_id}")).json()["items"]
        assert len(items) == 2


async def test_newest_thousand_ids_are_kept() -> None:
    """An id is still known after 999 others."""
    async with running_server(echo) as server, attached(server) as client:
        for number in range(1000):
            item = {"role": "user", "content": f"{number}"}
            await client.send("conversation.item.create", item=item, event_id=f"e{number}")
            if number % 50 == 49:
                await client.until("conversation.item.created", for_event_id=f"e{number}")
        for number in (0, 500, 999):
            item = {"role": "user", "content": f"{number}"}
            await client.send("conversation.item.create", item=item, event_id=f"e{number}")
        await refused(client, "conversation.item.create", item={"role": "user", "content": "x"}, event_id="e0")
        assert len(client.transcript.items) == 1000


async def test_pings_are_answered_each_time() -> None:
    """A ping is no command: its `event_id` may be anything, also one that was used."""
    async with running_server(echo) as server, attached(server) as client:
        await client.send("session.update", session={}, event_id="e1")
        await client.until("session.updated")
        for _ in range(2):
            await client.send("ping", event_id="e1")
            assert await client.receive() == {"type": "pong", "event_id": "e1"}
