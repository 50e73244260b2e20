"""What a task reports: in order, never backwards, and not more often than anybody could look."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realtime.errors import ServerError
from realtime.journal import Journal, Tail
from realtime.log import Deltas
from realtime.protocol import MAX_FRAME_BYTES, MAX_FRAME_CHARS, ChannelEvent, TaskOutputTextDelta, TaskProgress
from realtime.store.elements import encode_entries
from realtime.store.memory import MemoryStore
from realtime.tasks.reporter import MAX_UNSTORED, PROGRESS_S, AttemptReporter
from realtime.view import View
from tests.contract import flat, session
from tests.support.clock import advancing_clock
from tests.support.sdk import turns


class Desk:
    """A reporter of attempt 2, and what it has told."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.journal = Journal(self.store, interval_s=0.001)
        self.view = View()
        self.refusals: list[Exception] = []
        self.tail = Tail("sess_1", "t", self.view, lost=self.refusals.append)
        self.reporter = AttemptReporter(self.journal, self.tail, attempt=2)

    async def progress(self, progress: Any, total: Any = None, message: str | None = None) -> None:
        """Report."""
        await self.reporter.progress(progress, total, message)

    @property
    def told(self) -> list[Any]:
        """How far, and what, in order."""
        return [_said(event) for event in flat(self.view.log.entries(0))]


def _said(event: ChannelEvent) -> Any:
    match event:
        case TaskProgress(attempt=2, task_id="t", progress=progress):
            return progress
        case TaskOutputTextDelta(attempt=2, task_id="t", delta=delta):
            return delta
    raise AssertionError(event)


@asynccontextmanager
async def journalled(desk: Desk) -> AsyncIterator[None]:
    """With a journal that writes."""
    await desk.store.create(session("sess_1"))
    running = asyncio.create_task(desk.journal.run())
    try:
        yield
    finally:
        running.cancel()
        await asyncio.wait([running])


async def test_the_first_is_told_at_once_and_then_the_newest() -> None:
    """What comes within the interval is one event, with what was reported last."""
    desk = Desk()
    with advancing_clock() as advance:
        for number in range(100):
            await desk.progress(number, 100, f"page {number}")
        assert desk.told == [0]
        advance(PROGRESS_S)
        await turns()
        assert desk.told == [0, 99]
        newest = flat(desk.view.log.entries(0))[-1]
        assert isinstance(newest, TaskProgress)
        assert (newest.total, newest.message) == (100, "page 99")
        advance(10)
        await turns()
        assert desk.told == [0, 99], "nothing new, nothing told"
        await desk.progress(100)
        assert desk.told == [0, 99, 100]
    desk.reporter.stop()


async def test_text_comes_after_the_progress_before_it() -> None:
    """Order is kept, even where that costs an event."""
    desk = Desk()
    await desk.progress(1)
    await desk.progress(2)
    await desk.reporter.write("a")
    await desk.reporter.write("b")
    await desk.progress(3)
    await desk.reporter.write("c")
    assert desk.told == [1, 2, "a", "b", 3, "c"]
    desk.reporter.stop()


async def test_less_than_before_counts_as_that() -> None:
    """Its words are told all the same."""
    desk = Desk()
    for progress, message in ((3, "three"), (1, "one"), (4, "four"), (2.5, "half")):
        await desk.progress(progress, None, message)
        desk.reporter.flush()
    assert desk.told == [3, 3, 4, 4]
    messages = [event.message for event in flat(desk.view.log.entries(0)) if isinstance(event, TaskProgress)]
    assert messages == ["three", "one", "four", "half"]


async def test_what_was_held_back_is_told_at_the_end_or_not_at_all() -> None:
    """`flush` tells it, `stop` does not, and no timer is left."""
    for end, expected in (("flush", [1, 2]), ("stop", [1])):
        desk = Desk()
        with advancing_clock() as advance:
            await desk.progress(1)
            await desk.progress(2)
            getattr(desk.reporter, end)()
            desk.reporter.stop()
            advance(10)
            await turns()
            assert desk.told == expected


