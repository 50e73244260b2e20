"""What becomes of sessions when Redis, or the way to it, fails: nobody misses anything, and nobody is told a lie."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest
from msgspec.structs import replace
from redis.exceptions import OutOfMemoryError
from websockets.exceptions import ConnectionClosed

from realtime.errors import NotFound
from realtime.live import LiveSession
from realtime.observe import logs
from realtime.protocol import Session, SessionClosed, timestamp
from realtime.responders.base import Request, ResponderEvent
from realtime.store.base import Appended, Gone, Notice, Write
from realtime.store.redis import RedisStore
from realtime.store.redis_calls import LANES
from tests.end_to_end import PATIENCE_S, Model, Turn, echo, settled
from tests.support.client import Client, Transcript, attached
from tests.support.ears import Ears
from tests.support.ports import free_port
from tests.support.redis_server import RedisServer, patient_calls, redis_server
from tests.support.server import RunningServer, running_server
from tests.support.tcp_proxy import ProxyConnection, TcpProxy

DEAF_S = 12.0
"""How long an instance may hear nothing of the others when its connection has died in silence: 4 s, and what a busy
machine adds."""
LAG_S = 0.25
BACK_S = 10.0
"""How long after Redis is back readers may wait for what is new: 2 s, and what a busy machine adds."""
LEASE_S = 0.8
REFUSES_S = 1.5
SLACK_S = 1.4
"""What a busy machine may add to a bound; less than the time for which Redis hangs."""
JOINS = 2000
NAIVE_JOINS = 500
TOGETHER = 100
"""At once."""
MARKED = 40
CANARY_ROUNDS = 6


@pytest.fixture
async def redis() -> AsyncIterator[RedisServer]:
    """The Redis of a test."""
    async with redis_server() as server:
        yield server


@pytest.fixture
def model() -> Model:
    """The model that all instances ask."""
    return Model()


@asynccontextmanager
async def instances(model: Any, *urls: str, **settings: Any) -> AsyncIterator[list[RunningServer]]:
    """An instance for each URL of a Redis."""
    async with AsyncExitStack() as stack:
        contexts = [running_server(model, redis_url=url, **settings) for url in urls]
        servers = [await stack.enter_async_context(one) for one in contexts]
        yield servers
        for server in servers:
            server.stop()


@asynccontextmanager
async def streaming(
    model: Model, runs: RunningServer, reads: RunningServer, **settings: Any
) -> AsyncIterator[tuple[Client, Client, Turn]]:
    """A response that runs at one instance, and a client at each; both have its first token."""
    async with attached(runs) as near, attached(reads, near.session_id) as far:
        await near.send("response.create", input="go", response_id="r", **settings)
        turn = await model.turn()
        turn.say("one ")
        for client in (near, far):
            await says(client, "one ")
        yield near, far, turn


async def says(client: Client, text: str) -> None:
    """Return once the client has so much of the answer."""
    async with asyncio.timeout(2 * PATIENCE_S):
        while client.transcript.texts["r"] != text:
            assert len(client.transcript.texts["r"]) < len(text), client.transcript.texts["r"]
            await client.receive()


async def done(client: Client, within_s: float = PATIENCE_S) -> dict[str, Any]:
    """The response's end."""
    async with asyncio.timeout(within_s):
        while "r" not in client.transcript.done:
            await client.receive()
    return client.transcript.done["r"]


@asynccontextmanager
async def get(server: RunningServer) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an instance's plain endpoints."""
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=10) as client:
        yield client


class Lag:
    """The longest that the loop was busy without a turn: in CPU time, so that other processes don't count."""

    def __init__(self) -> None:
        self.worst_s = 0.0

    async def measure(self) -> None:
        """Take a turn every few milliseconds, for ever."""
        while True:
            before, used = time.monotonic(), time.thread_time()
            await asyncio.sleep(0.005)
            self.worst_s = max(self.worst_s, min(time.monotonic() - before - 0.005, time.thread_time() - used))


