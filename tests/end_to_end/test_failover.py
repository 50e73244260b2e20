"""Several instances behind nginx: one that is killed, hangs, drains or is full, and sessions that all of them share."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any
from unittest import mock

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from realtime.errors import StoreError
from realtime.store.base import CommandRecord, Write
from tests.end_to_end import PATIENCE_S, echo
from tests.support.client import Client, attached
from tests.support.instance import Instance, instance
from tests.support.model_server import ModelRequest, ModelServer
from tests.support.nginx import Nginx, nginx
from tests.support.ports import free_port
from tests.support.redis_server import redis_server
from tests.support.scenarios import Gate, Scenario, Stop, Text
from tests.support.server import RunningServer, running_server
from tests.support.upstream import REFUSAL, Dying, Upstream, refusing

BODY = b'{"prompt": "hello"}'
TELLING = {"add_header Retry-After": "add_header X-Tried $upstream_addr always; add_header Retry-After"}
"""A change of the configuration by which the answer to an upgrade says which instances were tried."""


@asynccontextmanager
async def http(proxy: Nginx) -> AsyncIterator[httpx.AsyncClient]:
    """A client of nginx over plain HTTP."""
    async with httpx.AsyncClient(base_url=proxy.url, trust_env=False, timeout=30) as client:
        yield client


def tried(client: Client) -> tuple[int, ...]:
    """The ports that nginx has tried for a client's connection; the last one is the instance that it has."""
    assert client.socket.response is not None
    addresses = client.socket.response.headers["x-tried"]
    return tuple(int(port) for port in re.findall(r"127\.0\.0\.1:(\d+)", addresses))


async def instance_of_next(proxy: Nginx) -> int:
    """The port of the instance that the next client is connected to."""
    async with attached(proxy) as client:
        return tried(client)[-1]


async def hung_up(call: ModelRequest) -> None:
    """Return once the model call was closed by the instance, which has to be soon."""
    async with asyncio.timeout(PATIENCE_S):
        assert await call.finished() == "peer_closed"


# ------------------------------------------------------------------------------------------- instances that are lost
async def test_new_connections_go_to_the_other_instance_when_one_is_killed() -> None:
    """Who was connected to it is cut off at once, and everybody who comes gets in."""
    async with AsyncExitStack() as stack:
        one, two = await asyncio.gather(*(stack.enter_async_context(instance()) for _ in range(2)))
        proxy = await stack.enter_async_context(nginx(one.port, two.port, replacing=TELLING))
        before = [await stack.enter_async_context(attached(proxy)) for _ in range(4)]
        assert {tried(client) for client in before} == {(one.port,), (two.port,)}
        one.kill()
        async with asyncio.timeout(PATIENCE_S):
            for client in before:
                if tried(client) == (one.port,):
                    assert await client.until_closed() == 1006
            for _ in range(8):
                async with attached(proxy) as client:
                    assert tried(client)[-1] == two.port
                    await client.send("ping")
                    await client.until("pong")


async def test_the_instance_with_the_fewest_connections_gets_the_next() -> None:
    """Not the one whose turn it would be."""
    async with running_server(echo) as one, running_server(echo) as two, AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(nginx(one.port, two.port, replacing=TELLING))
        there = [await stack.enter_async_context(attached(proxy)) for _ in range(6)]
        for client in there:
            if tried(client) == (one.port,):
                await client.socket.close()
        await proxy.logged('"status":101', times=3)
        back = [await stack.enter_async_context(attached(proxy)) for _ in range(3)]
        assert [tried(client) for client in back] == [(one.port,)] * 3


async def test_an_instance_that_is_back_is_used_again() -> None:
    """Some seconds after its return it gets connections; it has the fewest."""
    port = free_port()
    async with instance() as two, nginx(port, two.port, replacing=TELLING) as proxy:
        async with attached(proxy) as client:
            assert tried(client)[-1] == two.port
            async with instance(port=port):
                async with asyncio.timeout(2 * PATIENCE_S):
                    while await instance_of_next(proxy) != port:  # noqa: ASYNC110  # nothing tells of it
                        await asyncio.sleep(0.1)


