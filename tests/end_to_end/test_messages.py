"""What a client may say about its session: settings, items, truncation, the end, and what is no message at all."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.end_to_end import (
    ERROR_TYPES,
    Model,
    dialled,
    echo,
    events_of,
    frames_until_closed,
    refused,
    settled,
    until_closed,
)
from tests.support.client import Client, Transcript, attached
from tests.support.server import running_server

# --- session.update -------------------------------------------------------------------------------------------------


UPDATES: list[dict[str, Any]] = [
    {"instructions": "Be brief. \x00 🙂"},
    {"model": "other"},
    {"max_output_tokens": 1},
    {"on_disconnect": "continue"},
    {"disconnect_grace_ms": 3_600_000},
    {"multitask_strategy": "interrupt"},
    {"instructions": "All", "model": "m", "max_output_tokens": 7, "multitask_strategy": "enqueue"},
    {},
]


async def test_update_changes_what_it_names_and_nothing_else() -> None:
    """`session.updated` tells the whole session, with the changes; who attaches later sees them."""
    async with running_server(echo) as server:
        for changes in UPDATES:
            async with attached(server) as client:
                await client.send("session.update", session=changes, event_id="change")
                updated = await client.until("session.updated")
                assert set(updated) == {"type", "seq", "for_event_id", "session"}
                assert updated["for_event_id"] == "change"
                ignored = {"expires_at"}
                expected = {**client.first["session"], **changes}
                assert {k: v for k, v in updated["session"].items() if k not in ignored} == {
                    k: v for k, v in expected.items() if k not in ignored
                }
                async with attached(server, client.session_id, history="none") as other:
                    assert changes.items() <= other.first["session"].items()


async def test_updated_session_says_when_it_expires() -> None:
    """The session in `session.updated` has the same fields as the first frame's, each with a value."""
    async with running_server(echo) as server, attached(server) as client:
        await client.send("session.update", session={"instructions": "x"})
        session = (await client.until("session.updated"))["session"]
        assert set(session) == set(client.first["session"])
        assert session["expires_at"] >= client.first["session"]["created_at"]


async def test_update_reaches_every_connection_and_the_model() -> None:
    """The new settings hold for the next response, whoever asks for it."""
    model = Model()
    async with running_server(model) as server, attached(server) as one, attached(server, one.session_id) as two:
        await one.send("session.update", session={"instructions": "Be brief.", "model": "m2", "max_output_tokens": 5})
        await two.until("session.updated")
        await two.respond("question")
        turn = await model.turn()
        assert turn.request.instructions == "Be brief."
        assert turn.request.model == "m2"
        assert turn.request.max_output_tokens == 5
        turn.end()
        await two.until("response.done")
        await one.until("response.done")


async def test_empty_instructions_clear_them() -> None:
    """Instructions are taken back by empty ones."""
    async with running_server(echo) as server, attached(server) as client:
        await client.send("session.update", session={"instructions": "Be brief."})
        await client.send("session.update", session={"instructions": ""})
        await client.until("session.updated")
        assert (await client.until("session.updated"))["session"]["instructions"] == ""


BAD_UPDATES = [
    ({"model": "unknown"}, "model_not_found", "model"),
    ({"max_output_tokens": 4097}, "max_output_tokens_too_large", "max_output_tokens"),
    ({"max_output_tokens": 0}, "invalid_message", "session.max_output_tokens"),
    ({"max_output_tokens": "5"}, "invalid_message", "session.max_output_tokens"),
    ({"max_output_tokens": 1.5}, "invalid_message", "session.max_output_tokens"),
    ({"on_disconnect": "linger"}, "invalid_message", "session.on_disconnect"),
    ({"disconnect_grace_ms": -1}, "invalid_message", "session.disconnect_grace_ms"),
    ({"disconnect_grace_ms": 3_600_001}, "invalid_message", "session.disconnect_grace_ms"),
    ({"multitask_strategy": "queue"}, "invalid_message", "session.multitask_strategy"),
    ({"instructions": 5}, "invalid_message", "session.instructions"),
    ({"owner": "me"}, "unknown_field", "session.owner"),
    ({"id": "sess_1"}, "unknown_field", "session.id"),
    ([], "invalid_message", "session"),
]


