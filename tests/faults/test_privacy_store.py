"""What Redis keeps of what was said: with sealing nothing that can be read, and after an erase nothing at all."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import httpx
import pytest
from redis.asyncio import Redis

from realtime.responders.base import Request, ResponderEvent
from realtime.store.base import CommandRecord, Viewer, Write
from realtime.store.redis import RedisStore
from realtime.store.sealing import AesGcm, parse_seal_keys
from tests.contract import item, participant, session
from tests.support import sample_tasks
from tests.support.client import attached
from tests.support.redis_server import RedisServer, redis_server
from tests.support.server import RunningServer, running_server
from tests.support.worker import worker

KEYS = ("k2:" + base64.b64encode(b"n" * 32).decode(), "k1:" + base64.b64encode(b"o" * 32).decode())
LEASE_S = 1.0
PATIENCE_S = 30.0
POLL_S = 0.05
CANARIES = [
    f"canary-{what}"
    for what in ("instructions", "item", "answer", "metadata", "event", "task-event", "task", "user", "named-event")
]
RESULT = "CANARY-TASK"
ALONE = "canary-alone"
"""What a task is given that has no session."""


@pytest.fixture
async def redis() -> AsyncIterator[RedisServer]:
    """A Redis that writes all it knows to its disk, uncompressed."""
    async with redis_server(
        append_only=True, appendfsync="always", save="3600 1000000", rdbcompression="no", aof_use_rdb_preamble="no"
    ) as server:
        yield server


async def answering(request: Request) -> AsyncIterator[ResponderEvent]:
    """Answers in three pieces; a request that says "wait" for ever."""
    yield "canary-answer"
    await asyncio.sleep(0.1)
    yield " goes on"
    if request.messages[-1].content == "wait":
        await asyncio.Event().wait()
    yield "."


@asynccontextmanager
async def site(redis: RedisServer, **settings: object) -> AsyncIterator[list[RunningServer]]:
    """Two servers and a worker."""
    chosen = {"redis_url": redis.url, "lease_s": LEASE_S, **settings}
    texts = {name: ",".join(value) if isinstance(value, tuple) else value for name, value in chosen.items()}
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(worker(**texts, tasks=sample_tasks.MODULE))
        servers = [running_server(answering, **chosen, tasks=(sample_tasks.MODULE,)) for _ in range(2)]
        yield [await stack.enter_async_context(server) for server in servers]


async def asked(method: str, url: str, **options: object) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE_S) as client:
        return await client.request(method, url, **options)  # type: ignore[arg-type]


# --- what can be read ------------------------------------------------------------------------------------------------


@asynccontextmanager
async def overheard(redis: RedisServer, command: str) -> AsyncIterator[bytearray]:
    """All that Redis says after a command, as it comes."""
    heard = bytearray()
    reader, writer = await asyncio.open_connection("127.0.0.1", redis.port)
    writer.write(command.encode() + b"\r\n")
    heard += await reader.read(1)

    async def listen() -> None:
        while some := await reader.read(65_536):
            heard.extend(some)

    listening = asyncio.create_task(listen())
    try:
        yield heard
    finally:
        listening.cancel()
        await asyncio.wait([listening])
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def dumped(redis: RedisServer) -> dict[bytes, bytes]:
    """Every key, and what it holds, as Redis itself would carry it elsewhere."""
    async with Redis(port=redis.port) as client:
        keys = [key async for key in client.scan_iter(count=1000)]
        dumps = [await client.dump(key) for key in keys]
    return {key: dump for key, dump in zip(keys, dumps, strict=True) if dump is not None}


async def traces(redis: RedisServer, heard: dict[str, bytearray]) -> dict[str, bytes]:
    """All that Redis holds, has written down, and was told, by where it is."""
    await redis.command("SAVE")
    keys = await dumped(redis)
    files = {path.name: path.read_bytes() for path in Path(redis._folder).rglob("*") if path.is_file()}
    aof = [name for name in files if ".aof" in name]
    assert "dump.rdb" in files
    return {
        "dump": b"\n".join([*keys, *keys.values()]),
        "rdb": files["dump.rdb"],
        "aof": b"\n".join(files[name] for name in aof),
        **{where: bytes(what) for where, what in heard.items()},
    }


def hits(text: bytes, words: Iterable[str]) -> set[str]:
    """The words that stand in it."""
    return {word for word in words if word.encode() in text}


async def talk(one: RunningServer, two: RunningServer) -> None:
    """A conversation over two instances with everything in it that somebody might say."""
    async with attached(one) as client, attached(two, client.session_id) as other:
        await client.send("session.update", session={"instructions": "canary-instructions"}, event_id="canary-event")
        await client.until("session.updated")
        metadata = {"about": "canary-metadata"}
        assert "canary-answer" in await client.answer("canary-item", metadata=metadata)
        await other.send("task.create", name="echo", input={"text": "canary-task"}, event_id="canary-task-event")
        done = await client.until("task.done")
        assert done["result"] == RESULT
    made = await asked("POST", f"{one.url}/v1/tasks/echo", json={"text": ALONE})
    async with asyncio.timeout(PATIENCE_S):
        path = f"{two.url}/v1/tasks/{made.json()['task_id']}"
        while (await asked("GET", path)).json()["status"] != "complete":  # noqa: ASYNC110  # as below
            await asyncio.sleep(POLL_S)


async def named(redis: RedisServer, keys: tuple[str, ...]) -> None:
    """What a user does that has a name."""
    sealer = AesGcm(parse_seal_keys(keys)) if keys else None
    async with RedisStore(redis.url, sealer=sealer) as store:
        await store.create(session("sess_named", owner="canary-user"))
        record = CommandRecord("canary-user", "canary-named-event", b"digest")
        await store.append("sess_named", [Write("session", [item("hi")])], record)
        for connection_id in ("conn_1", "conn_2"):
            await store.join("sess_named", Viewer(participant(connection_id, "canary-user"), "inst_1"))
        await store.leave("sess_named", "conn_2", 0.0)
        assert await store.find_command("sess_named", "canary-user", "canary-named-event") == record


async def all_traces(redis: RedisServer, keys: tuple[str, ...]) -> dict[str, bytes]:
    """What is left in Redis of a conversation, and what went by."""
    async with overheard(redis, "MONITOR") as told, overheard(redis, "PSUBSCRIBE *") as published:
        async with site(redis, seal_keys=keys) as (one, two):
            await talk(one, two)
            await named(redis, keys)
            return await traces(redis, {"told": told, "published": published})


async def test_with_sealing_nothing_that_was_said_can_be_read_in_redis(redis: RedisServer) -> None:
    """Not in any key, not in its files, not in what it is told, and not in what it publishes."""
    found = await all_traces(redis, KEYS)
    assert all(len(text) > 1000 for text in found.values()), "there was something to look at"
    assert not {where: said for where, text in found.items() if (said := hits(text, [*CANARIES, RESULT, ALONE]))}
    assert all(hits(text, ["k2"]) for text in found.values()), "it is sealed with the first key"


async def test_without_sealing_all_of_it_can_be_read_in_redis(redis: RedisServer) -> None:
    """The control: what the other test looks for is found here, wherever it looks."""
    found = await all_traces(redis, ())
    for where in ("dump", "rdb", "aof", "told"):
        assert hits(found[where], CANARIES) == set(CANARIES), where
        assert hits(found[where], [RESULT, ALONE]) == {RESULT, ALONE}, where
    not_published = {"canary-named-event"}  # whoever looks has no use for it
    assert hits(found["published"], CANARIES) == set(CANARIES) - not_published


async def test_the_queue_holds_ids_and_names_alone(redis: RedisServer) -> None:
    """Also without sealing: neither what tasks are given nor what comes of them goes through it."""
    async with overheard(redis, "MONITOR") as told, site(redis) as (one, two):
        await talk(one, two)
    lines = [line for line in bytes(told).split(b"\n") if b"saq:" in line]
    assert lines
    assert hits(b"\n".join(lines), [*CANARIES, RESULT, ALONE]) == set()


# --- erasing ---------------------------------------------------------------------------------------------------------


async def mentions(redis: RedisServer, session_id: str) -> set[bytes]:
    """The keys in whose name or content a session's id stands."""
    found = await dumped(redis)
    return {key for key, dump in found.items() if session_id.encode() in key + dump}


