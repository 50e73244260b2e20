"""Redis behind TLS, for a user that may do only what the operations page says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError
from structlog.testing import capture_logs

from realtime.errors import StoreError
from realtime.responders.base import Request, ResponderEvent
from realtime.store.base import Appended, CommandRecord, Notice, Write
from realtime.store.redis import KEPT_COMMANDS, RedisStore
from tests.contract import item, session
from tests.support import sample_tasks
from tests.support.client import attached
from tests.support.event_stream import http_client
from tests.support.redis_access import PASSWORD, USER, Certificate, documented_lines, nothing_was_denied, restrict
from tests.support.redis_server import RedisServer, redis_cluster, redis_server
from tests.support.server import running_server
from tests.support.worker import worker

PATIENCE_S = 30.0
SESSION = "sess_1"
HELLO = [Write("session", [item("hi")])]


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    """What the Redis of a test shows."""
    return Certificate(tmp_path)


@pytest.fixture
async def redis(certificate: Certificate) -> AsyncIterator[RedisServer]:
    """The Redis of a test; its own client comes without TLS, as the default user."""
    async with redis_server(**certificate.options) as server:
        await restrict(server)
        yield server


async def say_hello(store: RedisStore) -> None:
    """See that a store writes, reads, and hears what another has written."""
    notices: list[Notice] = []
    await store.create(session(SESSION))
    await store.watch(SESSION, notices.append)
    await store.append(SESSION, HELLO)
    assert await store.read(SESSION, "session", 0, 1000) == HELLO[0].entries
    assert notices == [Appended("session", 1, HELLO[0].entries)]


async def hello(request: Request) -> AsyncIterator[ResponderEvent]:
    """Answers."""
    yield "Hello."


# --- TLS -------------------------------------------------------------------------------------------------------------


async def test_a_store_speaks_tls_with_the_authority_that_its_url_names(
    redis: RedisServer, certificate: Certificate
) -> None:
    """What is published comes over TLS, too."""
    async with RedisStore(certificate.url()) as store:
        await say_hello(store)
    await nothing_was_denied(redis)


async def test_all_connections_share_what_tls_needs(redis: RedisServer, certificate: Certificate) -> None:
    """To read the authorities' certificates holds up the loop: that is done once, and not on it."""
    async with RedisStore(certificate.url()) as store:
        await asyncio.gather(say_hello(store), *(store.ping() for _ in range(5)))
        pool = store._calls._client.connection_pool  # type: ignore[union-attr]
        contexts = {id(pool.make_connection().ssl_context) for _ in range(3)}
        assert contexts == {id(store._bus._connection.ssl_context)}  # type: ignore[union-attr]


@pytest.mark.parametrize("trust", ["", "/nowhere"])
async def test_a_certificate_of_an_unknown_authority_is_refused(
    redis: RedisServer, certificate: Certificate, trust: str
) -> None:
    """Nothing is told to a Redis that may be another one; the log says why."""
    url = certificate.url().partition("?")[0] + (f"?ssl_ca_certs={trust}" if trust else "")
    with capture_logs() as records:
        async with RedisStore(url) as store:
            with pytest.raises(StoreError):
                await store.create(session(SESSION))
    assert "redis does not answer" in [record["event"] for record in records]
    assert await redis.command("DBSIZE") == 0


async def test_a_wrong_password_is_an_outage(redis: RedisServer, certificate: Certificate) -> None:
    """Which the log calls by its name."""
    with capture_logs() as records:
        async with RedisStore(certificate.url(f"{USER}:wrong@")) as store:
            with pytest.raises(StoreError):
                await store.create(session(SESSION))
    assert {"event": "redis does not answer", "error": "AuthenticationError", "log_level": "warning"} in records


# --- the user --------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
async def test_servers_and_workers_need_no_more_than_the_page_says(
    redis: RedisServer, certificate: Certificate
) -> None:
    """A conversation with tasks, a worker that hands back what it runs, another that takes it, and an erase."""
    chosen: dict[str, Any] = {"redis_url": certificate.url(), "lease_s": 1.0}
    tasks = sample_tasks.MODULE
    async with running_server(hello, **chosen, tasks=(tasks,)) as server, http_client(base_url=server.url) as http:
        async with worker(**chosen, tasks=tasks, drain_s=0.5) as first, attached(server) as client:
            await client.send("task.create", name="sleep", input={"seconds": 3.0})
            await client.until("task.progress")
            first.terminate()
            async with worker(**chosen, tasks=tasks), asyncio.timeout(PATIENCE_S):
                await client.until("task.done", status="complete")
                assert await client.answer() == "Hello."
        assert (await http.delete(f"/v1/sessions/{client.session_id}")).status_code == 204
    await nothing_was_denied(redis)


async def test_the_user_may_forget_the_oldest_commands(redis: RedisServer, certificate: Certificate) -> None:
    """Which happens only once a session has had more of them than are kept."""
    async with RedisStore(certificate.url()) as store:
        await store.create(session(SESSION))
        for start in range(0, KEPT_COMMANDS + 1, 100):
            records = [CommandRecord("ann", f"e{number}", b"") for number in range(start, start + 100)]
            await asyncio.gather(*(store.append(SESSION, [], record) for record in records))
        assert await store.find_command(SESSION, "ann", "e0") is None
    await nothing_was_denied(redis)


@pytest.mark.parametrize(
    "command",
    ["KEYS *", "FLUSHALL", "CONFIG GET *", "ACL WHOAMI", "MONITOR", "GET other", "SET saq:other x", "PUBLISH other x"],
)
async def test_the_user_may_do_nothing_else(redis: RedisServer, certificate: Certificate, command: str) -> None:
    """Not look for keys, not empty it, not change it, and not touch what is others'."""
    async with RedisStore(certificate.url()) as store:
        [reply] = await store._calls.call_all([command.split()])
    assert isinstance(reply, NoPermissionError | RedisConnectionError)


async def test_without_info_a_store_works_all_the_same(redis: RedisServer, certificate: Certificate) -> None:
    """It is only not warned of a wrong setting."""
    await redis.command("ACL", "SETUSER", USER, "-info")
    async with RedisStore(certificate.url()) as store:
        await say_hello(store)


async def test_without_info_a_cluster_is_known_for_what_it_is() -> None:
    """By what a cluster's client needs anyway."""
    async with redis_cluster() as cluster:
        for node in cluster.nodes:
            await restrict(node, cluster=True)
            await node.command("ACL", "SETUSER", USER, "-info")
        async with RedisStore(f"redis://{USER}:{PASSWORD}@127.0.0.1:{cluster.ports[0]}") as store:
            for number in range(10):
                await store.create(session(f"sess_{number}"))
        assert all([await node.command("DBSIZE") for node in cluster.nodes])


def test_the_page_s_line_is_for_one_name() -> None:
    """Both lines are about the same user, and nothing in them allows everything."""
    for line in documented_lines():
        assert line[:3] == ["ACL", "SETUSER", USER]
        assert not {"allkeys", "allchannels", "allcommands", "+@all", "~*", "&*", "nopass"} & set(line)
