"""How a connection begins: what it is told first, where it goes on, and how it is refused."""

from __future__ import annotations

import asyncio
import json
import re
from datetime import datetime
from typing import Any

import msgspec
import pytest
from websockets.exceptions import InvalidStatus

from realtime.protocol import Participant
from realtime.store.base import Viewer
from tests.end_to_end import PATIENCE_S, Model, dialled, echo, events_of, frames_until_closed, settled, until_closed
from tests.support.client import Client, Event, Transcript, attached
from tests.support.server import RunningServer, running_server

SESSION_FIELDS = {
    "id",
    "created_at",
    "expires_at",
    "owner",
    "instructions",
    "model",
    "max_output_tokens",
    "on_disconnect",
    "disconnect_grace_ms",
    "multitask_strategy",
}


async def refusal(server: RunningServer, query: dict[str, Any] | str = "", **options: Any) -> tuple[int, Event, Event]:
    """Connect where the upgrade has to be refused; returns status, headers in lower case, and the body's error."""
    with pytest.raises(InvalidStatus) as refused:
        async with dialled(server, query, **options):
            pass
    response = refused.value.response
    headers = {name.lower(): value for name, value in response.headers.raw_items()}
    assert headers["content-type"] == "application/json"
    body = json.loads(response.body or b"")
    assert set(body) == {"error"}
    assert {"type", "code", "message"} <= set(body["error"])
    return response.status_code, headers, body["error"]


async def fatal(server: RunningServer, query: dict[str, Any]) -> tuple[Event, int]:
    """Connect where the connection has to be accepted, told an error, and closed; returns error and close code."""
    async with dialled(server, query, subprotocols=("realtime.v1",)) as socket:
        frames = await frames_until_closed(socket)
        assert [frame["type"] for frame in frames] == ["error"]
        assert frames[0]["error"]["fatal"] is True
        assert socket.close_code is not None
        return frames[0]["error"], socket.close_code


def resuming(positions: dict[str, int]) -> tuple[Transcript, str]:
    """What a client that has these positions knows, and how it says so."""
    transcript = Transcript()
    transcript.positions = dict(positions)
    return transcript, transcript.after()


# --- the first frame ------------------------------------------------------------------------------------------------


async def test_new_session_begins_with_its_description() -> None:
    """The first frame of a connection without a session is `session.created`, with exactly its fields."""
    async with running_server(echo) as server, attached(server) as client:
        first = client.first
        assert first["type"] == "session.created"
        assert set(first) == {"type", "session", "connection_id", "positions", "participants"}
        session = first["session"]
        assert set(session) == SESSION_FIELDS
        assert re.fullmatch(r"sess_[0-9a-f]{32}", session["id"])
        assert re.fullmatch(r"conn_[0-9a-f]{32}", first["connection_id"])
        assert session["owner"] == "anonymous"
        assert session["on_disconnect"] == "cancel"
        assert session["disconnect_grace_ms"] == 0
        assert session["multitask_strategy"] == "reject"
        assert session["instructions"] == ""
        assert first["positions"] == {"session": 0}
        assert [participant["connection_id"] for participant in first["participants"]] == [first["connection_id"]]
        assert set(first["participants"][0]) == {"user", "connection_id", "since"}


async def test_times_are_rfc_3339_in_utc() -> None:
    """Every time has a date, a time and a Z; a session expires after it was made."""
    async with running_server(echo) as server, attached(server) as client:
        session = client.first["session"]
        times = [session["created_at"], session["expires_at"], client.first["participants"][0]["since"]]
        for time in times:
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", time)
        assert datetime.fromisoformat(session["created_at"]) < datetime.fromisoformat(session["expires_at"])


