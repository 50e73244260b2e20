"""Limits of rates, connections and responses at once, with instances over one Redis: they hold over all of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest
from msgspec import Struct

from tests.access.signing import SECRET, token
from tests.end_to_end import Model, Turn, dialled, frames_until_closed, refused, until_closed
from tests.support.accounts import LEASE_S, PATIENCE_S, POLL_S, Accounts, accounts
from tests.support.client import Client, Event, attached
from tests.support.instance import instance
from tests.support.redis_server import RedisServer, redis_server
from tests.support.sample_tasks import MODULE
from tests.support.server import RunningServer, running_server

AT_ONCE = 100
LIMIT = 7
SLEEP: dict[str, Any] = {"type": "task.create", "name": "sleep", "input": {"seconds": 600}}
STATUSES = {202: LIMIT, 429: AT_ONCE - LIMIT}


class Site(Struct):
    """Two instances in this process over one Redis, whose model is the test."""

    model: Model
    redis: RedisServer
    one: RunningServer
    two: RunningServer
    http: httpx.AsyncClient
    accounts: Accounts

    async def session(self) -> str:
        """A new session."""
        answer = await self.http.post(f"{self.one.url}/v1/sessions")
        session_id: str = answer.json()["session"]["id"]
        return session_id

    async def command(self, session_id: str, n: int = 0, **command: Any) -> httpx.Response:
        """Ask one of the instances, by turns, to carry out a command."""
        server = (self.one, self.two)[n % 2]
        return await self.http.post(f"{server.url}/v1/sessions/{session_id}/events", json=command)


@asynccontextmanager
async def site(**settings: Any) -> AsyncIterator[Site]:
    """A site with these settings, of which nothing is held at the end."""
    async with AsyncExitStack() as stack:
        model = Model()
        redis = await stack.enter_async_context(redis_server())
        given = {"redis_url": redis.url, "lease_s": LEASE_S, **settings}
        one, two = [await stack.enter_async_context(running_server(model, **given)) for _ in range(2)]
        limits = httpx.Limits(max_connections=25)  # the loop is the instances', too: their calls have their time
        async with (
            httpx.AsyncClient(trust_env=False, timeout=30, limits=limits) as http,
            accounts(redis.url) as books,
        ):
            yield Site(model, redis, one, two, http, books)
        async with asyncio.timeout(PATIENCE_S):
            while one.holds or two.holds:  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)
        one.stop()
        two.stop()


def bearer(user: str) -> dict[str, str]:
    """The header that shows who a user is."""
    return {"authorization": f"Bearer {token(sub=user)}"}


async def end(client: Client, response_id: str) -> Event:
    """The end of a response, which has to come soon."""
    async with asyncio.timeout(PATIENCE_S):
        while response_id not in client.transcript.done:
            await client.receive()
    return client.transcript.done[response_id]


async def limits_told(client: Client) -> list[dict[str, Any]]:
    """What the client is told next of its limits."""
    async with asyncio.timeout(PATIENCE_S):
        told: list[dict[str, Any]] = (await client.until("rate_limits.updated"))["rate_limits"]
    return told


# -------------------------------------------------------------------------------------------------------------- rates


async def test_of_a_hundred_responses_at_once_on_two_instances_exactly_the_limit_is_accepted() -> None:
    """Of one address, in a session each; the others are told when to come again."""
    async with site(rate_responses=f"{LIMIT}/day") as s:
        sessions = [await s.session() for _ in range(AT_ONCE)]
        asked = (s.command(one, n, type="response.create", input="go") for n, one in enumerate(sessions))
        answers = await asyncio.gather(*asked)
        assert Counter(one.status_code for one in answers) == STATUSES
        for answer in answers:
            assert answer.headers["ratelimit-policy"] == f'"responses";q={LIMIT}'
            assert answer.headers["ratelimit"].startswith('"responses";r=')
            if answer.status_code == 429:
                error = answer.json()["error"]
                assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limited")
                assert int(answer.headers["retry-after"]) == -(-error["retry_after_ms"] // 1000) > 1
        for _ in range(LIMIT):
            (await s.model.turn()).end("hi")
        assert s.model.calls == LIMIT


@pytest.mark.parametrize("path", ["/v1/complete", "/v1/stream"])
async def test_of_a_hundred_one_shots_at_once_exactly_the_limit_is_accepted(path: str) -> None:
    """Whichever instance is asked; the answers tell what is left."""
    async with site(rate_oneshots=f"{LIMIT}/day") as s:
        calls = [
            asyncio.create_task(s.http.post((s.one, s.two)[n % 2].url + path, json={"prompt": "go"}))
            for n in range(AT_ONCE)
        ]
        for _ in range(LIMIT):
            (await s.model.turn()).end("hi")
        answers = await asyncio.gather(*calls)
        assert Counter(one.status_code for one in answers) == {200: LIMIT, 429: AT_ONCE - LIMIT}
        assert all(one.headers["ratelimit"].startswith('"oneshots";r=') for one in answers)
        assert s.model.calls == LIMIT


@pytest.mark.parametrize("path", ["/v1/tasks/summarise", "/v1/summarise"])
async def test_tasks_have_a_rate(path: str) -> None:
    """Made over HTTP, by any path."""
    async with site(rate_tasks=f"{LIMIT}/day") as s:
        headers = {"prefer": "respond-async"}
        urls = [(s.one, s.two)[n % 2].url + path for n in range(AT_ONCE)]
        answers = await asyncio.gather(*(s.http.post(url, json={"text": "x"}, headers=headers) for url in urls))
        assert Counter(one.status_code for one in answers) == STATUSES
        assert all(one.headers["ratelimit"].startswith('"tasks";r=') for one in answers)


async def test_tasks_of_sessions_and_others_have_one_rate() -> None:
    """Over the socket, as a command over HTTP, and without a session; a name that there is not costs nothing."""
    async with site(rate_tasks="3/day", tasks=(MODULE,)) as s, attached(s.one) as client:
        await refused(client, "task.create", name="nothing", input={})
        await client.send("task.create", name="summarise", input={"text": "x"})
        assert (await limits_told(client))[0]["remaining"] == 2
        made = await s.command(client.session_id, 1, type="task.create", name="summarise", input={"text": "x"})
        assert made.status_code == 202
        assert (await s.http.post(f"{s.two.url}/v1/summarise", json={}, headers={"prefer": "respond-async"})).is_error
        analysed = await s.http.post(f"{s.two.url}/v1/tasks/summarise", json={"text": "x"})
        assert analysed.status_code == 202
        error = await refused(client, "task.create", name="summarise", input={"text": "x"}, event_id="e")
        assert error["code"] == "rate_limited"


async def test_of_tasks_at_once_exactly_the_limit_is_accepted() -> None:
    """By two instances, in sessions and in none; who is refused leaves nothing, and others are not."""
    async with site(max_tasks_per_user=LIMIT, tasks=(MODULE,), auth_secret=SECRET) as s:
        ann, bob = bearer("ann"), bearer("bob")
        made = await s.http.post(f"{s.one.url}/v1/sessions", headers=ann)
        in_session = f"/v1/sessions/{made.json()['session']['id']}/events"
        command = {"type": "task.create", "name": "sleep", "input": {"seconds": 600}}
        calls = [
            s.http.post(server.url + path, json=body, headers=ann)
            for path, body in ((in_session, command), ("/v1/tasks/sleep", command["input"]))
            for server in (s.one, s.two)
            for _ in range(LIMIT)
        ]
        answers = await asyncio.gather(*calls)
        assert Counter(one.status_code for one in answers) == {202: LIMIT, 429: 3 * LIMIT}
        refusals = [one for one in answers if one.status_code == 429]
        assert {one.json()["error"]["code"] for one in refusals} == {"too_many_tasks_at_once"}
        assert all("retry-after" in one.headers for one in refusals)
        assert all(one.headers["ratelimit"].startswith('"tasks";r=') for one in answers)
        shown = await s.http.get(f"{s.two.url}{in_session.removesuffix('/events')}", headers=ann)
        alone = [one for one in answers if one.status_code == 202 and "location" in one.headers]
        assert len(shown.json()["tasks"]) + len(alone) == LIMIT
        assert (await s.http.post(f"{s.two.url}/v1/tasks/sleep", json={"seconds": 600}, headers=bob)).is_success


async def test_a_task_that_two_instances_are_asked_for_takes_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is refused by none of them."""
    monkeypatch.setattr("realtime.tasks.desk.SUBMIT_S", 600.0)
    async with site(max_tasks_per_user=LIMIT, tasks=(MODULE,)) as s:
        session_id = await s.session()
        for number in range(LIMIT):
            asked = [s.command(session_id, n, **SLEEP, event_id=f"e{number}") for n in range(4)]
            answers = await asyncio.gather(*asked)
            assert {one.status_code for one in answers} == {202}
            assert len({one.json()["task_id"] for one in answers}) == 1
            assert await s.one.engine.store.tracked() == number + 1
        assert (await s.command(session_id, **SLEEP)).status_code == 429


