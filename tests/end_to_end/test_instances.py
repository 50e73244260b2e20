"""Several instances that share their sessions: whatever a client does, it may do it at any of them."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed

from realtime.live import LiveSession
from realtime.protocol import new_id
from realtime.responders.base import Reasoning, Request, ResponderEvent
from realtime.store.redis import RedisStore
from tests.end_to_end import PATIENCE_S, Model, echo, events_of, refused, settled, until_closed
from tests.support.client import Client, Event, Transcript, attached
from tests.support.redis_server import RedisServer, redis_server
from tests.support.server import RunningServer, running_server

CLOSES_WITHIN_S = 1.0
"""From what ends a response, wherever it happens, to the end of its model call; it takes some milliseconds."""
SESSIONS = 3
ROUNDS = 17
"""Pairs of commands at once, in each of the sessions."""
HOPS = 40
"""Connections after which a reader stays where it is."""
BESIDE = {"session.created", "session.resumed", "participant.joined", "participant.left", "pong", "rate_limits.updated"}


@pytest.fixture
async def redis() -> AsyncIterator[RedisServer]:
    """The Redis of a test."""
    async with redis_server() as server:
        yield server


@pytest.fixture
def model() -> Model:
    """The model that all instances ask."""
    return Model()


@pytest.fixture
async def both(redis: RedisServer, model: Model) -> AsyncIterator[tuple[RunningServer, RunningServer]]:
    """Two instances on one Redis."""
    async with running_server(model, redis_url=redis.url) as one, running_server(model, redis_url=redis.url) as two:
        yield one, two
        one.stop()
        two.stop()


@asynccontextmanager
async def at_both(servers: tuple[RunningServer, RunningServer], **query: Any) -> AsyncIterator[tuple[Client, Client]]:
    """A client at each instance, in one new session."""
    one, two = servers
    async with attached(one, **query) as first, attached(two, first.session_id, **query) as second:
        yield first, second


def told(client: Client) -> list[Event]:
    """What came of the session's channels; the same for everybody, however it was replayed."""
    events = [event for event in client.transcript.events if event["type"] not in BESIDE]
    return [{name: value for name, value in event.items() if name != "replay"} for event in events]


async def done(client: Client, response_id: str) -> Event:
    """The end of a response, which has to come soon."""
    async with asyncio.timeout(PATIENCE_S):
        while response_id not in client.transcript.done:
            await client.receive()
    return client.transcript.done[response_id]


async def queue(client: Client, text: str) -> str:
    """Ask for a response that waits for the one that runs; returns its id once it is created."""
    response_id = new_id("resp")
    await client.send("response.create", input=text, response_id=response_id, multitask_strategy="enqueue")
    async with asyncio.timeout(PATIENCE_S):
        while response_id not in client.transcript.positions:
            await client.receive()
    return response_id


async def says(client: Client, response_id: str, text: str) -> None:
    """Return once the client has so much of an answer."""
    async with asyncio.timeout(PATIENCE_S):
        while client.transcript.texts[response_id] != text:
            await client.receive()


async def soon(event: asyncio.Event) -> None:
    """Return once it is set, which has to be soon."""
    async with asyncio.timeout(CLOSES_WITHIN_S):
        await event.wait()


async def not_yet(event: asyncio.Event, server: RunningServer, session_id: str) -> None:
    """It is not set, nor is it once all has gone through Redis that was under way."""
    for _ in range(5):
        await server.engine.store.load(session_id)
        assert not event.is_set()


async def gone(server: RunningServer, session_id: str, *, left: int) -> None:
    """Return once an instance knows that only so many connections look at a session."""
    async with asyncio.timeout(PATIENCE_S):
        for live in server.engine.hub.sessions():
            while live.id == session_id and len(live.audience.participants) > left:  # noqa: ASYNC110
                await asyncio.sleep(0.001)


# -------------------------------------------------------------------------------------------- attaching and resuming


