"""The journal writes what was shown, in order, once, and learns where the store refuses it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from realtime.errors import ConflictError, NotFound, StoreError
from realtime.journal import Journal, Tail
from realtime.live import RETRY_S
from realtime.log import Deltas, Entry
from realtime.protocol import ChannelEvent, Failure, OutputTextDelta, ResponseDone
from realtime.store.base import Batch, PositionConflict, Write
from realtime.store.memory import MemoryStore
from realtime.view import View
from tests.contract import done, flat, session, spoken
from tests.support.clock import advancing_clock
from tests.support.stores import ALL, Faulty, Slow, forget, unavailable

DELTA = OutputTextDelta(response_id="r", delta="")


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class SlowStore(Faulty):
    """Holds flushes up while `gate` is closed, fails them with `error`, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.fails_reads = False
        self.flushes = 0

    async def append_all(self, batches: Sequence[Batch]) -> list[Exception | None]:
        self.flushes += 1
        await self.gate.wait()
        if self.error is not None:
            return [self.error for _ in batches]
        return await super().append_all(batches)

    async def read(self, session_id: str, channel: str, after: int, max_chars: int) -> list[Entry]:
        if self.fails_reads:
            raise unavailable()
        return await super().read(session_id, channel, after, max_chars)

    async def texts(self, session_id: str = "sess_1", channel: str = "r") -> list[ChannelEvent]:
        return flat(await MemoryStore.read(self, session_id, channel, 0, ALL))


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


def failed(code: str) -> ResponseDone:
    """An end that is not the one that the response would have had."""
    return replace(done("r"), status="failed", error=Failure(type="server_error", code=code, message=""))


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
    async with asyncio.timeout(20):
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
    """It asks again, nobody is told, and what was said meanwhile is written with it once the store answers."""
    with advancing_clock() as advance:
        speaker = Speaker(journal)
        speaker.say("a")
        store.error = unavailable()
        await turns()
        advance(61)
        for _ in range(5):
            await turns()
            advance(RETRY_S)
            speaker.say("b")
            await turns()
            advance(60)
        assert store.flushes > 3
        store.error = None
        advance(RETRY_S)
        await turns()
        await journal.finish(speaker.tail, done("r"))
    assert await store.texts() == [*flat([spoken("r", "a", *"bbbbb")]), done("r")]
    assert speaker.refusals == []


async def test_a_store_that_fails_is_given_time(store: SlowStore, journal: Journal) -> None:
    """It is not asked at every interval, but after a pause."""
    with advancing_clock() as advance:
        Speaker(journal).say("a")
        store.error = unavailable()
        await turns()
        for _ in range(2):
            advance(60.1)
            await turns()
        assert store.flushes == 1
        advance(60.1)
        await turns()
        assert store.flushes == 2


async def test_one_session_s_failure_is_not_another_s(store: SlowStore, journal: Journal) -> None:
    """Who can be written is, and only the other is asked for again."""
    with advancing_clock() as advance:
        for name in ("sess_1", "sess_2"):
            Speaker(journal, name).say(name)
        store.faults = ["before"]
        await turns()
        advance(61)
        await turns()
        assert [await store.texts(name) for name in ("sess_1", "sess_2")] == [[], flat([spoken("r", "sess_2")])]
        advance(61)
        await turns()
        advance(61)
        await turns()
    assert await store.texts() == flat([spoken("r", "sess_1")])


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
    tail.wrote(tail.batch())
    assert view.stored == 6


def test_a_notice_that_comes_before_the_answer_counts_once() -> None:
    """A view that was told of its own write is not moved on again by the answer to it."""
    view = View()
    view.append_delta(DELTA, "a")
    tail = Tail("sess_1", "r", view, lost=lambda _: None)
    batch = tail.batch()
    view.receive(1, batch.writes[0].entries)
    tail.wrote(batch)
    assert (view.stored, view.log.head) == (1, 1)


