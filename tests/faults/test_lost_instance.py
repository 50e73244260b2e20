"""An instance is killed, or stands still for too long: what is stored is kept, and ended once by the others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed

from realtime.log import Deltas
from realtime.protocol import ResponseDone
from realtime.responders.demo import ANSWER
from realtime.store.redis import RedisStore
from tests.end_to_end import PATIENCE_S, Model, echo
from tests.support.client import Client, Transcript, attached
from tests.support.instance import Instance, instance
from tests.support.model_server import ModelServer
from tests.support.redis_server import RedisServer, redis_server
from tests.support.scale import scaled
from tests.support.scenarios import Paced, Scenario, Stop
from tests.support.server import RunningServer, running_server

LEASE_S = 1.0
BUSY_S = 8.0
"""What so many clients in one process may add, and other work on the machine."""
ENDS_WITHIN_S = LEASE_S + 5 + BUSY_S
"""Below the floor: what waits for that fails."""
STREAMS = scaled(200, 50)
FLOOR_S = 15.0
"""How long a response waits whose last viewer was lost with its instance."""
AT_ONCE = 50
QUESTION = "so " * 60
"""It is said back in the answer, which takes some seconds longer for it."""


@pytest.fixture
async def redis() -> AsyncIterator[RedisServer]:
    """The Redis of a test."""
    async with redis_server() as server:
        yield server


@asynccontextmanager
async def pair(
    redis: RedisServer, responder: Any = echo, **settings: Any
) -> AsyncIterator[tuple[Instance, RunningServer]]:
    """An instance that can get lost, where the demo answers, and one that stays."""
    shared = {"redis_url": redis.url, "lease_s": LEASE_S, **settings}
    async with instance(**shared) as lost, running_server(responder, **shared) as stays:
        yield lost, stays


async def until_said(client: Client, chars: int) -> None:
    """Return once the client has so much of the answer."""
    async with asyncio.timeout(2 * PATIENCE_S):
        while len(client.transcript.texts["r"]) < chars:
            await client.receive()


async def until_lost(client: Client) -> None:
    """Return once its connection is gone."""
    async with asyncio.timeout(2 * PATIENCE_S):
        try:
            while True:
                await client.receive()
        except ConnectionClosed:
            return


async def done(client: Client, response_id: str = "r") -> dict[str, Any]:
    """The response's end."""
    async with asyncio.timeout(ENDS_WITHIN_S + PATIENCE_S):
        while response_id not in client.transcript.done:
            await client.receive()
    return client.transcript.done[response_id]


async def stored_text(store: RedisStore, session_id: str) -> str:
    """What the store has of an answer."""
    entries = await store.read(session_id, "r", 0, 1_000_000)
    return "".join("".join(entry.texts) for entry in entries if isinstance(entry, Deltas))


async def ends_stored(redis: RedisServer, session_id: str, response_id: str = "r") -> int:
    """How many ends of a response stand in its log."""
    async with RedisStore(redis.url) as store:
        entries = await store.read(session_id, response_id, 0, 1_000_000)
    return sum(isinstance(entry, ResponseDone) for entry in entries)


def assert_lost(end: dict[str, Any]) -> None:
    """The end says that the instance was lost."""
    assert (end["status"], end["error"]["type"], end["error"]["code"]) == ("failed", "server_error", "instance_lost")


class Streaming:
    """One client of the instance that is killed: its session, and how it went on after it."""

    def __init__(self, client: Client) -> None:
        self.transcript = client.transcript
        self.session_id = client.session_id
        self.shown = ""
        self.stored = ""

    async def resume(self, server: RunningServer) -> None:
        """Go on elsewhere, to the ends of the response and of the one that was queued behind it."""
        seen = self.transcript
        before = len(seen.events)
        async with attached(server, self.session_id, transcript=seen, after=seen.after()) as client:
            for response_id in ("r", "queued"):
                await done(client, response_id)
        after = seen.events[before:]
        resets = [event for event in after if event.get("reset")]
        assert len(resets) == int(self.shown != self.stored[: len(self.shown)]), (self.shown, self.stored, resets)
        assert all(event["response_id"] == "r" for event in resets)

    def check(self) -> None:
        """It has what the store held when the instance was killed: a part of what the model said, once, in order."""
        assert seen_in_order(self.transcript.texts["r"], QUESTION)
        assert self.transcript.texts["r"] == self.stored
        assert_lost(self.transcript.done["r"])
        assert self.transcript.done["queued"]["status"] == "completed"
        assert self.transcript.texts["queued"] == "later"


def seen_in_order(text: str, question: str = "go") -> bool:
    """Whether it is a beginning of the answer to a question."""
    return bool(text) and ANSWER.format(said=question).startswith(text)


