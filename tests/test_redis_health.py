"""The log tells of each change once: that Redis stops answering, that it answers again, what it refuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from realtime.errors import StoreError
from realtime.observe import logs
from realtime.store import redis_health
from realtime.store.base import TaskRef
from realtime.store.redis import RedisStore
from realtime.store.redis_health import MAX_REASONS, REFUSED_S, STEADY_S, Health, reason_of
from tests.support.redis_server import RedisServer, redis_server

PATIENCE_S = 30.0
AWAY, BACK, REFUSES = "redis does not answer", "redis answers again", "redis refuses"

Record = tuple[str, dict[str, Any]]


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    """What is logged, of whatever level."""
    records: list[Record] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(logs, level, lambda event, **fields: records.append((event, fields)))
    return records


class Trial:
    """A `Health` on a clock of its own."""

    def __init__(self) -> None:
        self.now = 100.0
        self.health = Health(clock=lambda: self.now)


@pytest.fixture
def trial() -> Trial:
    """A new one: nothing has happened yet."""
    return Trial()


@pytest.fixture
async def redis() -> AsyncIterator[RedisServer]:
    """The Redis of a test."""
    async with redis_server() as server:
        yield server


def test_a_redis_that_answers_is_no_news(trial: Trial, logged: list[Record]) -> None:
    """Nothing is said of it, from its first reply on."""
    trial.health.replied([b"PONG", None, 1])
    trial.now += STEADY_S
    trial.health.replied([1])
    assert logged == []


def test_each_change_is_told_once(trial: Trial, logged: list[Record]) -> None:
    """However many calls fail, or succeed, on the way; and again the next time."""
    for _ in range(2):
        for _ in range(5):
            trial.health.failed(TimeoutError())
            trial.now += 1
        trial.now += STEADY_S
        trial.health.replied([1])
        trial.health.replied([1])
    assert logged == 2 * [(AWAY, {"error": "TimeoutError"}), (BACK, {"after_s": 4.0})]


def test_one_that_answers_now_and_then_is_not_back(trial: Trial, logged: list[Record]) -> None:
    """It counts as back once nothing has failed for a while."""
    for _ in range(10):
        trial.health.failed(RedisConnectionError("secret"))
        trial.now += STEADY_S - 0.5
        trial.health.replied([1])
    assert logged == [(AWAY, {"error": "ConnectionError"})]
    trial.now += 0.5
    trial.health.replied([1])
    assert [event for event, _ in logged] == [AWAY, BACK]


def test_a_node_that_does_not_answer_is_told_of_among_others_replies(trial: Trial, logged: list[Record]) -> None:
    """In a cluster it is one reply of many that is missing; the rest do not make up for it."""
    for _ in range(2):
        trial.health.replied([1, RedisConnectionError("gone"), 1])
        trial.now += STEADY_S
    trial.health.replied([1, RedisConnectionError("gone"), 1])
    assert logged == [(AWAY, {"error": "ConnectionError"})]


def test_a_refusal_is_told_once_a_minute(trial: Trial, logged: list[Record]) -> None:
    """Each reason by itself. A Redis that refuses does answer."""
    for _ in range(2):
        for _ in range(10):
            trial.health.replied([ResponseError("OOM"), ResponseError("READONLY"), ResponseError("OOM")])
            trial.now += 1
        trial.now += REFUSED_S - 10
    assert logged == 2 * [(REFUSES, {"reason": "OOM"}), (REFUSES, {"reason": "READONLY"})]


def test_reasons_are_bounded(trial: Trial, logged: list[Record]) -> None:
    """However many there are in a minute, and however long; after it there is room for others."""
    for number in range(1000):
        trial.health.replied([ResponseError(f"{number} {'x' * 1000}")])
    assert len(logged) == MAX_REASONS
    assert max(len(fields["reason"]) for _, fields in logged) == 200
    trial.now += REFUSED_S
    trial.health.replied([ResponseError("OOM")])
    assert logged[MAX_REASONS:] == [(REFUSES, {"reason": "OOM"})]


async def test_an_outage_is_two_lines(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch, logged: list[Record]
) -> None:
    """One when Redis is gone, and one when it is back."""
    monkeypatch.setattr(redis_health, "STEADY_S", 0.3)
    async with RedisStore(redis.url) as store, asyncio.timeout(PATIENCE_S):
        await store.ping()
        await redis.kill()
        for number in range(5):
            with pytest.raises(StoreError):
                await store.track(TaskRef("sess_1", f"task_{number}", "analyse"), 1.0)
        await redis.start()
        while len(logged) < 2:
            await store.ping()
            await asyncio.sleep(0.01)
    assert [event for event, _ in logged] == [AWAY, BACK]


async def test_what_redis_refuses_is_one_line(redis: RedisServer, logged: list[Record]) -> None:
    """Whichever call meets it; the callers are told that the store is not available."""
    async with RedisStore(redis.url) as store:
        await redis.command("SET", "rt:tasks", "no index")
        for _ in range(3):
            with pytest.raises(StoreError):
                await store.tracked()
    assert [event for event, _ in logged] == [REFUSES]
    assert str(logged[0][1]["reason"]).startswith("WRONGTYPE")


async def test_what_redis_refuses_is_logged_without_what_it_was_asked(redis: RedisServer) -> None:
    """Redis repeats the arguments of a command that it does not know; the log tells of the command alone."""
    with pytest.raises(ResponseError, match="canary") as refused:
        await redis.command("XNOTHING", "canary-5a1c")
    assert reason_of(refused.value) == "unknown command 'XNOTHING'"