async def test_update_that_is_not_allowed_is_refused() -> None:
    """A typed error names the field; nothing of the update happens."""
    async with running_server(echo, allowed_models=("known",)) as server:
        for session, code, param in BAD_UPDATES:
            async with attached(server) as client:
                error = await refused(client, "session.update", session=session, event_id="e1")
                assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param)
                await settled(client)
                kept = events_of(client, "session.updated")[-1]["session"]
                assert {**kept, "expires_at": ""} == {**client.first["session"], "expires_at": ""}
                assert client.transcript.positions == {"session": 1}


async def test_update_without_a_session_is_refused() -> None:
    """What an update is about is not optional."""
    async with running_server(echo) as server, attached(server) as client:
        error = await refused(client, "session.update")
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_message")


# --- conversation.item.create ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
async def test_item_is_added_for_everybody(role: str) -> None:
    """An item of any role comes to every connection as `conversation.item.created`, with exactly its fields."""
    async with running_server(echo) as server, attached(server) as one, attached(server, one.session_id) as two:
        content = "grüße \r\n\u2028\x00 🙂"
        await one.send("conversation.item.create", item={"role": role, "content": content}, event_id="e1")
        created = await one.until("conversation.item.created")
        assert set(created) == {"type", "seq", "for_event_id", "item"}
        assert created["for_event_id"] == "e1"
        assert set(created["item"]) == {"id", "role", "content", "user", "created_at"}
        assert created["item"]["id"].startswith("item_")
        assert (created["item"]["role"], created["item"]["content"]) == (role, content)
        assert created["item"]["user"] == "anonymous"
        assert await two.until("conversation.item.created") == created


async def test_items_are_the_conversation_in_their_order() -> None:
    """An imported conversation is what the model is asked to go on with."""
    model = Model()
    said = [("user", "Hello?"), ("assistant", "Hi."), ("system", "Be brief."), ("user", "How are you?")]
    async with running_server(model) as server, attached(server) as client:
        for role, content in said:
            await client.send("conversation.item.create", item={"role": role, "content": content})
        await client.send("response.create")
        turn = await model.turn()
        assert turn.conversation == said
        turn.end()
        await client.until("response.done")


async def test_item_keeps_the_id_that_the_client_chose() -> None:
    """A client may name its item; the same name again is refused and changes nothing."""
    async with running_server(echo) as server, attached(server) as client:
        item = {"role": "user", "content": "one", "id": "A-z_9"}
        await client.send("conversation.item.create", item=item)
        assert (await client.until("conversation.item.created"))["item"]["id"] == "A-z_9"
        error = await refused(client, "conversation.item.create", item={**item, "content": "two"}, event_id="e2")
        assert (error["type"], error["code"], error["param"]) == ("conflict_error", "already_exists", "item.id")
        await settled(client)
        assert [item["content"] for item in client.transcript.items] == ["one"]


BAD_IDS = ["", "a b", "ü", "a" * 65, "a\n", "a/b", "a:1", 5, {}]


async def test_item_id_has_to_be_one() -> None:
    """What doesn't match the pattern of ids is refused."""
    async with running_server(echo) as server:
        for item_id in BAD_IDS:
            async with attached(server) as client:
                item = {"role": "user", "content": "x", "id": item_id}
                error = await refused(client, "conversation.item.create", item=item, event_id="e1")
                assert (error["type"], error["param"]) == ("invalid_request_error", "item.id")
                assert client.transcript.positions == {"session": 0}


BAD_ITEMS: list[tuple[dict[str, Any], str, str]] = [
    ({"item": {"role": "tool", "content": "x"}}, "invalid_message", "item.role"),
    ({"item": {"role": "user", "content": None}}, "invalid_message", "item.content"),
    ({"item": {"role": "user", "content": ["x"]}}, "invalid_message", "item.content"),
    ({"item": {"role": "user", "content": "x", "type": "message"}}, "unknown_field", "item.type"),
    ({"item": {"role": "user"}}, "invalid_message", "item"),
    ({"item": "x"}, "invalid_message", "item"),
    ({"item": {"role": "user", "content": "x"}, "previous_item_id": "y"}, "unknown_field", "previous_item_id"),
]


async def test_item_that_is_none_is_refused() -> None:
    """A typed error names the field at fault."""
    async with running_server(echo) as server:
        for fields, code, param in BAD_ITEMS:
            async with attached(server) as client:
                error = await refused(client, "conversation.item.create", event_id="e1", **fields)
                assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param)


