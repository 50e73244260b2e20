"""A live session: folded when it is opened, and kept up to date by what the store tells, or does not tell."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from random import Random

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from realtime import live as live_module
from realtime.control import CancelResponse, CancelTask
from realtime.doorbell import Doorbell
from realtime.errors import NotFound
from realtime.hub import Hub
from realtime.live import LiveSession
from realtime.log import Entry
from realtime.protocol import CONTROL_CHANNEL, SESSION_CHANNEL, ItemCreated, OutputTextDelta, ResponseCreated
from realtime.store.base import Appended, Gone, Missed, Standing, Viewer, Write
from realtime.store.memory import MemoryStore
from tests.contract import (
    begun,
    closed,
    created,
    done,
    flat,
    item,
    participant,
    session,
    spoken,
    task_begun,
    task_done,
    task_made,
    task_told,
    task_wrote,
)
from tests.support.ears import Ears
from tests.support.stores import ALL, Distant, Late, Slow, Watched, forget, unavailable

SESSION = "sess_1"
DELTA = OutputTextDelta(response_id="r", delta="")
CANCEL = CancelResponse(response_id="r", reason="cancelled")


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


async def append(store: MemoryStore, channel: str, *entries: Entry) -> None:
    await store.append(SESSION, [Write(channel, entries)])


def viewer(connection_id: str, instance: str = "inst_1") -> Viewer:
    return Viewer(participant(connection_id), instance)


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


async def test_what_happens_during_the_opening_counts_once(hub: Hub, store: Watched, ears: Ears) -> None:
    """What is told while the session is read is neither missed nor folded twice."""
    await append(store, SESSION_CHANNEL, item("hi"), created("r1"))
    await append(store, "r1", begun("r1"))

    async def meanwhile() -> None:
        await append(store, "r1", spoken("r1", "a"), done("r1"))
        await append(store, SESSION_CHANNEL, item("b", "item_b"), created("r2"))
        await append(store, "r2", begun("r2"), spoken("r2", "x"))
        await store.join(SESSION, viewer("conn_1"))
        await append(store, CONTROL_CHANNEL, CANCEL)

    store.meanwhile = meanwhile
    async with hub.use(SESSION) as live:
        assert [entry.id for entry in live.state.timeline] == ["item_1", "r1", "item_b", "r2"]
        assert live.positions() == {SESSION_CHANNEL: 4, "r2": 2}
        assert live.state.responses["r2"].running
        assert list(live.audience.participants) == ["conn_1"]
        assert ears.requests == [CANCEL]


async def test_a_session_that_is_erased_during_the_opening_is_gone(hub: Hub, store: Watched) -> None:
    """Its user is refused, and nobody watches it any more."""

    async def meanwhile() -> None:
        await store.erase(SESSION)

    store.meanwhile = meanwhile
    with pytest.raises(NotFound):
        async with hub.use(SESSION):
            pass
    assert store.watchers == 0


async def test_what_is_appended_is_folded_and_told(hub: Hub, store: Watched, ears: Ears) -> None:
    """Readers are woken, the owner is told, and the state stands where the channel does."""
    async with hub.use(SESSION) as live:
        reader = Follower("conn_1")
        live.readers.add(reader)
        ears.told.clear()
        await append(store, SESSION_CHANNEL, item("hi"), created("r"))
        assert (live.state.position, list(live.views)) == (2, [SESSION_CHANNEL, "r"])
        assert reader.woken == 1
        assert ears.told == [live]


async def test_what_was_shown_already_wakes_nobody(hub: Hub, store: Watched) -> None:
    """The flush of deltas that every local reader has seen is no news."""
    async with hub.use(SESSION) as live:
        await append(store, SESSION_CHANNEL, created("r"))
        live.views["r"].append_delta(DELTA, "a")
        reader = Follower("conn_1")
        live.readers.add(reader)
        await append(store, "r", spoken("r", "a"))
        assert reader.woken == 0


async def test_requests_to_cancel_are_passed_on(hub: Hub, store: Watched, ears: Ears) -> None:
    """They stand in no view."""
    async with hub.use(SESSION) as live:
        await append(store, CONTROL_CHANNEL, CANCEL)
        assert ears.requests == [CANCEL]
        assert list(live.views) == [SESSION_CHANNEL]


async def test_who_comes_and_goes_is_known(hub: Hub, store: Watched) -> None:
    """The audience is the store's, and the clock of an unseen response starts when the last one leaves."""
    async with hub.use(SESSION) as live:
        await append(store, SESSION_CHANNEL, created("r"))
        await store.join(SESSION, viewer("conn_1"))
        assert list(live.audience.participants) == ["conn_1"]
        assert live.audience.due("r", live.state.session) is None
        await store.leave(SESSION, "conn_1", 15.0)
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