async def test_each_token_is_seen_at_both_instances(both: tuple[RunningServer, RunningServer], model: Model) -> None:
    """Two clients at two instances see an answer grow while the model is held back, and the same events."""
    async with at_both(both) as (one, two):
        response_id = await one.respond()
        turn = await model.turn()
        for text in ("one ", "one two ", "one two three"):
            turn.say(text.removeprefix(one.transcript.texts[response_id]))
            for client in (one, two):
                await says(client, response_id, text)
        turn.end()
        assert (await done(one, response_id))["status"] == "completed"
        await done(two, response_id)
        assert told(one) == told(two)


async def test_who_asks_at_one_instance_may_read_at_the_other_alone(
    both: tuple[RunningServer, RunningServer], model: Model
) -> None:
    """The one that runs a response has no reader for it: all of it comes through the store."""
    async with httpx.AsyncClient(base_url=both[0].url, trust_env=False) as http, attached(both[1]) as reader:
        create = {"type": "response.create", "input": "go", "response_id": "r"}
        await http.post(f"/v1/sessions/{reader.session_id}/events", json=create)
        turn = await model.turn()
        assert both[0].engine.runs(reader.session_id, "r")
        turn.end("one ", Reasoning("Hm. "), "two")
        assert (await done(reader, "r"))["status"] == "completed"
        assert (reader.transcript.texts["r"], reader.transcript.reasonings["r"]) == ("one two", "Hm. ")


async def test_a_client_that_changes_the_instance_after_every_event_has_no_seam(
    both: tuple[RunningServer, RunningServer], model: Model
) -> None:
    """By its positions alone: before the response, before its first token, between all of them, before its end."""
    transcript, pieces = Transcript(), [f"token {number} " for number in range(12)]
    sides = itertools.cycle(both)
    async with attached(next(sides), transcript=transcript) as client:
        session_id = client.session_id
        await client.send("session.update", session={"on_disconnect": "continue"})
        await client.until("session.updated")
        await client.send("response.create", input="go", response_id="r")
        turn = await model.turn()
    waiting = [turn.say] * len(pieces)
    while "r" not in transcript.done:
        async with (
            asyncio.timeout(PATIENCE_S),
            attached(next(sides), session_id, transcript=transcript, after=transcript.after()) as client,
        ):
            assert client.first["positions"]["session"] >= transcript.positions["session"]
            seen = len(transcript.events)
            if transcript.positions.get("r") and waiting:
                waiting.pop()(pieces[len(pieces) - len(waiting) - 1])
            elif not waiting:
                turn.end()
            while len(transcript.events) == seen:
                event = await client.receive()
                assert not event.get("reset")
                if event["type"] in BESIDE:
                    seen += 1
    assert transcript.texts["r"] == "".join(pieces)
    assert model.calls == 1


class Chatter:
    """A responder that says many small pieces at random moments, and keeps what it has said."""

    def __init__(self, seed: int) -> None:
        self.said: dict[str, str] = {}
        self._chance = random.Random(seed)

    async def __call__(self, request: Request) -> AsyncIterator[ResponderEvent]:
        """Answer."""
        self.said[request.response_id] = ""
        for number in range(self._chance.randrange(60, 100)):
            piece = f"{number}é🙂 "[: self._chance.randrange(1, 8)]
            self.said[request.response_id] += piece
            yield piece
            await asyncio.sleep(self._chance.random() * 0.006)


async def wander(
    servers: list[RunningServer], session_id: str, chance: random.Random, ids: set[str], transcript: Transcript
) -> None:
    """Read some events here and some there, leaving now by a close and now by a reset, until all is seen."""
    hops = 0
    while not ids <= transcript.done.keys():
        hops += 1
        server = chance.choice(servers)
        async with attached(server, session_id, transcript=transcript, after=transcript.after()) as client:
            for _ in range(chance.randrange(1, 6) if hops < HOPS else 10_000):
                event = await client.receive()
                assert not event.get("reset")
                if ids <= transcript.done.keys():
                    break
            if chance.random() < 0.5:
                client.reset()