async def test_an_instance_that_hangs_does_not_keep_clients_out() -> None:
    """Who is sent to it waits for nginx's patience, here a second, and is then served by the other one."""
    short = {"proxy_read_timeout 35s": "proxy_read_timeout 1s", **TELLING}
    async with instance() as one, running_server(echo, ping_interval_s=0.3) as two:
        async with nginx(one.port, two.port, replacing=short) as proxy:
            one.pause()
            async with asyncio.timeout(2 * PATIENCE_S):
                for _ in range(3):
                    async with attached(proxy) as client:
                        assert tried(client)[-1] == two.port
                        assert await client.answer("hello") == "hello"
            one.resume()


# ------------------------------------------------------------------------------- instances that drain, are full, die


async def test_a_full_instance_makes_nginx_try_the_next() -> None:
    """A 503 before the upgrade is not the end: the other instance takes the connection."""
    async with running_server(echo, max_connections=1) as full, running_server(echo) as free:
        async with nginx(full.port, free.port, replacing=TELLING) as proxy, attached(full):
            seen = set()
            for _ in range(8):
                async with asyncio.timeout(PATIENCE_S), attached(proxy) as client:
                    assert await client.answer("hello") == "hello"
                    seen.add(tried(client))
            assert {ports[-1] for ports in seen} == {free.port}
            assert any(full.port in ports for ports in seen), "nginx never asked the full one"


async def test_when_all_are_full_the_client_is_told_by_the_server() -> None:
    """The last refusal is passed on as it is, and what the instances have goes on."""
    async with running_server(echo, max_connections=1) as one, running_server(echo, max_connections=1) as two:
        async with (
            nginx(one.port, two.port) as proxy,
            attached(one),
            attached(two),
            http(proxy) as client,
        ):
            for _ in range(10):
                with pytest.raises(InvalidStatus) as refused:
                    async with connect(proxy.ws_url, proxy=None):
                        pass
                response = refused.value.response
                assert (response.status_code, response.headers.get_all("retry-after")) == (503, ["1"])
                assert json.loads(response.body or b"")["error"]["code"] == "too_many_connections"
                assert (await client.post("/v1/complete", content=BODY)).status_code == 200


async def test_a_post_that_was_refused_goes_to_the_next_instance() -> None:
    """It arrives there whole, once."""
    async with refusing() as draining, Upstream() as other, nginx(draining.port, other.port) as proxy:
        async with http(proxy) as client:
            for number in range(6):
                body = b"%d" % number * 100_000
                assert (await client.post("/v1/stream", content=body)).status_code == 200
                assert other.requests[-1].body == body
            assert len(other.requests) == 6
            assert draining.requests


async def test_a_refusal_of_all_is_passed_on_as_it_is() -> None:
    """However often: a 503 is no fault of an instance, which would shut out everybody."""
    async with refusing() as one, refusing() as two, nginx(one.port, two.port) as proxy, http(proxy) as client:
        for _ in range(20):
            for method in ("POST", "GET"):
                response = await client.request(method, "/v1/sessions")
                assert (response.status_code, response.content) == (503, REFUSAL)
                assert response.headers.get_list("retry-after") == ["7"]
        one.status = two.status = 200
        assert (await client.get("/v1/sessions")).status_code == 200


async def test_a_post_that_died_halfway_is_not_repeated() -> None:
    """Nobody knows whether it was carried out: each arrives once, and who sent it is told."""
    async with Dying() as dying, Upstream() as other, nginx(dying.port, other.port) as proxy, http(proxy) as client:
        statuses = [(await client.post("/v1/stream", content=BODY)).status_code for _ in range(8)]
        assert len(dying.requests) + len(other.requests) == len(statuses)
        assert dying.requests
        assert statuses.count(502) == len(dying.requests)
        assert statuses.count(200) == len(other.requests)


async def test_a_post_that_was_refused_and_died_then_is_not_repeated() -> None:
    """Not on its second way either."""
    async with refusing() as draining, Dying() as one, Dying() as two:
        async with nginx(draining.port, one.port, two.port) as proxy, http(proxy) as client:
            statuses = [(await client.post("/v1/stream", content=BODY)).status_code for _ in range(9)]
            assert draining.requests
            assert statuses == [502] * 9
            assert len(one.requests) + len(two.requests) == 9