async def test_known_session_begins_with_resumed() -> None:
    """The first frame of an attach is `session.resumed`, with the same fields and the session's settings now."""
    async with running_server(echo) as server, attached(server) as one:
        await one.send("session.update", session={"instructions": "Be brief.", "multitask_strategy": "enqueue"})
        await one.until("session.updated")
        async with attached(server, one.session_id) as other:
            assert other.first["type"] == "session.resumed"
            assert set(other.first) == set(one.first)
            assert other.session_id == one.session_id
            assert other.first["session"]["instructions"] == "Be brief."
            assert other.first["session"]["multitask_strategy"] == "enqueue"
            assert other.first["connection_id"] != one.first["connection_id"]


async def test_positions_name_the_session_and_unfinished_channels() -> None:
    """`positions` is where the session and its unfinished responses stand; what has ended is not in it."""
    model = Model()
    async with running_server(model) as server, attached(server) as client:
        done = await client.respond("one")
        (await model.turn()).end("1")
        await client.until("response.done", response_id=done)
        running = await client.respond("two")
        turn = await model.turn()
        turn.say("a", "b")
        await client.until("response.output_text.delta")
        waiting = await client.respond("three", multitask_strategy="enqueue")
        async with attached(server, client.session_id, history="none") as other:
            assert other.first["positions"] == {"session": 6, running: 3, waiting: 0}
        turn.end()
        (await model.turn()).end()
        await client.until("response.done", response_id=waiting)


async def test_first_frame_keeps_to_the_limit_with_long_instructions() -> None:
    """Instructions as long as an update may make them still fit into the first frame of who attaches later."""
    model = Model()
    async with running_server(model) as server, attached(server, subprotocol="realtime.v1.msgpack") as client:
        await client.send("session.update", session={"multitask_strategy": "enqueue"})
        for number in range(64):
            await client.send("response.create", input="x", response_id=f"r{number}".ljust(64, "_"))
        await settled(client)
        turn = await model.turn()
        for length in range(40_000, 43_700, 200):  # each one is six bytes in JSON; the last ones are refused
            await client.send("session.update", session={"instructions": "\x01" * length})
        await settled(client)
        async with dialled(server, {"session_id": client.session_id, "history": "none"}) as socket:
            frame = await socket.recv()
            assert isinstance(frame, str)
            assert json.loads(frame)["type"] == "session.resumed"
            assert len(frame.encode()) <= 256 * 1024
        await client.send("session.close")
        await client.until("session.closed")
        await turn.closed.wait()


async def test_first_frame_keeps_to_the_limit_with_many_participants() -> None:
    """However many connections look at a session, its first frame stays within 256 KiB."""
    async with running_server(echo) as server, dialled(server) as maker:
        session_id = json.loads(await maker.recv())["session"]["id"]
        crowd = [
            Participant(user="anonymous", connection_id=f"conn_{number:032x}", since="2030-01-01T00:00:00.000000Z")
            for number in range(2500)
        ]
        for participant in crowd:
            await server.engine.store.join(session_id, Viewer(participant, server.engine.instance))
        async with dialled(server, {"session_id": session_id}) as socket:
            frame = await socket.recv()
            assert isinstance(frame, str)
            assert json.loads(frame)["type"] == "session.resumed"
            assert len(frame.encode()) <= 256 * 1024


# --- history --------------------------------------------------------------------------------------------------------


async def test_history_is_replayed_and_marked_and_then_comes_what_is_live() -> None:
    """Without `after` everything is replayed with `replay: true`; what comes after the attach has no such mark."""
    model = Model()
    async with running_server(model) as server, attached(server) as one:
        response_id = await one.respond("question")
        turn = await model.turn()
        turn.say("Hello", ", ")
        await one.until("response.output_text.delta")
        async with attached(server, one.session_id) as other:
            await other.until("response.output_text.delta")
            replayed = other.transcript.events[1:]
            assert [event["type"] for event in replayed] == [
                "conversation.item.created",
                "response.created",
                "response.in_progress",
                "response.output_text.delta",
            ]
            assert all(event["replay"] is True for event in replayed)
            assert replayed[-1]["merged"] == 2
            assert other.transcript.positions == other.first["positions"]
            turn.end("world")
            await other.until("response.done")
            live = other.transcript.events[5:]
            assert [event["type"] for event in live] == ["response.output_text.delta", "response.done"]
            assert not any("replay" in event for event in live)
            assert other.transcript.texts[response_id] == "Hello, world"
        await one.until("response.done")