async def test_kill_under_many_streams(redis: RedisServer) -> None:
    """Everybody resumes elsewhere and ends with what the store held, who had seen more after a `reset`; within the
    lease and 5 s each response has ended and the queued one behind it has run."""
    async with pair(redis) as (lost, stays), AsyncExitStack() as stack:
        clients: list[Client] = []
        for start in range(0, STREAMS, AT_ONCE):
            paces = [250 if number % 4 else 0 for number in range(start, start + AT_ONCE)]
            coming = [stack.enter_async_context(attached(lost, delta_interval_ms=pace)) for pace in paces]
            clients += await asyncio.gather(*coming)
        for client in clients:
            await client.send("response.create", input=QUESTION, response_id="r")
            await client.send("response.create", input="later", response_id="queued", multitask_strategy="enqueue")
        reading = [asyncio.create_task(until_lost(client)) for client in clients]
        while not all(client.transcript.texts["r"] for client in clients):  # noqa: ASYNC110  # over many clients
            await asyncio.sleep(0.05)
        async with RedisStore(redis.url) as store:
            for client in clients:
                while not await stored_text(store, client.session_id):  # noqa: ASYNC110  # the journal is at it
                    await asyncio.sleep(0.01)
        lost.kill()
        killed_at = time.monotonic()
        await asyncio.gather(*reading)
        streams = [Streaming(client) for client in clients]
        async with RedisStore(redis.url) as store:
            texts = await asyncio.gather(*(stored_text(store, stream.session_id) for stream in streams))
        for stream, text in zip(streams, texts, strict=True):
            stream.shown, stream.stored = stream.transcript.texts["r"], text
        await asyncio.gather(*(stream.resume(stays) for stream in streams))
        assert time.monotonic() - killed_at < ENDS_WITHIN_S
        for stream in streams:
            stream.check()


async def test_several_observers_end_a_lost_response_once(redis: RedisServer) -> None:
    """Three instances find out at the same time: one end is stored, and everybody is told that one."""
    shared = {"redis_url": redis.url, "lease_s": LEASE_S}
    async with (
        pair(redis) as (lost, two),
        running_server(echo, **shared) as three,
        running_server(echo, **shared) as four,
    ):
        async with attached(lost) as client, AsyncExitStack() as stack:
            await client.send("response.create", input="go", response_id="r")
            others = [
                await stack.enter_async_context(attached(server, client.session_id)) for server in (two, three, four)
            ]
            for other in others:
                await until_said(other, 20)
            lost.kill()
            killed_at = time.monotonic()
            ends = await asyncio.gather(*(done(other) for other in others))
            assert time.monotonic() - killed_at < ENDS_WITHIN_S
            assert_lost(ends[0])
            assert all({**end, "merged": 1} == {**ends[0], "merged": 1} for end in ends)
            assert len({other.transcript.texts["r"] for other in others}) == 1
            assert await ends_stored(redis, client.session_id) == 1
            await until_lost(client)


@pytest.mark.parametrize("comes_by", ["attaching", "asking"])
async def test_a_lost_response_that_nobody_watched_ends_when_somebody_comes(redis: RedisServer, comes_by: str) -> None:
    """No instance had the session open when the one that ran it was killed: who attaches later, or asks for a snapshot
    now and then, finds it ended."""
    async with pair(redis, on_disconnect="continue") as (lost, stays):
        async with attached(lost) as client:
            await client.send("response.create", input="go", response_id="r")
            await until_said(client, 20)
            lost.kill()
            await until_lost(client)
        assert stays.busy_sessions == 0
        await asyncio.sleep(LEASE_S)
        if comes_by == "attaching":
            async with attached(stays, client.session_id) as late:
                assert_lost(await done(late))
                return
        async with httpx.AsyncClient(base_url=stays.url, trust_env=False) as http, asyncio.timeout(ENDS_WITHIN_S):
            while True:
                shown = (await http.get(f"/v1/sessions/{client.session_id}")).json()["responses"][0]
                if shown["status"] != "in_progress":
                    break
                await asyncio.sleep(0.1)
        assert (shown["status"], shown["error"]["code"]) == ("failed", "instance_lost")
        assert seen_in_order(shown["text"])


async def test_viewers_of_a_lost_instance_have_left(redis: RedisServer) -> None:
    """The others are told; and a response that they alone looked at gets the time that bad luck deserves."""
    model = Model()
    async with pair(redis, model) as (lost, stays), attached(lost) as viewer:
        async with httpx.AsyncClient(base_url=stays.url, trust_env=False) as http:
            create = {"type": "response.create", "input": "go", "response_id": "r"}
            await http.post(f"/v1/sessions/{viewer.session_id}/events", json=create)
        turn = await model.turn()
        turn.say("one ")
        await until_said(viewer, 4)
        [live] = stays.engine.hub.sessions()
        async with asyncio.timeout(PATIENCE_S):
            while not live.audience.participants:  # noqa: ASYNC110  # nothing tells of it
                await asyncio.sleep(0.01)
        lost.kill()
        async with asyncio.timeout(ENDS_WITHIN_S):
            while live.audience.participants:  # noqa: ASYNC110  # nothing tells of it
                await asyncio.sleep(0.01)
        due = live.audience.due("r", live.state.session)
        assert due is not None
        assert FLOOR_S - 8 < due - asyncio.get_running_loop().time() <= FLOOR_S
        assert not turn.closed.is_set()
        async with attached(stays, viewer.session_id) as other:
            assert len(other.first["participants"]) == 1
            turn.end("two")
            assert (await done(other))["status"] == "completed"


