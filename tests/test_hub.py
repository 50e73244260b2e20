"""Live sessions: opened by their first user, kept up to date by what the store tells, closed after the last."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable

import pytest

from realtime.errors import NotFound
from realtime.hub import WINDOW, Hub, LiveSession, View
from realtime.log import RUN_LENGTH, Entry
from realtime.protocol import CONTROL_CHANNEL, SESSION_CHANNEL, OutputTextDelta
from realtime.session import CancelResponse
from realtime.store.base import Gone, Listener, Snapshot, Write
from realtime.store.memory import MemoryStore
from tests.contract import begun, closed, created, done, flat, item, participant, session, spoken

SESSION = "sess_1"
DELTA = OutputTextDelta(response_id="r", delta="")
CANCEL = CancelResponse(response_id="r", reason="cancelled")


class Watched(MemoryStore):
    """Counts who watches, and lets something happen while a session is read."""

    def __init__(self) -> None:
        super().__init__()
        self.watchers = 0
        self.meanwhile: Callable[[], object] | None = None
        self.loading: asyncio.Event | None = None

    def watch(self, session_id: str, listener: Listener) -> Callable[[], None]:
        end = super().watch(session_id, listener)
        self.watchers += 1

        def unwatch() -> None:
            self.watchers -= 1
            end()

        return unwatch

    async def load(self, session_id: str) -> Snapshot:
        if self.loading is not None:
            await self.loading.wait()
        snapshot = await super().load(session_id)
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            await meanwhile()  # type: ignore[misc]
        return snapshot


class Follower:
    """A reader that follows what it is told to, and counts its wake-ups."""

    def __init__(self, name: str, *channels: str) -> None:
        self.participant = participant(name)
        self.floor_s = 0.0
        self.channels = set(channels)
        self.woken = 0

    def wake(self) -> None:
        self.woken += 1

    def follows(self, channel: str) -> bool:
        return channel in self.channels


class Events:
    """What a hub tells its owner."""

    def __init__(self) -> None:
        self.changed: list[LiveSession] = []
        self.cancelled: list[CancelResponse] = []

    def cancel(self, live: LiveSession, request: CancelResponse) -> None:
        self.cancelled.append(request)


@pytest.fixture
async def store() -> Watched:
    """A store with one session."""
    store = Watched()
    await store.create(session(SESSION))
    return store


@pytest.fixture
def events() -> Events:
    """What the hub told."""
    return Events()


@pytest.fixture
def hub(store: Watched, events: Events) -> Hub:
    """A hub over the store."""
    return Hub(store, changed=events.changed.append, cancel=events.cancel)


async def append(store: MemoryStore, channel: str, *entries: object) -> None:
    await store.append(SESSION, [Write(channel, entries)])  # type: ignore[arg-type]


# --- View ----------------------------------------------------------------------------------------------------------


def test_a_view_takes_what_the_store_has() -> None:
    """What was not shown before is, and its events are told, deltas left out."""
    view = View()
    assert view.receive(1, [begun("r"), spoken("r", "a", "b"), done("r")]) == [begun("r"), done("r")]
    assert (view.log.head, view.stored) == (4, 4)


def test_a_view_takes_its_own_deltas_once() -> None:
    """Deltas that were shown before they were stored are not shown again."""
    view = View()
    for text in "abc":
        view.append_delta(DELTA, text)
    assert view.receive(1, [spoken("r", "a", "b")]) == []
    assert (view.log.head, view.stored) == (3, 2)
    assert flat(view.log.entries(0)) == flat([spoken("r", "a", "b", "c")])


@pytest.mark.parametrize("known", range(6))
def test_a_view_takes_what_overlaps_once(known: int) -> None:
    """Whatever it has already, in the middle of a run or between, it then has everything, once."""
    everything: list[Entry] = [begun("r"), spoken("r", "a", "b", "c"), done("r")]
    view = View()
    for event in flat(everything)[:known]:
        view.log.append_delta(DELTA, event.delta) if isinstance(event, OutputTextDelta) else view.log.append(event)
    fresh = view.receive(1, everything)
    assert flat(view.log.entries(0)) == flat(everything)
    assert fresh == [event for event in flat(everything)[known:] if not isinstance(event, OutputTextDelta)]


def test_a_view_that_is_told_late_stays_where_it_is() -> None:
    """Old news moves nothing back."""
    view = View()
    view.receive(1, [begun("r"), done("r")])
    assert view.receive(1, [begun("r")]) == []
    assert (view.log.head, view.stored) == (2, 2)


def test_a_view_is_a_window() -> None:
    """Of what is stored only the newest stays at hand."""
    view = View()
    for position in range(1, 1001):
        view.receive(position, [spoken("r", "x")])
    assert WINDOW <= view.log.head - view.log.start <= 3 * WINDOW + RUN_LENGTH


def test_a_view_keeps_what_is_not_stored() -> None:
    """However much that is: nobody else has it."""
    view = View()
    for _ in range(1000):
        view.append_delta(DELTA, "x")
    assert view.log.start == 0
    view.receive(1, [spoken("r", *["x"] * 900)])
    view.append_delta(DELTA, "x")
    assert RUN_LENGTH < view.log.start <= 900


# --- Hub -----------------------------------------------------------------------------------------------------------


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


# --- LiveSession ---------------------------------------------------------------------------------------------------


async def test_a_session_is_folded_when_it_is_opened(hub: Hub, store: Watched) -> None:
    """Its conversation, its settings, and which responses are unfinished."""
    await append(store, SESSION_CHANNEL, item("hi"), created("r1"), created("r2"), created("r3"))
    await append(store, "r1", begun("r1"), spoken("r1", "a"), done("r1"))
    await append(store, "r2", begun("r2"), spoken("r2", "a", "b"))
    async with hub.use(SESSION) as live:
        assert list(live.state.unfinished) == ["r2", "r3"]
        assert [live.state.responses[name].running for name in ("r2", "r3")] == [True, False]
        assert live.positions() == {SESSION_CHANNEL: 4, "r2": 3, "r3": 0}
        assert live.state.position == 4


async def test_a_long_session_is_folded_whole(hub: Hub, store: Watched) -> None:
    """However many reads that takes."""
    for number in range(200):
        await append(store, SESSION_CHANNEL, item("x" * 1000, f"item_{number}"))
    async with hub.use(SESSION) as live:
        assert len(live.state.timeline) == live.state.position == 200


async def test_what_happens_during_the_opening_counts_once(hub: Hub, store: Watched, events: Events) -> None:
    """What is told while the session is read is neither missed nor folded twice."""
    await append(store, SESSION_CHANNEL, item("hi"), created("r1"))
    await append(store, "r1", begun("r1"))

    async def meanwhile() -> None:
        await append(store, "r1", spoken("r1", "a"), done("r1"))
        await append(store, SESSION_CHANNEL, item("b", "item_b"), created("r2"))
        await append(store, "r2", begun("r2"), spoken("r2", "x"))
        await store.hold(SESSION, [participant("conn_1")], 10)
        await append(store, CONTROL_CHANNEL, CANCEL)

    store.meanwhile = meanwhile
    async with hub.use(SESSION) as live:
        assert [entry.id for entry in live.state.timeline] == ["item_1", "r1", "item_b", "r2"]
        assert live.positions() == {SESSION_CHANNEL: 4, "r2": 2}
        assert live.state.responses["r2"].running
        assert list(live.audience.participants) == ["conn_1"]
        assert events.cancelled == [CANCEL]


async def test_a_session_that_is_erased_during_the_opening_is_gone(hub: Hub, store: Watched) -> None:
    """Its user is refused, and nobody watches it any more."""

    async def meanwhile() -> None:
        await store.erase(SESSION)

    store.meanwhile = meanwhile
    with pytest.raises(NotFound):
        async with hub.use(SESSION):
            pass
    assert store.watchers == 0


async def test_what_is_appended_is_folded_and_told(hub: Hub, store: Watched, events: Events) -> None:
    """Readers are woken, the owner is told, and the state stands where the channel does."""
    async with hub.use(SESSION) as live:
        reader = Follower("conn_1")
        live.readers.add(reader)
        events.changed.clear()
        await append(store, SESSION_CHANNEL, item("hi"), created("r"))
        assert (live.state.position, list(live.views)) == (2, [SESSION_CHANNEL, "r"])
        assert reader.woken == 1
        assert events.changed == [live]


async def test_what_was_shown_already_wakes_nobody(hub: Hub, store: Watched) -> None:
    """The flush of deltas that every local reader has seen is no news."""
    async with hub.use(SESSION) as live:
        await append(store, SESSION_CHANNEL, created("r"))
        live.views["r"].append_delta(DELTA, "a")
        reader = Follower("conn_1")
        live.readers.add(reader)
        await append(store, "r", spoken("r", "a"))
        assert reader.woken == 0


async def test_requests_to_cancel_are_passed_on(hub: Hub, store: Watched, events: Events) -> None:
    """They stand in no view."""
    async with hub.use(SESSION) as live:
        await append(store, CONTROL_CHANNEL, CANCEL)
        assert events.cancelled == [CANCEL]
        assert list(live.views) == [SESSION_CHANNEL]


async def test_who_comes_and_goes_is_known(hub: Hub, store: Watched) -> None:
    """The audience is the store's, and the clock of an unseen response starts when the last one leaves."""
    async with hub.use(SESSION) as live:
        await append(store, SESSION_CHANNEL, created("r"))
        await store.hold(SESSION, [participant("conn_1")], 10)
        assert list(live.audience.participants) == ["conn_1"]
        assert live.audience.due("r", live.state.session) is None
        await store.release(SESSION, "conn_1", 15.0)
        due = live.audience.due("r", live.state.session)
        assert due == pytest.approx(asyncio.get_running_loop().time() + 15.0, abs=1)