async def test_an_end_that_is_told_again_moves_nothing(hub: Hub, store: Watched) -> None:
    """Who opens a closed session may still be told of what it has read already."""
    await append(store, SESSION_CHANNEL, item("hi"), closed())
    async with hub.use(SESSION) as live:
        live._receive(Appended(SESSION_CHANNEL, 2, [closed()]))
        assert live.state.position == 2
        await live.refresh()
        assert live.gone is None


async def test_a_session_that_is_gone_tells_everybody(hub: Hub, store: Watched, ears: Ears) -> None:
    """Readers are woken and the owner is told."""
    async with hub.use(SESSION) as live:
        reader = Follower("conn_1")
        live.readers.add(reader)
        ears.told.clear()
        await store.erase(SESSION)
        assert (live.gone, reader.woken, ears.told) == (Gone("deleted"), 1, [live])


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


# --- what was not told ---------------------------------------------------------------------------------------------


class There:
    """Another instance that appends, and one here that hears late, if at all."""

    def __init__(self, store: MemoryStore, ears: Ears) -> None:
        self.store = store
        self.late = Late(store)
        self.live = LiveSession(SESSION, self.late, ears)

    async def append(self, channel: str, *entries: Entry) -> None:
        await append(self.store, channel, *entries)

    def lose(self) -> None:
        """What is under way never arrives."""
        self.late.waiting.clear()

    def position(self, channel: str) -> int:
        return self.live.views[channel].log.head


@pytest.fixture
async def there(store: Watched, ears: Ears) -> AsyncIterator[There]:
    """A session that is open here."""
    there = There(store, ears)
    await there.live.open()
    yield there
    there.live.close()


async def test_what_is_missed_is_read(there: There, ears: Ears) -> None:
    """All of it, once the store says that it may not have told everything."""
    await there.append(SESSION_CHANNEL, item("hi"), created("r"))
    await there.append("r", begun("r", "inst_2"), spoken("r", "a", "b"))
    await there.append(CONTROL_CHANNEL, CANCEL)
    await there.store.join(SESSION, viewer("conn_1", "inst_2"))
    there.lose()
    there.live._receive(Missed())
    await ears.settled()
    assert there.live.positions() == {SESSION_CHANNEL: 2, "r": 3}
    assert flat(there.live.views["r"].log.entries(0)) == flat([begun("r", "inst_2"), spoken("r", "a", "b")])
    assert list(there.live.audience.participants) == ["conn_1"]
    assert ears.requests == [CANCEL]


async def test_a_gap_in_a_channel_is_found(there: There, ears: Ears) -> None:
    """By the next thing that is told of it."""
    await there.append(SESSION_CHANNEL, item("a", "item_a"))
    there.lose()
    await there.append(SESSION_CHANNEL, item("b", "item_b"))
    there.late.deliver()
    assert there.live.state.position == 0
    await ears.settled()
    assert [entry.id for entry in there.live.state.timeline] == ["item_a", "item_b"]


async def test_a_gap_in_the_control_channel_is_found(there: There, ears: Ears) -> None:
    """And every request is passed on once, in order."""
    requests = [CancelResponse(response_id=name, reason="cancelled") for name in "abc"]
    for request in requests:
        await there.append(CONTROL_CHANNEL, request)
    del there.late.waiting[1]
    there.late.deliver()
    await ears.settled()
    assert ears.requests == requests


async def test_an_append_to_a_channel_that_nobody_was_told_of_is_a_gap(there: There, ears: Ears) -> None:
    """Its creation was missed."""
    await there.append(SESSION_CHANNEL, created("r"))
    there.lose()
    await there.append("r", begun("r", "inst_2"))
    there.late.deliver()
    await ears.settled()
    assert there.live.positions() == {SESSION_CHANNEL: 1, "r": 1}