async def test_item_too_large_for_a_frame_is_refused() -> None:
    """Control characters, one byte in MessagePack, are six in JSON: what no frame could carry is not accepted."""
    async with running_server(echo) as server, attached(server, subprotocol="realtime.v1.msgpack") as client:
        item = {"role": "user", "content": "\x01" * 60_000}
        error = await refused(client, "conversation.item.create", item=item, event_id="e1")
        assert (error["type"], error["code"]) == ("invalid_request_error", "too_large")
        item["content"] = "\x01" * 43_000
        await client.send("conversation.item.create", item=item)
        await client.until("conversation.item.created")
        async with attached(server, client.session_id) as reader:
            await reader.until("conversation.item.created")
            assert reader.transcript.items[0]["content"] == item["content"]


# --- conversation.item.truncate -------------------------------------------------------------------------------------


async def test_truncation_is_clamped_and_rounded_to_characters() -> None:
    """`heard_chars` counts UTF-16 code units, at most what there is, and never half of a character."""
    text = "a🙂bcd"
    asked = {0: 0, 1: 1, 2: 1, 3: 3, 4: 4, 5: 5, 6: 6, 7: 6, 10**6: 6, 2**63: 6, 10**30: 6}
    model = Model()
    async with running_server(model) as server:
        for heard_chars, kept in asked.items():
            async with attached(server) as client:
                response_id = await client.respond("question")
                (await model.turn()).end(text)
                done = await client.until("response.done")
                assert done["output_chars"] == 6
                fields = {"response_id": response_id, "heard_chars": heard_chars}
                await client.send("conversation.item.truncate", event_id="cut", **fields)
                truncated = await client.until("conversation.item.truncated")
                assert truncated["item"] == {"response_id": response_id, "heard_chars": kept}
                assert truncated["for_event_id"] == "cut"
                assert set(truncated) == {"type", "seq", "for_event_id", "item"}
                await client.respond("next")
                turn = await model.turn()
                heard = text.encode("utf-16-le")[: kept * 2].decode("utf-16-le")
                answer = [("assistant", heard)] if heard else []
                assert turn.conversation == [("user", "question"), *answer, ("user", "next")]
                turn.end()
                await client.until("response.done")


async def test_truncation_of_a_running_answer_keeps_what_was_heard() -> None:
    """An answer may be truncated while it runs; its end says what was heard, and the conversation keeps that."""
    model = Model()
    async with running_server(model) as server, attached(server) as client:
        response_id = await client.respond("question")
        turn = await model.turn()
        turn.say("Hello, ")
        await client.until("response.output_text.delta")
        await client.send("conversation.item.truncate", response_id=response_id, heard_chars=5)
        assert (await client.until("conversation.item.truncated"))["item"]["heard_chars"] == 5
        turn.end("world")
        done = await client.until("response.done")
        assert (done["status"], done["output_chars"], done["heard_chars"]) == ("completed", 12, 5)
        await client.respond("next")
        turn = await model.turn()
        assert ("assistant", "Hello") in turn.conversation
        turn.end()
        await client.until("response.done")


BAD_TRUNCATIONS: list[tuple[dict[str, Any], str, str, str]] = [
    ({"response_id": "resp_x", "heard_chars": 1}, "not_found_error", "response_not_found", "response_id"),
    ({"response_id": "session", "heard_chars": 1}, "not_found_error", "response_not_found", "response_id"),
    ({"response_id": "a b", "heard_chars": 1}, "invalid_request_error", "invalid_message", "response_id"),
    ({"response_id": "answer", "heard_chars": -1}, "invalid_request_error", "invalid_message", "heard_chars"),
    ({"response_id": "answer", "heard_chars": 1.5}, "invalid_request_error", "invalid_message", "heard_chars"),
    ({"response_id": "answer", "heard_chars": None}, "invalid_request_error", "invalid_message", "heard_chars"),
]


async def test_truncation_that_is_not_possible_is_refused() -> None:
    """An unknown response or a count that is none is a typed error, and nothing is truncated."""
    async with running_server(echo) as server:
        for fields, kind, code, param in BAD_TRUNCATIONS:
            async with attached(server) as client:
                await client.answer("hello", response_id="answer")
                error = await refused(client, "conversation.item.truncate", event_id="e1", **fields)
                assert (error["type"], error["code"], error["param"]) == (kind, code, param)
                assert events_of(client, "conversation.item.truncated") == []


# --- session.close --------------------------------------------------------------------------------------------------


