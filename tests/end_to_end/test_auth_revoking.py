"""Tokens that are taken back: what is open is closed on every instance, what was issued before counts no more."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

import httpx
import pytest

from realtime.access.admission import Admission
from realtime.access.principal import Principal
from realtime.access.revocations import LOOK_S
from realtime.connections import Connections
from realtime.tasks.stream import TaskStream
from tests.end_to_end import PATIENCE_S, Model, dialled, echo, frames_until_closed
from tests.support.client import attached
from tests.support.event_stream import connections_of, http_client, streaming
from tests.support.instance import Instance, instance
from tests.support.redis_server import RedisServer, redis_server
from tests.support.sample_tasks import MODULE
from tests.support.server import running_server
from tests.support.tokens import SECRET, bearer

ADMIN = {"scope": "admin"}
CLOSED_S = 2 * PATIENCE_S
"""How long a close may take on a machine that is busy; what is promised is two seconds."""


class Fleet(NamedTuple):
    """Two instances over one Redis."""

    redis: RedisServer
    one: Instance
    two: Instance


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with redis_server(append_only=True, appendfsync="always") as redis, AsyncExitStack() as stack:
        settings: dict[str, Any] = {"auth_secret": SECRET, "redis_url": redis.url, "tasks": MODULE}
        starts = [stack.enter_async_context(instance(**settings)) for _ in range(2)]
        yield Fleet(redis, *[await start for start in starts])


async def revoke(server: Any, **subject: str) -> None:
    """Take tokens back."""
    async with http_client(base_url=server.url) as http:
        answer = await http.post("/v1/admin/revoke", json=subject, headers=bearer("root", **ADMIN))
        assert answer.status_code == 204, answer.text


async def newer() -> None:
    """Return in the next second: times in tokens are whole seconds."""
    await asyncio.sleep(1.001 - time.time() % 1)


async def shown_to(server: Any, session_id: str, headers: dict[str, str]) -> int:
    """The status with which a session is shown, or not."""
    async with http_client(base_url=server.url) as http:
        return (await http.get(f"/v1/sessions/{session_id}", headers=headers)).status_code


async def error_of_stream(response: httpx.Response) -> str:
    """Read an event stream to its end; returns its last lines."""
    return "\n".join([line async for line in response.aiter_lines()][-4:])


@asynccontextmanager
async def open_everywhere(fleet: Fleet, session_id: str, headers: dict[str, str]) -> AsyncIterator[list[Any]]:
    """On both instances a WebSocket, an event stream and a task's stream; what is yielded ends when they do."""
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        endings: list[asyncio.Task[Any]] = []
        async with http_client(base_url=fleet.one.url) as http:
            made = {"type": "task.create", "name": "sleep", "input": {"seconds": 600}}
            answer = await http.post(f"/v1/sessions/{session_id}/events", json=made, headers=headers)
            task_id = answer.json()["task_id"]
        for server in (fleet.one, fleet.two):
            client = await stack.enter_async_context(attached(server, session_id, headers=headers))
            ending: Coroutine[Any, Any, Any] = client.until_closed()
            endings.append(group.create_task(ending))
            http = await stack.enter_async_context(http_client(base_url=server.url))
            for path in ("/events", f"/tasks/{task_id}/events"):
                stream = http.stream("GET", f"/v1/sessions/{session_id}{path}", headers=headers)
                ending = error_of_stream(await stack.enter_async_context(stream))
                endings.append(group.create_task(ending))
        yield endings


@pytest.mark.parametrize("subject", ["user", "session_id"])
async def test_what_is_open_is_closed_on_every_instance(fleet: Fleet, subject: str) -> None:
    """WebSockets with 4401, streams with an error; others' stay."""
    async with attached(fleet.two, headers=bearer("bob")) as other, attached(fleet.two, headers=bearer("ann")) as first:
        session_id, shown = first.session_id, bearer("ann")
        revoked = {"user": "ann", "session_id": session_id}[subject]
        async with open_everywhere(fleet, session_id, shown) as endings:
            await revoke(fleet.one, **{subject: revoked})
            async with asyncio.timeout(CLOSED_S):
                ended = await asyncio.gather(*endings)
        assert ended[0::3] == [4401, 4401]
        for text in ended[1::3] + ended[2::3]:
            assert "token_revoked" in text
            assert '"fatal":true' in text
        assert await first.until_closed() == 4401
        await other.send("ping")
        await other.until("pong")
        await newer()
        for server in (fleet.one, fleet.two):
            assert await shown_to(server, session_id, shown) == 401
            assert await shown_to(server, session_id, bearer("ann")) == 200