async def test_the_last_place_is_not_refused_to_who_asks_the_other_instance_for_the_same_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While the first one has taken it, and has not made the task yet."""
    async with site(max_tasks_per_user=1, tasks=(MODULE,)) as s:
        session_id, store = await s.session(), s.one.engine.store
        append, announced, gate = store.append, asyncio.Event(), asyncio.Event()

        async def later(*args: Any, **kwargs: Any) -> None:
            announced.set()
            await gate.wait()
            await append(*args, **kwargs)

        monkeypatch.setattr(store, "append", later)
        asking = asyncio.create_task(s.command(session_id, 0, **SLEEP, event_id="e"))
        async with asyncio.timeout(PATIENCE_S):
            await announced.wait()
            answer = await s.command(session_id, 1, **SLEEP, event_id="e")
            gate.set()
            answers = [answer.json(), (await asking).json()]
        assert [one.get("duplicate", False) for one in answers] == [False, True]
        assert answers[0]["task_id"] == answers[1]["task_id"]
        assert await store.tracked() == 1


async def test_a_task_whose_id_is_taken_by_the_other_instance_takes_no_place_from_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both have announced it, one has made it."""
    monkeypatch.setattr("realtime.tasks.desk.SUBMIT_S", 600.0)
    async with site(max_tasks_per_user=LIMIT, tasks=(MODULE,)) as s:
        session_id = await s.session()
        for number in range(LIMIT):
            asked = [s.command(session_id, n, **SLEEP, task_id=f"t{number}") for n in range(4)]
            answers = await asyncio.gather(*asked)
            assert Counter(one.status_code for one in answers) == {202: 1, 409: 3}
        async with asyncio.timeout(PATIENCE_S):
            while s.one.engine._commits or s.two.engine._commits:  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)
        assert await s.one.engine.store.tracked() == LIMIT


