"""Budgets and costs, with real instances over one Redis and a stand-in model: nobody spends what there is not."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from unittest import mock

import httpx
import pytest
from msgspec import Struct

from realtime.access.ledger import Balance
from realtime.access.till import SLACK_TOKENS
from realtime.live import LiveSession
from realtime.protocol import new_id
from realtime.responders.base import Finish, TokenCount
from realtime.store.base import Snapshot
from tests.end_to_end import Model, refused
from tests.support.accounts import ANONYMOUS, LEASE_S, PATIENCE_S, POLL_S, Accounts, accounts, weight
from tests.support.client import Client, Event, attached
from tests.support.instance import Instance, instance
from tests.support.model_server import ModelServer
from tests.support.redis_server import RedisServer, redis_server
from tests.support.scenarios import Gate, Paced, Scenario, Start, Stop, Text, ToolUse, Usage, answer, tool_calls
from tests.support.server import running_server
from tests.support.tool_tasks import MODULE
from tests.support.worker import worker

AT_ONCE = 100
ROOM = 10
"""How many of those the budget has room for."""
CACHED = Usage(input_tokens=10, cache_read_input_tokens=33, cache_creation_input_tokens=7)
ENDLESS = Scenario([Start(), Paced(["word "] * 100_000, rate_per_s=500.0)])
"""A model that goes on whatever it was asked for."""
ONE_SHOT_TOKENS = 36
"""What is held for the prompt `go`, beside what may be said."""


class Site(Struct):
    """Two instances over one Redis, the model that they ask, and the accounts."""

    model: ModelServer
    redis: RedisServer
    one: Instance
    two: Instance
    http: httpx.AsyncClient
    accounts: Accounts

    async def complete(self, at: Instance, model: str = "m", **body: Any) -> httpx.Response:
        """A one-shot call."""
        body = {"prompt": "go", "model": model, "max_tokens": 64, **body}
        return await self.http.post(f"{at.url}/v1/complete", json=body)


@asynccontextmanager
async def site(**settings: Any) -> AsyncIterator[Site]:
    """A site with these settings."""
    async with AsyncExitStack() as stack:
        model = await stack.enter_async_context(ModelServer())
        redis = await stack.enter_async_context(redis_server())
        given = {"model": model.url, "redis_url": redis.url, "lease_s": LEASE_S, **settings}
        one, two = await asyncio.gather(*(stack.enter_async_context(instance(**given)) for _ in range(2)))
        limits = httpx.Limits(max_connections=None)
        http = await stack.enter_async_context(httpx.AsyncClient(trust_env=False, timeout=30, limits=limits))
        yield Site(model, redis, one, two, http, await stack.enter_async_context(accounts(redis.url)))


def gated(gate: Gate, usage: Usage = CACHED) -> Scenario:
    """An answer that waits for the gate in its middle."""
    return Scenario([Text("Hello"), gate, Text(" world"), Stop()], usage=usage)


async def done(client: Client, response_id: str) -> Event:
    """The end of a response, which has to come soon."""
    async with asyncio.timeout(PATIENCE_S):
        while response_id not in client.transcript.done:
            await client.receive()
    return client.transcript.done[response_id]


async def asked(client: Client, **fields: Any) -> Event:
    """Ask for a response; what comes of that: it is created, or refused."""
    await client.send("response.create", input="go", **fields)
    async with asyncio.timeout(PATIENCE_S):
        while (event := await client.receive())["type"] not in {"response.created", "error"}:
            pass
    return event


async def joined(client: Client, strategy: str) -> str:
    """Ask for a response while another runs; returns its id once it is created."""
    response_id = new_id("resp")
    await client.send("response.create", input="go", model="m", response_id=response_id, multitask_strategy=strategy)
    async with asyncio.timeout(PATIENCE_S):
        while response_id not in {*client.transcript.positions, *client.transcript.done}:
            await client.receive()
    return response_id


@asynccontextmanager
async def watched(accounts: Accounts) -> AsyncIterator[Callable[[], int]]:
    """Look at the budget again and again while the block lasts: it is never exceeded. Gives how often it was looked."""
    looks = 0

    async def look() -> None:
        nonlocal looks
        while True:
            balance = await accounts.tokens()
            assert balance.used + balance.held <= LIMIT, balance
            looks += 1
            await asyncio.sleep(POLL_S)

    looking = asyncio.create_task(look())
    try:
        yield lambda: looks
    finally:
        looking.cancel()
        await asyncio.wait([looking])
    if not looking.cancelled():
        looking.result()


LIMIT = ROOM * (ONE_SHOT_TOKENS + 64)


# ------------------------------------------------------------------------------------------------------- many at once


async def test_of_a_hundred_calls_at_once_on_two_instances_as_many_are_made_as_fit() -> None:
    """All others are refused before the model is asked; what is used at last is what the answers say."""
    gate = Gate()
    async with site(token_budget=f"{LIMIT}/day") as s, watched(s.accounts) as looks:
        s.model.scenarios["m"] = gated(gate)
        calls = [asyncio.create_task(s.complete((s.one, s.two)[n % 2])) for n in range(AT_ONCE)]
        refusals = [await one for one in refused_of(calls, AT_ONCE - ROOM)]
        assert {(one.status_code, one.json()["error"]["code"]) for one in refusals} == {(429, "budget_exceeded")}
        assert {one.json()["error"]["type"] for one in refusals} == {"budget_error"}
        assert all(int(one.headers["retry-after"]) >= 1 for one in refusals)
        assert await s.accounts.tokens() == Balance(0, 0, LIMIT)
        gate.open()
        answers = [(await call).json() for call in calls if not call.done() or (await call).status_code == 200]
        assert len(answers) == len(s.model.received) == ROOM
        used = sum(weight(one["usage"]) for one in answers)
        assert await s.accounts.nothing_held() == Balance(0, used, 0)
        assert used == ROOM * (10 + 2 + 13)
        assert looks()


def refused_of(calls: list[asyncio.Task[httpx.Response]], count: int) -> Any:
    """The first so many calls that are answered."""
    for number, call in enumerate(asyncio.as_completed(calls)):
        yield call
        if number + 1 == count:
            return


async def test_of_a_hundred_sessions_at_once_on_two_instances_as_many_are_answered_as_fit() -> None:
    """Each asks at the same moment; nothing is created for those that are refused."""
    gate = Gate()
    async with AsyncExitStack() as stack:
        s = await stack.enter_async_context(site(token_budget=f"{ROOM * 300}/day"))
        s.model.scenarios["m"] = gated(gate)
        clients = [await stack.enter_async_context(attached((s.one, s.two)[n % 2])) for n in range(AT_ONCE)]
        first = clients.pop()
        assert (await asked(first, model="m", max_output_tokens=64))["type"] == "response.created"
        each = (await s.accounts.tokens()).held
        fit = ROOM * 300 // each
        events = await asyncio.gather(*(asked(one, model="m", max_output_tokens=64) for one in clients))
        kinds = Counter(event["type"] for event in events)
        assert kinds == {"response.created": fit - 1, "error": AT_ONCE - fit}
        codes = {event["error"]["code"] for event in events if event["type"] == "error"}
        assert codes == {"budget_exceeded"}
        gate.open()
        clients.append(first)
        ends = [await done(one, r) for one in clients for r in list(one.transcript.positions) if r != "session"]
        assert {end["status"] for end in ends} == {"completed"}
        assert len(ends) == len(s.model.received) == fit
        assert await s.accounts.nothing_held() == Balance(0, sum(weight(end["usage"]) for end in ends), 0)


# ------------------------------------------------------------------------------------------------------- what is paid


async def test_what_a_response_has_used_is_charged_and_told_with_its_cost() -> None:
    """In `response.done`, in the snapshot, in one-shot answers, in the metrics."""
    async with site(token_budget="100000/day", prices="m=10/100") as s, attached(s.one) as client:
        s.model.scenarios["m"] = answer("one two three", usage=CACHED)
        response_id = await client.respond(model="m")
        usage = (await done(client, response_id))["usage"]
        cost = (10 * 10 + 3 * 100 + 33 * 1 + 7 * 12.5) / 1e6
        assert usage["cost_usd"] == pytest.approx(cost)
        shown = (await s.http.get(f"{s.one.url}/v1/sessions/{client.session_id}")).json()
        assert f'"cost_usd":{usage["cost_usd"]}' in httpx.Response(200, json=shown).text.replace(" ", "")
        completion = (await s.complete(s.one)).json()
        assert completion["usage"]["cost_usd"] == pytest.approx(cost)
        stream = await s.http.post(f"{s.one.url}/v1/stream", json={"prompt": "go", "model": "m"})
        assert f'"cost_usd":{usage["cost_usd"]}' in stream.text
        assert await s.accounts.nothing_held() == Balance(0, 3 * weight(usage), 0)
        metrics = (await s.http.get(f"{s.one.url}/metrics")).text
        assert metric(metrics, "realtime_cost_usd_total") == pytest.approx(3 * cost)
        assert metric(metrics, 'realtime_tokens_total{kind="cache_read"}') == 99
        assert metric(metrics, 'realtime_tokens_total{kind="cache_write"}') == 21
        assert metric(metrics, 'realtime_tokens_total{kind="output"}') == 9


def metric(text: str, name: str) -> float:
    """What a metric counts."""
    [line] = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return float(line.removeprefix(name))


async def test_a_response_that_is_stopped_is_charged_its_estimate() -> None:
    """And nothing stays held."""
    async with site(token_budget="100000/day") as s, attached(s.one) as client:
        s.model.scenarios["m"] = gated(Gate())
        response_id = await client.respond(model="m")
        await client.until("response.output_text.delta")
        await client.send("response.cancel", response_id=response_id)
        end = await done(client, response_id)
        assert (end["status"], end["usage"]["estimated"]) == ("cancelled", True)
        assert await s.accounts.nothing_held() == Balance(0, weight(end["usage"]), 0)


async def test_what_does_not_fit_is_refused_before_anything_is_made() -> None:
    """Nor is the model asked."""
    async with site(token_budget="50/day") as s, attached(s.one) as client:
        error = await refused(client, "response.create", input="go", event_id="e1")
        assert (error["type"], error["code"]) == ("budget_error", "budget_exceeded")
        await client.send("session.update", session={}, event_id="after")
        await client.until("session.updated")
        assert client.transcript.items == []
        assert s.model.received == []
        assert await s.accounts.nothing_held() == Balance(0, 0, 0)


async def test_a_session_has_a_budget_of_its_own() -> None:
    """Another session of the same user goes on."""
    async with site(session_token_budget=4000) as s, attached(s.one) as client:
        s.model.scenarios["m"] = answer("hi", usage=Usage(input_tokens=2000))
        await done(client, await client.respond("x" * 2000, model="m", max_output_tokens=64))
        async with asyncio.timeout(PATIENCE_S):
            while (await s.accounts.session(client.session_id)).used != 2001:  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)
        async with attached(s.two, client.session_id) as other:
            error = await refused(other, "response.create", input="go", model="m", max_output_tokens=64)
            assert error["code"] == "budget_exceeded"
        async with attached(s.two) as another:
            assert await another.answer(max_output_tokens=64) == "Hello from the stand-in model."


async def test_a_response_that_is_made_on_one_instance_and_runs_on_the_other_is_charged_once() -> None:
    """It waits for one that runs there."""
    gate = Gate()
    async with site(token_budget="100000/day") as s, attached(s.one) as first:
        s.model.scenarios["m"] = gated(gate)
        running = await first.respond(model="m")
        await first.until("response.output_text.delta")
        async with attached(s.two, first.session_id) as second:
            queued = await joined(second, "enqueue")
            gate.open()
            ends = [await done(second, running), await done(second, queued)]
        assert [end["status"] for end in ends] == ["completed", "completed"]
        assert await s.accounts.nothing_held() == Balance(0, sum(weight(end["usage"]) for end in ends), 0)


async def test_a_response_that_interrupts_another_is_charged_with_it() -> None:
    """Each for itself, whichever instances they are made on."""
    gate = Gate()
    async with site(token_budget="100000/day") as s, attached(s.one) as first:
        s.model.scenarios["m"] = gated(gate)
        running = await first.respond(model="m")
        await first.until("response.output_text.delta")
        async with attached(s.two, first.session_id) as second:
            interrupting = await joined(second, "interrupt")
            ends = [await done(second, running)]
            gate.open()
            ends.append(await done(second, interrupting))
        assert [end["status"] for end in ends] == ["cancelled", "completed"]
        assert await s.accounts.nothing_held() == Balance(0, sum(weight(end["usage"]) for end in ends), 0)


# ------------------------------------------------------------------------------------------------------- in mid-stream


async def test_a_model_that_does_not_stop_is_closed_when_the_reservation_is_spent() -> None:
    """What it has said is kept and shown; nothing beyond what was held is charged, but for the last piece."""
    async with site(token_budget="100000/day") as s, attached(s.one) as client:
        s.model.scenarios["m"] = ENDLESS
        response_id = await client.respond(model="m", max_output_tokens=20)
        held = (await s.accounts.tokens()).held
        end = await done(client, response_id)
        assert (end["status"], end["stop_reason"]) == ("incomplete", "budget_exceeded")
        async with asyncio.timeout(PATIENCE_S):
            assert await s.model.received[0].finished() == "peer_closed"
        text = client.transcript.texts[response_id]
        assert text.startswith("word word ")
        assert end["output_chars"] == len(text)
        shown = await s.http.get(f"{s.two.url}/v1/sessions/{client.session_id}")
        assert text in shown.text
        balance = await s.accounts.nothing_held()
        assert balance.used == weight(end["usage"])
        assert held <= balance.used <= held + max(SLACK_TOKENS, held // 4) + 64


async def test_a_one_shot_of_such_a_model_ends_so_too() -> None:
    """Over both endpoints."""
    async with site(token_budget="100000/day") as s:
        s.model.scenarios["m"] = ENDLESS
        completion = (await s.complete(s.one, max_tokens=20)).json()
        assert completion["stop_reason"] == "budget_exceeded"
        assert completion["text"].startswith("word word ")
        stream = await s.http.post(f"{s.one.url}/v1/stream", json={"prompt": "go", "model": "m", "max_tokens": 20})
        assert '"stop_reason":"budget_exceeded"' in stream.text
        for call in s.model.received:
            async with asyncio.timeout(PATIENCE_S):
                assert await call.finished() == "peer_closed"
        assert (await s.accounts.nothing_held()).used >= 2 * weight(completion["usage"]) - 64


BUDGET = 20_000
WEATHER = tool_calls(ToolUse("weather", {"city": "Bonn"}), says="Let me look. ", then=answer("Rain."))


@asynccontextmanager
async def working_site() -> AsyncIterator[Site]:
    """A site with a worker, whose tasks the model may call."""
    settings = {"token_budget": f"{BUDGET}/day", "tasks": MODULE}
    async with (
        site(**settings) as s,
        worker(redis_url=s.redis.url, lease_s=LEASE_S, **settings),
    ):
        yield s


async def left(s: Site, tokens: int) -> None:
    """Have a one-shot call use what there is but for so many tokens."""
    burnt = BUDGET - (await s.accounts.nothing_held()).used - tokens - 1
    s.model.scenarios["burn"] = answer("hi", usage=Usage(input_tokens=burnt))
    assert (await s.complete(s.two, "burn", prompt="x" * burnt)).status_code == 200
    assert BUDGET - (await s.accounts.nothing_held()).used == tokens


async def test_all_calls_of_a_response_with_tools_are_charged() -> None:
    """As one."""
    async with working_site() as s, attached(s.one) as client:
        s.model.scenarios["m"] = WEATHER
        end = await done(client, await client.respond(model="m", max_output_tokens=64))
        assert (end["status"], len(s.model.received)) == ("completed", 2)
        assert await s.accounts.nothing_held() == Balance(0, weight(end["usage"]), 0)


async def test_the_call_after_a_tool_is_held_before_it_is_made() -> None:
    """Where it does not fit the response ends without it, and what it has said stands."""
    gate = Gate()
    async with working_site() as s, attached(s.one) as client:
        s.model.scenarios |= {"gated": gated(gate), "m": WEATHER}
        first = await client.respond(model="gated", max_output_tokens=64)
        each = (await s.accounts.tokens()).held
        gate.open()
        await done(client, first)
        await left(s, each)
        async with attached(s.one) as another:
            response_id = await another.respond(model="m", max_output_tokens=64)
            end = await done(another, response_id)
            assert (end["status"], end["stop_reason"]) == ("incomplete", "budget_exceeded")
            assert another.transcript.texts[response_id] == "Let me look. "
            assert len(s.model.received) == 3
            charged = BUDGET - each + weight(end["usage"])
            assert await s.accounts.nothing_held() == Balance(0, charged, 0)


async def test_a_task_that_has_used_the_budget_fails_with_that() -> None:
    """Its model calls are its user's, held before each."""
    async with working_site() as s:
        await left(s, 100)
        calls = len(s.model.received)
        answered = await s.http.post(f"{s.one.url}/v1/tasks/summarise", json={"text": "A long story. " * 100})
        path = f"{s.one.url}/v1/tasks/{answered.json()['task_id']}"
        async with asyncio.timeout(PATIENCE_S):
            await s.http.get(f"{path}/events")
        shown = (await s.http.get(path)).json()
        assert (shown["status"], shown["error"]["type"]) == ("failed", "budget_error")
        assert len(s.model.received) == calls
        assert (await s.accounts.nothing_held()).used == BUDGET - 100