async def test_close_ends_the_session_for_everyone() -> None:
    """Every connection is told the ends of what ran, then `session.closed`, and is closed with 1000."""
    model = Model()
    async with running_server(model) as server, attached(server) as one, attached(server, one.session_id) as two:
        running = await one.respond("one")
        turn = await model.turn()
        turn.say("partial")
        await one.until("response.output_text.delta")
        waiting = await one.respond("two", multitask_strategy="enqueue")
        await one.send("session.close", event_id="close")
        for client in (one, two):
            assert await until_closed(client) == 1000
            closed = client.transcript.events[-1]
            assert closed["type"] == "session.closed"
            assert set(closed) == {"type", "seq", "for_event_id", "reason"}
            assert closed["for_event_id"] == "close"
            assert client.transcript.done[running]["status"] == "cancelled"
            assert client.transcript.done[waiting]["status"] == "cancelled"
            assert client.transcript.texts[running] == "partial"
        await turn.closed.wait()
        assert model.calls == 1


async def test_ends_that_a_close_causes_name_it() -> None:
    """The `response.done` of what a `session.close` stopped carries its `for_event_id`."""
    model = Model()
    async with running_server(model) as server, attached(server) as client:
        response_id = await client.respond("one")
        turn = await model.turn()
        await client.send("session.close", event_id="close")
        assert await until_closed(client) == 1000
        await turn.closed.wait()
        assert client.transcript.done[response_id].get("for_event_id") == "close"


async def test_closed_session_stays_readable() -> None:
    """Who attaches afterwards is sent the history, `session.closed` last, and 1000."""
    async with running_server(echo) as server:
        async with attached(server) as client:
            await client.answer("hello", response_id="answer")
            await client.send("session.close")
            assert await until_closed(client) == 1000
        for _ in range(2):
            async with attached(server, client.session_id) as reader:
                assert await until_closed(reader) == 1000
                assert reader.transcript.texts["answer"] == "hello"
                assert reader.transcript.events[-1]["type"] == "session.closed"
                assert all(event.get("replay") for event in reader.transcript.events[1:])


async def test_commands_behind_a_close_change_nothing() -> None:
    """What a client sends right behind `session.close` is too late: nothing comes after `session.closed`."""
    model = Model()
    async with running_server(model) as server:
        async with attached(server) as client:
            await client.send("session.close")
            await client.send("response.create", input="too late")
            await client.send("conversation.item.create", item={"role": "user", "content": "too late"})
            assert await until_closed(client) == 1000
        async with dialled(server, {"session_id": client.session_id}) as socket:
            frames = await frames_until_closed(socket)
            assert [frame["type"] for frame in frames] == ["session.resumed", "session.closed"]
        assert model.calls == 0


# --- ping -----------------------------------------------------------------------------------------------------------


async def test_ping_is_answered() -> None:
    """A `pong` belongs to no channel and names the ping's `event_id` where it had one; it moves no position."""
    async with running_server(echo) as server, attached(server) as client, attached(server, client.session_id) as other:
        await client.until("participant.joined")
        await client.send("ping")
        assert await client.receive() == {"type": "pong"}
        await client.send("ping", event_id="p" * 64)
        assert await client.receive() == {"type": "pong", "event_id": "p" * 64}
        await settled(other)
        assert events_of(other, "pong") == []
        assert client.transcript.positions == {"session": 0}


async def test_pings_overtake_what_streams() -> None:
    """Whoever only reads a stream is answered while it runs."""
    model = Model()
    async with running_server(model) as server, attached(server) as client:
        await client.respond("question")
        turn = await model.turn()
        for number in range(50):
            turn.say("word ")
            await client.send("ping", event_id=f"{number}")
            await client.until("pong", event_id=f"{number}")
        turn.end()
        await client.until("response.done")


# --- what is no message ---------------------------------------------------------------------------------------------


NO_MESSAGES: list[tuple[Any, str, str | None]] = [
    ({}, "unknown_type", "type"),
    ({"type": "nonsense"}, "unknown_type", "type"),
    ({"type": "session.created"}, "unknown_type", "type"),
    ({"type": None}, "unknown_type", "type"),
    ({"type": ["ping"]}, "unknown_type", "type"),
    ({"type": "PING"}, "unknown_type", "type"),
    ({"type": "ping", "extra": 1}, "unknown_field", "extra"),
    ({"type": "ping", "event_id": ""}, "invalid_message", "event_id"),
    ({"type": "ping", "event_id": "x" * 65}, "invalid_message", "event_id"),
    ({"type": "ping", "event_id": 7}, "invalid_message", "event_id"),
    ({"type": "session.close", "session_id": "sess_other"}, "unknown_field", "session_id"),
    ([], "invalid_message", None),
    (None, "invalid_message", None),
    (5, "invalid_message", None),
    ("ping", "invalid_message", None),
    ([{"type": "ping"}], "invalid_message", None),
]