async def test_readers_that_wander_between_the_instances_have_what_the_model_said(redis: RedisServer) -> None:
    """Under drops at random moments, in both directions, at three instances, while several responses follow."""
    chance, chatter = random.Random(1), Chatter(2)
    settings = {"redis_url": redis.url, "on_disconnect": "continue"}
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(running_server(chatter, **settings)) for _ in range(3)]
        ids, seen = {f"r{number}" for number in range(4)}, [Transcript() for _ in range(5)]
        async with asyncio.timeout(6 * PATIENCE_S), attached(servers[0]) as creator:
            wanderers = [wander(servers, creator.session_id, random.Random(chance.random()), ids, one) for one in seen]
            for response_id in sorted(ids):
                await creator.send("response.create", input="go", response_id=response_id, multitask_strategy="enqueue")
            await asyncio.gather(*wanderers)
        for transcript in seen:
            assert {response_id: transcript.texts[response_id] for response_id in ids} == chatter.said
            assert {end["status"] for end in transcript.done.values()} == {"completed"}


async def test_history_comes_from_an_instance_that_never_saw_it(redis: RedisServer, model: Model) -> None:
    """Items, answers, truncations, settings: what one instance has done another one tells, after the first is gone."""
    async with running_server(model, redis_url=redis.url) as one, attached(one) as writer:
        await writer.send("session.update", session={"instructions": "be brief"})
        await writer.send("conversation.item.create", item={"role": "assistant", "content": "Hello."})
        await writer.send("response.create", input="first", response_id="first")
        (await model.turn()).end("an answer", Reasoning("thought"), " in two")
        await done(writer, "first")
        await writer.send("conversation.item.truncate", response_id="first", heard_chars=4)
        await writer.send("response.create", input="second", response_id="second")
        (await model.turn()).fail(RuntimeError("broken"))
        await done(writer, "second")
        await settled(writer)
    async with running_server(model, redis_url=redis.url) as other:
        async with attached(other, writer.session_id) as reader:
            while reader.transcript.positions != writer.transcript.positions:
                async with asyncio.timeout(PATIENCE_S):
                    assert (await reader.receive())["replay"]
            assert reader.transcript.texts == writer.transcript.texts
            assert reader.transcript.reasonings == writer.transcript.reasonings
            assert reader.transcript.done == {
                response_id: {**end, "replay": True} for response_id, end in writer.transcript.done.items()
            }
            assert reader.first["session"]["instructions"] == "be brief"
            await reader.send("response.create", input="third", response_id="third")
            turn = await model.turn()
            assert turn.conversation == [
                ("assistant", "Hello."),
                ("user", "first"),
                ("assistant", "an a"),
                ("user", "second"),
                ("user", "third"),
            ]
            turn.end()


async def test_a_snapshot_of_another_instance_can_be_gone_on_from(
    both: tuple[RunningServer, RunningServer], model: Model
) -> None:
    """In the middle of an answer: what it shows and what comes after its positions are the whole, without a seam."""
    async with attached(both[0]) as client:
        response_id = await client.respond()
        turn = await model.turn()
        turn.say("one ")
        await says(client, response_id, "one ")
        async with httpx.AsyncClient(base_url=both[1].url, trust_env=False) as http:
            while True:
                snapshot = (await http.get(f"/v1/sessions/{client.session_id}")).json()
                if snapshot["responses"][0]["text"]:
                    break
        assert [response["status"] for response in snapshot["responses"]] == ["in_progress"]
        assert [item["content"] for item in snapshot["items"]] == ["go"]
        transcript = Transcript()
        transcript.positions = dict(snapshot["positions"])
        transcript.texts[response_id] = snapshot["responses"][0]["text"]
        turn.end("two")
        async with attached(both[1], client.session_id, transcript=transcript, after=transcript.after()) as reader:
            await done(reader, response_id)
        assert transcript.texts[response_id] == "one two"