# ----------------------------------------------------------------------------------------------------- what goes wrong


async def test_a_response_of_an_instance_that_is_killed_is_charged_what_was_stored() -> None:
    """By whoever ends it; what was held for it is free after the lease."""
    async with site(token_budget="100000/day") as s, attached(s.two) as viewer:
        s.model.scenarios["m"] = gated(Gate())
        async with attached(s.one, viewer.session_id) as client:
            response_id = await client.respond(model="m")
            await viewer.until("response.output_text.delta")
            assert (await s.accounts.tokens()).held
            s.one.kill()
            end = await done(viewer, response_id)
        assert (end["status"], end["error"]["code"]) == ("failed", "instance_lost")
        assert weight(end["usage"])
        async with asyncio.timeout(PATIENCE_S):  # what was held may have run out before it is charged
            while await s.accounts.nothing_held() != Balance(0, weight(end["usage"]), 0):  # noqa: ASYNC110  # as said
                await asyncio.sleep(POLL_S)


async def test_a_response_whose_conversation_has_grown_too_dear_fails_and_costs_nothing() -> None:
    """It waited meanwhile: what it needs more is held before the model is asked, or it is not asked."""
    model = Model()
    async with running_server(model, token_budget="10000/day") as server, attached(server) as client:
        first = await client.respond()
        turn = await model.turn()
        second = await client.respond(multitask_strategy="enqueue")
        turn.end("x" * 8000, Finish("end_turn", TokenCount(input_tokens=10, output_tokens=5)))
        await done(client, first)
        end = await done(client, second)
        assert (end["status"], end["error"]["type"]) == ("failed", "budget_error")
        assert (end["usage"]["total_tokens"], model.calls) == (0, 1)
        async with asyncio.timeout(PATIENCE_S):
            while server.holds > 1:  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)
        left = await server.engine.commands._admission.till.left(ANONYMOUS)
        assert left is not None
        assert left.remaining == 10_000 - 15


