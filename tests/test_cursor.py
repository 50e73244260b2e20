"""What one reader is sent: replay, then live, each channel from its position, without seam."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
from msgspec.structs import replace

from realtime.control import CancelResponse
from realtime.cursor import Cursor, Start, find_start
from realtime.errors import NotFound
from realtime.live import LiveSession
from realtime.log import Entry
from realtime.protocol import (
    CONTROL_CHANNEL,
    SESSION_CHANNEL,
    ChannelEvent,
    CloseCode,
    OutputTextDelta,
    Overrides,
)
from realtime.store.base import Head, Snapshot, Write
from realtime.store.memory import MemoryStore
from tests.contract import begun, closed, created, done, item, participant, session, spoken
from tests.support.ears import Ears
from tests.support.stores import Late, Slow

SESSION = "sess_1"


class World:
    """A live session, and the readers of it."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.ears = Ears()
        self.live = LiveSession(SESSION, store, self.ears)

    async def append(self, channel: str, *entries: Entry) -> None:
        """What another instance does, which is read where there is something to follow."""
        await self.store.append(SESSION, [Write(channel, entries)])
        await self.ears.settled()

    def say(self, text: str, name: str = "r") -> None:
        """Show a delta that is not stored yet."""
        self.live.views[name].append_delta(OutputTextDelta(response_id=name, delta=""), text)

    async def cursor(self, after: Mapping[str, int] | None = None, *, interval_s: float = 0.0) -> Cursor:
        return Cursor(self.live, await find_start(self.live, after), interval_s=interval_s)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """An empty session that is open here."""
    store = MemoryStore()
    await store.create(session(SESSION))
    world = World(store)
    await world.live.open()
    yield world
    world.live.close()
    await world.ears.settled()


async def next_of(cursor: Cursor) -> ChannelEvent:
    """The next event that a cursor has to send."""
    event = await cursor.next(0.0)
    assert event is not None
    return event


async def all_of(cursor: Cursor, now: float = 0.0) -> list[ChannelEvent]:
    """Everything that a cursor has to send now."""
    found = []
    while (event := await cursor.next(now)) is not None:
        found.append(event)
    return found


def brief(events: list[ChannelEvent]) -> list[str]:
    """Events in few characters: `<` for replayed, `!` for reset, the channel, the positions, the text."""
    return [
        f"{'<' * event.replay}{'!' * event.reset}{getattr(event, 'response_id', 's')}"
        f" {event.seq - event.merged}-{event.seq} {getattr(event, 'delta', type(event).__name__)}"
        for event in events
    ]


# --- replay, then live ---------------------------------------------------------------------------------------------


async def test_an_empty_session_has_nothing(world: World) -> None:
    """And nothing is due."""
    cursor = await world.cursor()
    assert await cursor.next(0.0) is None
    assert cursor.due == math.inf


async def test_replay_comes_first_and_merged(world: World) -> None:
    """What stood in the logs is marked; what comes now is not, and is not joined to it."""
    await world.append(SESSION_CHANNEL, item("hi"), created("r"))
    await world.append("r", begun("r"), spoken("r", "a", "b"))
    cursor = await world.cursor()
    world.say("c")
    assert brief(await all_of(cursor)) == [
        "<s 0-1 ItemCreated",
        "<s 1-2 ResponseCreated",
        "<r 0-1 ResponseInProgress",
        "<r 1-3 ab",
        "r 3-4 c",
    ]


async def test_what_is_shown_and_not_stored_is_replayed(world: World) -> None:
    """It stood in the log of this process when the reader began."""
    await world.append(SESSION_CHANNEL, created("r"))
    await world.append("r", begun("r"))
    world.say("a")
    assert brief(await all_of(await world.cursor()))[-1] == "<r 1-2 a"


async def test_a_finished_channel_is_replayed_from_the_store(world: World) -> None:
    """There is no view of it any more."""
    await world.append(SESSION_CHANNEL, created("r"))
    await world.append("r", begun("r"), spoken("r", *"abc"), done("r"))
    assert list(world.live.views) == [SESSION_CHANNEL]
    cursor = await world.cursor()
    assert brief(await all_of(cursor))[1:] == ["<r 0-1 ResponseInProgress", "<r 1-4 abc", "<r 4-5 ResponseDone"]
    assert cursor.positions == {SESSION_CHANNEL: 1}