# ------------------------------------------------------------------------ commands at an instance that runs nothing


async def test_a_cancel_stops_what_runs_elsewhere(both: tuple[RunningServer, RunningServer], model: Model) -> None:
    """The model call is closed at once, and both are told the same end with the command's id."""
    async with at_both(both) as (one, two):
        response_id = await one.respond()
        turn = await model.turn()
        turn.say("one ")
        await says(two, response_id, "one ")
        await two.send("response.cancel", response_id=response_id, event_id="stop")
        await soon(turn.closed)
        end = await done(two, response_id)
        assert (end["status"], end["stop_reason"], end["for_event_id"]) == ("cancelled", "cancelled", "stop")
        assert await done(one, response_id) == end


async def test_a_cancel_stops_what_waits_elsewhere(both: tuple[RunningServer, RunningServer], model: Model) -> None:
    """A queued response ends without a model call, whoever has queued it, and its end is its only event."""
    async with at_both(both) as (one, two):
        first = await one.respond()
        turn = await model.turn()
        queued = await queue(one, "later")
        await two.send("response.cancel", response_id=queued)
        for client in (one, two):
            end = await done(client, queued)
            assert (end["status"], end["seq"]) == ("cancelled", 1)
        turn.end()
        await done(two, first)
        assert model.calls == 1


async def test_a_cancel_with_what_was_heard_truncates_elsewhere(
    both: tuple[RunningServer, RunningServer], model: Model
) -> None:
    """The truncation and the end name as much as the listener heard."""
    async with at_both(both) as (one, two):
        response_id = await one.respond()
        turn = await model.turn()
        turn.say("one two three")
        await says(two, response_id, "one two three")
        await two.send("response.cancel", response_id=response_id, heard_chars=7)
        assert (await done(one, response_id))["heard_chars"] == 7
        async with asyncio.timeout(PATIENCE_S):
            while not events_of(two, "conversation.item.truncated"):
                await two.receive()
        [truncated] = events_of(two, "conversation.item.truncated")
        assert truncated["item"] == {"response_id": response_id, "heard_chars": 7}


async def test_a_truncation_reaches_the_model_elsewhere(
    both: tuple[RunningServer, RunningServer], model: Model
) -> None:
    """What one instance truncated the other one sends in its next request no longer."""
    async with at_both(both) as (one, two):
        response_id = await one.respond("question")
        (await model.turn()).end("much too long")
        await done(two, response_id)
        await two.send("conversation.item.truncate", response_id=response_id, heard_chars=4)
        await one.until("conversation.item.truncated")
        await one.send("response.create", input="next")
        turn = await model.turn()
        assert turn.conversation == [("user", "question"), ("assistant", "much"), ("user", "next")]
        turn.end()


async def test_an_update_holds_elsewhere(both: tuple[RunningServer, RunningServer], model: Model) -> None:
    """The next response at the other instance has the new instructions, and a snapshot shows them."""
    async with at_both(both) as (one, two):
        await two.send("session.update", session={"instructions": "be brief", "multitask_strategy": "enqueue"})
        updated = await one.until("session.updated")
        assert updated["session"]["instructions"] == "be brief"
        await one.send("response.create", input="go")
        turn = await model.turn()
        assert turn.request.instructions == "be brief"
        turn.end()


async def test_a_close_ends_everything_everywhere(both: tuple[RunningServer, RunningServer], model: Model) -> None:
    """What runs at the other instance is cancelled, what waits too, all are told, and then closed with 1000."""
    async with at_both(both) as (one, two):
        running = await one.respond()
        turn = await model.turn()
        queued = await queue(one, "later")
        await two.send("session.close")
        await soon(turn.closed)
        for client in (one, two):
            assert await until_closed(client) == 1000
            reasons = {response_id: end["stop_reason"] for response_id, end in client.transcript.done.items()}
            assert reasons == {running: "session_closed", queued: "session_closed"}
            assert client.transcript.events[-1]["type"] == "session.closed"