async def test_a_get_that_died_is_repeated() -> None:
    """It may be."""
    async with Dying() as dying, Upstream() as other, nginx(dying.port, other.port) as proxy, http(proxy) as client:
        assert [(await client.get("/v1/sessions/x")).status_code for _ in range(6)] == [200] * 6
        assert dying.requests


async def test_a_post_finds_the_instance_that_is_there() -> None:
    """One that refuses connections has got nothing of it."""
    async with Upstream() as other, nginx(free_port(), other.port) as proxy, http(proxy) as client:
        assert [(await client.post("/v1/stream", content=BODY)).status_code for _ in range(6)] == [200] * 6
        assert len(other.requests) == 6


async def test_with_no_instance_at_all_the_client_is_told_to_come_back() -> None:
    """A 502, with a time."""
    async with nginx(free_port(), free_port()) as proxy, http(proxy) as client:
        response = await client.post("/v1/stream", content=BODY)
        assert (response.status_code, response.headers["retry-after"]) == (502, "1")


@pytest.mark.parametrize("status", [400, 404, 429, 500, 502])
async def test_other_errors_of_the_server_are_passed_on_as_they_are(status: int) -> None:
    """They are for the client, and no reason to ask another instance."""
    headers = {"x-own": "yes"}
    async with Upstream(status, REFUSAL, headers) as one, Upstream(status, REFUSAL, headers) as two:
        async with nginx(one.port, two.port) as proxy, http(proxy) as client:
            for path in ("/", "/v1/complete", "/v1/sessions/x/events"):
                response = await client.post(path, content=BODY)
                assert (response.status_code, response.content) == (status, REFUSAL)
                assert (response.headers["x-own"], "retry-after" in response.headers) == ("yes", False)
            assert len(one.requests) + len(two.requests) == 3


# ------------------------------------------------------------------------- two instances that share their sessions


@asynccontextmanager
async def two_instances(*scenario: Any, **settings: Any) -> AsyncIterator[tuple[ModelServer, list[Instance], Nginx]]:
    """A model, two instances on one Redis, and nginx in front of them."""
    async with AsyncExitStack() as stack:
        model = await stack.enter_async_context(ModelServer(default=Scenario(scenario)))
        redis = await stack.enter_async_context(redis_server(append_only=True))
        contexts = [instance(model=model.url, redis_url=redis.url, **settings) for _ in range(2)]
        ones = await asyncio.gather(*map(stack.enter_async_context, contexts))
        ports = [one.port for one in ones]
        proxy = await stack.enter_async_context(nginx(*ports, replacing=TELLING))
        yield model, ones, proxy


async def test_a_command_whose_answer_was_lost_is_carried_out_once() -> None:
    """An instance has stored it, but does not hear so, and says 503; the next one gets it from nginx once more."""
    async with redis_server() as redis, AsyncExitStack() as stack:
        contexts = [running_server(echo, redis_url=redis.url) for _ in range(2)]
        one, two = [await stack.enter_async_context(context) for context in contexts]
        proxy = await stack.enter_async_context(nginx(one.port, two.port))
        client = await stack.enter_async_context(http(proxy))
        session = (await client.post("/v1/sessions")).json()["session"]
        with deaf_after_appending(one):
            for number in range(4):
                item = {"role": "user", "content": str(number)}
                command = {"type": "conversation.item.create", "item": item}
                answer = await client.post(f"/v1/sessions/{session['id']}/events", json=command)
                assert answer.status_code == 202
        assert any(" : " in line for line in proxy.access_log), "nothing was tried twice"
        items = (await client.get(f"/v1/sessions/{session['id']}")).json()["items"]
        assert [item["content"] for item in items] == ["0", "1", "2", "3"]


@contextmanager
def deaf_after_appending(server: RunningServer) -> Iterator[None]:
    """Have a server not hear that its store has done what it was told."""
    store = server.engine.store
    append = store.append

    async def lossy(
        session_id: str, writes: Sequence[Write], command: CommandRecord | None = None, *, keep_s: float = 0.0
    ) -> None:
        await append(session_id, writes, command, keep_s=keep_s)
        raise StoreError("store_unavailable", "The store did not answer.", retry_after_ms=1000)

    with mock.patch.object(store, "append", lossy):
        yield