async def test_without_history_only_what_comes_now(world: World) -> None:
    """From where the session and its unfinished channels stand."""
    await world.append(SESSION_CHANNEL, created("r"))
    await world.append("r", begun("r"), spoken("r", "a"))
    cursor = Cursor(world.live, None)
    assert cursor.positions == {SESSION_CHANNEL: 1, "r": 2}
    world.say("b")
    assert brief(await all_of(cursor)) == ["r 2-3 b"]


async def test_what_stays_in_the_log_is_not_sent(world: World) -> None:
    """A response's overrides are nobody's business."""
    await world.append(SESSION_CHANNEL, created("r", Overrides(instructions="secret")))
    [event] = await all_of(await world.cursor())
    assert event == replace(created("r"), seq=1, replay=True)


async def test_which_instance_runs_a_response_is_not_sent(world: World) -> None:
    """Neither replayed nor live."""
    cursor = await world.cursor()
    await world.append(SESSION_CHANNEL, created("r"))
    await world.append("r", begun("r", "inst_2"))
    assert (await all_of(cursor))[1] == replace(begun("r"), seq=1)
    assert (await all_of(await world.cursor()))[1] == replace(begun("r"), seq=1, replay=True)


async def test_a_reader_behind_the_window_reads_the_store(world: World) -> None:
    """And goes over to the window where that begins, without a seam."""
    await world.append(SESSION_CHANNEL, created("r"))
    await world.append("r", begun("r"))
    cursor = await world.cursor()
    await all_of(cursor)
    for number in range(500):
        await world.append("r", spoken("r", f"{number} "))
    assert world.live.views["r"].log.start > 1
    world.say("not stored")
    found = await all_of(cursor)
    texts = [event.delta for event in found if isinstance(event, OutputTextDelta)]
    assert "".join(texts) == "".join(f"{number} " for number in range(500)) + "not stored"
    assert [event.seq - event.merged for event in found] == [1, *(event.seq for event in found[:-1])]


async def test_a_reader_far_behind_reads_the_store_in_parts(world: World) -> None:
    """However many reads a channel takes, the next one is not forgotten."""
    for number in range(300):
        await world.append(SESSION_CHANNEL, item(str(number), f"item_{number}"))
    assert world.live.views[SESSION_CHANNEL].log.start > 0
    assert [event.seq for event in await all_of(await world.cursor())] == list(range(1, 301))


# --- the order over channels ---------------------------------------------------------------------------------------


async def test_a_channel_s_creation_comes_before_its_events(world: World) -> None:
    """Also live."""
    cursor = await world.cursor()
    await world.append(SESSION_CHANNEL, created("r"))
    await world.append("r", begun("r"))
    assert brief(await all_of(cursor)) == ["s 0-1 ResponseCreated", "r 0-1 ResponseInProgress"]


async def test_the_session_s_end_comes_last(world: World) -> None:
    """It is held back until everything in the session has ended."""
    cursor = await world.cursor()
    await world.append(SESSION_CHANNEL, created("r"), closed())
    await world.append("r", begun("r"))
    assert brief(await all_of(cursor)) == ["s 0-1 ResponseCreated", "r 0-1 ResponseInProgress"]
    await world.append("r", done("r"))
    assert brief(await all_of(cursor)) == ["r 1-2 ResponseDone", "s 1-2 SessionClosed"]
    assert await cursor.next(0.0) is None


async def test_nothing_is_replayed_after_something_live(world: World) -> None:
    """The end of a session that was closed before the reader came, held back for a response, is live."""
    await world.append(SESSION_CHANNEL, created("r"), closed())
    cursor = await world.cursor()
    await all_of(cursor)
    await world.append("r", done("r"))
    assert brief(await all_of(cursor)) == ["r 0-1 ResponseDone", "s 1-2 SessionClosed"]


async def test_a_chatty_response_does_not_starve_another(world: World) -> None:
    """Where every read finds something new in one channel, the other is served nevertheless."""
    await world.append(SESSION_CHANNEL, created("r"), created("q"))
    await world.append("r", begun("r"))
    await world.append("q", begun("q"))
    cursor = await world.cursor()
    await all_of(cursor)
    world.say("once", "q")
    found = []
    for number in range(10):
        world.say(str(number), "r")
        event = await cursor.next(0.0)
        assert event is not None
        found.append(event)
    assert "q 1-2 once" in brief(found)


