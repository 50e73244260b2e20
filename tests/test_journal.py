"""The journal writes what was shown, in order, once, and learns where the store refuses it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from realtime.errors import NotFound, StoreError
from realtime.hub import View
from realtime.journal import Journal, Tail
from realtime.log import Deltas
from realtime.protocol import ChannelEvent, OutputTextDelta
from realtime.store.base import Batch, PositionConflict, Write
from realtime.store.memory import MemoryStore
from tests.contract import done, flat, session, spoken
from tests.support.clock import advancing_clock

ALL = 1_000_000
DELTA = OutputTextDelta(response_id="r", delta="")


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class SlowStore(MemoryStore):
    """Holds flushes up while `gate` is closed, fails them with `error`, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.flushes = 0

    async def append_all(self, batches: Sequence[Batch]) -> list[Exception | None]:
        self.flushes += 1
        await self.gate.wait()
        if self.error is not None:
            return [self.error for _ in batches]
        return await super().append_all(batches)

    async def texts(self, session_id: str = "sess_1", channel: str = "r") -> list[ChannelEvent]:
        return flat(await self.read(session_id, channel, 0, ALL))


class Speaker:
    """A response that runs: its view, its tail, and what the store refused of it."""

    def __init__(self, journal: Journal, session_id: str = "sess_1") -> None:
        self.journal = journal
        self.view = View()
        self.refusals: list[Exception] = []
        self.tail = Tail(session_id, "r", self.view, lost=self.refusals.append)

    def say(self, *texts: str) -> None:
        for text in texts:
            self.view.append_delta(DELTA, text)
            self.journal.mark(self.tail)

    def finish(self) -> asyncio.Task[None]:
        return asyncio.create_task(self.journal.finish(self.tail, done("r")))


@pytest.fixture
async def store() -> SlowStore:
    """A store with two sessions."""
    store = SlowStore()
    for name in ("sess_1", "sess_2"):
        await store.create(session(name))
    return store


@pytest.fixture
async def journal(store: SlowStore) -> AsyncIterator[Journal]:
    """A journal that runs, and flushes every minute."""
    journal = Journal(store, interval_s=60)
    task = asyncio.create_task(journal.run())
    yield journal
    task.cancel()
    await asyncio.wait([task])


async def test_what_was_shown_is_stored_within_the_interval(store: SlowStore, journal: Journal) -> None:
    """All of it in one write, which the view then knows to be stored."""
    with advancing_clock() as advance:
        speaker = Speaker(journal)
        speaker.say("a", "b")
        await turns()
        speaker.say("c")
        advance(59)
        await turns()
        assert await store.texts() == []
        advance(1)
        await turns()
    assert await store.texts() == flat([spoken("r", "a", "b", "c")])
    assert (speaker.view.stored, store.flushes) == (3, 1)


async def test_all_responses_are_one_round_trip(store: SlowStore, journal: Journal) -> None:
    """Over all sessions of the process."""
    with advancing_clock() as advance:
        for name in ("sess_1", "sess_2"):
            Speaker(journal, name).say(name)
        await turns()
        advance(61)
        await turns()
    assert store.flushes == 1
    for name in ("sess_1", "sess_2"):
        assert await store.texts(name) == flat([spoken("r", name)])


async def test_silence_is_not_written(store: SlowStore, journal: Journal) -> None:
    """After a flush nothing happens until something new is said."""
    with advancing_clock() as advance:
        Speaker(journal).say("a")
        for _ in range(4):
            await turns()
            advance(61)
        await turns()
    assert store.flushes == 1


async def test_an_end_is_written_at_once(store: SlowStore, journal: Journal) -> None:
    """Behind the last words, without waiting for the interval; `finish` returns when the store has it."""
    speaker = Speaker(journal)
    speaker.say("a", "b")
    async with asyncio.timeout(5):
        await journal.finish(speaker.tail, done("r"))
    assert await store.texts() == [*flat([spoken("r", "a", "b")]), done("r")]


async def test_an_end_is_not_shown_before_it_is_stored(store: SlowStore, journal: Journal) -> None:
    """While the store is slow, the view has the deltas only, and `finish` waits."""
    speaker = Speaker(journal)
    store.gate.clear()
    speaker.say("a")
    finishing = speaker.finish()
    await turns()
    assert not finishing.done()
    assert flat(speaker.view.log.entries(0)) == flat([spoken("r", "a")])
    store.gate.set()
    await finishing