async def test_a_response_whose_command_is_cancelled_after_it_has_begun_is_charged() -> None:
    """The connection is lost while its command still looks whether it may begin, and something else begins it."""
    model, looking, may_look = Model(), asyncio.Event(), asyncio.Event()
    refresh = LiveSession.refresh

    async def first_hangs(live: LiveSession) -> Snapshot:
        if not looking.is_set():
            looking.set()
            await may_look.wait()
        return await refresh(live)

    async with running_server(model, token_budget="10000/day") as server, attached(server) as viewer:
        await viewer.respond()
        running = await model.turn()
        async with attached(server, viewer.session_id) as client:
            with mock.patch.object(LiveSession, "refresh", first_hangs):
                await client.send("response.create", input="go", multitask_strategy="enqueue")
                await looking.wait()
                running.end("hi")
                queued = await model.turn()
                client.reset()
                await viewer.until("participant.left")
            may_look.set()
            assert server.holds == 3  # with the viewer's own connection
            queued.end("hello", Finish("end_turn", TokenCount(input_tokens=30, output_tokens=3)))
            await viewer.until("response.done", output_chars=5)
            ends = [*viewer.transcript.done.values()]
            async with asyncio.timeout(PATIENCE_S):
                while server.holds > 1:  # noqa: ASYNC110
                    await asyncio.sleep(POLL_S)
        left = await server.engine.commands._admission.till.left(ANONYMOUS)
        assert left is not None
        assert len(ends) == 2
        assert left.remaining == 10_000 - sum(weight(end["usage"]) for end in ends)