async def test_a_delete_ends_everything_everywhere(both: tuple[RunningServer, RunningServer], model: Model) -> None:
    """The model call is closed, the connections are with 4410, and nobody finds the session any more."""
    async with at_both(both) as (one, two):
        await one.respond()
        turn = await model.turn()
        async with httpx.AsyncClient(trust_env=False) as http:
            path = f"/v1/sessions/{one.session_id}"
            assert (await http.delete(both[1].url + path)).status_code == 204
            await soon(turn.closed)
            assert [await until_closed(client) for client in (one, two)] == [4410, 4410]
            assert [(await http.get(server.url + path)).status_code for server in both] == [404, 404]


async def test_an_interrupting_response_elsewhere_waits_for_the_end(
    both: tuple[RunningServer, RunningServer], model: Model
) -> None:
    """What ran at the other instance is cancelled first, with the reason `interrupted`; its text is what was said."""
    async with at_both(both) as (one, two):
        first = await one.respond("one")
        turn = await model.turn()
        turn.say("half an ")
        await says(two, first, "half an ")
        await two.send("response.create", input="two", response_id="second", multitask_strategy="interrupt")
        await soon(turn.closed)
        following = await model.turn()
        assert following.conversation == [("user", "one"), ("assistant", "half an "), ("user", "two")]
        following.end("answer")
        for client in (one, two):
            assert (await done(client, first))["stop_reason"] == "interrupted"
            assert (await done(client, "second"))["status"] == "completed"
            kinds = [(event["type"], event.get("response_id")) for event in client.transcript.events]
            assert kinds.index(("response.done", first)) < kinds.index(("response.in_progress", "second"))


async def test_a_queued_response_elsewhere_waits_for_its_turn(
    both: tuple[RunningServer, RunningServer], model: Model
) -> None:
    """It starts when the one at the other instance has ended, and its model is sent that answer."""
    async with at_both(both) as (one, two):
        await one.respond("one")
        turn = await model.turn()
        queued = await queue(two, "two")
        await not_yet_asked(model, two)
        turn.end("first answer")
        following = await model.turn()
        assert following.conversation == [("user", "one"), ("assistant", "first answer"), ("user", "two")]
        following.end("second answer")
        for client in (one, two):
            assert (await done(client, queued))["status"] == "completed"


async def not_yet_asked(model: Model, client: Client) -> None:
    """Nothing but the first response was started, nor is it once this client's commands are through."""
    await settled(client)
    assert model.calls == 1


async def test_a_queued_response_starts_without_who_asked_for_it(
    both: tuple[RunningServer, RunningServer], model: Model
) -> None:
    """Its connection, the only one at its instance, has gone: it is started all the same."""
    async with attached(both[0]) as one:
        await one.respond("one")
        turn = await model.turn()
        async with attached(both[1], one.session_id) as two:
            queued = await queue(two, "two")
        await one.until("participant.left")
        turn.end()
        (await model.turn()).end("here")
        assert (await done(one, queued))["status"] == "completed"
        assert one.transcript.texts[queued] == "here"


async def test_a_queued_response_starts_when_nobody_is_there_at_all(
    both: tuple[RunningServer, RunningServer], model: Model
) -> None:
    """Who asked for it may come back later, anywhere, and find it answered."""
    async with attached(both[0], transcript=Transcript()) as one:
        await one.send("session.update", session={"on_disconnect": "continue"})
        await one.respond("one")
        turn = await model.turn()
        async with attached(both[1], one.session_id) as two:
            queued = await queue(two, "two")
    await gone(both[0], one.session_id, left=0)
    turn.end()
    (await model.turn()).end("here")
    async with attached(both[1], one.session_id) as back:
        assert (await done(back, queued))["status"] == "completed"
        assert back.transcript.texts[queued] == "here"


# ------------------------------------------------------------------------------------------- two commands at once