async def test_a_session_that_is_revoked_leaves_the_others(fleet: Fleet) -> None:
    """Its owner's other sessions go on, by the same token."""
    shown = bearer("ann")
    async with attached(fleet.one, headers=shown) as kept, attached(fleet.one, headers=shown) as taken:
        await revoke(fleet.two, session_id=taken.session_id)
        async with asyncio.timeout(CLOSED_S):
            assert await taken.until_closed() == 4401
        await kept.send("ping")
        await kept.until("pong")
        async with dialled(fleet.one, {"session_id": taken.session_id}, additional_headers=shown) as socket:  # type: ignore[arg-type]
            [frame] = await frames_until_closed(socket)
            assert (frame["error"]["code"], socket.close_code) == ("token_revoked", 4401)


async def test_revocations_outlive_redis(fleet: Fleet) -> None:
    """While it is away what is known goes on, and when it is back with its file nothing is forgotten, by a new instance
    neither."""
    shown = bearer("ann")
    async with attached(fleet.one, headers=shown) as client:
        session_id = client.session_id
        await revoke(fleet.one, user="ann")
        async with asyncio.timeout(CLOSED_S):
            assert await client.until_closed() == 4401
    await fleet.redis.kill()
    assert await shown_to(fleet.one, session_id, shown) == 401
    async with http_client(base_url=fleet.one.url) as http:
        answer = await http.post("/v1/admin/revoke", json={"user": "bob"}, headers=bearer("root", **ADMIN))
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "store_error")
    await fleet.redis.start()
    settings: dict[str, Any] = {"auth_secret": SECRET, "redis_url": fleet.redis.url, "tasks": MODULE}
    async with instance(**settings) as third:
        async with asyncio.timeout(CLOSED_S):
            for server in (fleet.one, fleet.two, third):  # which may have to ask once more
                while await shown_to(server, session_id, shown) != 401:  # noqa: ASYNC110  # each look is a request
                    await asyncio.sleep(0.05)


async def test_what_ran_for_the_last_connection_is_cancelled() -> None:
    """At once, without the grace of those whom the server has cut off: over a WebSocket and over a stream."""
    model = Model()
    async with running_server(model, auth_secret=SECRET) as server:
        async with attached(server, headers=bearer("ann")) as client:
            await client.respond()
            turn = await model.turn()
            await revoke(server, user="ann")
            async with asyncio.timeout(PATIENCE_S):
                assert await client.until_closed() == 4401
                await turn.closed.wait()
        await newer()
        async with attached(server, headers=bearer("ann")) as client:
            session_id = client.session_id
        url = f"{server.url}/v1/sessions/{session_id}/events"
        async with streaming(url, headers=bearer("ann")) as stream, http_client(base_url=server.url) as http:
            command = {"type": "response.create", "input": "go"}
            assert (await http.post(url, json=command, headers=bearer("ann"))).status_code == 202
            turn = await model.turn()
            await revoke(server, user="ann")
            async with asyncio.timeout(PATIENCE_S):
                await stream.until_end()
                await turn.closed.wait()


@pytest.mark.parametrize("subject", ["user", "session_id"])
async def test_who_is_let_in_meanwhile_is_found(monkeypatch: pytest.MonkeyPatch, subject: str) -> None:
    """A token that is taken back between the look at it and the opening of its connection, whichever that is."""
    admitted = Admission.connection

    @asynccontextmanager
    async def late(self: Admission, principal: Principal, name: str) -> AsyncIterator[None]:
        await revoke(server, **{subject: {"user": "ann", "session_id": session_id}[subject]})
        async with admitted(self, principal, name):
            yield

    async with running_server(echo, auth_secret=SECRET, tasks=(MODULE,)) as server:
        async with attached(server, headers=bearer("ann")) as client:
            await client.send("task.create", name="sleep", input={"seconds": 600})
            task_id = (await client.until("task.created"))["task"]["id"]
            session_id = client.session_id
        monkeypatch.setattr(Admission, "connection", late)
        async with dialled(server, {"session_id": session_id}, additional_headers=bearer("ann")) as socket:
            [frame] = await frames_until_closed(socket)
            assert (frame["error"]["code"], socket.close_code) == ("token_revoked", 4401)
        async with http_client(base_url=server.url) as http:
            for path in ("/events", f"/tasks/{task_id}/events"):
                await newer()
                answer = await http.get(f"/v1/sessions/{session_id}{path}", headers=bearer("ann"))
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "token_revoked")