async def test_a_finished_view_stays_until_its_readers_have_seen_the_end(hub: Hub, store: Watched) -> None:
    """Each of them; the last one takes it away."""
    async with hub.use(SESSION) as live:
        await append(store, SESSION_CHANNEL, created("r"))
        one, other = Follower("conn_1", "r"), Follower("conn_2", "r")
        live.readers |= {one, other}
        await append(store, "r", begun("r"), done("r"))
        one.channels.clear()
        live.release("r")
        assert "r" in live.views
        live.leave(other)
        assert list(live.views) == [SESSION_CHANNEL]


async def test_a_finished_view_that_nobody_follows_is_dropped(hub: Hub, store: Watched) -> None:
    """At its end; what runs is kept without readers."""
    async with hub.use(SESSION) as live:
        await append(store, SESSION_CHANNEL, created("r"))
        await append(store, "r", begun("r"))
        live.release("r")
        assert "r" in live.views
        await append(store, "r", done("r"))
        assert list(live.views) == [SESSION_CHANNEL]
        assert live.positions() == {SESSION_CHANNEL: 1}


async def test_a_channel_is_read_whole(hub: Hub, store: Watched) -> None:
    """What the store has, then what is shown and not stored yet."""
    async with hub.use(SESSION) as live:
        await append(store, SESSION_CHANNEL, created("r"))
        await append(store, "r", begun("r"), spoken("r", *["x"] * 300))
        live.views["r"].append_delta(DELTA, "not stored")
        whole: list[Entry] = [begun("r"), spoken("r", *["x"] * 300, "not stored")]
        assert flat(await live.entries("r")) == flat(whole)
        assert await live.entries("unknown") == []