async def test_a_call_of_an_instance_that_is_killed_is_free_after_the_lease() -> None:
    """It had told what it had spent until then, or nothing."""
    async with site(token_budget="1000/day") as s:
        s.model.scenarios["m"] = gated(Gate())
        calling = asyncio.create_task(s.complete(s.one, max_tokens=900))
        await (await s.model.next_request()).sent(1)
        assert (await s.complete(s.two, max_tokens=900)).status_code == 429
        s.one.kill()
        with pytest.raises(httpx.HTTPError):
            await calling
        assert (await s.accounts.nothing_held()).used <= 100
        assert (await s.complete(s.two, "other", max_tokens=800)).status_code == 200


async def test_where_redis_hangs_nothing_new_is_paid_and_what_runs_goes_on() -> None:
    """It is settled once Redis is back."""
    gate = Gate()
    async with site(token_budget="100000/day") as s, attached(s.one) as client, attached(s.one) as idle:
        s.model.scenarios["m"] = gated(gate)
        response_id = await client.respond(model="m")
        await client.until("response.output_text.delta")
        s.redis.pause()
        try:
            for error in (
                await refused(idle, "response.create", input="go", model="m"),
                (await s.complete(s.one)).json()["error"],
            ):
                assert error["type"] == "store_error"
                assert error["retry_after_ms"]
            gate.open()
            async with asyncio.timeout(PATIENCE_S):
                while client.transcript.texts[response_id] != "Hello world":
                    await client.receive()
        finally:
            s.redis.resume()
        end = await done(client, response_id)
        assert end["status"] == "completed"
        assert len(s.model.received) == 1
        assert await s.accounts.nothing_held() == Balance(0, weight(end["usage"]), 0)