async def test_a_tasks_stream_that_stalls_is_let_go() -> None:
    """Nobody waits until its client takes what it was sent before."""
    async with running_server(echo, auth_secret=SECRET, tasks=(MODULE,), send_timeout_s=600) as server:
        async with http_client(base_url=server.url) as http:
            made = await http.post("/v1/tasks/write_numbers", json={"steps": 20_000_000}, headers=bearer("ann"))
            head = f"GET {made.headers['location']}/events HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            head += f"Authorization: {bearer('ann')['Authorization']}\r\n\r\n"
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
            try:
                writer.write(head.encode())
                held = connections_of(server)
                async with asyncio.timeout(CLOSED_S):
                    await reader.readuntil(b"task.started")
                    while not stalls(held):  # noqa: ASYNC110  # nothing tells of it
                        await asyncio.sleep(0.005)
                    await revoke(server, user="ann")
                    await held.empty()
            finally:
                writer.close()
            await newer()
            answer = await http.delete(made.headers["location"], headers=bearer("ann"))
            assert answer.status_code == 202


def stalls(held: Connections) -> bool:
    """Whether a task's stream has waited for its client for a while."""
    streams = [one for one in held._held if isinstance(one, TaskStream)]
    loop = asyncio.get_running_loop()
    deadlines = [one._patience.when() for one in streams if one._patience is not None]
    return any(when is not None and when < loop.time() + 599.5 for when in deadlines)


@pytest.mark.parametrize(
    "body",
    [{}, {"user": "a", "session_id": "s"}, {"user": ""}, {"user": 1}, {"session_id": "a b"}, {"users": "a"}, []],
)
async def test_a_revocation_is_of_one_thing(body: Any) -> None:
    """A user or a session, by its name; nothing else is understood."""
    async with running_server(echo, auth_secret=SECRET) as server, http_client(base_url=server.url) as http:
        answer = await http.post("/v1/admin/revoke", json=body, headers=bearer("root", **ADMIN))
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


async def test_a_session_of_the_name_none_is_nobodys_lack_of_one() -> None:
    """What belongs to no session is not touched by a revocation of whichever."""
    async with running_server(echo, auth_secret=SECRET) as server, http_client(base_url=server.url) as http:
        shown = bearer("ann")
        await revoke(server, session_id="None")
        assert (await http.post("/v1/sessions", headers=shown)).status_code == 201


def test_the_look_is_often_enough() -> None:
    """A call to the store has a second left of the two that are promised."""
    assert LOOK_S <= 1


@pytest.mark.parametrize(("path", "body"), [("/v1/stream", {"prompt": "go"}), ("/v1/summarise", {"text": "go"})])
async def test_a_one_shot_ends_with_its_token(path: str, body: dict[str, str]) -> None:
    """It is a live connection, too: the client is told why."""
    model = Model()
    async with running_server(model, auth_secret=SECRET) as server, http_client(base_url=server.url) as http:
        asking = asyncio.create_task(http.post(path, json=body, headers=bearer("ann")))
        turn = await model.turn()
        answer = await http.post("/v1/admin/revoke", json={"user": "ann"}, headers=bearer("root", **ADMIN))
        assert answer.status_code == 204
        async with asyncio.timeout(CLOSED_S):
            assert '"token_revoked"' in (await asking).text
            await turn.closed.wait()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/sessions", {}),
        ("/v1/sessions/{}/events", {"type": "response.create", "input": "go"}),
        ("/v1/tasks/summarise", {"text": "go"}),
        ("/v1/complete", {"prompt": "go"}),
    ],
)
async def test_who_sends_slowly_is_asked_again(path: str, body: dict[str, str]) -> None:
    """A token that was taken back while its body was still coming begins nothing."""
    model = Model()
    async with running_server(model, auth_secret=SECRET) as server, http_client(base_url=server.url) as http:
        made = (await http.post("/v1/sessions", headers=bearer("ann"))).json()["session"]["id"]
        begun, may_end = asyncio.Event(), asyncio.Event()

        async def slowly() -> AsyncIterator[bytes]:
            whole = json.dumps(body).encode()
            yield whole[:1]
            begun.set()
            await may_end.wait()
            yield whole[1:]

        asking = asyncio.create_task(http.post(path.format(made), content=slowly(), headers=bearer("ann")))
        await begun.wait()
        await revoke(server, user="ann")
        may_end.set()
        answer = await asking
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "token_revoked")
        assert model.calls == 0