async def test_history_none_sends_only_what_comes() -> None:
    """With `history=none` nothing is replayed: a client that adopts the positions goes on from them."""
    model = Model()
    async with running_server(model) as server, attached(server) as one:
        response_id = await one.respond("question")
        turn = await model.turn()
        turn.say("unheard ")
        await one.until("response.output_text.delta")
        async with attached(server, one.session_id, history="none") as other:
            turn.end("heard")
            await other.until("response.done", response_id=response_id)
            assert other.transcript.texts[response_id] == "heard"
            assert not any("replay" in event for event in other.transcript.events)
            assert events_of(other, "conversation.item.created") == []
        await one.until("response.done")


async def test_attach_between_every_two_tokens_has_no_seam() -> None:
    """Whoever attaches while an answer streams gets all of it once, whenever that is."""
    model = Model()
    words = [f"{number} " for number in range(40)]
    async with running_server(model) as server, attached(server) as one:
        response_id = await one.respond("count")
        turn = await model.turn()

        async def read_along(session_id: str) -> str:
            async with attached(server, session_id) as client:
                await client.until("response.done", response_id=response_id)
                return client.transcript.texts[response_id]

        async with asyncio.TaskGroup() as group:
            readers = []
            for word in words:
                readers.append(group.create_task(read_along(one.session_id)))
                turn.say(word)
                await one.until("response.output_text.delta")
            turn.end()
            await one.until("response.done")
            while len(events_of(one, "participant.left")) < len(words):
                await one.receive()
        assert {reader.result() for reader in readers} == {"".join(words)}


# --- after ----------------------------------------------------------------------------------------------------------


async def test_after_goes_on_in_the_middle_of_an_answer() -> None:
    """A named position of a running response is where its replay begins."""
    model = Model()
    async with running_server(model, on_disconnect="continue") as server:
        async with attached(server) as client:
            session_id, transcript = client.session_id, client.transcript
            response_id = await client.respond("question")
            turn = await model.turn()
            turn.say("one ")
            await client.until("response.output_text.delta")
        turn.say("two ", "three ")
        async with attached(server, session_id, transcript=transcript, after=transcript.after()) as client:
            event = await client.until("response.output_text.delta")
            assert "one " not in event["delta"]
            turn.end("four")
            await client.until("response.done")
        assert transcript.texts[response_id] == "one two three four"
        assert len([event for event in transcript.events if event["type"] == "response.created"]) == 1


async def test_after_may_split_deltas_that_were_merged() -> None:
    """Every position is one to go on from, also one in the middle of what another reader gets as one event."""
    model = Model()
    pieces = ["ä", "🙂", "", "c", "\r\n", "f"]
    async with running_server(model) as server, attached(server) as client:
        response_id = await client.respond("question")
        turn = await model.turn()
        turn.end(*pieces)
        done = await client.until("response.done")
        said = [piece for piece in pieces if piece]
        assert done["seq"] == len(said) + 2
        for position in range(done["seq"]):
            transcript, after = resuming({"session": 2, response_id: position})
            async with attached(server, client.session_id, transcript=transcript, after=after) as other:
                await other.until("response.done")
                assert transcript.texts[response_id] == "".join(said[max(0, position - 1) :])


async def test_after_replays_a_channel_created_behind_the_session_position() -> None:
    """A channel that is not named is replayed from its start if the session's position doesn't cover its creation."""
    async with running_server(echo) as server, attached(server) as client:
        first = await client.answer("before", response_id="before") and "before"
        position = client.transcript.positions["session"]
        await client.answer("afterwards", response_id="later")
        transcript, after = resuming({"session": position})
        async with attached(server, client.session_id, transcript=transcript, after=after) as other:
            await other.until("response.done", response_id="later")
            assert transcript.texts["later"] == "afterwards"
            assert first not in transcript.texts
            assert all(event["replay"] for event in transcript.events[1:])


