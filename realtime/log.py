"""A channel's log in memory: positions, and the merging of what a reader has not seen yet. No I/O, no clock.

Events are numbered 1, 2, 3, … A position is the number of the last event that somebody has. Deltas, which are nearly
all events, are held in runs: a list of texts while they come in, one joined string with its lengths once the run is
full, so that a thousand deltas cost little more than their characters and can still be split at any position.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter

from msgspec import Struct
from msgspec.structs import replace

from realtime.errors import InvalidRequest
from realtime.protocol import MAX_FRAME_CHARS, ChannelEvent, Delta, Merge

MAX_SINGLES = 64
RUN_LENGTH = 64
"""Deltas in a run before it is joined: large enough that the joined form pays, small enough to slice quickly."""


class Deltas(Struct, frozen=True):
    """Neighbouring deltas of one kind, a position each. `template` is one such event with an empty `delta`."""

    template: Delta
    texts: Sequence[str]


Entry = Deltas | ChannelEvent
"""What a log is written and read in: a run of deltas, or one event of another kind."""


def length(entry: Entry) -> int:
    """How many positions an entry takes."""
    return len(entry.texts) if isinstance(entry, Deltas) else 1


def entries_from(entries: Iterable[Entry], skip: int) -> Iterator[Entry]:
    """The entries without their first `skip` positions."""
    for entry in entries:
        size = length(entry)
        if skip >= size:
            skip -= size
        elif skip > 0 and isinstance(entry, Deltas):
            yield Deltas(entry.template, entry.texts[skip:])
            skip = 0
        else:
            yield entry


def parse_positions(text: str) -> dict[str, int]:
    """The positions of `session:41,resp_9:512`; raises `InvalidRequest` where it is anything else."""
    positions: dict[str, int] = {}
    for pair in text.split(","):
        channel, _, number = pair.rpartition(":")
        if not channel or not (number.isascii() and number.isdigit() and len(number) <= 15):
            raise InvalidRequest("invalid_positions", "Positions look like session:41,resp_9:512.", param="after")
        positions[channel] = int(number)
    return positions


def format_positions(positions: dict[str, int]) -> str:
    """The opposite of `parse_positions`."""
    return ",".join(f"{channel}:{position}" for channel, position in positions.items())


class _Single:
    """One event that is not a delta."""

    __slots__ = ("event", "first")

    count = 1

    def __init__(self, first: int, event: ChannelEvent) -> None:
        self.first = first
        self.event = event


class _Run:
    """Deltas of one kind at the positions `first`, `first + 1`, …: a list of texts, then one joined string."""

    __slots__ = ("_joined", "_lengths", "_texts", "count", "first", "template")

    def __init__(self, first: int, template: Delta) -> None:
        self.first = first
        self.template = template
        self.count = 0
        self._texts: list[str] = []
        self._joined = ""
        self._lengths: array[int] | None = None

    @property
    def full(self) -> bool:
        return self._lengths is not None

    def append(self, text: str) -> None:
        self._texts.append(text)
        self.count += 1
        if self.count == RUN_LENGTH:
            self._lengths = array("I", map(len, self._texts))
            self._joined = "".join(self._texts)
            self._texts = []

    def texts(self, start: int, stop: int) -> list[str]:
        if self._lengths is None:
            return self._texts[start:stop]
        offset = sum(self._lengths[:start])
        texts = []
        for size in self._lengths[start:stop]:
            texts.append(self._joined[offset : offset + size])
            offset += size
        return texts


class ChannelLog:
    """The events of one channel after `start`, up to and including `head`.

    A log that begins at 0 is the whole channel; one with a later `start` is a window of its end.
    """

    __slots__ = ("_runs", "head", "start")

    def __init__(self, start: int = 0) -> None:
        self.start = start
        self.head = start
        self._runs: list[_Run | _Single] = []

    def append(self, event: ChannelEvent) -> None:
        """Add an event of any kind but a delta."""
        self.head += 1
        self._runs.append(_Single(self.head, event))

    def append_delta(self, template: Delta, text: str) -> None:
        """Add a delta: `template` with `text` in it."""
        self.head += 1
        run = self._runs[-1] if self._runs else None
        if not isinstance(run, _Run) or run.full or not _same(run.template, template):
            run = _Run(self.head, template)
            self._runs.append(run)
        run.append(text)

    def extend(self, entries: Iterable[Entry]) -> None:
        """Add entries, in order."""
        for entry in entries:
            if isinstance(entry, Deltas):
                for text in entry.texts:
                    self.append_delta(entry.template, text)
            else:
                self.append(entry)

    def covers(self, position: int) -> bool:
        """Whether everything after `position` that the channel has so far is held here."""
        return self.start <= position

    def entries(self, after: int, max_chars: int | None = None) -> list[Entry]:
        """Everything after `after`, unmerged; with `max_chars` it stops once it has about so many characters, or
        `MAX_SINGLES` events that are not deltas."""
        found: list[Entry] = []
        chars = 0
        weight = (max_chars or 0) // MAX_SINGLES
        for run in self._runs[self._index(after + 1) :]:
            if isinstance(run, _Single):
                found.append(run.event)
                chars += weight
            else:
                texts = run.texts(max(0, after + 1 - run.first), run.count)
                found.append(Deltas(run.template, texts))
                chars += sum(map(len, texts))
            if max_chars is not None and chars >= max_chars:
                break
        return found

    def next(self, after: int, upto: int | None = None) -> ChannelEvent | None:
        """What a reader at `after` is sent next, with `seq` and `merged`: one event that may stand for several.

        Neighbours are joined by their merge rule up to and including position `upto` (default: the head) and
        `MAX_FRAME_CHARS`. `None` if nothing waits.
        """
        last = self.head if upto is None else min(upto, self.head)
        if after >= last:
            return None
        index = self._index(after + 1)
        run = self._runs[index]
        if isinstance(run, _Run):
            return self._joined(index, after, last)
        if run.event.merge is Merge.LATEST:
            return self._latest(index, after, last)
        return replace(run.event, seq=after + 1)

    def drop(self, upto: int) -> None:
        """Forget whole runs up to position `upto`; the window then starts after them."""
        kept = self._index(upto + 1)
        if kept < len(self._runs) and self._runs[kept].first <= upto:
            upto = self._runs[kept].first - 1
        del self._runs[:kept]
        self.start = max(self.start, min(upto, self.head))

    def _index(self, position: int) -> int:
        """The index of the run that holds `position`; past the end if none does."""
        if self._runs and position >= self._runs[-1].first:
            return len(self._runs) - (position <= self.head)
        return max(0, bisect_right(self._runs, position, key=attrgetter("first")) - 1)

    def _joined(self, index: int, after: int, last: int) -> ChannelEvent:
        template: Delta | None = None
        texts: list[str] = []
        room = MAX_FRAME_CHARS
        position = after
        for run in self._runs[index:]:
            if not isinstance(run, _Run) or (template is not None and not _same(run.template, template)):
                break
            template = run.template
            for text in run.texts(position + 1 - run.first, last + 1 - run.first):
                room -= len(text)
                if room < 0 and texts:
                    return _delta(template, texts, position)
                texts.append(text)
                position += 1
            if position == last:
                break
        assert template is not None
        return _delta(template, texts, position)

    def _latest(self, index: int, after: int, last: int) -> ChannelEvent:
        newest = self._runs[index]
        assert isinstance(newest, _Single)
        for run in self._runs[index + 1 : index + last - after]:
            if not isinstance(run, _Single) or type(run.event) is not type(newest.event):
                break
            newest = run
        return replace(newest.event, seq=newest.first, merged=newest.first - after)


def _delta(template: Delta, texts: list[str], position: int) -> ChannelEvent:
    text = texts[0] if len(texts) == 1 else "".join(texts)
    return replace(template, delta=text, seq=position, merged=len(texts))


def _same(one: Delta, other: Delta) -> bool:
    return one is other or one == other
