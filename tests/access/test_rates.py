"""Rates: exact, over all instances, for everybody apart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime.access.rates import SWEEP_S, Allowance, MemoryRates, Rate, Rates, Taken, parse_rate
from realtime.access.rates_redis import RedisRates
from realtime.errors import StoreError
from realtime.settings import SettingsError
from tests.contract.redis_subject import running
from tests.support.redis_server import RedisServer, redis_cluster, redis_server

PATIENCE_S = 20.0
SLOW = Rate(10, 86_400.0)
"""One that gives nothing more while a test runs."""
MINUTE = Rate(10, 60.0)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("50/second", Rate(50, 1.0)),
        ("10/minute", Rate(10, 60.0)),
        ("1/hour", Rate(1, 3600.0)),
        ("999999999/day", Rate(999_999_999, 86_400.0)),
    ],
)
def test_a_rate_is_a_number_for_each_period(text: str, rate: Rate) -> None:
    """As the settings tell it."""
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    "text", ["", "10", "0/minute", "-1/minute", "10/week", "10 / minute", "1.5/second", "10/minute\n"]
)
def test_what_is_no_rate_is_said_in_one_line(text: str) -> None:
    """With the text itself and an example."""
    with pytest.raises(SettingsError) as error:
        parse_rate(text)
    assert repr(text) in str(error.value)
    assert "\n" not in str(error.value)


# --- one connection's ------------------------------------------------------------------------------------------------


def test_a_full_allowance_allows_its_limit_at_once() -> None:
    """And then one after another, each when the one before says."""
    allowance = Allowance(Rate(50, 1.0))
    assert [allowance.take(100.0) for _ in range(50)] == [0.0] * 50
    wait_s = allowance.take(100.0)
    assert wait_s == pytest.approx(0.02)
    assert allowance.take(100.0 + wait_s) == 0.0
    assert allowance.take(100.0 + wait_s) == pytest.approx(0.02)


def test_what_is_refused_is_not_taken() -> None:
    """However often it is asked for."""
    allowance = Allowance(Rate(1, 1.0))
    allowance.take(0.0)
    for _ in range(1_000):
        assert allowance.take(0.5) == pytest.approx(0.5)
    assert allowance.take(1.0) == 0.0


@given(
    limit=st.integers(1, 200),
    period_s=st.sampled_from([1.0, 60.0, 3600.0]),
    start=st.floats(0, 1e6),
    gaps=st.lists(st.sampled_from([0.0, 0.0, 0.001, 0.02, 0.3, 7.0]), min_size=1, max_size=300),
)
def test_no_more_is_allowed_than_the_limit_and_what_time_gives(
    limit: int, period_s: float, start: float, gaps: list[float]
) -> None:
    """In any stretch that begins with a full allowance; and what is refused would be one too many."""
    allowance, now, taken = Allowance(Rate(limit, period_s)), start, 0
    for gap in gaps:
        now += gap
        before = allowance.remaining(now)
        wait_s = allowance.take(now)
        assert (wait_s == 0.0) is (before > 0)
        assert wait_s <= period_s / limit * 1.001
        taken += wait_s == 0.0
        assert taken <= limit + limit / period_s * (now - start) + 1e-3


# --- everybody's -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    """A Redis."""
    with running(redis_server()) as redis:
        yield redis.url


@pytest.fixture(scope="module")
def cluster_url() -> Iterator[str]:
    """A cluster."""
    with running(redis_cluster()) as cluster:
        yield cluster.url


@pytest.fixture(params=["memory", "redis", "cluster"])
async def views(request: pytest.FixtureRequest, redis_url: str, cluster_url: str) -> AsyncIterator[tuple[Rates, Rates]]:
    """The same rates, as two instances see them. A test has subjects of its own."""
    if request.param == "memory":
        async with MemoryRates() as rates:
            yield rates, rates
        return
    url = redis_url if request.param == "redis" else cluster_url
    async with RedisRates(url) as one, RedisRates(url) as other:
        yield one, other


async def test_so_many_are_allowed_and_no_more(views: tuple[Rates, Rates]) -> None:
    """Each says how many are left."""
    async with asyncio.timeout(PATIENCE_S):
        taken = [await views[number % 2].take("responses", "many", SLOW) for number in range(12)]
    assert [one.allowed for one in taken] == [True] * 10 + [False] * 2
    assert [one.remaining for one in taken] == [*range(9, -1, -1), 0, 0]
    assert {one.limit for one in taken} == {10}


async def test_what_is_given_back_may_be_taken_again(views: tuple[Rates, Rates]) -> None:
    """By anybody, however much was taken; a look takes nothing, and there is never more than the limit."""
    one, other = views
    for taken in (1, SLOW.limit):
        for _ in range(taken):
            assert (await one.take("tasks", "ann", SLOW)).allowed
        assert (await other.take("tasks", "ann", SLOW, cost=0)).remaining == SLOW.limit - taken
        for _ in range(taken):
            await other.give_back("tasks", "ann", SLOW)
        left = await one.take("tasks", "ann", SLOW, cost=0)
        assert (left.remaining, left.reset_s) == (SLOW.limit, 0.0)
    await other.give_back("tasks", "bob", SLOW)
    assert [(await one.take("tasks", "bob", SLOW)).allowed for _ in range(SLOW.limit + 1)] == [True] * SLOW.limit + [
        False
    ]


async def test_of_three_hundred_at_once_exactly_the_limit_is_allowed(views: tuple[Rates, Rates]) -> None:
    """Over two instances."""
    rate = Rate(100, 86_400.0)
    async with asyncio.timeout(PATIENCE_S):
        taken = await asyncio.gather(*(views[number % 2].take("responses", "race", rate) for number in range(300)))
    assert sum(one.allowed for one in taken) == 100


async def test_who_is_refused_is_told_when_to_come_again(views: tuple[Rates, Rates]) -> None:
    """When there is one more, and when all are there again."""
    for _ in range(10):
        allowed = await views[0].take("responses", "when", SLOW)
        assert allowed.retry_after_s == 0.0
    refused = await views[1].take("responses", "when", SLOW)
    assert 8640 - PATIENCE_S < refused.retry_after_s <= 8640
    assert 86_400 - PATIENCE_S < refused.reset_s <= 86_400


async def test_a_cost_is_taken_whole_or_not_at_all(views: tuple[Rates, Rates]) -> None:
    """What is refused takes nothing."""
    assert (await views[0].take("responses", "cost", SLOW, 6)).remaining == 4
    refused = await views[0].take("responses", "cost", SLOW, 5)
    assert (refused.allowed, refused.remaining) == (False, 4)
    assert (await views[0].take("responses", "cost", SLOW, 4)).allowed


async def test_a_rate_comes_back(views: tuple[Rates, Rates]) -> None:
    """In real time: after what the refusal says there is one more."""
    rate = Rate(1, 0.2)
    async with asyncio.timeout(PATIENCE_S):
        while (taken := await views[0].take("messages", "again", rate)).allowed:
            pass
        await asyncio.sleep(taken.retry_after_s + 0.002)
        assert (await views[1].take("messages", "again", rate)).allowed


@pytest.mark.parametrize("subject", ["{x}", "a:b", "\ud800", "🙂" * 5_000, ""])
async def test_subjects_of_any_name_are_apart(views: tuple[Rates, Rates], subject: str) -> None:
    """Whatever a user's id holds, and whatever the name before it."""
    one = Rate(1, 86_400.0)
    assert (await views[0].take("a", subject, one)).allowed
    assert not (await views[0].take("a", subject, one)).allowed
    assert (await views[0].take("a", f"{subject}x", one)).allowed
    assert (await views[0].take(f"a:{subject}", "", one)).allowed