@pytest.mark.parametrize("chosen", [{}, {"event_id": "e"}, {"task_id": "t"}])
async def test_a_task_that_a_full_session_refuses_takes_no_place(
    chosen: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often; nobody has to look after it before."""
    monkeypatch.setattr("realtime.tasks.desk.SUBMIT_S", 600.0)
    async with site(max_tasks_per_user=1, max_session_bytes=1, tasks=(MODULE,)) as s:
        session_id = await s.session()
        said: dict[str, Any] = {"type": "conversation.item.create", "item": {"role": "user", "content": "hi"}}
        assert (await s.command(session_id, **said)).status_code == 202
        for n in range(3):
            async with asyncio.timeout(PATIENCE_S):
                while await s.one.engine.store.tracked():  # noqa: ASYNC110
                    await asyncio.sleep(POLL_S)
            answer = await s.command(session_id, n, type="task.create", name="sleep", input={"seconds": 1}, **chosen)
            assert answer.json()["error"]["code"] == "session_full"


async def test_who_tries_again_until_there_is_a_place_is_let_in() -> None:
    """As they are told to: what was refused counts against no rate."""
    async with site(max_tasks_per_user=1, rate_tasks="2/day", tasks=(MODULE,)) as s:
        session_id = await s.session()
        assert (await s.command(session_id, **SLEEP, task_id="t")).status_code == 202
        for n in range(4):
            refused_twice = [
                await s.command(session_id, n, **SLEEP),
                await s.http.post(f"{s.two.url}/v1/tasks/sleep", json=SLEEP["input"]),
            ]
            for answer in refused_twice:
                assert answer.json()["error"]["code"] == "too_many_tasks_at_once"
                assert answer.headers["ratelimit"].startswith('"tasks";r=1;t=')
        assert (await s.http.delete(f"{s.one.url}/v1/sessions/{session_id}/tasks/t")).is_success
        async with asyncio.timeout(PATIENCE_S):
            while (answer := await s.command(session_id, **SLEEP)).is_error:
                assert answer.json()["error"]["code"] == "too_many_tasks_at_once"


@pytest.mark.parametrize("how", ["cancelled", "closed", "deleted"])
async def test_a_task_that_never_ran_makes_room_at_its_end(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has to come to it in the queue before, or to look after it."""
    monkeypatch.setattr("realtime.tasks.desk.SUBMIT_S", 600.0)
    async with site(max_tasks_per_user=1, tasks=(MODULE,)) as s:
        session_id = await s.session()
        session = f"{s.one.url}/v1/sessions/{session_id}"
        given = {"name": "sleep", "input": {"seconds": 600}, "task_id": "t"}
        assert (await s.command(session_id, type="task.create", **given)).is_success  # type: ignore[arg-type]
        assert (await s.http.post(f"{s.two.url}/v1/tasks/sleep", json={"seconds": 1})).status_code == 429
        if how == "closed":
            assert (await s.command(session_id, type="session.close")).is_success
        else:
            assert (await s.http.delete(session if how == "deleted" else f"{session}/tasks/t")).is_success
        async with asyncio.timeout(PATIENCE_S):
            while (await s.http.post(f"{s.two.url}/v1/tasks/sleep", json={"seconds": 1})).is_error:  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)


