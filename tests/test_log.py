"""Positions and merging: what a reader is sent of a channel's log."""

from __future__ import annotations

from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realtime.errors import InvalidRequest
from realtime.log import (
    MAX_SINGLES,
    RUN_LENGTH,
    ChannelLog,
    Deltas,
    Entry,
    entries_from,
    format_positions,
    length,
    parse_positions,
)
from realtime.protocol import (
    JSON,
    MAX_FRAME_BYTES,
    MAX_FRAME_CHARS,
    ChannelEvent,
    Merge,
    OutputTextDelta,
    ReasoningDelta,
)
from tests.contract import begun, done, flat, spoken

TEXT = OutputTextDelta(response_id="r", delta="")
THOUGHT = ReasoningDelta(response_id="r", delta="")


class Progress(ChannelEvent, kw_only=True, frozen=True, tag="test.progress"):
    """A kind of which the newest event stands for all."""

    merge: ClassVar[Merge] = Merge.LATEST

    percent: int


class OtherProgress(ChannelEvent, kw_only=True, frozen=True, tag="test.other_progress"):
    """Another such kind."""

    merge: ClassVar[Merge] = Merge.LATEST

    percent: int


def log_of(*entries: Entry, start: int = 0) -> ChannelLog:
    log = ChannelLog(start)
    log.extend(entries)
    return log


def progress(*percents: int) -> list[Entry]:
    return [Progress(percent=percent) for percent in percents]


def delta(event: ChannelEvent | None) -> tuple[str, int, int]:
    """What a delta says, its `seq` and its `merged`."""
    assert isinstance(event, OutputTextDelta | ReasoningDelta)
    return event.delta, event.seq, event.merged


# --- next: the merge rules -----------------------------------------------------------------------------------------


def test_an_empty_log_has_nothing_next() -> None:
    """Nobody is sent anything before something was appended."""
    assert ChannelLog().next(0) is None


def test_deltas_that_wait_become_one() -> None:
    """Neighbouring deltas are concatenated; the event has the last one's number and says for how many it stands."""
    assert delta(log_of(spoken("r", "a", "b", "c")).next(0)) == ("abc", 3, 3)


def test_a_single_delta_stands_for_itself() -> None:
    """What does not wait with others is sent as it is, `merged` 1."""
    assert delta(log_of(spoken("r", "a", "b")).next(1)) == ("b", 2, 1)


def test_kinds_of_deltas_do_not_merge() -> None:
    """Text and reasoning stay apart, and in order."""
    log = log_of(Deltas(THOUGHT, ["h", "m"]), spoken("r", "a"), Deltas(THOUGHT, ["!"]))
    sent = [log.next(position) for position in (0, 2, 3)]
    assert [delta(event) for event in sent] == [("hm", 2, 2), ("a", 3, 1), ("!", 4, 1)]
    assert [type(event) for event in sent] == [ReasoningDelta, OutputTextDelta, ReasoningDelta]


def test_deltas_of_other_commands_do_not_merge() -> None:
    """Deltas that differ in anything but their text are no neighbours of one kind."""
    other = OutputTextDelta(response_id="r", delta="", for_event_id="e1")
    assert delta(log_of(spoken("r", "a"), Deltas(other, ["b"])).next(0)) == ("a", 1, 1)


def test_equal_templates_are_one_kind() -> None:
    """Deltas merge by what they are, not by which object they came with: each flush brings its own."""
    assert delta(log_of(spoken("r", "a"), spoken("r", "b")).next(0)) == ("ab", 2, 2)


def test_deltas_merge_over_many_runs() -> None:
    """How a log holds its deltas can't be seen in what is sent."""
    log = log_of(spoken("r", *["x"] * (3 * RUN_LENGTH + 5)))
    assert delta(log.next(0)) == ("x" * (3 * RUN_LENGTH + 5), 3 * RUN_LENGTH + 5, 3 * RUN_LENGTH + 5)


def test_other_events_are_kept() -> None:
    """Events without a merge rule are sent one by one, in order."""
    log = log_of(begun("r"), begun("r"))
    assert [(event.seq, event.merged) for event in (log.next(0), log.next(1)) if event] == [(1, 1), (2, 1)]


def test_a_merge_ends_at_an_event_that_is_kept() -> None:
    """Deltas before and after another event are two events."""
    log = log_of(spoken("r", "a", "b"), begun("r"), spoken("r", "c"))
    assert delta(log.next(0)) == ("ab", 2, 2)
    assert delta(log.next(3)) == ("c", 4, 1)


def test_the_latest_wins() -> None:
    """Of neighbours of such a kind the newest alone is sent, and says for how many it stands."""
    event = log_of(*progress(10, 20, 30)).next(0)
    assert event == Progress(percent=30, seq=3, merged=3)