@asynccontextmanager
async def unhurt_loop() -> AsyncIterator[None]:
    """The loop turns within the block as often as it has to."""
    lag = Lag()
    measuring = asyncio.create_task(lag.measure())
    try:
        yield
    finally:
        measuring.cancel()
        await asyncio.wait([measuring])
    assert lag.worst_s < LAG_S


# --------------------------------------------------------------------------------------------- the bus's connection


async def bus_of(redis: RedisServer, proxy: TcpProxy) -> ProxyConnection:
    """The connection through the proxy over which an instance hears what is published."""
    clients = str(await redis.command("CLIENT", "LIST", "TYPE", "PUBSUB"))
    return next(
        connection for connection in proxy.connections if f":{connection._sockets[1].getsockname()[1]} " in clients
    )


async def by_reset(redis: RedisServer, proxy: TcpProxy, _: RunningServer) -> None:
    """An RST."""
    await (await bus_of(redis, proxy)).reset()


async def by_silence(redis: RedisServer, proxy: TcpProxy, _: RunningServer) -> None:
    """The way back is gone, and nobody says so."""
    await (await bus_of(redis, proxy)).blackhole()


async def by_silence_of_all(redis: RedisServer, proxy: TcpProxy, _: RunningServer) -> None:
    """The same for every connection that is open: a firewall has forgotten them. New ones work."""
    for connection in list(proxy.connections):
        await connection.blackhole()


async def by_timeout(_: RedisServer, __: TcpProxy, server: RunningServer) -> None:
    """The kernel gives up on it: ETIMEDOUT, which since Python 3.11 is the very error of a timeout."""
    store = server.engine.store
    assert isinstance(store, RedisStore)
    connection = store._bus._connection
    assert connection is not None
    assert connection._reader is not None
    connection._reader.set_exception(OSError(errno.ETIMEDOUT, "Connection timed out"))


async def by_kernel(redis: RedisServer, proxy: TcpProxy, _: RunningServer) -> None:
    """Redis itself drops it."""
    await redis.command("CLIENT", "KILL", "TYPE", "PUBSUB")


@pytest.mark.parametrize("breaks", [by_reset, by_kernel, by_timeout, by_silence, by_silence_of_all])
async def test_a_bus_that_dies_is_replaced_and_nothing_is_missed(
    redis: RedisServer, model: Model, breaks: Callable[[RedisServer, TcpProxy, RunningServer], Awaitable[None]]
) -> None:
    """The instance is deaf for some seconds at most, its loop turns all the while, and then it has everything."""
    async with TcpProxy("127.0.0.1", redis.port) as proxy:
        async with instances(model, redis.url, f"redis://127.0.0.1:{proxy.port}/0") as (runs, reads):
            async with streaming(model, runs, reads) as (near, far, turn):
                await breaks(redis, proxy, reads)
                async with unhurt_loop(), asyncio.timeout(DEAF_S):
                    text = "one "
                    for number in range(20):
                        turn.say(f"{number} ")
                        text += f"{number} "
                        await asyncio.sleep(0.01)
                    await says(far, text)
                turn.end("end")
                await says(far, text + "end")
                assert (await done(far))["status"] == "completed"
                assert len(str(await redis.command("CLIENT", "LIST", "TYPE", "PUBSUB")).split("\n")) >= 2
            async with attached(reads, near.session_id) as late:
                await says(late, text + "end")


PLAIN = """
import asyncio, errno, os, sys, threading
from redis.asyncio import Redis

async def drain(bus):
    async for message in bus.listen():
        pass

async def main():
    turns = 0
    async with Redis(port=int(sys.argv[1])) as redis, redis.pubsub() as bus:
        await bus.subscribe("news")
        listening = asyncio.create_task(drain(bus))
        await asyncio.sleep(0.05)
        bus.connection._reader.set_exception(OSError(errno.ETIMEDOUT, "Connection timed out"))
        threading.Timer(0.5, lambda: (print(turns), sys.stdout.flush(), os._exit(0))).start()
        while True:
            await asyncio.sleep(0.01)
            turns += 1

asyncio.run(main())
"""