@pytest.mark.parametrize("seed", range(SESSIONS))
async def test_of_two_responses_at_once_exactly_one_wins(
    both: tuple[RunningServer, RunningServer], model: Model, seed: int
) -> None:
    """Decided one after the other, at whatever distance they come: the other one is refused and leaves nothing."""
    chance = random.Random(seed)
    async with at_both(both) as clients:
        for number in range(ROUNDS):
            ids = [f"r{number}-{side}" for side in range(2)]
            for response_id, client in chance.sample(list(zip(ids, clients, strict=True)), 2):
                await client.send("response.create", input=response_id, response_id=response_id, event_id=response_id)
                if chance.random() < 0.3:
                    await asyncio.sleep(chance.random() * 0.003)
            turn = await model.turn()
            await asyncio.gather(*map(settled, clients))
            turn.end("x")
            winner = turn.request.response_id
            assert turn.conversation[-1] == ("user", winner)
            for client in clients:
                await done(client, winner)
            refusals = [event["error"] for client in clients for event in events_of(client, "error")]
            assert len(refusals) == number + 1
            assert {error["code"] for error in refusals} == {"response_in_progress"}
        for client in clients:
            assert len(client.transcript.items) == len(client.transcript.done) == model.calls == ROUNDS


async def test_a_decision_holds_only_where_the_log_stood(
    both: tuple[RunningServer, RunningServer], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the other instance appends after a decision and before its append makes it be decided again."""
    async with at_both(both) as (one, two):
        append_whole = both[0].engine.whole

        async def late(live: LiveSession, work: Coroutine[Any, Any, None]) -> None:
            monkeypatch.undo()
            await two.send("response.create", input="two", response_id="two")
            while not live.state.unfinished:  # noqa: ASYNC110  # until this instance has heard of it
                await asyncio.sleep(0)
            await append_whole(live, work)

        monkeypatch.setattr(both[0].engine, "whole", late)
        error = await refused(one, "response.create", input="one", response_id="one")
        assert error["code"] == "response_in_progress"
        assert (await model.turn()).request.response_id == "two"


async def test_what_one_instance_has_told_the_next_one_does_not_deny(
    both: tuple[RunningServer, RunningServer], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An instance that has not heard of it yet looks before it refuses: a response to cancel, an item to answer, an
    end that makes room."""
    store = both[1].engine.store
    assert isinstance(store, RedisStore)
    async with at_both(both) as (one, two):
        await settled(two)
        monkeypatch.setattr(store._bus, "_hear", lambda *_: None)
        await one.send("conversation.item.create", item={"role": "user", "content": "question"})
        await one.until("conversation.item.created")
        await two.send("response.create", response_id="first")
        turn = await model.turn()
        await says_nothing_yet(one, "first")
        queued = await queue(one, "later")
        await two.send("response.cancel", response_id=queued)
        assert (await done(one, queued))["status"] == "cancelled"
        turn.end()
        await done(one, "first")
        await one.send("response.create", input="next", response_id="second")
        turn = await model.turn()
        turn.end()
        await done(one, "second")
        await two.send("response.create", input="last", response_id="third")
        (await model.turn()).end()
        assert (await done(two, "third"))["status"] == "completed"
        assert events_of(two, "error") == []


async def says_nothing_yet(client: Client, response_id: str) -> None:
    """Return once the client knows that the response runs."""
    async with asyncio.timeout(PATIENCE_S):
        await client.until("response.in_progress", response_id=response_id)


class Counting:
    """A responder that takes its time, and counts how many of its answers go on at once."""

    def __init__(self, chance: random.Random) -> None:
        self.calls: list[str] = []
        self.most = 0
        self._running = 0
        self._chance = chance

    async def __call__(self, request: Request) -> AsyncIterator[ResponderEvent]:
        """Answer."""
        self.calls.append(request.response_id)
        self._running += 1
        self.most = max(self.most, self._running)
        try:
            await asyncio.sleep(self._chance.random() * 0.004)
            yield "x"
        finally:
            self._running -= 1


@pytest.mark.parametrize("seed", range(SESSIONS))
async def test_of_two_queued_responses_at_once_both_run_one_after_the_other(redis: RedisServer, seed: int) -> None:
    """Never both at a time, each once, in the same order for everybody."""
    chance = random.Random(seed)
    responder = Counting(chance)
    async with (
        running_server(responder, redis_url=redis.url) as one,
        running_server(responder, redis_url=redis.url) as two,
        at_both((one, two)) as clients,
    ):
        asked = [f"r{number}-{side}" for number in range(ROUNDS) for side in range(2)]
        for number in range(ROUNDS):
            ids = asked[2 * number : 2 * number + 2]
            for response_id, client in chance.sample(list(zip(ids, clients, strict=True)), 2):
                create = {"input": "x", "response_id": response_id, "multitask_strategy": "enqueue"}
                await client.send("response.create", **create)
            for client, response_id in itertools.product(clients, ids):
                assert (await done(client, response_id))["status"] == "completed"
        assert (responder.most, sorted(responder.calls)) == (1, sorted(asked))
        for client in clients:
            created = [event["response"]["id"] for event in events_of(client, "response.created")]
            assert created == responder.calls


async def test_one_event_id_at_two_instances_has_one_effect_and_the_same_ids(
    both: tuple[RunningServer, RunningServer], model: Model
) -> None:
    """A command that is sent again elsewhere, at once or later, is carried out once, and both answers name the same."""
    async with AsyncExitStack() as stack:
        https = [
            await stack.enter_async_context(httpx.AsyncClient(base_url=server.url, trust_env=False)) for server in both
        ]
        watcher = await stack.enter_async_context(attached(both[0]))
        path = f"/v1/sessions/{watcher.session_id}/events"
        for number in range(ROUNDS):
            create = {"type": "response.create", "input": "x", "event_id": f"e{number}"}
            answers = [
                answer.json() for answer in await asyncio.gather(*(http.post(path, json=create) for http in https))
            ]
            turn = await model.turn()
            answers.append((await https[number % 2].post(path, json=create)).json())
            assert {answer["response_id"] for answer in answers} == {turn.request.response_id}, answers
            assert len({answer["item_id"] for answer in answers}) == 1
            assert sorted("duplicate" in answer for answer in answers) == [False, True, True]
            turn.end()
            await done(watcher, turn.request.response_id)
        assert model.calls == len(watcher.transcript.items) == ROUNDS


async def test_one_event_id_at_two_instances_with_other_content_is_refused(
    both: tuple[RunningServer, RunningServer],
) -> None:
    """The second instance knows what the first one was told under it."""
    async with at_both(both) as (one, two):
        item = {"role": "user", "content": "one"}
        await one.send("conversation.item.create", item=item, event_id="e")
        await one.until("conversation.item.created")
        error = await refused(two, "conversation.item.create", item={**item, "content": "two"}, event_id="e")
        assert error["code"] == "event_id_reused"


# ------------------------------------------------------------------------------------------- who looks at a session


async def test_participants_are_seen_from_everywhere(both: tuple[RunningServer, RunningServer]) -> None:
    """Who joins and leaves at one instance is told at the other, and is in its first frames."""
    async with attached(both[0]) as one:
        for _ in range(3):
            async with attached(both[1], one.session_id) as two:
                mine = [client.first["connection_id"] for client in (one, two)]
                assert [participant["connection_id"] for participant in two.first["participants"]] == mine
                async with asyncio.timeout(PATIENCE_S):
                    joined = await one.until("participant.joined")
                assert joined["participant"] == two.first["participants"][1]
                two.reset()
            async with asyncio.timeout(PATIENCE_S):
                assert (await one.until("participant.left"))["participant"] == joined["participant"]
        assert len(events_of(one, "participant.joined")) == len(events_of(one, "participant.left")) == 3


@pytest.mark.parametrize("leaves_first", ["where it runs", "elsewhere"])
async def test_the_last_viewer_over_all_instances_decides(
    both: tuple[RunningServer, RunningServer], model: Model, leaves_first: str
) -> None:
    """With one of two gone the response goes on; with both it is cancelled, and its model call closed at once."""
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(attached(both[0]))
        two = await stack.enter_async_context(attached(both[1], one.session_id))
        first, last = (one, two) if leaves_first == "where it runs" else (two, one)
        response_id = await one.respond()
        turn = await model.turn()
        turn.say("one ")
        await says(last, response_id, "one ")
        await first.socket.close()
        async with asyncio.timeout(PATIENCE_S):
            await last.until("participant.left")
        await not_yet(turn.closed, both[0], one.session_id)
        turn.say("two ")
        await says(last, response_id, "one two ")
        last.reset()
        await soon(turn.closed)
        back = await stack.enter_async_context(attached(both[1], one.session_id))
        end = await done(back, response_id)
        assert (end["status"], end["stop_reason"]) == ("cancelled", "disconnected")
        assert back.transcript.texts[response_id] == "one two "


async def test_a_viewer_that_comes_back_elsewhere_stops_the_clock(
    both: tuple[RunningServer, RunningServer], model: Model
) -> None:
    """Within the grace, at an instance that it has never been to, it finds the response going on."""
    async with attached(both[0]) as one:
        response_id = await one.respond(disconnect_grace_ms=60_000)
        turn = await model.turn()
        turn.say("one ")
        await says(one, response_id, "one ")
    await gone(both[0], one.session_id, left=0)
    await not_yet(turn.closed, both[0], one.session_id)
    seen = one.transcript
    async with attached(both[1], one.session_id, transcript=seen, after=seen.after()) as two:
        turn.end("two")
        assert (await done(two, response_id))["status"] == "completed"
        assert seen.texts[response_id] == "one two"


async def test_viewers_that_come_and_go_at_random_are_counted_right(
    both: tuple[RunningServer, RunningServer], model: Model
) -> None:
    """As long as one of them stays anywhere the response runs; when the last has gone it ends, each time."""
    chance = random.Random(13)
    for _ in range(4):
        async with AsyncExitStack() as stack:
            first = await stack.enter_async_context(attached(chance.choice(both)))
            response_id = await first.respond()
            turn = await model.turn()
            there = [first]
            for number in range(12):
                if len(there) > 1 and chance.random() < 0.5:
                    leaver = there.pop(chance.randrange(len(there)))
                    leaver.reset() if chance.random() < 0.5 else await leaver.socket.close()
                else:
                    server = chance.choice(both)
                    there.append(await stack.enter_async_context(attached(server, first.session_id)))
                turn.say(f"{number} ")
                await says(there[-1], response_id, "".join(f"{said} " for said in range(number + 1)))
                assert not turn.closed.is_set()
            for client in there:
                client.reset()
            await soon(turn.closed)


async def test_an_instance_closes_connections_of_its_own_alone(redis: RedisServer, model: Model) -> None:
    """One that shuts down says goodbye to its own; who is at the other one reads on, and may take the others in."""
    async with running_server(model, redis_url=redis.url) as stays:
        async with running_server(echo, redis_url=redis.url) as leaves:
            here, there = Transcript(), Transcript()
            async with attached(stays, transcript=here) as one:
                async with attached(leaves, one.session_id, transcript=there) as two:
                    response_id = await one.respond()
                    turn = await model.turn()
                    turn.say("one ")
                    await says(two, response_id, "one ")
                    leaves.stop()
                    with pytest.raises(ConnectionClosed):
                        await two.until("never")
                async with attached(stays, one.session_id, transcript=there, after=there.after()) as back:
                    turn.end("two")
                    for client in (one, back):
                        assert (await done(client, response_id))["status"] == "completed"
                assert here.texts == there.texts == {response_id: "one two"}