# --- positions -----------------------------------------------------------------------------------------------------


async def resumable(world: World) -> None:
    """A session with one response that is done, and one that runs."""
    await world.append(SESSION_CHANNEL, item("hi"), created("q"), created("r"))
    await world.append("q", begun("q"), spoken("q", *"abc"), done("q"))
    await world.append("r", begun("r"), spoken("r", *"xyz"))


async def test_a_reader_goes_on_from_its_positions(world: World) -> None:
    """In the middle of a run as well; what it does not name and has seen created is over for it."""
    await resumable(world)
    cursor = await world.cursor({SESSION_CHANNEL: 3, "r": 2})
    assert brief(await all_of(cursor)) == ["<r 2-4 yz"]


async def test_a_channel_that_is_not_named_is_replayed_with_its_creation(world: World) -> None:
    """Where the session's position does not cover it."""
    await resumable(world)
    cursor = await world.cursor({SESSION_CHANNEL: 2})
    assert brief(await all_of(cursor)) == ["<s 2-3 ResponseCreated", "<r 0-1 ResponseInProgress", "<r 1-4 xyz"]


async def test_a_position_counts_where_the_creation_is_replayed(world: World) -> None:
    """What a client says that it has of a channel it is not sent again."""
    await resumable(world)
    cursor = await world.cursor({SESSION_CHANNEL: 2, "r": 2})
    assert brief(await all_of(cursor)) == ["<s 2-3 ResponseCreated", "<r 2-4 yz"]


async def test_a_channel_may_be_named_at_0(world: World) -> None:
    """A client that saw it created and nothing of it yet."""
    await resumable(world)
    cursor = await world.cursor({SESSION_CHANNEL: 3, "q": 0})
    assert brief(await all_of(cursor)) == ["<q 0-1 ResponseInProgress", "<q 1-4 abc", "<q 4-5 ResponseDone"]


async def test_only_the_end_may_be_missing(world: World) -> None:
    """A client that has all deltas is sent the end, and not reset."""
    await resumable(world)
    assert brief(await all_of(await world.cursor({SESSION_CHANNEL: 3, "q": 4}))) == ["<q 4-5 ResponseDone"]


@pytest.mark.parametrize("position", [5, 6, 99])
async def test_a_reader_at_or_beyond_an_end_is_reset(world: World, position: int) -> None:
    """It names what it has not seen done, so what it has was never stored: it gets the channel anew."""
    await resumable(world)
    cursor = await world.cursor({SESSION_CHANNEL: 3, "q": position})
    assert brief(await all_of(cursor)) == ["<!q 0-1 ResponseInProgress", "<q 1-4 abc", "<q 4-5 ResponseDone"]


async def test_until_it_is_reset_a_reader_stands_where_it_says(world: World) -> None:
    """It may leave before it was told to forget a channel, and come back: then it has to be told."""
    await resumable(world)
    cursor = await world.cursor({SESSION_CHANNEL: 2, "q": 99})
    assert brief([await next_of(cursor)]) == ["<s 2-3 ResponseCreated"]
    assert cursor.positions["q"] == 99
    assert brief([await next_of(cursor)]) == ["<!q 0-1 ResponseInProgress"]
    assert cursor.positions["q"] == 1


async def test_a_response_that_is_stopped_while_a_reader_comes_is_told(world: World, monkeypatch: Any) -> None:
    """The store's answer does not know its channel yet, and here it has ended already: the reader hears of that."""
    await resumable(world)
    await world.append(SESSION_CHANNEL, created("late"))
    load = world.store.load

    async def old(session_id: str) -> Snapshot:
        monkeypatch.undo()
        snapshot = await load(session_id)
        await world.append("late", done("late"))
        return snapshot

    monkeypatch.setattr(world.store, "load", old)
    cursor = await world.cursor({SESSION_CHANNEL: 4, "r": 4, "late": 0})
    assert brief(await all_of(cursor)) == ["<late 0-1 ResponseDone"]