def test_the_latest_of_what_still_waits_wins() -> None:
    """A reader that has seen some is told of the others only."""
    assert log_of(*progress(10, 20, 30)).next(1) == Progress(percent=30, seq=3, merged=2)
    assert log_of(*progress(10, 20, 30)).next(2) == Progress(percent=30, seq=3)


def test_the_latest_wins_only_among_neighbours() -> None:
    """Another kind, a delta or an end between two of them keeps both."""
    for between in (OtherProgress(percent=1), spoken("r", "a"), done("r")):
        log = log_of(*progress(10, 20), between, *progress(30))
        assert log.next(0) == Progress(percent=20, seq=2, merged=2)
        assert log.next(3) == Progress(percent=30, seq=4)


def test_the_latest_wins_up_to_a_position() -> None:
    """Merging stops at `upto`, so what stood before and what comes now are not mixed."""
    log = log_of(*progress(10, 20, 30))
    assert log.next(0, 2) == Progress(percent=20, seq=2, merged=2)


@pytest.mark.parametrize("upto", [1, 2, RUN_LENGTH, RUN_LENGTH + 1, 150])
def test_deltas_merge_up_to_a_position(upto: int) -> None:
    """The same for deltas, within a run and over several."""
    log = log_of(spoken("r", *["x"] * 150))
    assert delta(log.next(0, upto)) == ("x" * upto, upto, upto)
    assert log.next(upto, upto) is None


def test_a_reader_that_is_ahead_waits() -> None:
    """Past the head, and past `upto`, there is nothing."""
    log = log_of(spoken("r", "a", "b"))
    assert log.next(2) is None
    assert log.next(99) is None
    assert log.next(2, 1) is None


def test_upto_beyond_the_head_is_the_head() -> None:
    """A bound that was never reached bounds nothing."""
    assert delta(log_of(spoken("r", "a", "b")).next(0, 99)) == ("ab", 2, 2)


def test_empty_deltas_take_positions() -> None:
    """A delta without text is an event like any other."""
    assert delta(log_of(spoken("r", "", "", "")).next(0)) == ("", 3, 3)