async def unmentioned(redis: RedisServer, session_id: str) -> None:
    """Return once a session's id stands nowhere."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while await mentions(redis, session_id):  # noqa: ASYNC110  # nothing tells of it
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise AssertionError(f"left: {await mentions(redis, session_id)}") from None


@pytest.mark.parametrize("keys", [(), KEYS], ids=["clear", "sealed"])
async def test_an_erased_session_leaves_nothing_though_it_was_at_work(
    redis: RedisServer, keys: tuple[str, ...]
) -> None:
    """Its keys are gone at once; the index of tasks and the queue are rid of it once its work has been stopped; and
    whatever still ran had its last word before that, or writes nothing any more."""
    async with site(redis, seal_keys=keys) as (one, two):
        async with attached(one) as client, attached(two, client.session_id) as other:
            session_id = client.session_id
            await client.respond("wait")
            await client.send("task.create", name="sleep", input={"seconds": 60.0})
            await other.until("task.progress")
            assert len(await mentions(redis, session_id)) > 6
            answer = await asked("DELETE", f"{two.url}/v1/sessions/{session_id}")
            assert answer.status_code == 204
            assert not [key for key in await mentions(redis, session_id) if key.startswith(b"rt:{")]
            assert await client.until_closed() == await other.until_closed() == 4410
        await unmentioned(redis, session_id)
        await one.engine.finish_turns()
    assert await mentions(redis, session_id) == set(), "nor when everything has ended"