async def test_after_leaves_out_a_channel_that_the_session_position_covers() -> None:
    """A channel that is not named is not replayed at all if the session's position covers its creation, even live."""
    model = Model()
    async with running_server(model) as server, attached(server) as client:
        response_id = await client.respond("question")
        turn = await model.turn()
        turn.say("said")
        await client.until("response.output_text.delta")
        transcript, after = resuming({"session": client.transcript.positions["session"]})
        async with attached(server, client.session_id, transcript=transcript, after=after) as other:
            turn.end("more")
            await client.until("response.done", response_id=response_id)
            await settled(other)
            assert [event["type"] for event in transcript.events] == ["session.resumed", "session.updated"]


UNKNOWN_CHANNELS = ["resp_unknown:7", "resp_unknown:0", "task_x:1,resp_y:2", "../..:3", "🙂:4"]


async def test_after_ignores_unknown_channels() -> None:
    """A channel that the session does not have is passed over."""
    async with running_server(echo) as server:
        for unknown in UNKNOWN_CHANNELS:
            async with attached(server) as client:
                await client.answer("hello", response_id="known")
                transcript = Transcript()
                after = f"session:0,{unknown}"
                async with attached(server, client.session_id, transcript=transcript, after=after) as other:
                    await other.until("response.done")
                    assert transcript.texts["known"] == "hello"
                    assert other.first["positions"] == {"session": 2}


async def test_after_does_not_reach_the_control_channel() -> None:
    """`control` is no channel that clients see: naming it is naming one that is unknown."""
    model = Model()
    async with running_server(model) as server, attached(server) as client:
        response_id = await client.respond("question")
        turn = await model.turn()
        await client.send("response.cancel", response_id=response_id)
        await client.until("response.done")
        await turn.closed.wait()
        async with dialled(server, {"session_id": client.session_id, "after": "session:2,control:0"}) as socket:
            await socket.recv()
            await socket.send(json.dumps({"type": "session.update", "session": {}}))
            assert json.loads(await socket.recv())["type"] == "session.updated"


@pytest.mark.parametrize("beyond", [0, 1, 1000])
async def test_after_at_the_end_of_a_finished_channel_resets_it(beyond: int) -> None:
    """Who names a finished channel's end or more has seen what was never stored: it is reset and replayed from 1."""
    async with running_server(echo) as server, attached(server) as client:
        await client.answer("hello", response_id="answer")
        end = client.transcript.done["answer"]["seq"]
        transcript, after = resuming({"session": 2, "answer": end + beyond})
        async with attached(server, client.session_id, transcript=transcript, after=after) as other:
            await other.until("response.done", response_id="answer")
            events = transcript.events[1:]
            assert [event["type"] for event in events] == [
                "response.in_progress",
                "response.output_text.delta",
                "response.done",
            ]
            assert events[0]["reset"] is True
            assert events[0]["seq"] == 1
            assert not any("reset" in event for event in events[1:])
            assert all(event["replay"] for event in events)
            assert transcript.texts["answer"] == "hello"


async def test_after_just_before_the_end_gets_the_end_alone() -> None:
    """A client that has all but a response's `done` gets that, and no reset."""
    async with running_server(echo) as server, attached(server) as client:
        await client.answer("hello", response_id="answer")
        transcript, after = resuming({"session": 2, "answer": client.transcript.done["answer"]["seq"] - 1})
        async with attached(server, client.session_id, transcript=transcript, after=after) as other:
            await other.until("response.done", response_id="answer")
            assert [event["type"] for event in transcript.events] == ["session.resumed", "response.done"]
            assert "reset" not in transcript.events[1]