async def test_control_redis_pys_own_subscriber_freezes_the_loop(redis: RedisServer) -> None:
    """What it does after ETIMEDOUT: it spins without giving way, so that nothing else has a turn any more."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PLAIN, str(redis.port)), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert int(output) < 5, "of about 50 turns"


async def test_sessions_that_rest_are_read_again_too(redis: RedisServer, model: Model) -> None:
    """What happened to a session in which nothing runs, while its instance was deaf, is told as soon as it hears."""
    async with TcpProxy("127.0.0.1", redis.port) as proxy:
        async with instances(model, redis.url, f"redis://127.0.0.1:{proxy.port}/0") as (one, two):
            async with attached(one) as writer, attached(two, writer.session_id) as reader:
                bus = await bus_of(redis, proxy)
                await proxy.blackhole()
                await bus.reset()
                await writer.send("conversation.item.create", item={"role": "user", "content": "hello"})
                await settled(writer)
                async with asyncio.timeout(DEAF_S), attached(one, writer.session_id) as third:
                    await proxy.resume()
                    joined = await reader.until("participant.joined")
                    assert joined["participant"]["connection_id"] == third.first["connection_id"]
                    while not reader.transcript.items:
                        await reader.receive()


# ----------------------------------------------------------------------------------------------- watch, then read


async def ending_soon(store: RedisStore, session_id: str, chance: random.Random) -> None:
    """Append an item and the session's end, at a random moment."""
    await asyncio.sleep(chance.random() * 0.05)
    await store.append(session_id, [Write("session", [SessionClosed(reason="end")])])


class Ended(Ears):
    """Knows when a session has been seen to end."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = asyncio.Event()

    def changed(self, live: LiveSession) -> None:
        """Something happened to the session."""
        if live.state.closed:
            self.ended.set()


async def sees_the_end(store: RedisStore, session_id: str, chance: random.Random) -> bool:
    """Join at a random moment, as an instance does; returns whether the end was told."""
    await asyncio.sleep(chance.random() * 0.05)
    ears = Ended()
    live = LiveSession(session_id, store, ears)
    await live.open()
    try:
        async with asyncio.timeout(PATIENCE_S):
            await ears.ended.wait()
    except TimeoutError:
        return False
    finally:
        live.close()
    await ears.settled()
    return live.state.position == 1


async def sees_the_end_naively(store: RedisStore, session_id: str, chance: random.Random, over: asyncio.Event) -> bool:
    """The same in the wrong order: what there is, and then what comes."""
    await asyncio.sleep(chance.random() * 0.05)
    heard: list[Notice] = []
    read = await store.read(session_id, "session", 0, 1000)
    unwatch = await store.watch(session_id, heard.append)
    await over.wait()
    unwatch()
    return bool(read) or any(isinstance(notice, Appended) for notice in heard)


@asynccontextmanager
async def two_stores(redis: RedisServer) -> AsyncIterator[tuple[RedisStore, RedisStore]]:
    """Two instances' ways to one Redis."""
    with patient_calls():
        async with RedisStore(redis.url) as one, RedisStore(redis.url) as two:
            yield one, two


async def some_sessions(store: RedisStore, numbers: Iterator[int], count: int) -> list[str]:
    """New sessions."""
    ids = [f"sess_{next(numbers)}" for _ in range(count)]
    template = Session(
        id="",
        owner="anonymous",
        created_at=timestamp(),
        expires_at="",
        instructions="",
        model="default",
        max_output_tokens=100,
        on_disconnect="cancel",
        disconnect_grace_ms=0,
        multitask_strategy="reject",
    )
    await asyncio.gather(*(store.create(replace(template, id=session_id)) for session_id in ids))
    return ids