# --- in memory alone -------------------------------------------------------------------------------------------------


class _Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_time_gives_back_what_was_taken() -> None:
    """Exactly when it was said, and never more than the limit."""
    clock = _Clock()
    async with MemoryRates(clock=clock) as rates:
        for number in range(10):
            assert await rates.take("a", "b", MINUTE) == Taken(True, 10, 9 - number, 6.0 * (number + 1), 0.0)
        assert await rates.take("a", "b", MINUTE) == Taken(False, 10, 0, 60.0, 6.0)
        clock.now += 6.0
        assert (await rates.take("a", "b", MINUTE)).allowed
        clock.now += 3600.0
        assert (await rates.take("a", "b", MINUTE)).remaining == 9


async def test_what_is_full_again_is_forgotten() -> None:
    """Nothing is kept for each request, and nothing of who has stopped asking."""
    clock = _Clock()
    async with MemoryRates(clock=clock) as rates:
        for number in range(1_000):
            await rates.take("a", f"{number}", MINUTE)
        assert len(rates) == 1_000
        clock.now += SWEEP_S + 1
        await rates.take("a", "b", MINUTE)
        assert len(rates) == 1


async def test_a_flood_of_subjects_lifts_nobody_s_limit() -> None:
    """Memory is bounded; what is forgotten first is what says least."""
    clock = _Clock()
    async with MemoryRates(clock=clock, max_allowances=100) as rates:
        for _ in range(10):
            await rates.take("a", "greedy", MINUTE)
        for number in range(5_000):
            await rates.take("a", f"{number}", MINUTE)
            assert len(rates) <= 100
        assert not (await rates.take("a", "greedy", MINUTE)).allowed


# --- in Redis alone --------------------------------------------------------------------------------------------------


@pytest.fixture
async def redis() -> AsyncIterator[RedisServer]:
    """The Redis of a test."""
    async with redis_server(password="s3cret/@:") as server:
        yield server


async def test_every_key_is_gone_when_its_rate_is_full_again(redis: RedisServer) -> None:
    """It has its time to live from the first take on, and does not tell whose it is."""
    async with RedisRates(redis.url) as rates:
        for number in range(1, 4):
            await rates.take("responses", "alice", MINUTE)
            [name] = await redis.command("KEYS", "*")
            assert 0 < await redis.command("PTTL", name) <= 6_000 * number
            assert name.startswith("rt:rate:{")
            assert "alice" not in name


async def test_a_redis_that_hangs_is_an_error_soon(redis: RedisServer) -> None:
    """Nobody waits for longer, those that were cancelled meanwhile take no reply of others along."""
    async with RedisRates(redis.url) as rates, asyncio.timeout(PATIENCE_S):
        await rates.take("responses", "alice", SLOW)
        redis.pause()
        given_up = asyncio.create_task(rates.take("responses", "bob", SLOW, 7))
        with pytest.raises(StoreError):
            await rates.take("responses", "alice", SLOW)
        given_up.cancel()
        await asyncio.wait([given_up])
        redis.resume()
        assert (await _answered(lambda: rates.take("responses", "carol", SLOW, 3))).remaining == 7


async def _answered(call: Callable[[], Awaitable[Taken]]) -> Taken:
    while True:
        try:
            return await call()
        except StoreError:
            await asyncio.sleep(0.01)


async def test_a_redis_that_is_gone_is_an_error(redis: RedisServer) -> None:
    """And works again once it is back."""
    async with RedisRates(redis.url) as rates, asyncio.timeout(PATIENCE_S):
        await rates.take("responses", "alice", SLOW)
        await redis.kill()
        with pytest.raises(StoreError):
            await rates.take("responses", "alice", SLOW)
        await redis.start()
        assert (await _answered(lambda: rates.take("responses", "alice", SLOW))).remaining == 9