async def test_after_ahead_of_a_running_response_waits_for_it() -> None:
    """A position ahead of a channel that still grows is not reset: its reader is sent what comes after it."""
    model = Model()
    async with running_server(model) as server, attached(server) as client:
        response_id = await client.respond("question")
        turn = await model.turn()
        turn.say("a")
        await client.until("response.output_text.delta")
        transcript, after = resuming({"session": 2, response_id: 3})
        async with attached(server, client.session_id, transcript=transcript, after=after) as other:
            turn.end("b", "c")
            await other.until("response.done")
            assert transcript.texts[response_id] == "c"
            assert not any("reset" in event for event in transcript.events)


async def test_after_beyond_the_session_ends_it_as_lost() -> None:
    """A session position that the store doesn't have means that it lost events: fatal, and 4404."""
    async with running_server(echo) as server, attached(server) as client:
        await client.answer("hello")
        error, code = await fatal(server, {"session_id": client.session_id, "after": "session:3"})
        assert (error["type"], error["code"], code) == ("not_found_error", "store_lost", 4404)
        assert await client.answer("still here") == "still here"


async def test_after_wins_over_history() -> None:
    """`history` is for a connection without `after`."""
    async with running_server(echo) as server, attached(server) as client:
        await client.answer("hello", response_id="answer")
        query = {"session_id": client.session_id, "after": "session:0", "history": "none"}
        async with dialled(server, query) as socket, asyncio.timeout(PATIENCE_S):
            types = [json.loads(await socket.recv())["type"] for _ in range(6)]
            assert types[1] == "conversation.item.created"
            assert types[-1] == "response.done"


async def test_after_without_the_session_replays_the_session() -> None:
    """A session that is not named counts as one of which nothing came."""
    async with running_server(echo) as server, attached(server) as client:
        await client.answer("hello", response_id="answer")
        query = {"session_id": client.session_id, "after": "answer:3"}
        async with dialled(server, query) as socket, asyncio.timeout(PATIENCE_S):
            types = [json.loads(await socket.recv())["type"] for _ in range(4)]
            assert types == ["session.resumed", "conversation.item.created", "response.created", "response.done"]


# --- a session that is closed ---------------------------------------------------------------------------------------


async def test_closed_session_is_read_and_closed() -> None:
    """Whoever attaches to a closed session, however, is sent what it lacks up to `session.closed`, and 1000."""
    async with running_server(echo) as server:
        async with attached(server) as client:
            await client.answer("hello", response_id="answer")
            await client.send("session.close")
            assert await until_closed(client) == 1000
        for query in ({}, {"history": "none"}, {"after": "session:0"}, {"after": "session:2"}):
            transcript = resuming({"session": 2})[0] if query.get("after") == "session:2" else Transcript()
            async with attached(server, client.session_id, transcript=transcript, **query) as reader:
                assert await until_closed(reader) == 1000, query
                assert transcript.events[0]["type"] == "session.resumed"
                assert transcript.events[-1]["type"] == "session.closed", query


async def test_closed_session_closes_who_has_seen_its_end() -> None:
    """A client that names the session's end, which it need not do, is closed with 1000 and sent no gap."""
    async with running_server(echo) as server:
        async with attached(server) as client:
            await client.send("session.close")
            assert await until_closed(client) == 1000
        transcript, after = resuming({"session": 1})
        async with attached(server, client.session_id, transcript=transcript, after=after) as reader:
            assert await until_closed(reader) == 1000


# --- subprotocols ---------------------------------------------------------------------------------------------------


OFFERS = [
    (("realtime.v1",), "realtime.v1"),
    (("realtime.v1.msgpack",), "realtime.v1.msgpack"),
    (("realtime.v1", "realtime.v1.msgpack"), "realtime.v1"),
    (("realtime.v1.msgpack", "realtime.v1"), "realtime.v1.msgpack"),
    (("bearer.secret", "realtime.v1"), "realtime.v1"),
    (("realtime.v1.msgpack", "bearer.secret"), "realtime.v1.msgpack"),
    (("realtime.v2", "realtime.v1"), "realtime.v1"),
]