async def test_one_users_tasks_leave_room_for_anothers() -> None:
    """However many they ask for, where more run at once than one may have; one that has run makes room."""
    chosen: dict[str, Any] = {"max_tasks_per_user": 2, "worker_slots": 3, "tasks": (MODULE,), "auth_secret": SECRET}
    async with running_server(Model(), **chosen) as server, attached(server, headers=bearer("ann")) as ann:
        for number in range(2):
            await ann.send("task.create", name="sleep", input={"seconds": 600}, task_id=f"t{number}")
            await ann.until("task.started", task_id=f"t{number}")
        error = await refused(ann, "task.create", name="sleep", input={"seconds": 600}, event_id="e")
        assert (error["type"], error["code"]) == ("rate_limit_error", "too_many_tasks_at_once")
        async with attached(server, headers=bearer("bob")) as bob:
            await bob.send("task.create", name="sleep", input={"seconds": 0}, task_id="mine")
            async with asyncio.timeout(PATIENCE_S):
                assert (await bob.until("task.done", task_id="mine"))["status"] == "complete"
        await ann.send("task.cancel", task_id="t0")
        await ann.until("task.done", task_id="t0")
        async with asyncio.timeout(PATIENCE_S):
            while "t2" not in ann.transcript.positions:
                await ann.send("task.create", name="sleep", input={"seconds": 600}, task_id="t2", event_id="again")
                await ann.receive()


async def test_each_user_has_a_rate_of_their_own() -> None:
    """However many share an address."""
    async with site(rate_oneshots="1/day", auth_secret=SECRET) as s:
        statuses: list[int] = []
        for user in ("ann", "ann", "bob"):
            call = asyncio.create_task(
                s.http.post(f"{s.one.url}/v1/complete", json={"prompt": "go"}, headers=bearer(user))
            )
            if user != "ann" or not statuses:
                (await s.model.turn()).end("hi")
            statuses.append((await call).status_code)
        assert statuses == [200, 429, 200]


