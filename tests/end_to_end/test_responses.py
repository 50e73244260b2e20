"""Responses: how they are asked for, what their channel holds, how they end, and how several of them get along."""

from __future__ import annotations

import asyncio
import json
import socket as sockets
from collections.abc import AsyncIterator
from typing import Any

import pytest
from websockets.asyncio.client import connect

from realtime.errors import UpstreamError
from realtime.protocol import ResponseDone, ResponseInProgress
from realtime.responders.base import Finish, Reasoning, Request, Text, TokenCount
from realtime.store.base import Appended, Notice
from tests.end_to_end import PATIENCE_S, Model, echo, events_of, refused, settled
from tests.support.client import Client, Event, Transcript, attached
from tests.support.server import RunningServer, running_server

ESTIMATED = {"input_tokens", "output_tokens", "total_tokens", "estimated"}


def of_channel(client: Client, channel: str) -> list[Event]:
    """The events of one response's channel that the client has received."""
    return [event for event in client.transcript.events if event.get("response_id") == channel]


def order(client: Client) -> list[tuple[str, str]]:
    """Type and response of every event about responses, deltas left out, in the order in which they came."""
    found = []
    for event in client.transcript.events:
        kind = event["type"].removeprefix("response.")
        if event["type"] == "response.created":
            found.append((kind, event["response"]["id"]))
        elif kind in {"in_progress", "done"}:
            found.append((kind, event["response_id"]))
    return found


# --- response.create ------------------------------------------------------------------------------------------------


async def test_response_is_created_runs_and_is_done() -> None:
    """The whole life of a response, event for event, each with exactly its fields."""
    model = Model()
    async with running_server(model) as server, attached(server) as client:
        await client.send("response.create", input="question", metadata={"a": 1, "b": None}, event_id="e1")
        (await model.turn()).end("Hello")
        await client.until("response.done")
        told = [event for event in client.transcript.events if event["type"] != "rate_limits.updated"]
        item, created, begun, delta, done = told[1:]
        assert item["type"] == "conversation.item.created"
        assert (item["item"]["role"], item["item"]["content"]) == ("user", "question")
        assert set(created) == {"type", "seq", "for_event_id", "response"}
        assert set(created["response"]) == {"id", "status", "model", "created_at", "metadata", "user"}
        assert created["response"]["status"] == "in_progress"
        assert created["response"]["metadata"] == {"a": 1, "b": None}
        assert created["response"]["user"] == "anonymous"
        assert created["response"]["id"].startswith("resp_")
        assert item["for_event_id"] == created["for_event_id"] == "e1"
        response_id = created["response"]["id"]
        assert begun == {"type": "response.in_progress", "seq": 1, "response_id": response_id}
        assert delta == {"type": "response.output_text.delta", "seq": 2, "response_id": response_id, "delta": "Hello"}
        assert set(done) == {"type", "seq", "response_id", "status", "stop_reason", "usage", "output_chars"}
        assert (done["seq"], done["status"], done["stop_reason"]) == (3, "completed", "end_turn")
        assert done["output_chars"] == 5
        assert set(done["usage"]) == ESTIMATED


async def test_response_without_input_goes_on_from_the_conversation() -> None:
    """`input` is optional where there is something to respond to."""
    model = Model()
    async with running_server(model) as server, attached(server) as client:
        await client.send("conversation.item.create", item={"role": "user", "content": "Hello?"})
        await client.send("response.create")
        turn = await model.turn()
        assert turn.conversation == [("user", "Hello?")]
        turn.end("Hi.")
        await client.until("response.done")
        assert len(client.transcript.items) == 1