async def test_first_known_subprotocol_is_selected() -> None:
    """The server selects the first of its two that is offered, and never a token."""
    async with running_server(echo) as server:
        for offered, selected in OFFERS:
            async with dialled(server, subprotocols=offered) as socket:
                assert socket.subprotocol == selected
                frame = await socket.recv()
                first = json.loads(frame) if isinstance(frame, str) else msgspec.msgpack.decode(frame)
                assert isinstance(frame, bytes) == (selected == "realtime.v1.msgpack")
                assert first["type"] == "session.created"


async def test_no_subprotocol_means_json() -> None:
    """A client that offers none gets none, and JSON in text frames."""
    async with running_server(echo) as server, dialled(server) as socket:
        assert socket.subprotocol is None
        assert socket.response is not None
        assert "Sec-WebSocket-Protocol" not in socket.response.headers
        frame = await socket.recv()
        assert isinstance(frame, str)
        client = Client(socket, Transcript())
        await client.send("ping")
        assert await client.receive() == {"type": "pong"}


UNKNOWN_SUBPROTOCOLS = [("bearer.secret",), ("realtime.v2",), ("realtime.V1", "mqtt")]


async def test_unknown_subprotocols_alone_are_refused() -> None:
    """Where subprotocols are offered and none of ours, the upgrade is a 400, and no token is repeated."""
    async with running_server(echo) as server:
        for offered in UNKNOWN_SUBPROTOCOLS:
            status, _, error = await refusal(server, subprotocols=offered)
            assert status == 400
            assert error["type"] == "invalid_request_error"
            assert "secret" not in json.dumps(error)


async def test_both_encodings_carry_the_same_structures() -> None:
    """A session told in MessagePack is event for event the session told in JSON."""
    async with running_server(echo) as server, attached(server, subprotocol="realtime.v1.msgpack") as packed:
        metadata = {"text": "ü🙂\x00", "int": 2**53, "float": 0.1, "bool": True, "null": None}
        await packed.send("response.create", input="grüße 🙂", metadata=metadata)
        await packed.until("response.done")
        transcripts = []
        for subprotocol in ("realtime.v1", "realtime.v1.msgpack"):
            async with attached(server, packed.session_id, subprotocol=subprotocol) as reader:
                await reader.until("response.done")
                transcripts.append(reader.transcript.events[1:])
        assert transcripts[0] == transcripts[1]
        assert transcripts[0][1]["response"]["metadata"] == metadata


# --- refusals -------------------------------------------------------------------------------------------------------


BAD_QUERIES = [
    ("history=some", "history"),
    ("history=", "history"),
    ("delta_interval_ms=-1", "delta_interval_ms"),
    ("delta_interval_ms=1001", "delta_interval_ms"),
    ("delta_interval_ms=1.5", "delta_interval_ms"),
    ("delta_interval_ms=", "delta_interval_ms"),
    ("delta_interval_ms=%D9%A1", "delta_interval_ms"),
    ("after=", "after"),
    ("after=session", "after"),
    ("after=session:", "after"),
    ("after=session:-1", "after"),
    ("after=session:1,", "after"),
    ("after=:5", "after"),
    ("after=session:" + "9" * 400, "after"),
    ("session_id=", "session_id"),
    ("session_id=%FF", None),
    ("x&" * 200, None),
]


async def test_bad_query_is_refused_before_the_upgrade() -> None:
    """A query that can't be honoured is a 400 with the typed error as its body."""
    async with running_server(echo) as server:
        for query, param in BAD_QUERIES:
            status, _, error = await refusal(server, query)
            assert status == 400
            assert error["type"] == "invalid_request_error"
            assert error.get("param") == param


UNKNOWN_SESSIONS = ["sess_" + "0" * 32, "x", "../../etc", "🙂", "\x00", "s" * 4000]


async def test_unknown_session_is_told_after_the_upgrade() -> None:
    """A browser can read only what comes over the socket: it is accepted, told the error, and closed with 4404."""
    async with running_server(echo) as server:
        for session_id in UNKNOWN_SESSIONS:
            error, code = await fatal(server, {"session_id": session_id})
            assert code == 4404
            assert (error["type"], error["code"]) == ("not_found_error", "session_not_found")
            assert len(session_id) < 5 or session_id not in error["message"]