async def test_what_is_told_of_a_channel_that_has_ended_is_no_gap(there: There, ears: Ears) -> None:
    """It is old news."""
    await there.append(SESSION_CHANNEL, created("r"))
    await there.append("r", begun("r", "inst_2"), done("r"))
    there.late.deliver()
    await ears.settled()
    told = Appended("r", 1, [begun("r", "inst_2")])
    there.live._receive(told)
    assert ears.tasks == set()


async def test_a_response_that_runs_elsewhere_is_followed(there: There, ears: Ears) -> None:
    """From its beginning, whichever part of it was there before anybody followed; and not longer than it lasts."""
    await there.append(SESSION_CHANNEL, created("r"))
    await there.append("r", begun("r", "inst_2"), spoken("r", "a"))
    there.late.deliver()
    await there.append("r", spoken("r", "b"))
    await ears.settled()
    await there.append("r", spoken("r", "c"))
    there.late.deliver()
    assert flat(there.live.views["r"].log.entries(1)) == flat([spoken("r", "a", "b", "c")])
    await there.append("r", done("r"))
    there.late.deliver()
    assert there.live.state.unfinished == {}
    assert [channel for _, channel in there.store._listeners] == [SESSION_CHANNEL]


async def test_a_response_that_runs_here_is_not_followed(there: There, ears: Ears) -> None:
    """What it says is shown before the store has it."""
    await there.append(SESSION_CHANNEL, created("r"))
    await there.append("r", begun("r", "inst_1"))
    there.late.deliver()
    await ears.settled()
    assert [channel for _, channel in there.store._listeners] == [SESSION_CHANNEL]


async def test_a_late_instance_follows_what_runs(store: Watched, ears: Ears) -> None:
    """It is opened while a response runs elsewhere, and shows from there on what is said."""
    await append(store, SESSION_CHANNEL, created("r"))
    await append(store, "r", begun("r", "inst_2"), spoken("r", "a"))
    live = LiveSession(SESSION, store, ears)
    await live.open()
    await append(store, "r", spoken("r", "b"))
    await ears.settled()
    await append(store, "r", spoken("r", "c"))
    assert live.positions() == {SESSION_CHANNEL: 1, "r": 4}
    assert flat(live.views["r"].log.entries(2)) == flat([spoken("r", "b", "c")])
    live.close()
    assert store._listeners == {}


async def test_a_task_is_followed_wherever_it_runs(there: There, ears: Ears) -> None:
    """Its worker shows nothing by itself, not even one in this process; attempt after attempt, to its end."""
    await there.append(SESSION_CHANNEL, task_made("t"))
    await there.append("t", task_begun("t", 1, "inst_1"), task_wrote("t", "a"))
    there.late.deliver()
    await ears.settled()
    await there.append("t", task_wrote("t", "b"))
    there.late.deliver()
    assert flat(there.live.views["t"].log.entries(1)) == flat([task_wrote("t", "a", "b")])
    await there.append("t", task_begun("t", 2, "inst_2"), task_told("t", 1))
    await there.append("t", task_wrote("t", "c", attempt=2))
    there.late.deliver()
    await ears.settled()
    assert there.live.state.tasks["t"].instance == "inst_2"
    assert there.live.positions() == {SESSION_CHANNEL: 1, "t": 6}
    await there.append("t", task_done("t"))
    there.late.deliver()
    assert there.live.state.unfinished_tasks == {}
    assert there.live.views.keys() == {SESSION_CHANNEL}
    assert [channel for _, channel in there.store._listeners] == [SESSION_CHANNEL]


async def test_a_late_instance_follows_the_tasks_that_run(store: Watched, ears: Ears) -> None:
    """From where they stand; those that are over are only known."""
    await append(store, SESSION_CHANNEL, task_made("t1"), task_made("t2"), task_made("t3"))
    await append(store, "t1", task_begun("t1", 1, "inst_2"), task_wrote("t1", "a", "b"))
    await append(store, "t2", task_done("t2"))
    live = LiveSession(SESSION, store, ears)
    await live.open()
    await ears.settled()
    await append(store, "t1", task_wrote("t1", "c"))
    assert live.positions() == {SESSION_CHANNEL: 3, "t1": 4, "t3": 0}
    assert [(task.running, task.done) for task in live.state.tasks.values()] == [
        (True, False),
        (False, True),
        (False, False),
    ]
    assert flat(await live.entries("t1")) == flat([task_begun("t1", 1, "inst_2"), task_wrote("t1", "a", "b", "c")])
    live.close()
    assert store._listeners == {}