async def test_what_is_no_message_is_a_typed_error() -> None:
    """A frame that decodes and is no message is refused with a code and the field, and the connection lives on."""
    async with running_server(echo) as server:
        for subprotocol in ("realtime.v1", "realtime.v1.msgpack"):
            async with attached(server, subprotocol=subprotocol) as client:
                for message, code, param in NO_MESSAGES:
                    await client.send_raw(message)
                    error = (await client.until("error"))["error"]
                    found = (error["type"], error["code"], error.get("param"))
                    assert found == ("invalid_request_error", code, param), message
                    assert error["fatal"] is False
                    assert "event_id" not in error
                assert await client.answer("lives on") == "lives on"


async def test_malformed_message_is_named_by_its_event_id() -> None:
    """The error of a message that can't be carried out still names its `event_id`, if that can be read."""
    async with running_server(echo) as server, attached(server) as client:
        for message in (
            {"type": "nonsense", "event_id": "e1"},
            {"event_id": "e1"},
            {"type": "ping", "event_id": "e1", "extra": [[1]]},
            {"type": "response.create", "event_id": "e1", "input": 5},
        ):
            await client.send_raw(message)
            assert (await client.until("error"))["error"]["event_id"] == "e1"


async def test_errors_do_not_repeat_what_was_said() -> None:
    """An error's words are the server's own: a value that it doesn't allow is not in them."""
    async with running_server(echo) as server, attached(server) as client:
        for message in (
            {"type": "session.update", "session": {"on_disconnect": "CANARY"}},
            {"type": "session.update", "session": {"model": 1, "instructions": "CANARY"}},
            {"type": "conversation.item.create", "item": {"role": "CANARY", "content": "CANARY"}},
            {"type": "CANARY"},
            {"type": "response.create", "input": "CANARY", "metadata": {"CANARY": ["CANARY"]}},
            {"type": "response.create", "response_id": "CAN ARY", "input": "CANARY"},
            {"type": "response.cancel", "response_id": "CANARY"},
        ):
            await client.send_raw(message)
            error = (await client.until("error"))["error"]
            assert "CANARY" not in json.dumps(error), message
            assert error["type"] in ERROR_TYPES


async def test_error_is_told_to_its_sender_alone() -> None:
    """Others at the session hear nothing of what one of them did wrong."""
    async with running_server(echo) as server, attached(server) as one, attached(server, one.session_id) as two:
        await refused(one, "response.create")
        await one.answer("hello")
        await two.until("response.done")
        assert events_of(two, "error") == []


async def test_commands_of_one_connection_keep_their_order() -> None:
    """A hundred items sent without waiting stand in the order in which they were sent."""
    async with running_server(echo) as server, attached(server) as client:
        for number in range(100):
            await client.send("conversation.item.create", item={"role": "user", "content": f"{number}"})
        while len(client.transcript.items) < 100:
            await client.receive()
        assert [item["content"] for item in client.transcript.items] == [f"{number}" for number in range(100)]


async def test_commands_before_a_disconnect_are_carried_out() -> None:
    """What a client sent before it left properly counts."""
    async with running_server(echo) as server, attached(server) as one:
        async with attached(server, one.session_id) as two:
            await two.send("conversation.item.create", item={"role": "user", "content": "last words"})
        event = await one.until("conversation.item.created")
        assert event["item"]["content"] == "last words"


async def test_duplicate_keys_are_one_message() -> None:
    """JSON that names a field twice is one message or one error, never two."""
    async with running_server(echo) as server, dialled(server) as socket:
        client = Client(socket, Transcript())
        await client.start()
        await socket.send('{"type":"ping","event_id":"a","event_id":"b"}')
        first = await client.receive()
        assert first == {"type": "pong", "event_id": "b"} or first["type"] == "error"
        await socket.send('{"type":"ping","type":"session.close"}')
        assert (await client.receive())["type"] == "error"
        await client.send("ping")
        assert await client.receive() == {"type": "pong"}