async def test_deleted_session_closes_its_connections() -> None:
    """A session that is erased under a connection ends it with a fatal error and 4410; after that it is unknown."""
    async with running_server(echo) as server, attached(server) as client:
        await client.answer("hello")
        await server.engine.store.erase(client.session_id)
        assert await until_closed(client) == 4410
        assert client.transcript.events[-1]["type"] == "error"
        assert client.transcript.events[-1]["error"]["fatal"] is True
        assert (await fatal(server, {"session_id": client.session_id}))[1] == 4404


async def admitted(server: RunningServer) -> bool:
    """Whether the server takes another connection, which then is answered."""
    try:
        async with attached(server) as client:
            return await client.answer("in") == "in"
    except InvalidStatus:
        return False


async def test_full_instance_refuses_until_somebody_leaves() -> None:
    """An instance with as many connections as it may have answers 503 with `Retry-After`, and others go on."""
    async with running_server(echo, max_connections=2) as server, attached(server) as one:
        async with attached(server):
            status, headers, error = await refusal(server)
            assert status == 503
            assert int(headers["retry-after"]) >= 1
            assert error["type"] == "rate_limit_error"
            assert error["retry_after_ms"] > 0
            assert await one.answer("still served") == "still served"
        async with asyncio.timeout(PATIENCE_S):
            while not await admitted(server):  # the server hears of the leaving a moment later
                pass


async def test_refused_upgrade_is_no_error_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    """What a client asks for wrongly, or a full instance, is not logged as a fault of the server."""
    async with running_server(echo, max_connections=1) as server:
        assert (await refusal(server, "history=some"))[0] == 400
        async with attached(server):
            assert (await refusal(server))[0] == 503
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


async def test_page_of_another_origin_is_refused() -> None:
    """A browser's upgrade from another site's page is a 403 before the upgrade; from our own it is welcome."""
    async with running_server(echo) as server:
        async with dialled(server, origin=server.url) as socket:
            assert json.loads(await socket.recv())["type"] == "session.created"
        status, _, error = await refusal(server, origin="https://evil.example")
        assert status == 403
        assert error["type"] == "permission_error"


# --- delta_interval_ms ----------------------------------------------------------------------------------------------


async def test_delta_interval_spaces_and_merges_the_frames_of_a_response() -> None:
    """Two frames of one response are at least the interval apart, and deltas in between are merged."""
    model = Model()
    loop = asyncio.get_running_loop()
    async with running_server(model) as server, attached(server, delta_interval_ms=100) as client:
        began = loop.time()
        response_id = await client.respond("question")
        turn = await model.turn()
        frames = 0
        for number in range(4):
            turn.say(*(f"{number}{letter} " for letter in "abcde"))
            event = await client.until("response.output_text.delta")
            frames += 1
            assert event["merged"] == 5
        turn.end()
        await client.until("response.done", response_id=response_id)
        assert frames == 4
        # in_progress, four deltas, done: five gaps.
        assert loop.time() - began >= 5 * 0.1
        assert client.transcript.texts[response_id].count(" ") == 20


async def test_delta_interval_is_each_connections_own() -> None:
    """A reader without an interval is not slowed by one that has the longest."""
    model = Model()
    async with running_server(model) as server, attached(server) as quick:
        async with attached(server, quick.session_id, delta_interval_ms=1000) as slow:
            response_id = await quick.respond("question")
            turn = await model.turn()
            for number in range(10):
                turn.say(f"{number}")
                assert (await quick.until("response.output_text.delta"))["delta"] == f"{number}"
            turn.end()
            await quick.until("response.done")
            await slow.until("response.done")
            assert slow.transcript.texts[response_id] == quick.transcript.texts[response_id] == "0123456789"
            assert len(events_of(slow, "response.output_text.delta")) < 10
