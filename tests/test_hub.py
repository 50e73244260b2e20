"""The live sessions of a process: opened by their first user, shared, closed after the last."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator

import pytest

from realtime.errors import NotFound
from realtime.hub import Hub
from realtime.live import LiveSession
from realtime.store.base import Gone
from tests.contract import session
from tests.support.ears import Ears
from tests.support.stores import Watched

SESSION = "sess_1"


@pytest.fixture
async def store() -> Watched:
    """A store with one session."""
    store = Watched()
    await store.create(session(SESSION))
    return store


@pytest.fixture
async def ears() -> AsyncIterator[Ears]:
    """Who is told of what happens."""
    ears = Ears()
    yield ears
    await ears.settled()


@pytest.fixture
def hub(store: Watched, ears: Ears) -> Hub:
    """A hub over the store."""
    return Hub(store, ears)


async def test_a_session_is_opened_once(hub: Hub, store: Watched) -> None:
    """Two users share it, and it is closed after the last."""
    async with hub.use(SESSION) as one:
        async with hub.use(SESSION) as other:
            assert one is other
        assert (store.watchers, list(hub.sessions())) == (1, [one])
    assert (store.watchers, list(hub.sessions())) == (0, [])


async def test_users_that_come_at_once_share_the_opening(hub: Hub, store: Watched) -> None:
    """While the first still waits for the store, the second waits for the same."""
    store.loading = asyncio.Event()

    async def use() -> LiveSession:
        async with hub.use(SESSION) as live:
            return live

    users = [asyncio.ensure_future(use()) for _ in range(3)]
    for _ in range(3):
        await asyncio.sleep(0)
    assert store.watchers == 1
    assert list(hub.sessions()) == []
    store.loading.set()
    assert len(set(await asyncio.gather(*users))) == 1
    assert store.watchers == 0


async def test_a_user_that_gives_up_takes_nothing_from_the_others(hub: Hub, store: Watched) -> None:
    """Cancelled while the session is being opened, it leaves the opening to who still waits."""
    store.loading = asyncio.Event()

    async def use() -> str:
        async with hub.use(SESSION) as live:
            return live.id

    users = [asyncio.ensure_future(use()) for _ in range(2)]
    for _ in range(3):
        await asyncio.sleep(0)
    users[0].cancel()
    await asyncio.wait([users[0]])
    store.loading.set()
    assert await users[1] == SESSION


async def test_an_opening_that_nobody_waits_for_is_given_up(hub: Hub, store: Watched) -> None:
    """The last user gone, nothing is left of it."""
    store.loading = asyncio.Event()

    async def use() -> None:
        async with hub.use(SESSION):
            raise AssertionError("the store never answered")

    user = asyncio.ensure_future(use())
    for _ in range(3):
        await asyncio.sleep(0)
    user.cancel()
    await asyncio.wait([user])
    for _ in range(3):
        await asyncio.sleep(0)
    assert store.watchers == 0
    assert len(asyncio.all_tasks()) == 1


async def test_an_unknown_session_is_refused(hub: Hub, store: Watched) -> None:
    """Each time anew, and nothing is kept of it."""
    for _ in range(2):
        with pytest.raises(NotFound):
            async with hub.use("sess_none"):
                pass
    gc.collect()
    assert (store.watchers, list(hub.sessions())) == (0, [])


async def test_a_retained_session_outlives_its_users(hub: Hub, store: Watched) -> None:
    """A response that runs keeps it open."""
    async with hub.use(SESSION) as live:
        hub.retain(live)
    assert store.watchers == 1
    hub.release(live)
    assert store.watchers == 0


async def test_a_session_that_is_gone_is_not_shared(hub: Hub, store: Watched) -> None:
    """Who comes after it was erased is refused, while its users still hold it; both let go without harm."""
    async with hub.use(SESSION) as live:
        await store.erase(SESSION)
        assert live.gone == Gone("deleted")
        with pytest.raises(NotFound):
            async with hub.use(SESSION):
                pass
        assert list(hub.sessions()) == []
    assert store.watchers == 0


async def test_a_session_that_could_not_be_opened_is_not_listed(hub: Hub, store: Watched) -> None:
    """Not even in the moment before its users have heard of it."""
    store.loading = asyncio.Event()
    listed: list[LiveSession] = []

    async def use() -> None:
        with pytest.raises(NotFound):
            async with hub.use("sess_none"):
                pass

    user = asyncio.ensure_future(use())
    await asyncio.sleep(0)
    store.loading.set()
    while not user.done():
        listed += hub.sessions()
        await asyncio.sleep(0)
    assert listed == []