async def test_a_task_s_log_that_was_missed_is_read(there: There, ears: Ears) -> None:
    """All that was told of it meanwhile, in order, once the store says that it may not have told everything."""
    await there.append(SESSION_CHANNEL, task_made("t"))
    await there.append("t", task_begun("t"), task_told("t", 1), task_wrote("t", "a"), task_told("t", 2))
    there.lose()
    there.late.miss()
    await ears.settled()
    assert there.position("t") == 4
    assert there.live.state.tasks["t"].running
    await there.append("t", task_done("t"))
    there.lose()
    there.late.miss()
    await ears.settled()
    assert there.live.state.tasks["t"].done


async def test_those_who_look_without_taking_part_are_woken_too(hub: Hub, store: Watched) -> None:
    """As the readers are, and not after they have gone."""
    async with hub.use(SESSION) as live:
        bell = Doorbell()
        live.bells.add(bell)
        await append(store, SESSION_CHANNEL, task_made("t"))
        async with asyncio.timeout(20):
            await bell.wait()
        live.bells.discard(bell)
        await append(store, "t", task_begun("t"))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await bell.wait()


async def test_a_request_to_cancel_a_task_is_passed_on(hub: Hub, store: Watched, ears: Ears) -> None:
    """As one to cancel a response is."""
    async with hub.use(SESSION):
        await append(store, CONTROL_CHANNEL, CancelTask(task_id="t"))
    assert ears.requests == [CancelTask(task_id="t")]


async def test_a_late_instance_hears_what_was_asked_for_before(store: Watched, ears: Ears) -> None:
    """A request may have come when nobody was there to hear it."""
    await append(store, CONTROL_CHANNEL, CANCEL)
    live = LiveSession(SESSION, store, ears)
    await live.open()
    await ears.settled()
    assert ears.requests == [CANCEL]
    live.close()