async def test_a_socket_is_told_what_is_left_after_what_was_accepted_and_what_was_not() -> None:
    """The rate, and the tokens, if they are limited."""
    async with site(rate_responses="1/day", token_budget="100000/day") as s, attached(s.one) as client:
        await client.send("response.create", input="go")
        rate, tokens = await limits_told(client)
        assert (rate["name"], rate["limit"], rate["remaining"]) == ("responses", 1, 0)
        assert (tokens["name"], tokens["limit"]) == ("tokens", 100_000)
        assert tokens["remaining"] == 100_000 - (await s.accounts.tokens()).held
        (await s.model.turn()).end("hi")
        await client.until("response.done")
        await client.send("response.create", input="go", event_id="e")
        [rate] = await limits_told(client)
        assert rate["remaining"] == 0
        error = (await client.until("error"))["error"]
        assert (error["code"], error["event_id"]) == ("rate_limited", "e")
        assert error["retry_after_ms"] > 1000


async def test_what_is_refused_or_was_carried_out_before_costs_nothing() -> None:
    """Of the rate: three commands that come to nothing, and the one after them is let in."""
    async with site(rate_responses="2/day") as s, attached(s.one) as client:
        response_id = await client.respond(event_id="first")
        turn = await s.model.turn()
        assert (await refused(client, "response.create", input="go"))["code"] == "response_in_progress"
        assert (await refused(client, "response.create", input="go", max_output_tokens=10**6))["type"]
        again = await s.command(client.session_id, 1, type="response.create", input="go", event_id="first")
        assert again.json()["duplicate"]
        assert "ratelimit" not in again.headers
        turn.end("hi")
        await end(client, response_id)
        await client.respond()
        (await s.model.turn()).end("hi")
        await client.until("response.done")
        assert (await refused(client, "response.create", input="go"))["code"] == "rate_limited"


async def test_a_connection_may_send_so_many_messages() -> None:
    """Those that come too soon are refused, each with the time to wait."""
    async with site(rate_messages="3/day") as s, attached(s.one) as client, attached(s.one) as other:
        for n in range(5):
            await client.send("ping", event_id=f"p{n}")
        for n in range(3):
            await client.until("pong", event_id=f"p{n}")
        for n in (3, 4):
            error = (await client.until("error"))["error"]
            assert (error["type"], error["code"], error["event_id"]) == ("rate_limit_error", "rate_limited", f"p{n}")
            assert error["retry_after_ms"] > 0
        await other.send("ping")
        await other.until("pong")


async def test_a_connection_that_goes_on_is_closed() -> None:
    """With 4429, after a hundred refusals in a row."""
    async with site(rate_messages="3/day") as s, attached(s.one) as client:
        for _ in range(3 + 100 + 1):
            await client.send("ping")
        assert await until_closed(client) == 4429
        errors = [event["error"] for event in client.transcript.events if event["type"] == "error"]
        assert {error["code"] for error in errors} == {"rate_limited"}
        assert [error["fatal"] for error in errors] == [False] * (len(errors) - 1) + [True]


# -------------------------------------------------------------------------------------------------------- connections


async def full(s: Site, session_id: str, **headers: str) -> None:
    """One more connection is refused, of each kind, at each instance."""
    for server in (s.one, s.two):
        async with dialled(server, {"session_id": session_id}, additional_headers=headers) as socket:
            [frame] = await frames_until_closed(socket)
            assert frame["error"]["code"] == "too_many_connections"
            assert socket.close_code == 4429
        answer = await s.http.get(f"{server.url}/v1/sessions/{session_id}/events", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "too_many_connections")
        assert int(answer.headers["retry-after"]) == 1


async def connections(s: Site, expected: int) -> None:
    """Return once so many are held, which has to be soon."""
    async with asyncio.timeout(PATIENCE_S):
        while await s.accounts.connections() != expected:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)


async def test_an_address_has_so_many_connections_of_all_kinds_over_both_instances() -> None:
    """Sockets, streams of sessions, streams of tasks; each that ends makes room."""
    async with site(max_connections_per_address=3) as s, attached(s.one) as client:
        task = await s.http.post(f"{s.one.url}/v1/tasks/summarise", json={"text": "x"})
        events = f"{s.two.url}/v1/sessions/{client.session_id}/events"
        async with (
            s.http.stream("GET", events),
            s.http.stream("GET", f"{s.one.url}/v1/tasks/{task.json()['task_id']}/events") as last,
        ):
            assert last.status_code == 200
            await connections(s, 3)
            await full(s, client.session_id)
        await connections(s, 1)
        async with attached(s.two, client.session_id), attached(s.one, client.session_id):
            await full(s, client.session_id)