async def test_a_session_is_the_same_at_both_instances() -> None:
    """Two clients at two instances see the same answer, token by token, while the model is held back."""
    gates = [Gate() for _ in range(3)]
    steps = [step for gate, word in zip(gates, ("one ", "two ", "three"), strict=True) for step in (gate, Text(word))]
    async with two_instances(*steps, Stop()) as (_, _, proxy), AsyncExitStack() as stack:
        writer = await stack.enter_async_context(attached(proxy))
        reader = await stack.enter_async_context(attached(proxy, writer.session_id))
        assert tried(writer) != tried(reader), "nginx gives the second one to the instance with fewer connections"
        response_id = await writer.respond()
        for gate in gates:
            gate.open()
            async with asyncio.timeout(PATIENCE_S):
                deltas = [await client.until("response.output_text.delta") for client in (writer, reader)]
            assert deltas[0]["delta"] == deltas[1]["delta"]
        for client in (writer, reader):
            done = await client.until("response.done")
            assert (done["status"], client.transcript.texts[response_id]) == ("completed", "one two three")


async def test_a_cancel_at_the_other_instance_reaches_the_model() -> None:
    """Wherever the response runs, whoever is attached may stop it."""
    async with two_instances(Text("one "), Gate()) as (model, _, proxy):
        async with attached(proxy) as writer, attached(proxy, writer.session_id) as other:
            assert tried(writer) != tried(other)
            response_id = await writer.respond()
            call = await model.next_request()
            await other.until("response.output_text.delta")
            await other.send("response.cancel", response_id=response_id)
            await hung_up(call)
            assert (await writer.until("response.done"))["status"] == "cancelled"


async def test_a_viewer_at_the_other_instance_keeps_the_response_alive() -> None:
    """It ends with the last viewer over both instances, not with the first."""
    gate = Gate()
    async with two_instances(Text("one "), gate, Text("two"), Stop()) as (model, _, proxy):
        async with attached(proxy) as writer, attached(proxy, writer.session_id) as other:
            assert tried(writer) != tried(other)
            response_id = await writer.respond()
            call = await model.next_request()
            await other.until("response.output_text.delta")
            await writer.socket.close()
            gate.open()
            assert (await other.until("response.done", response_id=response_id))["status"] == "completed"
            assert call.ended == "completed"


async def test_a_client_resumes_at_the_other_instance_after_a_kill() -> None:
    """It goes on where it was, by nginx's address alone, and learns that the response was lost with its instance."""
    lease_s = 2
    async with two_instances(Text("one "), Text("two "), Gate(), lease_s=lease_s) as (model, ones, proxy):
        async with attached(proxy) as client:
            transcript, session_id = client.transcript, client.session_id
            response_id = await client.respond()
            call = await model.next_request()
            while transcript.texts[response_id] != "one two ":
                await client.receive()
            owner = next(one for one in ones if one.port == tried(client)[-1])
            owner.kill()
            async with asyncio.timeout(PATIENCE_S):
                assert await client.until_closed() == 1006
                await hung_up(call)
        async with attached(proxy, session_id, transcript=transcript, after=transcript.after()) as back:
            assert tried(back)[-1] != owner.port
            async with asyncio.timeout(lease_s + 2 * PATIENCE_S):
                done = await back.until("response.done", response_id=response_id)
        assert (done["status"], done["error"]["code"]) == ("failed", "instance_lost")
        assert "one two ".startswith(transcript.texts[response_id])


async def test_the_next_answer_comes_from_the_instance_that_is_left() -> None:
    """The session is as usable as before its instance was killed."""
    async with two_instances(Text("one "), Text("two"), Stop()) as (_, ones, proxy):
        async with attached(proxy) as client:
            transcript, session_id = client.transcript, client.session_id
            assert await client.answer() == "one two"
            next(one for one in ones if one.port == tried(client)[-1]).kill()
            with pytest.raises(ConnectionClosed):
                await client.receive()
        async with attached(proxy, session_id, transcript=transcript, after=transcript.after()) as back:
            async with asyncio.timeout(PATIENCE_S):
                assert await back.answer() == "one two"