async def test_of_many_who_join_at_any_moment_nobody_misses_the_end(redis: RedisServer) -> None:
    """Watch, then read, then go on by position, each against an end that comes from elsewhere meanwhile."""
    chance, numbers = random.Random(3), iter(range(JOINS))
    async with two_stores(redis) as (writer, reader):
        for _ in range(JOINS // TOGETHER):
            ids = await some_sessions(writer, numbers, TOGETHER)
            ends = asyncio.gather(*(ending_soon(writer, session_id, chance) for session_id in ids))
            seen = await asyncio.gather(*(sees_the_end(reader, session_id, chance) for session_id in ids))
            await ends
            assert all(seen), f"{seen.count(False)} of {TOGETHER} miss the end"


async def test_control_of_many_who_read_and_then_watch_some_miss_the_end(redis: RedisServer) -> None:
    """The order that comes to mind first loses what happens between the two."""
    chance, numbers, over = random.Random(3), iter(range(NAIVE_JOINS)), asyncio.Event()
    seen: list[bool] = []
    async with two_stores(redis) as (writer, reader):
        for _ in range(NAIVE_JOINS // TOGETHER):
            over.clear()
            ids = await some_sessions(writer, numbers, TOGETHER)
            joins = asyncio.gather(*(sees_the_end_naively(reader, session_id, chance, over) for session_id in ids))
            await asyncio.gather(*(ending_soon(writer, session_id, chance) for session_id in ids))
            for session_id in ids[:3]:  # each a round trip later: all is heard that ever will be
                await reader.load(session_id)
            over.set()
            seen += await joins
    assert not all(seen)


# ---------------------------------------------------------------------------------------------- Redis dies, or hangs


async def test_redis_is_killed_and_restarted_and_nothing_is_missed(model: Model) -> None:
    """With its data kept: who is where it runs sees every token at once, the others when it is back."""
    async with redis_server(append_only=True) as redis:
        async with instances(model, redis.url, redis.url) as servers:
            async with streaming(model, *servers) as (near, far, turn):
                text = "one "
                for outage in range(2):
                    await redis.kill()
                    for number in range(10):
                        piece = f"{outage}.{number} "
                        turn.say(piece)
                        text += piece
                        await says(near, text)
                    await redis.start()
                    async with asyncio.timeout(BACK_S + SLACK_S):
                        await says(far, text)
                turn.end("end")
                for client in (near, far):
                    assert (await done(client))["status"] == "completed"
                    assert client.transcript.texts["r"] == text + "end"
            async with attached(servers[1], near.session_id) as late:
                await says(late, text + "end")


async def test_what_ends_while_redis_is_away_is_told_once_it_is_stored(model: Model) -> None:
    """Nobody hears of an end that is not in the log; when it can be written it is, once."""
    async with redis_server(append_only=True) as redis:
        async with instances(model, redis.url, redis.url) as servers:
            async with streaming(model, *servers) as (near, far, turn):
                await redis.kill()
                turn.end("two")
                await says(near, "one two")
                await turn.closed.wait()
                await near.send("ping")
                await near.until("pong")
                assert not near.transcript.done
                await redis.start()
                for client in (near, far):
                    assert (await done(client))["status"] == "completed"
                    assert client.transcript.texts["r"] == "one two"


async def test_redis_comes_back_empty_and_everything_is_told_to_be_lost(redis: RedisServer, model: Model) -> None:
    """Sessions with a response and without one, at both instances: connections end with 4404 and `store_lost`."""
    async with instances(model, redis.url, redis.url) as servers:
        async with streaming(model, *servers) as (near, far, turn), attached(servers[0]) as idle:
            await redis.wipe()
            turn.say("two ")
            async with asyncio.timeout(PATIENCE_S):
                await turn.closed.wait()
            for client in (near, far, idle):
                async with asyncio.timeout(PATIENCE_S):
                    assert await client.until_closed() == 4404
                error = client.transcript.events[-1]["error"]
                assert (error["code"], error["fatal"]) == ("store_lost", True)
                assert not client.transcript.done or client.transcript.done["r"]["error"]["code"] == "store_lost"
        async with attached(servers[0]) as fresh:
            assert fresh.session_id
            await fresh.send("response.create", input="go", response_id="r")
            (await model.turn()).end("works")
            assert (await done(fresh))["status"] == "completed"


async def refused_in_time(client: Client) -> None:
    """A command fails soon, and says that it may be sent again."""
    started = time.monotonic()
    await client.send("session.update", session={}, event_id="late")
    error = (await client.until("error"))["error"]
    assert time.monotonic() - started < REFUSES_S + SLACK_S
    assert (error["type"], error["event_id"], error["fatal"]) == ("store_error", "late", False)
    assert error["retry_after_ms"] > 0


async def shows_that_the_store_is_away(server: RunningServer, session_id: str) -> None:
    """The instance is alive and not ready, and says soon of a session that it can't tell."""
    async with get(server) as http:
        started = time.monotonic()
        paths = ("/healthz", "/readyz", f"/v1/sessions/{session_id}")
        alive, ready, shown = await asyncio.gather(*map(http.get, paths))
        assert time.monotonic() - started < REFUSES_S + SLACK_S
        assert (alive.status_code, ready.status_code, shown.status_code) == (200, 503, 503)
        assert shown.json()["error"]["type"] == "store_error"


async def test_redis_hangs_for_longer_than_the_lease(redis: RedisServer, model: Model) -> None:
    """Local viewers read on, commands fail soon and may be retried, nothing is declared lost, all ends well."""
    async with instances(model, redis.url, redis.url, lease_s=LEASE_S) as servers:
        async with streaming(model, *servers) as (near, far, turn):
            await asyncio.sleep(1.5 * LEASE_S)  # so that a missing lease would count
            redis.pause()
            paused_at = time.monotonic()
            shows = asyncio.create_task(shows_that_the_store_is_away(servers[1], near.session_id))
            refused = asyncio.create_task(refused_in_time(far))
            text = "one "
            while time.monotonic() < paused_at + 2.5 * LEASE_S:
                said_at = time.monotonic()
                turn.say("more ")
                text += "more "
                await says(near, text)
                assert time.monotonic() - said_at < SLACK_S
                await asyncio.sleep(0.05)
            await asyncio.gather(shows, refused)
            redis.resume()
            async with asyncio.timeout(BACK_S + SLACK_S):
                await says(far, text)
            await asyncio.sleep(1.5 * LEASE_S)  # whoever were to be declared lost would be by now
            turn.end("end")
            for client in (near, far):
                assert (await done(client))["status"] == "completed"
                assert client.transcript.texts["r"] == text + "end"
                gone = [event for event in client.transcript.events if event["type"] == "participant.left"]
                assert gone == []
            async with get(servers[1]) as http:
                assert (await http.get("/readyz")).status_code == 200


async def test_redis_is_out_of_memory(redis: RedisServer, model: Model) -> None:
    """Tokens go on, an end that can't be stored is told to nobody, commands may be retried; with memory all is well."""
    async with instances(model, redis.url, redis.url, lease_s=LEASE_S) as servers:
        async with streaming(model, *servers) as (near, far, turn):
            await asyncio.sleep(1.5 * LEASE_S)  # so that a missing lease would count
            await redis.command("CONFIG", "SET", "maxmemory", "1")
            with pytest.raises(OutOfMemoryError):  # the plain way: what is stored fails, what is announced works
                await redis.command("SET", "answer", "done")
            assert await redis.command("PUBLISH", "news", "done") == 0
            turn.end("two ")
            await says(near, "one two ")
            for client in (near, far):
                await client.send("session.update", session={}, event_id="again")
                error = (await client.until("error"))["error"]
                assert error["type"] == "store_error"
                assert error["retry_after_ms"] > 0
            await asyncio.sleep(1.5 * LEASE_S)  # whoever were to be declared lost would be by now
            assert not near.transcript.done
            assert not far.transcript.done
            await redis.command("CONFIG", "SET", "maxmemory", "0")
            for client in (near, far):
                assert (await done(client))["status"] == "completed"
                assert client.transcript.texts["r"] == "one two "
            await near.send("session.update", session={}, event_id="again")
            await far.until("session.updated", for_event_id="again")


async def test_a_store_ends_at_whatever_moment_it_is_told_to(redis: RedisServer) -> None:
    """Also while it connects, when a library that it uses may lose a cancellation."""
    for turns in range(60):
        async with asyncio.timeout(PATIENCE_S), RedisStore(redis.url):
            for _ in range(turns):
                await asyncio.sleep(0)


async def test_a_session_that_is_found_gone_while_somebody_begins_to_watch_it(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who began is told that it is gone, at once, and not left waiting."""
    async with RedisStore(redis.url) as store:
        send, heard = store._bus._send, list[Notice]()

        async def find_out_and_send(command: str, topic: str) -> None:
            monkeypatch.undo()
            with pytest.raises(NotFound):
                await store.load("sess_unknown")
            await send(command, topic)

        monkeypatch.setattr(store._bus, "_send", find_out_and_send)
        async with asyncio.timeout(REFUSES_S / 2):
            await store.watch("sess_unknown", heard.append)
        assert heard == [Gone("lost")]


# ------------------------------------------------------------------------------------------------- how it is set up


@pytest.mark.parametrize(("policy", "warned"), [("noeviction", False), ("allkeys-lru", True), ("volatile-ttl", True)])
async def test_a_policy_that_evicts_is_warned_of(monkeypatch: pytest.MonkeyPatch, policy: str, *, warned: bool) -> None:
    """Once, at the start: a Redis that throws away what it has would lose sessions in silence."""
    warnings: list[str] = []
    monkeypatch.setattr(logs, "warning", lambda event, **_: warnings.append(event))
    async with redis_server(maxmemory_policy=policy) as redis, running_server(echo, redis_url=redis.url) as server:
        async with attached(server) as client:
            assert await client.answer("hello") == "hello"
    assert ["noeviction" in warning for warning in warnings] == [True] * warned


async def test_an_instance_that_is_there_before_redis(model: Model) -> None:
    """It comes up, is alive and not ready, refuses what needs the store, and works once Redis does."""
    async with redis_server(port=free_port()) as redis:
        await redis.kill()
        async with instances(model, redis.url, redis.url) as servers, get(servers[0]) as http:
            assert (await http.get("/healthz")).status_code == 200
            refusal = await http.get("/readyz")
            assert (refusal.status_code, refusal.json()["error"]["type"]) == (503, "store_error")
            with pytest.raises(AssertionError):
                async with attached(servers[0]):
                    pass
            assert (await http.post("/v1/sessions")).status_code == 503
            await redis.start()
            async with asyncio.timeout(BACK_S):
                while (await http.get("/readyz")).status_code != 200:  # noqa: ASYNC110  # nothing tells of it
                    await asyncio.sleep(0.01)
            async with streaming(model, *servers) as (near, far, turn):
                turn.end("two")
                for client in (near, far):
                    assert (await done(client))["status"] == "completed"


async def test_scripts_that_redis_has_forgotten_are_told_again(redis: RedisServer, model: Model) -> None:
    """In the middle of a response, more than once."""
    async with instances(model, redis.url, redis.url) as servers:
        async with streaming(model, *servers) as (near, far, turn):
            text = "one "
            for number in range(3):
                await redis.command("SCRIPT", "FLUSH", "SYNC")
                turn.say(f"{number} ")
                text += f"{number} "
                await says(far, text)
            await redis.command("SCRIPT", "FLUSH", "SYNC")
            turn.end()
            for client in (near, far):
                assert (await done(client))["status"] == "completed"


@pytest.mark.parametrize("login", ["password", "user"])
async def test_a_redis_that_asks_who_is_there(model: Model, login: str) -> None:
    """With a password, or as a user who may do no more than is needed."""
    async with redis_server(password="s/e:c@ret") as redis:
        url = redis.url
        if login == "user":
            rights = ("~rt:*", "resetchannels", "&rt:*", "+@all", "-@dangerous", "-@admin")
            await redis.command("ACL", "SETUSER", "app", "on", ">p@ss", *rights)
            url = f"redis://app:p%40ss@127.0.0.1:{redis.port}/0"
        async with instances(model, url, url) as servers, streaming(model, *servers) as (near, far, turn):
            turn.end("two")
            for client in (near, far):
                assert (await done(client))["status"] == "completed"


# --------------------------------------------------------------------------------------- connections, and who gets what


class Marks:
    """A responder that says the marker of its session again and again, slowly."""

    async def __call__(self, request: Request) -> AsyncIterator[ResponderEvent]:
        """Answer."""
        marker = request.messages[0].content
        for _ in range(20):
            yield f"{marker} "
            await asyncio.sleep(0.002)


async def connections(redis: RedisServer, kind: str) -> int:
    """How many connections of a kind Redis has, this test's own left out."""
    return sum(
        f"cmd={'client'}" not in line for line in str(await redis.command("CLIENT", "LIST", "TYPE", kind)).splitlines()
    )


async def test_connections_to_redis_do_not_grow_with_the_sessions(redis: RedisServer) -> None:
    """One subscriber for a process, and a few for commands, while many sessions are read and written at both."""
    async with instances(Marks(), redis.url, redis.url) as servers, AsyncExitStack() as stack:
        for number in range(MARKED):
            near = await stack.enter_async_context(attached(servers[number % 2]))
            await stack.enter_async_context(attached(servers[1 - number % 2], near.session_id))
            await near.send("response.create", input=f"m{number}")
        assert sum(server.busy_sessions for server in servers) == 2 * MARKED
        assert await connections(redis, "pubsub") == 2
        of_one = 4 * (LANES + 3)  # the store's, and those of rates, of the ledger and of revocations
        assert await connections(redis, "normal") <= 2 * of_one
        topics = await redis.command("PUBSUB", "CHANNELS")
        assert len(topics) > MARKED


async def hang_up_somewhere(servers: list[RunningServer], session_id: str, marker: str, chance: random.Random) -> None:
    """Attach anywhere, leave at a random moment, mostly while the store is read; see only what is the session's."""
    server = chance.choice(servers)
    try:
        async with asyncio.timeout(chance.random() * 0.06), attached(server, session_id) as client:
            with contextlib.suppress(ConnectionClosed):
                while True:
                    only_own(await client.receive(), session_id, marker)
    except TimeoutError:
        return


def only_own(event: dict[str, Any], session_id: str, marker: str) -> None:
    """Nothing in an event comes from another session."""
    if "session" in event:
        assert event["session"]["id"] == session_id
    if "item" in event:
        assert event["item"]["content"] == marker
    if "delta" in event:
        assert set(event["delta"].split()) == {marker}, event


async def test_clients_that_hang_up_while_the_store_is_read_get_nobody_elses_data(redis: RedisServer) -> None:
    """Many sessions, each with its own words, over a slow way to Redis: replies stay with whom they are for, and a
    client that goes costs no connection to Redis."""
    chance = random.Random(17)
    async with TcpProxy("127.0.0.1", redis.port) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}/0"
        async with instances(Marks(), url, url, on_disconnect="continue") as servers:
            markers: dict[str, str] = {}
            for number in range(MARKED):
                async with attached(servers[number % 2]) as client:
                    markers[client.session_id] = f"mark-{number}"
                    await client.respond(f"mark-{number}", response_id="r")
            await proxy.delay(0.004)
            before = (await redis.command("INFO", "stats"))["total_connections_received"]
            for _ in range(CANARY_ROUNDS):
                leavers = [hang_up_somewhere(servers, one, mark, chance) for one, mark in markers.items()]
                await asyncio.gather(*leavers)
            after = (await redis.command("INFO", "stats"))["total_connections_received"]
            await proxy.resume()
            assert after - before < MARKED, f"{after - before} connections for {MARKED * CANARY_ROUNDS} clients"
            for session_id, marker in markers.items():
                async with attached(chance.choice(servers), session_id, transcript=Transcript()) as client:
                    assert (await done(client))["status"] == "completed"
                    assert client.transcript.texts["r"] == f"{marker} " * 20