@pytest.mark.parametrize(
    "odd", [float("nan"), float("inf"), 2**63, -(2**63), 10**400], ids=["nan", "inf", "large", "small", "huge"]
)
@pytest.mark.parametrize("field", ["progress", "total"])
async def test_number_that_not_every_client_can_read_is_refused(odd: Any, field: str) -> None:
    """It would be the end of the journal's whole write."""
    desk = Desk()
    with pytest.raises(ValueError, match="numbers"):
        await desk.progress(odd if field == "progress" else 1, odd)
    assert desk.told == []


class Steps(int):
    """A number as some library has it."""


async def test_number_of_a_library_is_told_as_a_plain_one() -> None:
    """What goes to the store is an `int` or a `float`."""
    desk = Desk()
    await desk.progress(Steps(3), True)
    [event] = flat(desk.view.log.entries(0))
    assert isinstance(event, TaskProgress)
    assert (type(event.progress), type(event.total)) == (int, int)
    assert encode_entries([event])
    desk.reporter.stop()


async def test_long_message_is_cut() -> None:
    """An event fits into a frame."""
    desk = Desk()
    await desk.progress(1, 2, "\x00" * 1_000_000)
    [event] = desk.view.log.entries(0)
    assert len(encode_entries([event])) < MAX_FRAME_BYTES / 6
    desk.reporter.stop()


async def test_long_text_is_told_in_pieces_that_fit_into_frames() -> None:
    """Whole, all the same."""
    desk = Desk()
    text = "x" * (3 * MAX_FRAME_CHARS + 1)
    await desk.reporter.write(text)
    assert [len(piece) for piece in desk.told] == [MAX_FRAME_CHARS] * 3 + [1]
    await desk.reporter.write("")
    assert len(desk.told) == 4


async def test_what_is_no_text_is_refused() -> None:
    """Lone surrogates can't be sent to anybody."""
    desk = Desk()
    for report in (desk.reporter.write("\ud800"), desk.progress(1, None, "\ud800")):
        with pytest.raises(ServerError):
            await report
    assert desk.told == []


async def test_who_reports_faster_than_the_store_takes_it_waits() -> None:
    """So what is not stored yet is bounded, and goes on once it is."""
    desk = Desk()

    async def talk() -> None:
        for _ in range(10 * MAX_UNSTORED):
            await desk.reporter.write("x")

    talking = asyncio.create_task(talk())
    await turns(3 * MAX_UNSTORED)
    assert not talking.done()
    assert desk.view.log.head == MAX_UNSTORED + 1
    async with journalled(desk), asyncio.timeout(10):
        await talking
    [run, *_] = await desk.store.read("sess_1", "t", 0, 10)
    assert isinstance(run, Deltas)
    assert desk.refusals == []


REPORTS = st.lists(st.one_of(st.text("ab", max_size=3), st.integers(0, 5), st.sampled_from(["", None])), max_size=30)


@settings(deadline=None)
@given(REPORTS)
def test_whatever_is_reported_comes_in_order(reports: list[str | int | None]) -> None:
    """Text whole, progress never backwards, each piece of text after the newest progress before it. `None`: a while
    passes."""

    async def report() -> list[Any]:
        desk = Desk()
        with advancing_clock() as advance:
            for one in reports:
                match one:
                    case None:
                        advance(PROGRESS_S)
                        await turns(3)
                    case str():
                        await desk.reporter.write(one)
                    case _:
                        await desk.progress(one)
            desk.reporter.flush()
        return desk.told

    told = asyncio.run(report())
    assert "".join(one for one in told if isinstance(one, str)) == "".join(
        one for one in reports if isinstance(one, str)
    )
    numbers = [one for one in told if isinstance(one, int)]
    assert numbers == sorted(numbers)
    given_numbers = [one for one in reports if isinstance(one, int)]
    assert numbers[-1:] == ([max(given_numbers)] if given_numbers else [])
    assert len(numbers) <= len(given_numbers)
    for text in [one for one in reports if one and isinstance(one, str)][:1]:
        before = [one for one in reports[: reports.index(text)] if isinstance(one, int)]
        assert [one for one in told[: told.index(text)] if isinstance(one, int)][-1:] == (
            [max(before)] if before else []
        )
