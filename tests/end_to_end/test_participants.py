"""Several connections at one session: who is told of whom, and that all of them see the same."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from tests.end_to_end import Model, echo, events_of, settled
from tests.support.client import Client, Event, attached
from tests.support.server import running_server

BESIDE = {
    "session.created",
    "session.resumed",
    "participant.joined",
    "participant.left",
    "pong",
    "error",
    "rate_limits.updated",
}


def channel_events(client: Client) -> list[Event]:
    """What came of the session's channels, as it came."""
    return [event for event in client.transcript.events if event["type"] not in BESIDE]


async def test_others_are_told_who_joins_and_leaves() -> None:
    """`participant.joined` and `.left` name the participant as first frames do, have no `seq`, and come once."""
    async with running_server(echo) as server, attached(server) as one:
        async with attached(server, one.session_id) as two:
            joined = await one.until("participant.joined")
            assert set(joined) == {"type", "participant"}
            assert joined["participant"] == two.first["participants"][1]
            assert joined["participant"]["connection_id"] == two.first["connection_id"]
            assert joined["participant"]["user"] == "anonymous"
        left = await one.until("participant.left")
        assert left == {"type": "participant.left", "participant": joined["participant"]}
        await settled(one)
        assert len(events_of(one, "participant.joined")) == len(events_of(one, "participant.left")) == 1


async def test_nobody_is_told_of_themselves() -> None:
    """A connection finds itself in its first frame, and hears only of others."""
    async with running_server(echo) as server, attached(server) as one, attached(server, one.session_id) as two:
        await settled(two)
        assert events_of(two, "participant.joined") == []
        await settled(one)
        assert [event["participant"]["connection_id"] for event in events_of(one, "participant.joined")] == [
            two.first["connection_id"]
        ]


async def test_first_frame_lists_everybody_the_oldest_first() -> None:
    """Whoever attaches learns who is there already."""
    async with running_server(echo) as server, AsyncExitStack() as stack:
        one = await stack.enter_async_context(attached(server))
        clients = [one]
        for _ in range(3):
            clients.append(await stack.enter_async_context(attached(server, one.session_id)))
        ids = [client.first["connection_id"] for client in clients]
        assert len(set(ids)) == 4
        for number, client in enumerate(clients):
            listed = [participant["connection_id"] for participant in client.first["participants"]]
            assert listed == ids[: number + 1]


async def test_connection_that_is_cut_has_left() -> None:
    """A reset is a leave as any other."""
    async with running_server(echo) as server, attached(server) as one:
        async with attached(server, one.session_id) as two:
            await one.until("participant.joined")
            two.reset()
            left = await one.until("participant.left")
            assert left["participant"]["connection_id"] == two.first["connection_id"]
        async with attached(server, one.session_id) as three:
            assert [participant["connection_id"] for participant in three.first["participants"]] == [
                one.first["connection_id"],
                three.first["connection_id"],
            ]


async def test_reconnect_is_another_participant() -> None:
    """The one that was is told to have left, the new one to have joined: every joined has one left."""
    async with running_server(echo) as server, attached(server) as one:
        seen: list[str] = []
        for _ in range(5):
            async with attached(server, one.session_id) as two:
                seen.append(two.first["connection_id"])
        while len(events_of(one, "participant.left")) < 5:
            await one.receive()
        assert [event["participant"]["connection_id"] for event in events_of(one, "participant.joined")] == seen
        assert [event["participant"]["connection_id"] for event in events_of(one, "participant.left")] == seen


async def test_sessions_do_not_hear_of_each_other() -> None:
    """What happens in one session is told to nobody in another."""
    async with running_server(echo) as server, attached(server) as one, attached(server) as stranger:
        async with attached(server, one.session_id) as two:
            await one.until("participant.joined")
            await two.answer("private", response_id="answer")
        await one.until("participant.left")
        await settled(stranger)
        assert [event["type"] for event in stranger.transcript.events] == ["session.created", "session.updated"]
        await stranger.send("response.cancel", response_id="answer")
        assert (await stranger.until("error"))["error"]["code"] == "response_not_found"


async def test_two_tabs_see_the_same() -> None:
    """Two connections that were there from the start are told the same events, but for how deltas were merged."""
    model = Model()
    async with running_server(model) as server, attached(server) as one, attached(server, one.session_id) as two:
        for number, asking in enumerate((one, two, one)):
            response_id = await asking.respond(f"question {number}", metadata={"n": number})
            turn = await model.turn()
            for word in ("a ", "b ", "ü 🙂 ", "\r\n"):
                turn.say(word)
                await one.until("response.output_text.delta")
            turn.end("z")
            for client in (one, two):
                if response_id not in client.transcript.done:
                    await client.until("response.done", response_id=response_id)
        deltas = "response.output_text.delta"
        told = [[event for event in channel_events(client) if event["type"] != deltas] for client in (one, two)]
        assert told[0] == told[1]
        assert one.transcript.texts == two.transcript.texts
        assert one.transcript.positions == two.transcript.positions


async def test_tabs_in_both_encodings_see_the_same() -> None:
    """JSON and MessagePack may be mixed in one session."""
    async with running_server(echo) as server, attached(server) as one:
        async with attached(server, one.session_id, subprotocol="realtime.v1.msgpack") as two:
            assert await two.answer("grüße 🙂 \x00", response_id="answer") == "grüße 🙂 \x00"
            await one.until("response.done")
            assert one.transcript.texts["answer"] == two.transcript.texts["answer"]
            assert one.transcript.items == two.transcript.items


async def test_many_tabs_come_and_go_while_an_answer_streams() -> None:
    """Whoever stays hears of everybody who came, in matching pairs, and of every word."""
    model = Model()
    async with running_server(model) as server, attached(server) as one:
        response_id = await one.respond("question")
        turn = await model.turn()

        async def visit(session_id: str) -> str:
            async with attached(server, session_id) as client:
                await client.until("response.output_text.delta")
                return str(client.first["connection_id"])

        turn.say("0 ")
        async with asyncio.TaskGroup() as group:
            visits = [group.create_task(visit(one.session_id)) for _ in range(30)]
            for number in range(1, 31):
                turn.say(f"{number} ")
                await one.until("response.output_text.delta")
            while len(events_of(one, "participant.left")) < 30:
                await one.receive()
        turn.end()
        await one.until("response.done", response_id=response_id)
        assert one.transcript.texts[response_id] == "".join(f"{number} " for number in range(31))
        joined = [event["participant"]["connection_id"] for event in events_of(one, "participant.joined")]
        left = [event["participant"]["connection_id"] for event in events_of(one, "participant.left")]
        assert sorted(joined) == sorted(left) == sorted(task.result() for task in visits)