async def test_a_refresh_reads_what_was_not_told(hub: Hub, store: Watched) -> None:
    """A session that missed something catches up, and what is told later counts once."""
    async with hub.use(SESSION) as live:
        live.close()
        await append(store, SESSION_CHANNEL, item("a"), created("r"))
        assert live.state.position == 0
        await live.refresh()
        await live.refresh()
        assert (live.state.position, len(live.state.timeline)) == (2, 2)


async def test_the_session_s_end_is_folded(hub: Hub, store: Watched) -> None:
    """A closed session is still there."""
    async with hub.use(SESSION) as live:
        await append(store, SESSION_CHANNEL, closed())
        assert live.state.closed
        assert live.gone is None


async def test_a_closed_session_stands_before_its_end(hub: Hub, store: Watched) -> None:
    """Who begins where it stands is still told of the end."""
    async with hub.use(SESSION) as live:
        await append(store, SESSION_CHANNEL, item("hi"), closed())
        assert live.positions() == {SESSION_CHANNEL: 1}


async def test_a_session_that_is_gone_tells_everybody(hub: Hub, store: Watched, events: Events) -> None:
    """Readers are woken and the owner is told."""
    async with hub.use(SESSION) as live:
        reader = Follower("conn_1")
        live.readers.add(reader)
        events.changed.clear()
        await store.erase(SESSION)
        assert (live.gone, reader.woken, events.changed) == (Gone("deleted"), 1, [live])


async def test_there_is_one_timer(hub: Hub) -> None:
    """Starting it anew stops the one before, and so does closing the session."""
    looked: list[LiveSession] = []
    async with hub.use(SESSION) as live:
        now = asyncio.get_running_loop().time()
        live.start_timer(now, looked.append)
        live.start_timer(now - 1, looked.append)
        for _ in range(3):
            await asyncio.sleep(0)
        assert looked == [live]
        live.start_timer(now, looked.append)
    for _ in range(3):
        await asyncio.sleep(0)
    assert looked == [live]