async def test_settings_of_one_response_are_its_own() -> None:
    """Overrides reach the model for that response alone; the session keeps its own settings."""
    model = Model()
    async with running_server(model) as server, attached(server) as client:
        overrides = {"instructions": "Shout.", "model": "loud", "max_output_tokens": 7}
        await client.send("response.create", input="one", **overrides)
        turn = await model.turn()
        request = turn.request
        assert (request.instructions, request.model, request.max_output_tokens) == ("Shout.", "loud", 7)
        assert request.session_id == client.session_id
        turn.end()
        await client.until("response.done")
        created = events_of(client, "response.created")[0]
        assert created["response"]["model"] == "loud"
        assert request.response_id == created["response"]["id"]
        assert "Shout." not in json.dumps(client.transcript.events)
        await client.respond("two")
        request = (turn := await model.turn()).request
        assert (request.instructions, request.model) == ("", client.first["session"]["model"])
        turn.end()
        await client.until("response.done")


async def test_conversation_is_taken_when_the_response_begins_to_run() -> None:
    """What is added while a response waits in the queue is part of what it answers."""
    model = Model()
    async with running_server(model) as server, attached(server) as client:
        await client.respond("one")
        first = await model.turn()
        await client.respond("two", multitask_strategy="enqueue")
        await client.send("conversation.item.create", item={"role": "user", "content": "three"})
        await client.until("conversation.item.created")
        await settled(client)
        first.end("1")
        turn = await model.turn()
        assert turn.conversation == [("user", "one"), ("assistant", "1"), ("user", "two"), ("user", "three")]
        turn.end()
        await client.until("response.done", response_id=turn.request.response_id)


async def test_response_keeps_the_id_that_the_client_chose() -> None:
    """The same id again is refused, whether that response runs or is done, and changes nothing."""
    model = Model()
    async with running_server(model) as server, attached(server) as client:
        assert await client.respond("one", response_id="mine") == "mine"
        turn = await model.turn()
        for state in ("running", "done"):
            error = await refused(client, "response.create", input="two", response_id="mine", event_id=state)
            assert (error["type"], error["code"], error["param"]) == ("conflict_error", "already_exists", "response_id")
            if state == "running":
                turn.end()
                await client.until("response.done")
        await settled(client)
        assert len(client.transcript.items) == 1
        assert model.calls == 1


BAD_RESPONSES: list[tuple[dict[str, Any], str, str]] = [
    ({}, "empty_conversation", "input"),
    ({"input": "x", "model": "unknown"}, "model_not_found", "model"),
    ({"input": "x", "max_output_tokens": 4097}, "max_output_tokens_too_large", "max_output_tokens"),
    ({"input": "x", "max_output_tokens": 0}, "invalid_message", "max_output_tokens"),
    ({"input": "x", "response_id": "session"}, "reserved_id", "response_id"),
    ({"input": "x", "response_id": "control"}, "reserved_id", "response_id"),
    ({"input": "x", "response_id": "a b"}, "invalid_message", "response_id"),
    ({"input": "x", "response_id": "a" * 65}, "invalid_message", "response_id"),
    ({"input": "x", "response_id": "a\n"}, "invalid_message", "response_id"),
    ({"input": "x", "response_id": ""}, "invalid_message", "response_id"),
    ({"input": ["x"]}, "invalid_message", "input"),
    ({"input": "x", "metadata": []}, "invalid_message", "metadata"),
    ({"input": "x", "metadata": {"a": {"b": 1}}}, "invalid_message", "metadata[...]"),
    ({"input": "x", "multitask_strategy": "queue"}, "invalid_message", "multitask_strategy"),
    ({"input": "x", "temperature": 1}, "unknown_field", "temperature"),
]


async def test_response_that_is_not_allowed_is_refused() -> None:
    """A typed error names the field; no response is created, and no item."""
    model = Model()
    async with running_server(model, allowed_models=()) as server:
        for fields, code, param in BAD_RESPONSES:
            async with attached(server) as client:
                error = await refused(client, "response.create", event_id="e1", **fields)
                assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param)
                await settled(client)
                assert client.transcript.positions == {"session": 1}
                assert model.calls == 0


