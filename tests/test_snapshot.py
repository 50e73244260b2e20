"""A session in one answer, however long; what it says is tested over HTTP, in `tests/end_to_end/test_sessions.py`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
import pytest

from realtime.hub import Hub
from realtime.live import ENTRIES_A_TURN, LiveSession
from realtime.protocol import SESSION_CHANNEL, Session
from realtime.snapshot import BYTES_A_TURN, encode_whole, take_snapshot
from realtime.store.base import Write
from realtime.store.memory import MemoryStore
from tests.contract import begun, created, done, item, session, spoken, task_made
from tests.support.ears import Ears

SESSION = "sess_1"
TURNS = 10
Result = TypeVar("Result")


@asynccontextmanager
async def hub_with(*writes: Write) -> AsyncIterator[Hub]:
    """A hub over a store whose one session holds what was written."""
    store, ears = MemoryStore(), Ears()
    await store.create(session(SESSION))
    await store.append(SESSION, writes)
    yield Hub(store, ears)
    await ears.settled()


def describe(live: LiveSession) -> Session:
    """The session as it stands."""
    return live.state.session


async def in_turns(work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` returns, whose time others share: they have `TURNS` turns at least."""
    task, turns = asyncio.ensure_future(work), 0
    while not task.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns > TURNS
    return task.result()


@pytest.mark.parametrize(
    "writes",
    [
        (),
        (Write(SESSION_CHANNEL, [item("é\u2028", "item_1"), item("", "item_2"), created("resp_1"), task_made("t")]),),
        (
            Write(SESSION_CHANNEL, [created("resp_1"), created("resp_2")]),
            Write("resp_1", [begun("resp_1"), spoken("resp_1", "a"), done("resp_1")]),
        ),
    ],
)
async def test_it_is_encoded_as_anything_is(writes: tuple[Write, ...]) -> None:
    """To the byte, whatever is in it and whatever is not."""
    async with hub_with(*writes) as hub, hub.use(SESSION) as live:
        snapshot = await take_snapshot(live, describe)
        assert await encode_whole(snapshot) == msgspec.json.encode(snapshot)


async def test_others_have_their_turn_while_one_of_many_entries_is_read() -> None:
    """While it is opened, and while it is folded."""
    write = Write(SESSION_CHANNEL, [item("hi", f"item_{number}") for number in range(TURNS * ENTRIES_A_TURN)])

    async def open_in(hub: Hub) -> None:
        async with hub.use(SESSION):
            return

    async with hub_with(write) as hub:
        await in_turns(open_in(hub))
        async with hub.use(SESSION) as live:
            assert len((await in_turns(take_snapshot(live, describe))).items) == TURNS * ENTRIES_A_TURN


async def test_others_have_their_turn_while_a_long_one_is_encoded() -> None:
    """However few its entries are."""
    texts = [item("x" * BYTES_A_TURN, f"item_{number}") for number in range(TURNS + 1)]
    async with hub_with(Write(SESSION_CHANNEL, texts)) as hub, hub.use(SESSION) as live:
        snapshot = await take_snapshot(live, describe)
        assert len(await in_turns(encode_whole(snapshot))) > TURNS * BYTES_A_TURN