async def test_a_reader_ahead_of_a_running_channel_waits(world: World) -> None:
    """The owner will store what this reader has seen: it is not reset, and goes on from there."""
    await resumable(world)
    cursor = await world.cursor({SESSION_CHANNEL: 3, "r": 6})
    await world.append("r", spoken("r", "1", "2"))
    assert await all_of(cursor) == []
    await world.append("r", spoken("r", "3"))
    assert brief(await all_of(cursor)) == ["r 6-7 3"]


async def test_an_unknown_channel_is_ignored(world: World) -> None:
    """It holds nothing back, either."""
    cursor = await world.cursor({SESSION_CHANNEL: 0, "nobody": 7})
    await world.append(SESSION_CHANNEL, closed())
    assert brief(await all_of(cursor)) == ["s 0-1 SessionClosed"]


async def test_the_control_channel_is_nobody_s(world: World) -> None:
    """A client that names it is not sent what the servers tell each other, and still sees the session's end."""
    await world.append(CONTROL_CHANNEL, CancelResponse(response_id="r", reason="cancelled"))
    cursor = await world.cursor({SESSION_CHANNEL: 0, CONTROL_CHANNEL: 0})
    await world.append(SESSION_CHANNEL, closed())
    assert brief(await all_of(cursor)) == ["s 0-1 SessionClosed"]


async def test_a_session_that_lost_events_is_over(world: World) -> None:
    """A client that has more of the session than the store is told to start a new one."""
    await world.append(SESSION_CHANNEL, item("hi"))
    with pytest.raises(NotFound) as refusal:
        await world.cursor({SESSION_CHANNEL: 2})
    assert (refusal.value.code, refusal.value.close_code) == ("store_lost", CloseCode.NOT_FOUND)


def test_a_start_has_the_session_first() -> None:
    """So that what creates channels comes before them, whatever the order in which a client names them."""
    heads = {SESSION_CHANNEL: Head(3, finished=False), "r": Head(1, finished=False)}
    assert list(Start(heads, {"r": 1, SESSION_CHANNEL: 3}).positions) == [SESSION_CHANNEL, "r"]
    assert Start(heads, None).positions == {SESSION_CHANNEL: 0}


# --- another instance, which hears late ----------------------------------------------------------------------------


@pytest.fixture
async def late(world: World) -> AsyncIterator[World]:
    """The same session on another instance, which hears of nothing until its store delivers it."""
    late = World(Late(world.store))
    late.ears.instance = "inst_2"
    await late.live.open()
    yield late
    late.live.close()
    await late.ears.settled()


def deliver(late: World) -> None:
    assert isinstance(late.store, Late)
    late.store.deliver()


async def test_a_reader_ahead_of_an_instance_is_not_refused(world: World, late: World) -> None:
    """What the store has, another instance told; this one will hear of it."""
    await world.append(SESSION_CHANNEL, item("hi"))
    cursor = await late.cursor({SESSION_CHANNEL: 1})
    await world.append(SESSION_CHANNEL, item("b", "item_b"))
    deliver(late)
    assert [(event.seq, type(event).__name__) for event in await all_of(cursor)] == [(2, "ItemCreated")]


async def test_a_queued_response_that_an_instance_has_not_heard_of_is_not_lost(world: World, late: World) -> None:
    """A reader that saw it created elsewhere, and names it at 0, is sent it."""
    await world.append(SESSION_CHANNEL, created("r"))
    cursor = await late.cursor({SESSION_CHANNEL: 1, "r": 0})
    await world.append("r", begun("r"))
    deliver(late)
    assert [event.seq for event in await all_of(cursor)] == [1]


@pytest.mark.parametrize("turns", range(6))
async def test_a_reader_ahead_of_an_end_is_reset_whenever_that_comes(world: World, turns: int) -> None:
    """While it is read where it begins: what it named was shown by an owner that was ended elsewhere."""
    await resumable(world)
    slow = World(Slow(world.store))
    await slow.live.open()
    await slow.ears.settled()
    beginning = asyncio.create_task(slow.cursor({SESSION_CHANNEL: 3, "r": 9}))
    for _ in range(turns):
        await asyncio.sleep(0)
    await world.append("r", done("r"))
    cursor = await beginning
    await slow.ears.settled()
    found = brief(await all_of(cursor))
    assert [line.strip("<!") for line in found] == ["r 0-1 ResponseInProgress", "r 1-4 xyz", "r 4-5 ResponseDone"]
    assert "!" in found[0]
    slow.live.close()