async def test_numbers_in_metadata_are_what_every_encoding_can_carry() -> None:
    """Metadata that one encoding accepts can be read in the other: it is refused, or it comes through."""
    async with running_server(echo) as server, attached(server) as client:
        async with attached(server, client.session_id, subprotocol="realtime.v1.msgpack") as packed:
            await client.send("response.create", input="x", metadata={"n": 10**30}, event_id="e1")
            await client.send("response.create", input="y", metadata={"n": 2**63 - 1}, multitask_strategy="enqueue")
            async with asyncio.timeout(PATIENCE_S):
                while not events_of(packed, "response.created"):
                    await packed.receive()
                assert await packed.answer("lives on", multitask_strategy="enqueue") == "lives on"
        for subprotocol in ("realtime.v1.msgpack", "realtime.v1"):
            async with attached(server, client.session_id, subprotocol=subprotocol) as late:
                await settled(late)


async def test_not_a_number_in_metadata_is_no_json() -> None:
    """MessagePack carries JSON's data model: NaN and infinities, which JSON has not, are refused or told alike."""
    async with running_server(echo) as server, attached(server, subprotocol="realtime.v1.msgpack") as packed:
        metadata = {"nan": float("nan"), "inf": float("inf")}
        async with attached(server, packed.session_id) as plain:
            await packed.send("response.create", input="x", metadata=metadata, event_id="e1")
            await settled(packed)
            await settled(plain)
            seen = [str(events_of(client, "response.created")[:1]) for client in (packed, plain)]
            assert seen[0] == seen[1]


# --- the channel ----------------------------------------------------------------------------------------------------


async def test_tokens_said_at_once_come_in_few_frames() -> None:
    """Ten thousand tokens that a model says in one breath are joined, and are the text character for character."""
    words = [f"word-{number} " for number in range(10_000)]

    async def talkative(request: Request) -> AsyncIterator[str]:
        for word in words:
            yield word

    async with running_server(talkative) as server, attached(server) as client:
        assert await client.answer() == "".join(words)
        deltas = events_of(client, "response.output_text.delta")
        assert len(deltas) < 50
        assert sum(event.get("merged", 1) for event in deltas) == len(words)
        assert client.transcript.done.popitem()[1]["seq"] == len(words) + 2


async def test_slow_reader_gets_fewer_and_larger_frames() -> None:
    """A reader that stops reading is not queued for: what it missed comes merged, and is the same text."""
    words = [f"{number:05d}".ljust(200, ".") for number in range(5000)]

    async def steady(request: Request) -> AsyncIterator[str]:
        for word in words:
            yield word
            await asyncio.sleep(0)

    async with running_server(steady) as server, attached(server) as quick:
        async with slow_reader(server, quick.session_id) as slow:
            response_id = await quick.respond("go")
            await quick.until("response.done")
            await slow.until("response.done")
            deltas = [len(events_of(client, "response.output_text.delta")) for client in (quick, slow)]
            assert deltas[1] < deltas[0]
            assert max(event.get("merged", 1) for event in events_of(slow, "response.output_text.delta")) >= 50
            for client in (quick, slow):
                assert client.transcript.texts[response_id] == "".join(words)
                assert client.transcript.done[response_id]["seq"] == len(words) + 2


def slow_reader(server: RunningServer, session_id: str) -> Any:
    """A client with the smallest buffers there are, which takes a frame only when it is asked to."""
    return _SlowReader(server, session_id)


class _SlowReader:
    def __init__(self, server: RunningServer, session_id: str) -> None:
        self._server = server
        self._session_id = session_id

    async def __aenter__(self) -> Client:
        raw = sockets.socket(sockets.AF_INET, sockets.SOCK_STREAM)
        raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
        raw.setblocking(False)
        await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", self._server.port))
        self._socket = await connect(
            f"{self._server.ws_url}?session_id={self._session_id}",
            sock=raw,
            compression=None,
            max_size=None,
            max_queue=1,
            proxy=None,
        )
        return await Client(self._socket, Transcript()).start()

    async def __aexit__(self, *_: object) -> None:
        self._socket.transport.abort()
        await self._socket.wait_closed()