def test_a_tail_that_has_ended_is_clean() -> None:
    """Nothing follows an end, and the view need not have been told of it."""
    tail = Tail("sess_1", "r", View(), lost=lambda _: None)

    async def end() -> None:
        ended = tail.finish(done("r"))
        assert not tail.is_clean
        tail.wrote(tail.batch())
        await ended

    asyncio.run(end())
    assert tail.is_clean


# --- answers that did not come -------------------------------------------------------------------------------------


@pytest.fixture
async def quiet(store: SlowStore) -> Journal:
    """A journal that flushes when the test does."""
    return Journal(store, interval_s=60)


async def flush(journal: Journal) -> None:
    await journal._flush()
    await turns(3)


async def test_what_was_written_without_an_answer_is_not_written_again(store: SlowStore, quiet: Journal) -> None:
    """The position tells that somebody was there, and what stands there that it was this process."""
    speaker = Speaker(quiet)
    speaker.say("a", "b")
    store.faults = ["after"]
    await flush(quiet)
    speaker.say("c")
    finishing = speaker.finish()
    for _ in range(3):
        await flush(quiet)
    await finishing
    assert await store.texts() == [*flat([spoken("r", "a", "b", "c")]), done("r")]
    assert speaker.refusals == []


async def test_an_end_that_was_written_without_an_answer_is_written(store: SlowStore, quiet: Journal) -> None:
    """`finish` returns, and nothing is asked of the store any more."""
    speaker = Speaker(quiet)
    speaker.say("a")
    finishing = speaker.finish()
    await turns()
    store.faults = ["after"]
    for _ in range(2):
        await flush(quiet)
    await finishing
    assert await store.texts() == [*flat([spoken("r", "a")]), done("r")]
    appends = store.appends
    await flush(quiet)
    await flush(quiet)
    assert store.appends == appends


async def test_what_arrives_late_stands_once(store: SlowStore, quiet: Journal) -> None:
    """A write that was given up for lost, and lands before, between or after those that followed it."""
    for landing in range(4):
        await store.create(session(f"late_{landing}"))
        speaker = Speaker(quiet, f"late_{landing}")
        speaker.say("a")
        store.faults = ["late"]
        await flush(quiet)
        for step in range(3):
            if step == landing:
                await store.land()
            speaker.say(str(step))
            await flush(quiet)
        finishing = speaker.finish()
        await turns()
        for _ in range(3):
            await flush(quiet)
        await finishing
        await store.land()
        assert await store.texts(f"late_{landing}") == [*flat([spoken("r", *"a012")]), done("r")]
        assert speaker.refusals == []


async def test_an_end_by_somebody_else_is_found_behind_one_s_own_words(store: SlowStore, quiet: Journal) -> None:
    """They were written without an answer, and then the response was ended elsewhere: it is lost, at its length."""
    speaker = Speaker(quiet)
    speaker.say("a", "b")
    store.faults = ["after"]
    await flush(quiet)
    foreign = failed("instance_lost")
    await store.append("sess_1", [Write("r", [foreign], expect=2)])
    speaker.say("c")
    await flush(quiet)
    assert [type(error) for error in speaker.refusals] == [PositionConflict]
    with pytest.raises(PositionConflict):
        await speaker.finish()
    assert await store.texts() == [*flat([spoken("r", "a", "b")]), foreign]


async def test_who_has_lost_is_told_at_once(store: SlowStore, quiet: Journal) -> None:
    """Its end is not even tried."""
    await store.append("sess_1", [Write("r", [failed("instance_lost")])])
    speaker = Speaker(quiet)
    speaker.say("a")
    await flush(quiet)
    appends = store.appends
    with pytest.raises(PositionConflict):
        await quiet.finish(speaker.tail, done("r"))
    speaker.say("b")
    await flush(quiet)
    assert store.appends == appends
    assert len(speaker.refusals) == 1


async def test_a_store_that_does_not_answer_why_is_asked_again(store: SlowStore, quiet: Journal) -> None:
    """A conflict that can't be looked into is no lost response."""
    speaker = Speaker(quiet)
    speaker.say("a")
    store.faults = ["after"]
    await flush(quiet)
    speaker.say("b")
    reads, store.fails_reads = store.texts, True
    await flush(quiet)
    store.fails_reads = False
    for _ in range(2):
        await flush(quiet)
    assert await reads() == flat([spoken("r", "a", "b")])
    assert speaker.refusals == []