async def test_a_response_without_words_ends(store: SlowStore, journal: Journal) -> None:
    """Its end is all that is written."""
    await journal.finish(Speaker(journal).tail, done("r"))
    assert await store.texts() == [done("r")]


async def test_what_is_said_during_a_flush_is_written_by_the_next(store: SlowStore, journal: Journal) -> None:
    """Nothing twice, nothing lost, and the end last."""
    with advancing_clock() as advance:
        speaker = Speaker(journal)
        speaker.say("a")
        store.gate.clear()
        await turns()
        advance(61)
        await turns()
        speaker.say("b")
        finishing = speaker.finish()
        await turns()
        store.gate.set()
        await finishing
    assert await store.texts() == [*flat([spoken("r", "a", "b")]), done("r")]
    assert store.flushes == 2


async def test_a_conflict_is_told_to_who_lost(store: SlowStore, journal: Journal) -> None:
    """Where somebody else wrote to the channel, its owner hears of it, and the others go on."""
    await store.append("sess_1", [Write("r", [done("r")])])
    with advancing_clock() as advance:
        lost, other = Speaker(journal), Speaker(journal, "sess_2")
        lost.say("a")
        other.say("b")
        await turns()
        advance(61)
        await turns()
    assert [type(error) for error in lost.refusals] == [PositionConflict]
    assert (lost.view.stored, other.view.stored, other.refusals) == (0, 1, [])


async def test_an_end_that_is_refused_raises(store: SlowStore, journal: Journal) -> None:
    """`finish` raises the store's error, and nobody is told besides."""
    await store.append("sess_1", [Write("r", [done("r")])])
    speaker = Speaker(journal)
    speaker.say("a")
    with pytest.raises(PositionConflict):
        await journal.finish(speaker.tail, done("r"))
    assert speaker.refusals == []


async def test_the_end_of_a_session_that_is_gone_raises(store: SlowStore, journal: Journal) -> None:
    """As every append to it does."""
    await store.erase("sess_1")
    with pytest.raises(NotFound):
        await journal.finish(Speaker(journal).tail, done("r"))


async def test_the_journal_outlives_a_store_that_fails(store: SlowStore, journal: Journal) -> None:
    """What failed is still there to be written with the end, if the store answers again."""
    with advancing_clock() as advance:
        speaker = Speaker(journal)
        speaker.say("a")
        store.error = StoreError("store_unavailable", "The store does not answer.")
        await turns()
        advance(61)
        await turns()
        assert speaker.refusals == [store.error]
        store.error = None
        speaker.say("b")
        await journal.finish(speaker.tail, done("r"))
    assert await store.texts() == [*flat([spoken("r", "a", "b")]), done("r")]


async def test_who_stops_waiting_for_its_end_stops_nobody(store: SlowStore, journal: Journal) -> None:
    """A cancelled `finish` leaves the journal running, and the end is written nevertheless."""
    store.gate.clear()
    finishing = Speaker(journal).finish()
    await turns()
    finishing.cancel()
    await asyncio.wait([finishing])
    store.gate.set()
    await journal.finish(Speaker(journal, "sess_2").tail, done("r"))
    assert await store.texts() == [done("r")]


def test_a_tail_writes_what_is_not_stored() -> None:
    """From the view's stored position on, expecting the store to stand there."""
    view = View(5)
    view.append_delta(DELTA, "a")
    tail = Tail("sess_1", "r", view, lost=lambda _: None)
    assert tail.batch() == Batch("sess_1", [Write("r", [Deltas(DELTA, ["a"])], expect=5)])
    tail.settle(tail.batch(), None)
    assert view.stored == 6


def test_a_notice_that_comes_before_the_answer_counts_once() -> None:
    """A view that was told of its own write is not moved on again by the answer to it."""
    view = View()
    view.append_delta(DELTA, "a")
    tail = Tail("sess_1", "r", view, lost=lambda _: None)
    batch = tail.batch()
    view.receive(1, batch.writes[0].entries)
    tail.settle(batch, None)
    assert (view.stored, view.log.head) == (1, 1)