async def test_a_user_has_so_many_connections() -> None:
    """Another user of the same address is let in."""
    async with site(max_connections_per_user=1, auth_secret=SECRET) as s:
        answer = await s.http.post(f"{s.one.url}/v1/sessions", headers=bearer("ann"))
        session_id = answer.json()["session"]["id"]
        async with dialled(s.one, {"session_id": session_id}, additional_headers=bearer("ann")) as socket:
            await socket.recv()
            await full(s, session_id, **bearer("ann"))
            async with dialled(s.two, additional_headers=bearer("bob")) as other:
                assert "session.created" in str(await other.recv())


async def test_attaches_that_are_given_up_leave_no_place_taken() -> None:
    """Wherever they were when the client left."""
    async with site(max_connections_per_address=50) as s:
        session_id = await s.session()

        async def give_up(n: int) -> None:
            async with dialled((s.one, s.two)[n % 2], {"session_id": session_id}) as socket:
                if n % 3:
                    await asyncio.sleep(0)
                socket.transport.abort()

        await asyncio.gather(*(give_up(n) for n in range(40)), return_exceptions=True)
        await connections(s, 0)


async def test_the_places_of_an_instance_that_is_killed_are_free_after_its_lease() -> None:
    """Those of its connections and of its responses."""
    settings: dict[str, Any] = {"lease_s": LEASE_S, "max_connections_per_address": 1, "max_responses_per_user": 1}
    async with redis_server() as redis, instance(redis_url=redis.url, **settings) as lost:
        async with instance(redis_url=redis.url, **settings) as two, accounts(redis.url) as books:
            async with attached(lost):
                async with dialled_at(two.ws_url) as code:
                    assert code == 4429
                lost.kill()
            async with asyncio.timeout(PATIENCE_S):
                while await books.connections():  # noqa: ASYNC110
                    await asyncio.sleep(POLL_S)
            async with attached(two) as client:
                assert await client.answer("hello")


@asynccontextmanager
async def dialled_at(url: str) -> AsyncIterator[int | None]:
    """The code by which a new connection is closed at once."""
    server = RunningServer.__new__(RunningServer)
    server.ws_url = url
    async with dialled(server) as socket:
        await frames_until_closed(socket)
        yield socket.close_code


# -------------------------------------------------------------------------------------------------- responses at once


async def slots(s: Site, expected: int) -> None:
    """Return once so many responses are held, which has to be soon."""
    async with asyncio.timeout(PATIENCE_S):
        while await s.accounts.responses() != expected:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)


async def test_responses_and_one_shots_at_once_are_limited_over_sessions_and_instances() -> None:
    """Waiting ones count, too; each end makes room."""
    async with site(max_responses_per_user=3) as s, attached(s.one) as first, attached(s.two) as second:
        running = await first.respond()
        turn = await s.model.turn()
        queued = await first.respond(multitask_strategy="enqueue")
        call = asyncio.create_task(s.http.post(f"{s.two.url}/v1/complete", json={"prompt": "go"}))
        shot = await s.model.turn()
        error = await refused(second, "response.create", input="go", event_id="e")
        assert (error["type"], error["code"]) == ("rate_limit_error", "too_many_responses_at_once")
        assert error["retry_after_ms"]
        refusal = await s.http.post(f"{s.one.url}/v1/complete", json={"prompt": "go"})
        assert (refusal.status_code, refusal.json()["error"]["code"]) == (429, "too_many_responses_at_once")
        shot.end("hi")
        assert (await call).status_code == 200
        await slots(s, 2)
        response_id = await second.respond()
        (await s.model.turn()).end("hi")
        await end(second, response_id)
        turn.end("hi")
        await end(first, running)
        (await s.model.turn()).end("hi")
        await end(first, queued)
        await slots(s, 0)