def test_a_frame_is_bounded() -> None:
    """Deltas are joined up to `MAX_FRAME_CHARS`, and what is over comes next."""
    half = "x" * (MAX_FRAME_CHARS // 2)
    log = log_of(spoken("r", half, half, "y"))
    assert delta(log.next(0)) == (half + half, 2, 2)
    assert delta(log.next(2)) == ("y", 3, 1)


def test_a_delta_that_fills_a_frame_goes_alone() -> None:
    """The largest delta is not joined to the one before it."""
    log = log_of(spoken("r", "a", "x" * MAX_FRAME_CHARS, "b"))
    assert [delta(log.next(position))[2] for position in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("character", ["\x00", '"', "é", "\u2028", "🙂"])
def test_a_full_frame_is_small_enough_encoded(character: str) -> None:
    """Whatever its characters cost, a frame stays under the limit of the protocol."""
    event = log_of(spoken("r" * 64, *[character] * (2 * MAX_FRAME_CHARS))).next(0)
    assert event is not None
    frame = JSON.encode(event)
    assert isinstance(frame, str)
    assert len(frame.encode()) <= MAX_FRAME_BYTES
    assert event.merged == MAX_FRAME_CHARS


def test_what_is_sent_leaves_the_log_as_it_was() -> None:
    """`seq` and `merged` are set on what is sent only."""
    log = log_of(begun("r"), *progress(1, 2))
    log.next(0)
    log.next(1)
    assert flat(log.entries(0)) == flat([begun("r"), *progress(1, 2)])


# --- entries, windows and drop -------------------------------------------------------------------------------------


def test_entries_are_not_merged() -> None:
    """Each delta keeps its position, each event its place."""
    written: list[Entry] = [begun("r"), spoken("r", "a", "", "b"), Deltas(THOUGHT, ["c"]), done("r")]
    assert flat(log_of(*written).entries(0)) == flat(written)


def test_entries_begin_after_any_position() -> None:
    """Also in the middle of a run, joined already or not."""
    written: list[Entry] = [begun("r"), spoken("r", *map(str, range(RUN_LENGTH + 20))), done("r")]
    everything = flat(written)
    for after in range(len(everything) + 2):
        assert flat(log_of(*written).entries(after)) == everything[after:]


def test_entries_stop_after_enough_characters() -> None:
    """With a limit about so many characters are returned, at least one entry."""
    log = log_of(spoken("r", *["x" * 10] * 1000))
    found = flat(log.entries(0, 2000))
    assert 200 <= len(found) <= 200 + RUN_LENGTH
    assert len(flat(log.entries(0, 1))) >= 1


def test_entries_stop_after_enough_events() -> None:
    """Events that are not deltas count against the limit as well."""
    log = log_of(*[begun("r")] * (3 * MAX_SINGLES))
    assert len(log.entries(0, MAX_FRAME_CHARS)) == MAX_SINGLES


@pytest.mark.parametrize("skip", range(8))
def test_entries_may_begin_anywhere(skip: int) -> None:
    """Also in the middle of a run, and past the end."""
    entries: list[Entry] = [begun("r"), spoken("r", "a", "b", "c"), spoken("r", "d"), done("r")]
    assert flat(entries_from(entries, skip)) == flat(entries)[skip:]


def test_length_counts_positions() -> None:
    """A run takes one for each delta, any other event one."""
    assert [length(entry) for entry in (spoken("r", "a", "b"), spoken("r"), begun("r"))] == [2, 0, 1]


def test_a_window_begins_where_it_is_told() -> None:
    """A log may start late: its positions go on from there, and it says what it covers."""
    log = log_of(spoken("r", "a", "b"), start=10)
    assert (log.start, log.head) == (10, 12)
    assert log.covers(10)
    assert not log.covers(9)
    assert delta(log.next(10)) == ("ab", 12, 2)


def test_drop_forgets_whole_runs() -> None:
    """A run that `upto` falls into stays whole, so the window may be a little larger than asked for."""
    log = log_of(spoken("r", *["x"] * (2 * RUN_LENGTH)))
    log.drop(RUN_LENGTH + 5)
    assert (log.start, log.head) == (RUN_LENGTH, 2 * RUN_LENGTH)
    assert delta(log.next(RUN_LENGTH + 5))[1] == 2 * RUN_LENGTH


@pytest.mark.parametrize("upto", [3, 99])
def test_drop_of_everything_keeps_the_head(upto: int) -> None:
    """An emptied log stands where it stood, and goes on from there."""
    log = log_of(begun("r"), spoken("r", "a", "b"))
    log.drop(upto)
    assert (log.start, log.head, log.entries(3)) == (3, 3, [])
    log.append_delta(TEXT, "c")
    assert delta(log.next(3)) == ("c", 4, 1)


def test_drop_of_nothing_changes_nothing() -> None:
    """Before the window there is nothing to forget."""
    log = log_of(begun("r"), start=5)
    log.drop(0)
    log.drop(5)
    assert (log.start, log.head) == (5, 6)


def test_drop_of_an_empty_log() -> None:
    """There is nothing to forget in it."""
    log = ChannelLog(7)
    log.drop(3)
    log.drop(9)
    assert (log.start, log.head) == (7, 7)


ENTRIES = st.lists(
    st.one_of(
        st.integers(1, 90).map(lambda count: spoken("r", *map(str, range(count)))),
        st.integers(1, 9).map(lambda count: Deltas(THOUGHT, ["🙂"] * count)),
        st.integers(0, 9).map(lambda percent: Progress(percent=percent)),
        st.just(begun("r")),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(ENTRIES, st.data())
def test_any_window_serves_what_the_whole_log_does(entries: list[Entry], data: st.DataObject) -> None:
    """Whatever was dropped, positions at and after the start are served as before, contiguously to the head."""
    whole, window = log_of(*entries), log_of(*entries)
    window.drop(data.draw(st.integers(0, whole.head)))
    assert window.head == whole.head
    position = data.draw(st.integers(window.start, window.head))
    assert flat(window.entries(position)) == flat(whole.entries(position))
    while (event := window.next(position)) is not None:
        assert event == whole.next(position)
        assert event.seq - event.merged == position
        position = event.seq
    assert position == whole.head


# --- positions -----------------------------------------------------------------------------------------------------


def test_positions_are_pairs() -> None:
    """Channels and positions, joined by commas."""
    assert parse_positions("session:41,resp_9:512") == {"session": 41, "resp_9": 512}


def test_a_position_may_be_0() -> None:
    """A channel that was seen created and nothing of it came yet is named at 0."""
    assert parse_positions("session:0") == {"session": 0}


def test_positions_that_are_written_are_read() -> None:
    """Formatting and parsing are each other's opposite."""
    positions = {"session": 41, "resp_9": 0, "A-z_0": 999_999_999_999_999}
    assert parse_positions(format_positions(positions)) == positions


BAD_PAIRS = ["session", "session:", ":1", "session:-1", "session:+1", "session:1.0", "session:1e3", "session:x", ":"]
BAD_NUMBERS = ["session: 1", "session:٣", "session:²", "session:1_0", "session:" + "9" * 16]
BAD_LISTS = ["", ",", "session:1,", ",session:1", "session:1,,resp:2"]


@pytest.mark.parametrize("text", BAD_PAIRS + BAD_NUMBERS + BAD_LISTS)
def test_other_positions_are_refused(text: str) -> None:
    """Anything else is the client's mistake, and the error names the parameter."""
    with pytest.raises(InvalidRequest) as refusal:
        parse_positions(text)
    assert (refusal.value.code, refusal.value.param) == ("invalid_positions", "after")
