"""The end of a channel's log: what is shown and not stored, what is stored, and whose end counts."""

from __future__ import annotations

import pytest

from realtime.log import RUN_LENGTH, Entry
from realtime.protocol import OutputTextDelta
from realtime.view import WINDOW, View
from tests.contract import begun, done, flat, spoken

DELTA = OutputTextDelta(response_id="r", delta="")


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
@pytest.mark.parametrize("is_stored", [False, True])
def test_a_view_takes_what_overlaps_once(known: int, is_stored: bool) -> None:
    """Whatever it has already, in the middle of a run or between, stored or only shown, it then has all of it, once."""
    everything: list[Entry] = [begun("r"), spoken("r", "a", "b", "c"), done("r")]
    view = View()
    for position, event in enumerate(flat(everything)[:known], 1):
        if not isinstance(event, OutputTextDelta):
            view.receive(position, [event])
        elif is_stored:
            view.receive(position, [spoken("r", event.delta)])
        else:
            view.append_delta(DELTA, event.delta)
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


# --- what ends elsewhere -------------------------------------------------------------------------------------------


def shown(stored: int, head: int) -> View:
    """A view of a channel of this process: `in_progress`, then deltas, of which the store has some."""
    view = View()
    view.receive(1, [begun("r", "inst_1")])
    for number in range(2, head + 1):
        view.append_delta(DELTA, f"{number} ")
    view.stored = stored
    return view


@pytest.mark.parametrize("head", range(3, 9))
def test_an_end_of_somebody_else_s_stands_where_the_store_has_it(head: int) -> None:
    """What was shown from there on never came to be: the log goes on from the store's, and readers can tell."""
    view = shown(stored=2, head=head)
    assert view.receive(3, [done("r")]) == [done("r")]
    assert (view.log.head, view.stored, view.finished) == (3, 3, True)
    assert flat(view.log.entries(2)) == [done("r")]
    assert view.receive(3, [done("r")]) == []


def test_an_end_right_after_what_is_stored_is_no_break() -> None:
    """Where everything that was shown is stored, nobody has to forget anything."""
    view = shown(stored=5, head=5)
    view.receive(6, [done("r")])
    assert [type(event).__name__ for event in flat(view.log.entries(4))] == ["OutputTextDelta", "ResponseDone"]


def test_a_foreign_end_may_be_read_with_what_comes_before_it() -> None:
    """Deltas that were stored and not known to be, and the end behind them."""
    view = shown(stored=2, head=8)
    view.receive(3, [spoken("r", "3 ", "4 "), done("r")])
    assert flat(view.log.entries(2)) == [*flat([spoken("r", "3 ", "4 ")]), done("r")]


def test_after_the_end_a_view_takes_nothing() -> None:
    """Late news is no news."""
    view = shown(stored=2, head=2)
    view.receive(3, [done("r")])
    assert view.receive(4, [done("r")]) == []
    assert view.receive(3, [spoken("r", "3 ")]) == []
    assert view.log.head == 3
