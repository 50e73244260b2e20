"""What `/metrics` shows of a server at work, and whom."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator

import httpx
import pytest

from realtime.errors import UpstreamError
from realtime.observe.delivery import EVERY
from realtime.settings import Settings, SettingsError
from realtime.tasks.process import run
from tests.end_to_end import Model, echo
from tests.support.client import attached
from tests.support.figures import Figures, figures, until_shown
from tests.support.instance import instance
from tests.support.ports import free_port
from tests.support.redis_server import redis_server
from tests.support.server import RunningServer, running_server
from tests.support.tokens import SECRET, bearer
from tests.support.worker import site
from tests.test_workers import workers_of

DONE = "realtime_responses_total"


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
async def server(model: Model) -> AsyncIterator[RunningServer]:
    async with running_server(model) as server:
        yield server


async def test_an_answer_is_counted_on_its_way(server: RunningServer, model: Model) -> None:
    """From the model's first piece to the reader's socket, while it is there and when it is over."""
    before = await figures(server.url)
    async with attached(server) as client:
        response_id = await client.respond()
        turn = await model.turn()
        turn.say("Hel")
        await client.until("response.output_text.delta")
        during = await figures(server.url)
        turn.end("lo")
        await client.until("response.done", response_id=response_id)
        after = await figures(server.url)
    for gauge in ("realtime_sessions", "realtime_responses_running", "realtime_model_calls_running"):
        assert during.of(gauge) == before.of(gauge) + 1, gauge
    for gauge in ("realtime_responses_running", "realtime_model_calls_running"):
        assert after.of(gauge) == before.of(gauge), gauge
    assert during.of("realtime_connections", transport="websocket") == before.of("realtime_connections") + 1
    for name, more in {
        "realtime_connections_opened_total": 1,
        "realtime_sessions_created_total": 1,
        "realtime_model_calls_total": 1,
        "realtime_first_token_seconds_count": 1,
        "realtime_deltas_total": 2,
        "realtime_deltas_merged_total": 0,
    }.items():
        assert after.of(name) == before.of(name) + more, name
    assert after.of(DONE, status="completed", cause="") == before.of(DONE, status="completed", cause="") + 1
    assert after.of("realtime_journal_lag_seconds_count") > before.of("realtime_journal_lag_seconds_count")
    assert after.of("realtime_token_latency_seconds_count") <= before.of("realtime_token_latency_seconds_count") + 1


async def test_one_in_so_many_frames_has_its_latency_taken(server: RunningServer, model: Model) -> None:
    """From when a piece came to when it was written."""
    name, labels = "realtime_token_latency_seconds_count", {"transport": "websocket"}
    before = await figures(server.url)
    async with attached(server) as client:
        await client.respond()
        turn = await model.turn()
        for _ in range(EVERY):
            turn.say("a ")
            await client.until("response.output_text.delta")
        after = await figures(server.url)
        turn.end()
        await client.until("response.done")
    assert after.of(name, **labels) == before.of(name, **labels) + 1


async def test_what_was_cancelled_is_counted_by_its_cause(server: RunningServer, model: Model) -> None:
    """With the tokens that it might still have used."""
    before = await figures(server.url)
    async with attached(server) as client:
        response_id = await client.respond(max_output_tokens=1000)
        (await model.turn()).say("word " * 40)  # four bytes are a token
        await client.until("response.output_text.delta")
        await client.send("response.cancel", response_id=response_id)
        await client.until("response.done", response_id=response_id)
    after = await figures(server.url)
    labels = {"cause": "cancelled"}
    assert after.of(DONE, status="cancelled", **labels) == before.of(DONE, status="cancelled", **labels) + 1
    unused = "realtime_cancelled_unused_tokens_total"
    assert after.of(unused, **labels) == before.of(unused, **labels) + 1000 - 200 / 4


async def test_what_failed_is_counted_by_its_code(server: RunningServer, model: Model) -> None:
    """As the model's error, and as the response's."""
    before = await figures(server.url)
    async with attached(server) as client:
        await client.respond()
        (await model.turn()).fail(UpstreamError("upstream_overloaded", "It is overloaded."))
        await client.until("response.done")
    after = await figures(server.url)
    code = "upstream_overloaded"
    name = "realtime_upstream_errors_total"
    assert after.of(name, code=code) == before.of(name, code=code) + 1
    assert after.of(DONE, status="failed", cause=code) == before.of(DONE, status="failed", cause=code) + 1


async def test_where_tokens_are_checked_the_metrics_are_for_this_machine_and_admins() -> None:
    """Whoever comes through a proxy is asked for a token, whatever it says of them."""
    proxied = {"X-Forwarded-For": "192.0.2.7"}
    async with running_server(echo, auth_secret=SECRET) as server:
        async with httpx.AsyncClient(base_url=server.url, trust_env=False) as http:
            for headers, status in (
                ({}, 200),
                (proxied, 401),
                ({"X-Forwarded-For": "127.0.0.1"}, 401),
                ({"Via": "1.1 proxy"}, 401),
                ({"X-Real-IP": "127.0.0.1"}, 401),
                ({"X-Forwarded-Proto": "https"}, 401),
                ({"CF-Connecting-IP": "127.0.0.1"}, 401),
                ({"True-Client-IP": "127.0.0.1"}, 401),
                ({**proxied, **bearer("ops", scope="metrics")}, 200),
                ({**proxied, **bearer("ann")}, 403),
                ({**proxied, **bearer("ops", scope="admin")}, 200),
            ):
                assert (await http.get("/metrics", headers=headers)).status_code == status, headers


async def test_any_worker_tells_what_all_have_counted() -> None:
    """Asked again and again they say the same; of one that is gone what it counted stays, and what it held is gone."""
    opened, open_now = "realtime_connections_opened_total", "realtime_connections"
    async with redis_server() as redis, instance(arguments=("--workers", "2"), redis_url=redis.url) as one:
        async with attached(one), attached(one), attached(one):
            await until_shown(one.url, 3, open_now)
            shown = await asyncio.gather(*(figures(one.url) for _ in range(20)))
            assert {(now.of(opened), now.of(open_now)) for now in shown} == {(3, 3)}
            for pid in workers_of(one):
                os.kill(pid, signal.SIGKILL)
            await until_shown(one.url, 0, open_now)
        assert (await figures(one.url)).of(opened) == 3


async def test_a_worker_of_tasks_shows_its_own_where_it_is_told_to() -> None:
    """On loopback: what ran, how long it took and waited, and how Redis answered."""
    port = free_port()
    async with redis_server() as redis, site(redis, workers=1, worker_metrics_port=port) as here:
        await here.come_to_what_they_must([await here.submit("count", steps=2)])
        shown: Figures = await figures(f"http://127.0.0.1:{port}")
        for name in ("realtime_task_attempts_total", "realtime_task_seconds_count", "realtime_task_wait_seconds_count"):
            assert shown.of(name, name="count") == 1, name
        assert shown.of("realtime_tasks_finished_total", name="count", status="complete") == 1
        assert shown.of("realtime_store_seconds_count") > 0
        assert shown.of("realtime_loop_lag_seconds_count") > 0


def test_a_worker_whose_port_is_taken_does_not_start() -> None:
    """It says which."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = Settings(redis_url="redis://127.0.0.1:1", worker_metrics_port=port)
        with pytest.raises(SettingsError, match=f"REALTIME_WORKER_METRICS_PORT={port}: can't listen there"):
            run(settings)