@pytest.mark.parametrize("calls", ["load", "viewers", "follow", "read"])
async def test_reading_goes_on_until_the_store_answers(
    there: There, ears: Ears, calls: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it does not."""
    failures = 3
    answer = getattr(there.late, calls)

    async def fail(*arguments: object) -> object:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise unavailable()
        return await answer(*arguments)

    monkeypatch.setattr(there.late, calls, fail)
    monkeypatch.setattr(live_module, "RETRY_S", 0.0)
    await there.append(SESSION_CHANNEL, created("r"))
    await there.append("r", begun("r", "inst_2"), spoken("r", "a"))
    there.live._receive(Missed())
    await ears.settled()
    assert failures < 0
    assert there.live.positions() == {SESSION_CHANNEL: 1, "r": 2}


async def test_a_session_that_the_store_has_lost_is_gone(there: There, ears: Ears) -> None:
    """Found when it is read."""
    await there.append(SESSION_CHANNEL, item("hi"))
    there.late.deliver()
    del there.store._sessions[SESSION]
    there.live._receive(Missed())
    await ears.settled()
    assert there.live.gone == Gone("lost")


async def test_a_session_that_has_less_than_was_told_is_gone(there: There, ears: Ears) -> None:
    """A store that came back with an old copy has another session."""
    await there.append(SESSION_CHANNEL, item("a", "item_a"), item("b", "item_b"))
    there.late.deliver()
    forget(there.store, SESSION, SESSION_CHANNEL, 1)
    with pytest.raises(NotFound):
        await there.live.refresh()
    there.live._receive(Missed())
    await ears.settled()
    assert there.live.gone == Gone("lost")


@pytest.mark.parametrize("left", [0, 1, 2])
async def test_an_end_that_the_store_has_lost_is_told(there: There, ears: Ears, left: int) -> None:
    """Its response has ended here and not there: nobody else would ever end it."""
    await there.append(SESSION_CHANNEL, created("q"), created("r"))
    for name in "qr":
        await there.append(name, begun(name, "inst_2"), spoken(name, "a"), done(name))
    there.late.deliver()
    await ears.settled()
    assert ears.lost == []
    forget(there.store, SESSION, "r", left)
    there.live._receive(Missed())
    await ears.settled()
    assert ears.lost == ["r"]
    assert there.live.gone is None


# --- where the session stands --------------------------------------------------------------------------------------


async def standing(there: There) -> Standing:
    [standing] = await there.store.standings([SESSION])
    assert standing is not None
    return standing


async def test_a_session_that_stands_where_it_is_known_to_is_not_read(there: There, ears: Ears) -> None:
    """Nothing was missed."""
    await there.append(SESSION_CHANNEL, created("r"))
    await there.append(CONTROL_CHANNEL, CANCEL)
    await there.store.join(SESSION, viewer("conn_1"))
    await there.store.leave(SESSION, "conn_1", 0.0)
    there.late.deliver()
    there.live.look_at(await standing(there))
    assert ears.tasks == set()


async def test_a_session_that_stands_elsewhere_is_read(there: There, ears: Ears) -> None:
    """Whichever of its numbers has grown."""
    live = there.live
    await there.append(SESSION_CHANNEL, item("hi"))
    there.lose()
    live.look_at(await standing(there))
    await ears.settled()
    assert live.state.position == 1
    await there.append(CONTROL_CHANNEL, CANCEL)
    there.lose()
    live.look_at(await standing(there))
    await ears.settled()
    assert ears.requests == [CANCEL]
    await there.store.join(SESSION, viewer("conn_1"))
    there.lose()
    live.look_at(await standing(there))
    await ears.settled()
    assert list(live.audience.participants) == ["conn_1"]
    live.look_at(await standing(there))
    assert ears.tasks == set()


async def test_a_session_that_stands_nowhere_is_lost(there: There) -> None:
    """The store does not have it."""
    there.live.look_at(None)
    assert there.live.gone == Gone("lost")


async def test_reading_the_logs_does_not_hide_that_a_viewer_was_missed(there: There, ears: Ears) -> None:
    """A refresh for another reason leaves the audience as it is, and what was missed of it is still found."""
    await there.store.join(SESSION, viewer("conn_1", "inst_2"))
    there.lose()
    await there.live.refresh()
    there.live.look_at(await standing(there))
    await ears.settled()
    assert list(there.live.audience.participants) == ["conn_1"]


# --- answers that are old when they come ---------------------------------------------------------------------------


@pytest.fixture
async def distant(store: Watched, ears: Ears) -> AsyncIterator[LiveSession]:
    """A session that is open here, over a store whose answers take a while, and whose notices don't."""
    live = LiveSession(SESSION, Slow(store), ears)
    await live.open()
    yield live
    live.close()


async def test_what_was_told_while_the_session_was_read_is_not_lost(
    distant: LiveSession, store: Watched, ears: Ears
) -> None:
    """The answer is older than the notice: the store has not lost anything for it."""
    distant.doubt()
    for number in range(30):
        await append(store, SESSION_CHANNEL, item("x", f"item_{number}"))
        await asyncio.sleep(0)
    await ears.settled()
    assert distant.gone is None
    assert distant.state.position == 30


async def test_an_end_that_was_told_while_the_session_was_read_is_not_lost(
    distant: LiveSession, store: Watched, ears: Ears
) -> None:
    """The answer does not have it yet."""
    for turns in range(20):
        name = f"resp_{turns}"
        await append(store, SESSION_CHANNEL, created(name))
        await append(store, name, begun(name, "inst_1"))
        distant.doubt()
        for _ in range(turns):
            await asyncio.sleep(0)
        await append(store, name, done(name))
        await ears.settled()
    assert ears.lost == []


async def test_who_joined_while_the_viewers_were_read_is_there(
    distant: LiveSession, store: Watched, ears: Ears
) -> None:
    """However often that happens, in whichever phase of the reading."""
    there: set[str] = set()
    for number in range(40):
        distant.doubt()
        for _ in range(number % 13):
            await asyncio.sleep(0)
        await store.join(SESSION, viewer(f"conn_{number}", "inst_2"))
        there.add(f"conn_{number}")
        if number % 3 == 0:
            await asyncio.sleep(0)
            await store.leave(SESSION, f"conn_{number}", 0.0)
            there.discard(f"conn_{number}")
        for _ in range(number % 7):
            await asyncio.sleep(0)
        assert set(distant.audience.participants) == there
    await ears.settled()
    assert set(distant.audience.participants) == there


async def test_a_session_that_was_closed_while_it_was_read_tells_nobody(store: Watched, ears: Ears) -> None:
    """Its owner has forgotten it, and nothing goes on listening."""
    for turns in range(30):
        live = LiveSession(SESSION, Slow(store), ears)
        await live.open()
        name = f"resp_{turns}"
        await append(store, SESSION_CHANNEL, created(name))
        await append(store, name, begun(name, "inst_2"))
        await append(store, CONTROL_CHANNEL, CANCEL)
        live.doubt()
        for _ in range(turns):
            await asyncio.sleep(0)
        live.close()
        ears.told.clear()
        ears.requests.clear()
        await ears.settled()
        assert (ears.told, ears.requests) == ([], [])
        assert store._listeners == {}


async def test_a_control_channel_that_is_shorter_than_it_was_said_to_be_stops_nobody(
    there: There, ears: Ears, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that lost it between two answers."""
    await there.append(CONTROL_CHANNEL, CANCEL)
    there.lose()
    reads = 0

    async def nothing(*_: object) -> list[Entry]:
        nonlocal reads
        reads += 1
        assert reads < 10
        return []

    monkeypatch.setattr(there.late, "read", nothing)
    await there.live.refresh()
    assert ears.requests == []


# --- any order of news, answers and losses -------------------------------------------------------------------------


class Network:
    """One instance that writes, and one at the other end of a bad line."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.store = MemoryStore()
        self.far = Distant(self.store)
        self.far.turns = lambda: self.random.randrange(6)
        self.ears = Ears("inst_far")
        self.live = LiveSession(SESSION, self.far, self.ears)
        self.names: list[str] = []
        self.running: list[str] = []
        self.requests: list[CancelResponse] = []
        self.viewers: list[str] = []
        self.count = 0

    async def append(self, channel: str, *entries: Entry) -> None:
        await append(self.store, channel, *entries)

    async def check(self) -> None:
        """Hold what the far end knows against what the store has."""
        live = self.live
        snapshot = await self.store.load(SESSION)
        whole = {name: flat(await self.store.read(SESSION, name, 0, ALL)) for name in snapshot.heads}
        assert live.gone is None
        assert live.state.position == snapshot.heads[SESSION_CHANNEL].position
        timeline = [event for event in whole[SESSION_CHANNEL] if isinstance(event, ItemCreated | ResponseCreated)]
        expected = [event.item.id if isinstance(event, ItemCreated) else event.response.id for event in timeline]
        assert [entry.id for entry in live.state.timeline] == expected
        unfinished = [name for name in self.names if not (name in snapshot.heads and snapshot.heads[name].finished)]
        assert list(live.state.unfinished) == unfinished
        assert set(live.views) == {SESSION_CHANNEL, *unfinished}
        for name in unfinished:
            view = live.views[name]
            assert live.state.responses[name].running == (name in self.running)
            assert view.log.head == view.stored == len(whole.get(name, []))
            assert flat(view.log.entries(view.log.start)) == whole.get(name, [])[view.log.start :]
        assert self.ears.requests == self.requests
        assert sorted(live.audience.participants) == sorted(self.viewers)
        followed = {channel for _, channel in self.store._listeners}
        assert followed == {SESSION_CHANNEL, *self.running}


async def create(net: Network, number: int) -> None:
    if len(net.names) < 9:
        net.names.append(f"resp_{len(net.names)}")
        await net.append(SESSION_CHANNEL, item("go", f"item_{net.names[-1]}"), created(net.names[-1]))


async def begin(net: Network, number: int) -> None:
    waiting = [name for name in net.live.state.unfinished if name not in net.running]
    snapshot = await net.store.load(SESSION)
    if waiting and waiting[0] not in snapshot.heads:
        await net.append(waiting[0], begun(waiting[0], "inst_2"))
        net.running.append(waiting[0])


async def say(net: Network, number: int) -> None:
    if net.running:
        name = net.running[number % len(net.running)]
        texts = [f"{net.count + index} " for index in range(1 + number % 70)]
        net.count += len(texts)
        await net.append(name, spoken(name, *texts))


async def end(net: Network, number: int) -> None:
    if net.running:
        name = net.running.pop(number % len(net.running))
        await net.append(name, done(name))


async def note(net: Network, number: int) -> None:
    net.count += 1
    await net.append(SESSION_CHANNEL, item("x" * number, f"note_{net.count}"))


async def ask(net: Network, number: int) -> None:
    net.requests.append(CancelResponse(response_id="nobody", reason=str(len(net.requests))))
    await net.append(CONTROL_CHANNEL, net.requests[-1])


async def come(net: Network, number: int) -> None:
    net.count += 1
    net.viewers.append(f"conn_{net.count}")
    await net.store.join(SESSION, viewer(net.viewers[-1], "inst_2"))


async def go(net: Network, number: int) -> None:
    if net.viewers:
        await net.store.leave(SESSION, net.viewers.pop(number % len(net.viewers)), 0.0)


async def hear(net: Network, number: int) -> None:
    net.far.deliver(number % 5)


async def lose(net: Network, number: int) -> None:
    if net.far.waiting:
        net.far.waiting.pop(number % len(net.far.waiting))


async def lose_what_was_appended(net: Network, number: int) -> None:
    """Those notices have positions; of viewers' one that counts twice may make up for one that is lost."""
    appended = [index for index, (_, notice) in enumerate(net.far.waiting) if isinstance(notice, Appended)]
    if appended:
        net.far.waiting.pop(appended[number % len(appended)])


async def turn(net: Network, number: int) -> None:
    for _ in range(number % 11):
        await asyncio.sleep(0)


async def look(net: Network, number: int) -> None:
    [standing] = await net.far.standings([SESSION])
    net.live.look_at(standing)


async def miss(net: Network, number: int) -> None:
    net.live._receive(Missed())


Act = Callable[[Network, int], Awaitable[None]]
WRITES: list[Act] = [create, create, begin, begin, say, say, say, say, end, note, ask, come, come, go]
MODEST = settings(max_examples=150, deadline=None, phases=set(Phase) - {Phase.explain})


def schedules(*acts: Act) -> st.SearchStrategy[list[tuple[Act, int]]]:
    return st.lists(st.tuples(st.sampled_from(acts), st.integers(0, 999)), max_size=60)


async def play(steps: Sequence[tuple[Act, int]], seed: int, *, opened_after: int) -> Network:
    """Let things happen; the far end is opened at some point."""
    net = Network(seed)
    await net.store.create(session(SESSION))
    await net.append(SESSION_CHANNEL, created("resp_0"))
    await net.append("resp_0", begun("resp_0", "inst_2"))
    net.names, net.running = ["resp_0"], ["resp_0"]
    opening = asyncio.ensure_future(net.live.open())
    for _ in range(opened_after):
        await asyncio.sleep(0)
    await opening
    for act, number in steps:
        await act(net, number)
    return net


@MODEST
@given(steps=schedules(*WRITES, hear, hear, hear, turn, turn, look), seed=st.integers(0, 999))
async def test_what_comes_late_comes_right(steps: Sequence[tuple[Act, int]], seed: int) -> None:
    """Whatever order notices and answers come in: once all have come, the far end knows what the store has."""
    net = await play(steps, seed, opened_after=seed % 40)
    net.far.deliver()
    await net.ears.settled()
    net.far.deliver()
    await net.ears.settled()
    await net.check()
    net.live.close()


@MODEST
@given(steps=schedules(*WRITES, hear, hear, lose, lose, turn, turn, look, miss), seed=st.integers(0, 999))
async def test_what_never_comes_is_read(steps: Sequence[tuple[Act, int]], seed: int) -> None:
    """Whatever gets lost: once the store says that something did, the far end knows what the store has."""
    net = await play(steps, seed, opened_after=seed % 40)
    net.far.deliver()
    net.live._receive(Missed())
    await net.ears.settled()
    net.far.deliver()
    await net.ears.settled()
    await net.check()
    net.live.close()


@MODEST
@given(steps=schedules(*WRITES, hear, hear, *[lose_what_was_appended] * 2, turn, turn, look), seed=st.integers(0, 999))
async def test_a_look_finds_what_was_lost(steps: Sequence[tuple[Act, int]], seed: int) -> None:
    """Even where the store does not know that it lost something, but for what a response says."""
    net = await play(steps, seed, opened_after=seed % 40)
    net.far.deliver()
    await net.ears.settled()
    for _ in range(3):
        await look(net, 0)
        await net.ears.settled()
        net.far.deliver()
    live = net.live
    snapshot = await net.store.load(SESSION)
    assert live.state.position == snapshot.heads[SESSION_CHANNEL].position
    assert net.ears.requests == net.requests
    assert sorted(live.audience.participants) == sorted(net.viewers)
    live.close()
