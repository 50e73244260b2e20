"""Tasks in which nobody takes part: their results are there for as long as they are kept, and then nothing is left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.support.client import attached
from tests.support.redis_server import RedisServer, redis_server
from tests.support.scale import scaled
from tests.support.worker import POLL_S, Site, Submitted, site

LEASE_S = 1.0
UNHEARD = scaled(1000, 200)
TTL_S = 2.0
LONG_S = 2.5 * TTL_S
SETTLE_S = 2.0
"""In so long the keys that the queue makes anew have their time to live."""
ENDLESS = """
local found = {}
for _, key in ipairs(redis.call('KEYS', '*')) do
    if redis.call('PTTL', key) == -1 then found[#found + 1] = key end
end
return found
"""


@pytest.fixture
async def redis() -> AsyncIterator[RedisServer]:
    """The Redis of a test."""
    async with redis_server() as server:
        yield server


async def every_key_expires(redis: RedisServer) -> None:
    """See that no key is without an end for longer than workers may take to give it one."""
    first = set(await redis.command("EVAL", ENDLESS, 0))
    if first:
        await asyncio.sleep(SETTLE_S)
    left = first & set(await redis.command("EVAL", ENDLESS, 0))
    assert not left, f"keys without an end: {sorted(left)[:5]}"


async def all_gone(here: Site, redis: RedisServer, tasks: list[Submitted]) -> None:
    """Return once nobody knows the tasks any more, and nothing is left of them."""
    async with asyncio.timeout(TTL_S + 20):
        while await redis.command("KEYS", "rt:{*") or await redis.command("KEYS", "saq:job:*"):  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)
    for task in tasks:
        assert (await here.ask("GET", task.path)).status_code == 404
    assert await here.store.tracked() == 0


@pytest.mark.timeout(90)
async def test_a_thousand_results_that_nobody_waits_for_are_all_there(redis: RedisServer) -> None:
    """Whoever comes finds each of them, at an instance that had nothing to do with it too; every key has its end."""
    async with site(redis, instances=2, workers=2, lease_s=LEASE_S) as here:
        tasks = await asyncio.gather(*[here.submit("nothing", number=number) for number in range(UNHEARD)])
        await every_key_expires(redis)
        await here.ended(tasks)
        found = await asyncio.gather(*[here.show(task, at=1) for task in tasks])
        assert [(one["status"], one["attempt"], one["result"]) for one in found] == [
            ("complete", 1, number) for number in range(UNHEARD)
        ]
        await here.forgotten()
        await every_key_expires(redis)


async def over(redis: RedisServer, task: Submitted) -> None:
    """Return once a task has ended. The store is not asked: that would be a use of it."""
    async with asyncio.timeout(4 * LONG_S):
        while int(await redis.command("HGET", f"rt:{{{task.session_id}}}:meta", f"p:{task.id}") or 0) >= 0:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)


async def test_a_task_works_for_longer_than_it_is_kept_and_is_forgotten_then(redis: RedisServer) -> None:
    """So it is alone, and in a session that nobody looks at: the result is kept from its end on, and no longer."""
    async with site(redis, workers=1, lease_s=LEASE_S, task_ttl_s=TTL_S, session_ttl_s=TTL_S) as here:
        async with attached(here.instances[0]) as client:
            await client.send("task.create", task_id="t", name="sleep", input={"seconds": LONG_S})
            await client.until("task.created")
            in_session = Submitted("t", "sleep", {"seconds": LONG_S}, client.session_id)
        tasks = [in_session, await here.submit("sleep", seconds=LONG_S), await here.submit("compute", seconds=LONG_S)]
        for task in tasks:
            await over(redis, task)
            shown = await here.show(task)
            assert (shown["status"], shown["result"], shown["attempt"]) == ("complete", LONG_S, 1)
        await every_key_expires(redis)
        await all_gone(here, redis, tasks)


async def test_a_task_waits_for_longer_than_it_is_kept(redis: RedisServer) -> None:
    """There is no worker for a while, and nobody asks."""
    async with site(redis, lease_s=LEASE_S, task_ttl_s=TTL_S, session_ttl_s=TTL_S) as here:
        tasks = [await here.submit("nothing", number=number) for number in range(20)]
        await asyncio.sleep(2 * TTL_S)
        await here.start_worker()
        for task in tasks:
            await over(redis, task)
        shown = await asyncio.gather(*map(here.show, tasks))
        assert [one["result"] for one in shown] == list(range(20))