# --- the interval --------------------------------------------------------------------------------------------------


async def running(world: World) -> Cursor:
    """A cursor with an interval of a second over a response that runs, at time 0."""
    await world.append(SESSION_CHANNEL, created("r"))
    await world.append("r", begun("r"))
    cursor = await world.cursor(interval_s=1.0)
    await all_of(cursor, -10.0)
    return cursor


async def test_deltas_within_the_interval_become_one(world: World) -> None:
    """The first goes out at once, the others when the interval is over; `due` says when that is."""
    cursor = await running(world)
    world.say("a")
    assert brief(await all_of(cursor, 0.0)) == ["r 1-2 a"]
    world.say("b")
    world.say("c")
    assert await cursor.next(0.5) is None
    assert cursor.due == 1.0
    assert brief(await all_of(cursor, 1.0)) == ["r 2-4 bc"]


async def test_nothing_is_due_while_nothing_waits(world: World) -> None:
    """A reader that has everything sleeps until it is woken."""
    cursor = await running(world)
    world.say("a")
    await all_of(cursor, 0.0)
    assert cursor.due == math.inf


async def test_the_interval_is_each_response_s_own(world: World) -> None:
    """The session's events and another response are not held up."""
    cursor = await running(world)
    world.say("a")
    await all_of(cursor, 0.0)
    world.say("b")
    await world.append(SESSION_CHANNEL, created("q"))
    await world.append("q", begun("q"))
    assert brief(await all_of(cursor, 0.5)) == ["s 1-2 ResponseCreated", "q 0-1 ResponseInProgress"]


async def test_an_end_waits_for_the_interval_too(world: World) -> None:
    """Between two frames of a response there is the interval, whatever they are."""
    cursor = await running(world)
    world.say("a")
    await all_of(cursor, 0.0)
    await world.append("r", spoken("r", "a"), done("r"))
    assert await cursor.next(0.5) is None
    assert brief(await all_of(cursor, 1.0)) == ["r 2-3 ResponseDone"]


async def test_what_stood_is_replayed_however_long_that_takes(world: World) -> None:
    """What the interval holds up stays marked, and is not joined to what comes meanwhile."""
    await world.append(SESSION_CHANNEL, created("r"))
    await world.append("r", begun("r"), spoken("r", "a"))
    cursor = await world.cursor(interval_s=1.0)
    assert brief(await all_of(cursor, 0.0)) == ["<s 0-1 ResponseCreated", "<r 0-1 ResponseInProgress"]
    world.say("b")
    assert brief(await all_of(cursor, 1.0)) == ["<r 1-2 a"]
    assert brief(await all_of(cursor, 2.0)) == ["r 2-3 b"]


async def test_the_session_s_end_waits_for_the_interval(world: World) -> None:
    """It still comes last, and the cursor says when to ask again."""
    cursor = await running(world)
    world.say("a")
    await all_of(cursor, 0.0)
    await world.append("r", spoken("r", "a"), done("r"))
    await world.append(SESSION_CHANNEL, closed())
    assert await cursor.next(0.5) is None
    assert cursor.due == 1.0
    assert brief(await all_of(cursor, 1.0)) == ["r 2-3 ResponseDone", "s 1-2 SessionClosed"]


# --- views ---------------------------------------------------------------------------------------------------------


class Follower:
    """A reader with a cursor."""

    def __init__(self, cursor: Cursor) -> None:
        self.participant = participant("conn_1")
        self.floor_s = 0.0
        self.cursor = cursor

    def wake(self) -> None:
        return

    def follows(self, channel: str) -> bool:
        return channel in self.cursor.positions


async def test_a_view_is_dropped_once_its_end_was_taken(world: World) -> None:
    """By the last reader that follows it."""
    await world.append(SESSION_CHANNEL, created("r"))
    followers = [Follower(await world.cursor()) for _ in range(2)]
    world.live.readers |= set(followers)
    for follower in followers:
        await all_of(follower.cursor)
    await world.append("r", begun("r"), done("r"))
    await all_of(followers[0].cursor)
    assert "r" in world.live.views
    await all_of(followers[1].cursor)
    assert "r" not in world.live.views