@pytest.mark.parametrize("pieces", [["\x01" * 300_000], ["\x00" * 997] * 300, ["🙂" * 300_000], ['"\\' * 200_000]])
async def test_frames_keep_to_the_limit(pieces: list[str]) -> None:
    """No frame is larger than 256 KiB, whatever the text costs in JSON, said at once or piece by piece."""

    async def say(request: Request) -> AsyncIterator[str]:
        for piece in pieces:
            yield piece

    async with running_server(say) as server, attached(server) as client:
        text = "".join(pieces)
        assert await client.answer() == text  # the client measures every frame
        assert client.transcript.done.popitem()[1]["output_chars"] == len(text.encode("utf-16-le")) // 2
        for subprotocol in ("realtime.v1", "realtime.v1.msgpack"):
            async with attached(server, client.session_id, subprotocol=subprotocol) as late:
                await late.until("response.done")
                assert "".join(late.transcript.texts.values()) == text


async def test_reasoning_is_told_apart_from_the_answer() -> None:
    """Reasoning comes in deltas of its own, in its place between those of the answer, and is no part of the answer."""
    model = Model()
    async with running_server(model) as server, attached(server) as client:
        response_id = await client.respond("question")
        turn = await model.turn()
        turn.end(Reasoning("Let me "), Reasoning("see."), Text("It "), "is. ", Reasoning("Or not."), "Or not.")
        done = await client.until("response.done")
        assert client.transcript.reasonings[response_id] == "Let me see.Or not."
        assert client.transcript.texts[response_id] == "It is. Or not."
        assert done["output_chars"] == len("It is. Or not.")
        kinds = [event["type"].split(".")[1] for event in of_channel(client, response_id)]
        assert kinds == ["in_progress", "reasoning", "output_text", "reasoning", "output_text", "done"]
        await client.respond("next")
        turn = await model.turn()
        assert ("assistant", "It is. Or not.") in turn.conversation
        turn.end()
        await client.until("response.done")


# --- ends -----------------------------------------------------------------------------------------------------------


async def test_stop_reason_says_whether_it_is_complete() -> None:
    """A model that ran out of tokens leaves an `incomplete` response, with its count where it gave one."""
    model = Model()
    count = TokenCount(input_tokens=3, output_tokens=2, cache_read_input_tokens=5)
    async with running_server(model) as server, attached(server) as client:
        await client.respond("question")
        (await model.turn()).end("Hel", Finish("max_tokens", count))
        done = await client.until("response.done")
        assert (done["status"], done["stop_reason"]) == ("incomplete", "max_tokens")
        assert done["usage"] == {
            "input_tokens": 3,
            "output_tokens": 2,
            "total_tokens": 10,
            "cache_read_input_tokens": 5,
            "estimated": False,
        }
        await client.respond("next")
        turn = await model.turn()
        assert ("assistant", "Hel") in turn.conversation
        turn.end()
        await client.until("response.done")


async def test_failure_of_the_model_keeps_what_it_said() -> None:
    """An upstream error is the response's typed end; its partial text stays in the conversation."""
    model = Model()
    async with running_server(model) as server, attached(server) as client:
        response_id = await client.respond("question")
        turn = await model.turn()
        turn.say("Hel")
        turn.fail(UpstreamError("upstream_overloaded", "The model's provider is overloaded."))
        done = await client.until("response.done")
        assert (done["status"], done["stop_reason"]) == ("failed", None)
        assert done["error"] == {
            "type": "upstream_error",
            "code": "upstream_overloaded",
            "message": "The model's provider is overloaded.",
        }
        assert done["usage"]["estimated"] is True
        assert client.transcript.texts[response_id] == "Hel"
        await client.respond("next")
        turn = await model.turn()
        assert turn.conversation == [("user", "question"), ("assistant", "Hel"), ("user", "next")]
        turn.end()
        await client.until("response.done")