async def test_a_full_session_takes_the_end(store: SlowStore, quiet: Journal) -> None:
    """What does not fit is refused, and told; the end is taken, and the words that were shown with it."""
    store._max_bytes = 1
    await store.append("sess_1", [Write("other", [spoken("other", "x" * 10)])])
    speaker = Speaker(quiet)
    speaker.say("a")
    await flush(quiet)
    assert [error.code for error in speaker.refusals if isinstance(error, ConflictError)] == ["session_full"]
    finishing = speaker.finish()
    await turns()
    await flush(quiet)
    await finishing
    assert await store.texts() == [*flat([spoken("r", "a")]), done("r")]


async def test_what_the_store_has_lost_can_t_be_followed(store: SlowStore, quiet: Journal) -> None:
    """A part of the answer is gone: it is told, and no end that belongs to the whole is written."""
    speaker = Speaker(quiet)
    speaker.say("a", "b", "c")
    await flush(quiet)
    forget(store, "sess_1", "r", 1)
    speaker.say("d")
    await flush(quiet)
    assert [error.code for error in speaker.refusals if isinstance(error, StoreError)] == ["store_lost"]
    with pytest.raises(StoreError):
        await quiet.finish(speaker.tail, done("r"))
    assert await store.texts() == flat([spoken("r", "a")])


async def test_what_the_store_has_lost_before_the_end_is_told_with_it(store: SlowStore, quiet: Journal) -> None:
    """An answer that was whole when it ended is not told to be whole where it isn't."""
    speaker = Speaker(quiet)
    speaker.say("a", "b", "c")
    await flush(quiet)
    forget(store, "sess_1", "r", 1)
    finishing = speaker.finish()
    await turns()
    await flush(quiet)
    with pytest.raises(StoreError) as lost:
        await finishing
    assert lost.value.code == "store_lost"
    assert await store.texts() == flat([spoken("r", "a")])


async def test_news_is_newer_than_the_answer_of_the_store(store: SlowStore) -> None:
    """The end lands while the conflict is looked into: nothing was lost."""
    slow = Slow(store)
    journal = Journal(slow, interval_s=60)
    speaker = Speaker(journal)
    speaker.say("a", "b")
    await store.append("sess_1", [Write("r", [spoken("r", "a")], expect=0)])
    finishing = speaker.finish()
    await turns()
    flushing = asyncio.ensure_future(journal._flush())
    await turns(2)
    rest: list[Entry] = [spoken("r", "b"), done("r")]
    await store.append("sess_1", [Write("r", rest, expect=1)])
    speaker.view.receive(2, rest)
    await flushing
    await flush(journal)
    with suppress(PositionConflict):
        await finishing
    assert await store.texts() == [*flat([spoken("r", "a", "b")]), done("r")]


# --- any order of failures -----------------------------------------------------------------------------------------