async def test_others_are_told_that_viewers_were_lost(redis: RedisServer) -> None:
    """`participant.left`, within the lease and some seconds, once."""
    async with pair(redis) as (lost, stays), attached(lost) as viewer, attached(stays, viewer.session_id) as other:
        lost.kill()
        async with asyncio.timeout(ENDS_WITHIN_S):
            left = await other.until("participant.left")
        assert left["participant"]["connection_id"] == viewer.first["connection_id"]
        await until_lost(viewer)


@asynccontextmanager
async def paced(redis: RedisServer, **settings: Any) -> AsyncIterator[tuple[ModelServer, Instance, RunningServer]]:
    """A model that says numbers for some seconds, an instance that asks it, and one that stays."""
    words = [f"{number} " for number in range(60)]
    scenario = Scenario([Paced(words, 20), Stop()])
    shared = {"redis_url": redis.url, "lease_s": LEASE_S, **settings}
    async with ModelServer(default=scenario) as model, running_server(echo, **shared) as stays:
        async with instance(model=model.url, **shared) as one:
            yield model, one, stays


async def test_an_instance_that_was_only_thought_lost_gives_way(redis: RedisServer) -> None:
    """It stood still for longer than its lease: what it says late is refused, it closes its model call, and its own
    viewers end with the text that is stored, as the others' do."""
    async with paced(redis) as (model, paused, stays), attached(paused) as near:
        await near.send("response.create", input="go", response_id="r")
        call = await model.next_request()
        async with attached(stays, near.session_id) as far:
            await until_said(far, 12)
            await until_said(near, 12)
            paused.pause()
            assert_lost(await done(far))
            paused.resume()
            assert await call_ended(call) == "peer_closed"
            assert_lost(await done(near))
            assert near.transcript.texts["r"] == far.transcript.texts["r"]
            resets = [event for event in near.transcript.events if event.get("reset")]
            assert len(resets) <= 1
            async with attached(stays, near.session_id) as late:
                assert_lost(await done(late))
                assert late.transcript.texts["r"] == far.transcript.texts["r"]
            assert await ends_stored(redis, near.session_id) == 1
            await near.send("response.create", input="again", response_id="next")
            await far.until("response.created")
            await near.send("response.cancel", response_id="next")
            assert (await done(far, "next"))["status"] == "cancelled"


async def call_ended(call: Any) -> str:
    """What ended a model call, which has to be soon."""
    async with asyncio.timeout(PATIENCE_S):
        return str(await call.finished())


async def test_an_instance_that_stands_still_for_less_than_its_lease_loses_nothing(redis: RedisServer) -> None:
    """Its responses go on where they were, for everybody."""
    async with paced(redis, lease_s=3) as (_, paused, stays), attached(paused) as near:
        await near.send("response.create", input="go", response_id="r")
        async with attached(stays, near.session_id) as far:
            await until_said(far, 12)
            paused.pause()
            await asyncio.sleep(LEASE_S)
            paused.resume()
            for client in (near, far):
                assert (await done(client))["status"] == "completed"
                assert client.transcript.texts["r"] == "".join(f"{number} " for number in range(60))
                assert not [event for event in client.transcript.events if event.get("reset")]


async def test_instances_that_stood_still_together_do_not_bury_each_other(redis: RedisServer) -> None:
    """As on a machine that was asleep: whoever wakes up first finds every lease gone, and gives the others time."""
    shared: dict[str, Any] = {"redis_url": redis.url, "lease_s": LEASE_S, "on_disconnect": "continue"}
    async with instance(**shared) as one, instance(**shared) as two:
        async with attached(one) as near, attached(two, near.session_id) as far:
            await near.send("response.create", input="go", response_id="r")
            await until_said(far, 20)
            await asyncio.sleep(1.2 * LEASE_S)  # so that a missing lease would count
            one.pause()
            two.pause()
            await asyncio.sleep(1.5 * LEASE_S)
            two.resume()
            await asyncio.sleep(0.4 * LEASE_S)
            one.resume()
            for client in (near, far):
                assert (await done(client))["status"] == "completed"
                assert client.transcript.texts["r"] == ANSWER.format(said="go")


async def test_a_client_of_a_lost_instance_has_one_transcript(redis: RedisServer) -> None:
    """What it reads elsewhere afterwards is as if it had come from the beginning."""
    async with pair(redis, on_disconnect="continue") as (lost, stays):
        async with attached(lost) as client:
            await client.send("response.create", input="go", response_id="r")
            await until_said(client, 40)
            lost.kill()
            await until_lost(client)
        seen = client.transcript
        async with attached(stays, client.session_id, transcript=seen, after=seen.after()) as back:
            await done(back)
            assert await back.answer("next") == "next"
        async with attached(stays, client.session_id, transcript=Transcript()) as fresh:
            while fresh.transcript.done.keys() != seen.done.keys():
                await fresh.receive()
            assert fresh.transcript.texts == seen.texts