async def test_an_interruption_makes_room_for_itself() -> None:
    """Also where one response at once is all that a user may have; what else runs makes none."""
    async with site(max_responses_per_user=1) as s, attached(s.one) as client, attached(s.two) as other:
        running = await client.respond()
        turn = await s.model.turn()
        error = await refused(other, "response.create", input="go", multitask_strategy="interrupt")
        assert error["code"] == "too_many_responses_at_once"
        for _ in range(3):
            interrupting = await client.respond(multitask_strategy="interrupt")
            await end(client, running)
            turn, running = await s.model.turn(), interrupting
        turn.end("hi")
        await end(client, running)
        await slots(s, 0)


async def completes(turn: Turn, _client: Client, _s: Site) -> None:
    """The model is done."""
    turn.end("hi")


async def fails(turn: Turn, _client: Client, _s: Site) -> None:
    """The model breaks."""
    turn.fail(RuntimeError("broken"))


async def is_cancelled(_turn: Turn, client: Client, _s: Site) -> None:
    """By its user."""
    [response_id] = [one for one in client.transcript.positions if one != "session"]
    await client.send("response.cancel", response_id=response_id)


async def is_closed(_turn: Turn, client: Client, _s: Site) -> None:
    """With its session."""
    await client.send("session.close")


async def is_erased(_turn: Turn, client: Client, s: Site) -> None:
    """With its session, at the other instance."""
    assert (await s.http.delete(f"{s.two.url}/v1/sessions/{client.session_id}")).status_code == 204


async def is_left(_turn: Turn, client: Client, _s: Site) -> None:
    """By its only viewer."""
    client.reset()


@pytest.mark.parametrize("ends", [completes, fails, is_cancelled, is_closed, is_erased, is_left])
@pytest.mark.parametrize("is_followed", [False, True], ids=["alone", "followed"])
async def test_each_end_of_a_response_makes_room(ends: Any, is_followed: bool) -> None:
    """Also where another one waits behind it."""
    async with site(max_responses_per_user=2, token_budget="100000/day") as s, attached(s.one) as client:
        await client.respond()
        turn = await s.model.turn()
        if is_followed and ends is not is_cancelled:
            await client.respond(multitask_strategy="enqueue")
            await slots(s, 2)
        await ends(turn, client, s)
        if is_followed and ends in {completes, fails}:
            (await s.model.turn()).end("hi")
        await slots(s, 0)
        assert (await s.accounts.nothing_held()).used >= 0


async def test_a_response_that_an_instance_ends_as_it_goes_makes_room() -> None:
    """At once, not after the lease."""
    async with site(max_responses_per_user=1) as s, attached(s.one) as client:
        await client.respond()
        await s.model.turn()
        s.one.stop()
        await until_closed(client)
        await s.one.ended()
        assert await s.accounts.responses() == 0


async def test_what_is_refused_is_counted() -> None:
    """By what there was too much of."""
    async with site(rate_oneshots="1/day") as s:
        call = asyncio.create_task(s.http.post(f"{s.one.url}/v1/complete", json={"prompt": "go"}))
        (await s.model.turn()).end("hi")
        await call
        before = await hits(s)
        await s.http.post(f"{s.one.url}/v1/complete", json={"prompt": "go"})
        assert await hits(s) == before + 1


async def hits(s: Site) -> float:
    """How often the rate of one-shot calls was hit."""
    text = (await s.http.get(f"{s.one.url}/metrics")).text
    found = [line for line in text.splitlines() if line.startswith('realtime_limits_hit_total{limit="oneshots"}')]
    return sum(float(line.split()[-1]) for line in found)


async def test_where_redis_hangs_who_is_attached_stays_and_what_costs_is_refused() -> None:
    """Retryably; and it is let in again when Redis is back."""
    async with site(rate_oneshots="100/day") as s, attached(s.one) as client:
        s.redis.pause()
        try:
            answer = await s.http.post(f"{s.one.url}/v1/complete", json={"prompt": "go"})
            assert (answer.status_code, answer.json()["error"]["type"]) == (503, "store_error")
            assert answer.headers["retry-after"]
            assert s.model.calls == 0
            await client.send("ping")
            await client.until("pong")
        finally:
            s.redis.resume()
        call = asyncio.create_task(s.http.post(f"{s.one.url}/v1/complete", json={"prompt": "go"}))
        (await s.model.turn()).end("hi")
        assert (await call).status_code == 200