@pytest.mark.parametrize("said", [RuntimeError("CANARY"), "\ud800", Text("\ud800"), Reasoning("\udfff"), 5])
async def test_fault_of_a_responder_is_told_without_its_words(said: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever else a responder raises or says ends its response alone; the words of its error are told to nobody."""
    model = Model()
    async with running_server(model) as server, attached(server) as client:
        await client.respond("question")
        turn = await model.turn()
        turn.say("good")
        turn.fail(said) if isinstance(said, Exception) else turn.end(said)
        done = await client.until("response.done")
        assert (done["status"], done["error"]["type"], done["error"]["code"]) == (
            "failed",
            "server_error",
            "responder_failed",
        )
        assert "CANARY" not in json.dumps(done)
        await client.respond("next")
        (await model.turn()).end("fine")
        assert (await client.until("response.done"))["status"] == "completed"
    assert "CANARY" not in "".join(capfd.readouterr())


# --- response.cancel ------------------------------------------------------------------------------------------------


async def test_running_response_is_cancelled() -> None:
    """The model call is closed, the end names the command, and what was said stays in the conversation."""
    model = Model()
    async with running_server(model) as server, attached(server) as one, attached(server, one.session_id) as two:
        response_id = await one.respond("question")
        turn = await model.turn()
        turn.say("Hel", "lo")
        await two.until("response.output_text.delta")
        await two.send("response.cancel", response_id=response_id, event_id="stop")
        for client in (one, two):
            done = await client.until("response.done")
            assert (done["status"], done["stop_reason"]) == ("cancelled", "cancelled")
            assert done["for_event_id"] == "stop"
            assert done["output_chars"] == 5
            assert done["usage"]["estimated"] is True
            assert done["usage"]["output_tokens"] > 0
            assert client.transcript.texts[response_id] == "Hello"
        await turn.closed.wait()
        await one.respond("next")
        turn = await model.turn()
        assert turn.conversation == [("user", "question"), ("assistant", "Hello"), ("user", "next")]
        turn.end()
        await one.until("response.done")


async def test_queued_response_is_cancelled_without_running() -> None:
    """Its only event is its end, and the model is never asked."""
    model = Model()
    async with running_server(model) as server, attached(server) as client:
        await client.respond("one")
        turn = await model.turn()
        queued = await client.respond("two", multitask_strategy="enqueue")
        assert events_of(client, "response.created")[-1]["response"]["status"] == "queued"
        await client.send("response.cancel", response_id=queued, event_id="stop")
        done = await client.until("response.done")
        assert (done["response_id"], done["seq"], done["status"], done["for_event_id"]) == (
            queued,
            1,
            "cancelled",
            "stop",
        )
        assert done["output_chars"] == 0
        turn.end()
        await client.until("response.done", response_id=turn.request.response_id)
        await client.respond("three")
        turn = await model.turn()
        assert turn.request.response_id != queued
        turn.end()
        await client.until("response.done")
        assert model.calls == 2


async def test_cancel_of_a_done_response_is_no_error() -> None:
    """It has come too late, and nothing follows; with `heard_chars` it still truncates."""
    async with running_server(echo) as server, attached(server) as client:
        await client.answer("hello", response_id="answer")
        await client.send("response.cancel", response_id="answer", event_id="late")
        await settled(client)
        assert events_of(client, "error") == []
        await client.send("response.cancel", response_id="answer", heard_chars=2, event_id="heard")
        truncated = await client.until("conversation.item.truncated")
        assert truncated["item"] == {"response_id": "answer", "heard_chars": 2}
        assert truncated["for_event_id"] == "heard"
        assert len(events_of(client, "response.done")) == 1


async def test_cancel_with_heard_chars_truncates_as_well() -> None:
    """Both effects of one command: the truncation and the end, which says what was heard."""
    model = Model()
    async with running_server(model) as server, attached(server) as client:
        response_id = await client.respond("question")
        turn = await model.turn()
        turn.say("Hello 🙂")
        await client.until("response.output_text.delta")
        await client.send("response.cancel", response_id=response_id, heard_chars=7, event_id="stop")
        done = await client.until("response.done")
        truncated = events_of(client, "conversation.item.truncated")
        assert truncated[0]["item"]["heard_chars"] == 6
        assert (done["heard_chars"], done["output_chars"]) == (6, 8)
        assert truncated[0]["for_event_id"] == done["for_event_id"] == "stop"
        await turn.closed.wait()
        await client.respond("next")
        turn = await model.turn()
        assert ("assistant", "Hello ") in turn.conversation
        turn.end()
        await client.until("response.done")


BAD_CANCELS: list[tuple[dict[str, Any], str, str, str]] = [
    ({"response_id": "resp_x"}, "not_found_error", "response_not_found", "response_id"),
    ({"response_id": "control"}, "not_found_error", "response_not_found", "response_id"),
    ({"response_id": "a b"}, "invalid_request_error", "invalid_message", "response_id"),
    ({"response_id": "resp_x", "heard_chars": -1}, "invalid_request_error", "invalid_message", "heard_chars"),
    ({"response_id": "resp_x", "reason": "x"}, "invalid_request_error", "unknown_field", "reason"),
]


async def test_cancel_that_is_not_possible_is_refused() -> None:
    """What doesn't exist can't be cancelled; what runs runs on."""
    model = Model()
    async with running_server(model) as server:
        for fields, kind, code, param in BAD_CANCELS:
            async with attached(server) as client:
                await client.respond("question")
                turn = await model.turn()
                error = await refused(client, "response.cancel", event_id="e1", **fields)
                assert (error["type"], error["code"], error["param"]) == (kind, code, param)
                turn.end("unharmed")
                assert (await client.until("response.done"))["status"] == "completed"


async def test_cancel_races_the_end_and_there_is_one() -> None:
    """However a cancel and the model's own end meet, there is one `response.done`, and the text is what it counts."""
    model = Model()
    async with running_server(model) as server, attached(server) as one, attached(server, one.session_id) as two:
        for number in range(60):
            response_id = await one.respond(f"{number}")
            turn = await model.turn()
            turn.say("word " * (number % 5))
            if number % 3 == 0:
                turn.end()
            await two.send("response.cancel", response_id=response_id)
            await one.send("response.cancel", response_id=response_id)
            if number % 3 == 1:
                turn.end()
            for client in (one, two):
                done = await client.until("response.done", response_id=response_id)
                assert done["status"] in {"completed", "cancelled"}
                assert done["output_chars"] == len(client.transcript.texts[response_id])
            await turn.closed.wait()
        await settled(one)
        await settled(two)
        assert one.transcript.done.keys() == two.transcript.done.keys()
        assert len(events_of(one, "response.done")) == len(events_of(two, "response.done")) == 60


# --- several at once ------------------------------------------------------------------------------------------------


async def test_second_response_is_rejected_by_default() -> None:
    """While one runs another is a `response_in_progress` error, its input is not added, and the first runs on."""
    model = Model()
    async with running_server(model) as server, attached(server) as client:
        await client.respond("one")
        turn = await model.turn()
        error = await refused(client, "response.create", input="two", event_id="e2")
        assert (error["type"], error["code"]) == ("conflict_error", "response_in_progress")
        turn.end("1")
        assert (await client.until("response.done"))["status"] == "completed"
        assert [item["content"] for item in client.transcript.items] == ["one"]
        await client.respond("two")
        (await model.turn()).end()
        await client.until("response.done")


async def test_enqueued_responses_run_one_after_the_other() -> None:
    """They start in the order of their creation, each when the one before it is done, over what it said."""
    model = Model()
    async with running_server(model) as server, attached(server) as client:
        await client.send("session.update", session={"multitask_strategy": "enqueue"})
        ids = [await client.respond(f"{number}") for number in range(4)]
        statuses = [event["response"]["status"] for event in events_of(client, "response.created")]
        assert statuses == ["in_progress", "queued", "queued", "queued"]
        conversation: list[tuple[str, str]] = []
        for number, response_id in enumerate(ids):
            turn = await model.turn()
            conversation = turn.conversation
            assert turn.request.response_id == response_id
            assert model.calls == number + 1
            turn.end(f"answer {number}")
            await client.until("response.done", response_id=response_id)
        expected = [("created", response_id) for response_id in ids]
        lives = [(kind, response_id) for response_id in ids for kind in ("in_progress", "done")]
        seen = order(client)
        assert [entry for entry in seen if entry[0] == "created"] == expected
        assert [entry for entry in seen if entry[0] != "created"] == lives
        # An answer stands where its response was created.
        assert conversation == [
            (role, text)
            for number in range(3)
            for role, text in (("user", f"{number}"), ("assistant", f"answer {number}"))
        ] + [("user", "3")]


async def test_interrupt_ends_what_runs_and_waits_before_it_starts() -> None:
    """All others are cancelled, in the name of the command; it starts when their ends are stored, and not before."""
    model = Model()
    stored: list[str] = []

    def note(notice: Notice) -> None:
        if isinstance(notice, Appended):
            for entry in notice.entries:
                if isinstance(entry, ResponseInProgress | ResponseDone):
                    stored.append(f"{type(entry).__name__} {entry.response_id}")

    async with running_server(model) as server, attached(server) as client:
        unwatch = await server.engine.store.watch(client.session_id, note)
        running = await client.respond("one", response_id="running")
        first = await model.turn()
        first.say("partial")
        await client.until("response.output_text.delta")
        waiting = await client.respond("two", response_id="waiting", multitask_strategy="enqueue")
        await client.send(
            "response.create", input="three", response_id="urgent", multitask_strategy="interrupt", event_id="now"
        )
        urgent = await model.turn()
        assert urgent.request.response_id == "urgent"
        await first.closed.wait()
        assert model.calls == 2
        assert urgent.conversation == [
            ("user", "one"),
            ("assistant", "partial"),
            ("user", "two"),
            ("user", "three"),
        ]
        urgent.end("!")
        await client.until("response.done", response_id="urgent")
        for response_id in (running, waiting):
            done = client.transcript.done[response_id]
            assert (done["status"], done["stop_reason"], done["for_event_id"]) == ("cancelled", "interrupted", "now")
        assert client.transcript.done["waiting"]["seq"] == 1
        assert client.transcript.texts["running"] == "partial"
        begun = stored.index("ResponseInProgress urgent")
        assert stored.index("ResponseDone running") < begun
        assert stored.index("ResponseDone waiting") < begun
        seen = order(client)
        assert seen.index(("done", "running")) < seen.index(("in_progress", "urgent"))
        assert seen.index(("done", "waiting")) < seen.index(("in_progress", "urgent"))
        assert seen.index(("created", "urgent")) < seen.index(("done", "running"))
        created = events_of(client, "response.created")[-1]["response"]
        assert (created["id"], created["status"]) == ("urgent", "queued")
        unwatch()


async def test_interrupts_in_a_row_leave_the_last_one_running() -> None:
    """Whoever is interrupted before it began never runs; every one has its end."""
    model = Model()
    async with running_server(model) as server, attached(server) as client:
        await client.send("session.update", session={"multitask_strategy": "interrupt"})
        for number in range(10):
            await client.send("response.create", input=f"{number}", response_id=f"r{number}")
        while (turn := await model.turn()).request.response_id != "r9":
            pass
        turn.end("last")
        async with asyncio.timeout(PATIENCE_S):
            await client.until("response.done", response_id="r9")
        assert client.transcript.texts["r9"] == "last"
        assert {event["status"] for key, event in client.transcript.done.items() if key != "r9"} == {"cancelled"}
        assert len(client.transcript.done) == 10


async def test_two_creates_at_once_are_decided_one_after_the_other() -> None:
    """Of several connections that ask at the same time under `reject`, one gets its response and the others errors."""
    model = Model()
    async with running_server(model) as server, attached(server) as one:
        others = [attached(server, one.session_id) for _ in range(4)]
        clients = [one, *[await other.__aenter__() for other in others]]
        try:
            for number, client in enumerate(clients):
                await client.send("response.create", input=f"{number}", event_id=f"e{number}")
            turn = await model.turn()
            for client in clients:
                await settled(client)
            assert sum(len(events_of(client, "error")) for client in clients) == 4
            assert {event["error"]["code"] for client in clients for event in events_of(client, "error")} == {
                "response_in_progress"
            }
            assert len(events_of(one, "response.created")) == 1
            turn.end()
            await one.until("response.done")
            assert model.calls == 1
        finally:
            for other in others:
                await other.__aexit__(None, None, None)


async def test_queue_has_an_end() -> None:
    """A session holds 64 unfinished responses; the next is a typed error, and room comes back."""
    model = Model()
    async with running_server(model) as server, attached(server) as client:
        await client.send("session.update", session={"multitask_strategy": "enqueue"})
        for number in range(64):
            await client.send("response.create", input="x", response_id=f"r{number}")
        error = await refused(client, "response.create", input="one too many", event_id="e1")
        assert (error["type"], error["code"]) == ("conflict_error", "too_many_responses")
        turn = await model.turn()
        await client.send("response.cancel", response_id="r63")
        await client.until("response.done", response_id="r63")
        assert await client.respond("again", response_id="again") == "again"
        await client.send("session.close")
        await client.until("session.closed")
        assert len(client.transcript.done) == 65
        await turn.closed.wait()


# --- who looks ------------------------------------------------------------------------------------------------------


async def test_response_ends_with_its_last_viewer() -> None:
    """By default a response is cancelled when the last connection leaves, and not while one is left."""
    model = Model()
    async with running_server(model) as server:
        async with attached(server) as one:
            session_id = one.session_id
            async with attached(server, session_id):
                response_id = await one.respond("question")
                turn = await model.turn()
            turn.say("still here")
            await one.until("response.output_text.delta")
            assert not turn.closed.is_set()
        async with asyncio.timeout(PATIENCE_S):
            await turn.closed.wait()
        async with attached(server, session_id) as late:
            done = await late.until("response.done", response_id=response_id)
            assert (done["status"], done["stop_reason"]) == ("cancelled", "disconnected")
            assert late.transcript.texts[response_id] == "still here"


async def test_response_goes_on_without_viewers_where_asked_to() -> None:
    """With `on_disconnect: continue` nobody needs to look, also where only that response says so."""
    model = Model()
    async with running_server(model) as server:
        async with attached(server) as client:
            session_id = client.session_id
            response_id = await client.respond("question", on_disconnect="continue")
            turn = await model.turn()
        turn.end("said to nobody")
        await turn.closed.wait()
        async with attached(server, session_id) as late:
            done = await late.until("response.done", response_id=response_id)
            assert done["status"] == "completed"
            assert late.transcript.texts[response_id] == "said to nobody"


async def test_viewer_that_comes_back_in_time_stops_the_clock() -> None:
    """Within `disconnect_grace_ms` a response waits for somebody to come back."""
    model = Model()
    async with running_server(model) as server:
        async with attached(server) as client:
            session_id, transcript = client.session_id, client.transcript
            response_id = await client.respond("question", disconnect_grace_ms=60_000)
            turn = await model.turn()
            turn.say("one ")
            await client.until("response.output_text.delta")
            client.reset()
        async with attached(server, session_id, transcript=transcript, after=transcript.after()) as client:
            turn.end("two")
            done = await client.until("response.done", response_id=response_id)
            assert done["status"] == "completed"
            assert transcript.texts[response_id] == "one two"