class Trial:
    """A response that says things, a store that fails in every way, and a journal between them."""

    def __init__(self) -> None:
        self.store = SlowStore()
        self.journal = Journal(self.store, interval_s=60)
        self.speaker = Speaker(self.journal)
        self.said: list[str] = []
        self.finishing: asyncio.Task[None] | None = None
        self.happened: set[str] = set()

    @property
    def is_over(self) -> bool:
        return self.finishing is not None and self.finishing.done()

    async def flush(self) -> None:
        """And do what a turn does that has lost: it ends."""
        await flush(self.journal)
        if self.speaker.refusals:
            self.finish(failed("store_error"))
        await turns(3)

    def finish(self, end: ResponseDone) -> None:
        if self.finishing is None:
            self.finishing = asyncio.create_task(self.journal.finish(self.speaker.tail, end))
            self.end = end

    async def settle(self) -> None:
        """The store works again, what was under way arrives, and the response ends."""
        self.store.faults, self.store.is_down, self.store.fails_reads = [], False, False
        while self.store.under_way:
            await self.store.land()
        self.finish(done("r"))
        await turns(3)
        for _ in range(6):
            await self.flush()

    async def check(self) -> None:
        """What the store has is what was shown, or the response knows that it isn't."""
        assert self.finishing is not None
        assert self.finishing.done(), "nobody was told"
        error = self.finishing.exception()
        shown = flat([spoken("r", *self.said)])
        if isinstance(error, NotFound):
            assert "erase" in self.happened
            return
        stored = await self.store.texts()
        ends = [event for event in stored if isinstance(event, ResponseDone)]
        texts = [event for event in stored if not isinstance(event, ResponseDone)]
        assert ends == stored[len(texts) :], "something follows an end"
        assert texts == shown[: len(texts)]
        if error is None:
            assert (ends, texts) == ([self.end], shown)
        elif isinstance(error, StoreError):
            assert (error.code, "forget" in self.happened) == ("store_lost", True)
            assert self.end not in ends  # somebody else's may be there
        else:
            assert isinstance(error, PositionConflict)
            assert len(ends) == 1
            assert ends != [self.end] or texts == shown


async def say(trial: Trial, number: int) -> None:
    if trial.finishing is None and not trial.speaker.refusals:
        texts = [f"{len(trial.said) + index} " for index in range(1 + number % 80)]
        trial.said += texts
        trial.speaker.say(*texts)


async def write(trial: Trial, number: int) -> None:
    await trial.flush()


async def fail(trial: Trial, number: int) -> None:
    trial.store.faults = [("before", "after", "late")[number % 3]]
    await trial.flush()
    trial.store.faults = []


async def break_down(trial: Trial, number: int) -> None:
    trial.store.is_down, trial.store.fails_reads = ((True, False), (False, True), (False, False))[number % 3]


async def land(trial: Trial, number: int) -> None:
    await trial.store.land()


async def end(trial: Trial, number: int) -> None:
    trial.finish(done("r"))
    await turns(3)


async def bury(trial: Trial, number: int) -> None:
    """Somebody else ends the response; this instance hears of it at once, or not."""
    if "erase" not in trial.happened:
        position = len(flat(await MemoryStore.read(trial.store, "sess_1", "r", 0, ALL)))
        write = Write("r", [failed("instance_lost")], expect=position)
        with suppress(PositionConflict):
            await MemoryStore.append(trial.store, "sess_1", [write])
            if number % 2:
                trial.speaker.view.receive(position + 1, write.entries)


async def forget_some(trial: Trial, number: int) -> None:
    """The store loses what it had, unless the response is over."""
    if "erase" not in trial.happened and not trial.is_over and not trial.speaker.view.finished:
        entries = await MemoryStore.read(trial.store, "sess_1", "r", 0, ALL)
        if entries and not isinstance(entries[-1], ResponseDone):
            trial.happened.add("forget")
            forget(trial.store, "sess_1", "r", number % (len(flat(entries)) + 1))


async def erase(trial: Trial, number: int) -> None:
    if number % 10 == 0 and "erase" not in trial.happened and not trial.is_over:
        trial.happened.add("erase")
        await trial.store.erase("sess_1")


Act = Callable[[Trial, int], Awaitable[None]]
COMMON: list[Act] = [say, say, say, write, write, fail, fail, fail, break_down, land, end, erase]
RARE: list[Act] = [bury, forget_some]


@settings(max_examples=400, deadline=None, phases=set(Phase) - {Phase.explain})
@given(st.lists(st.tuples(st.sampled_from([*COMMON, *COMMON, *RARE]), st.integers(0, 999)), max_size=40))
async def test_the_store_has_what_was_shown_or_it_is_known(steps: Sequence[tuple[Act, int]]) -> None:
    """However the store fails, and whoever else writes."""
    trial = Trial()
    await trial.store.create(session())
    for act, number in steps:
        await act(trial, number)
    await trial.settle()
    await trial.check()
