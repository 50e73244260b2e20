"""The end of a channel's log in this process: what was said here and is not stored yet, and a window of what is."""

from __future__ import annotations

from collections.abc import Sequence

from realtime.log import ChannelLog, Deltas, Entry, entries_from, length
from realtime.protocol import ChannelEvent, Delta

WINDOW = 32
"""How many of a channel's newest events stay at hand for its readers; who is further behind reads from the store."""


class View:
    """The end of one channel's log: all that the store does not have yet, and a window of what it has.

    `stored` is the position up to which the store has the channel.
    """

    __slots__ = ("finished", "log", "stored")

    def __init__(self, position: int = 0) -> None:
        self.log = ChannelLog(position)
        self.stored = position
        self.finished = False

    def append_delta(self, template: Delta, text: str) -> None:
        """Show a delta before it is stored; only the channel's owner does."""
        self.log.append_delta(template, text)
        self._trim()

    def append(self, event: ChannelEvent) -> None:
        """Note an event that is not stored yet; only the channel's owner does, and shows it to nobody before it is."""
        self.log.append(event)
        self._trim()

    def receive(self, first: int, entries: Sequence[Entry]) -> list[ChannelEvent]:
        """Take what the store has from position `first` on, at most one past the head; returns the events of it that
        were not shown before, deltas left out.

        An end that stands where a delta was shown is somebody else's: what was shown from there on never came to be,
        and the log goes on from the store's. Readers that have seen more are beyond the end, and can tell.
        """
        end = first + sum(map(length, entries)) - 1
        if self.finished:
            return []
        if end <= self.log.head and not is_end(entries[-1]):
            self.stored = max(self.stored, end)
            return []
        if end <= self.log.head:
            self.log = ChannelLog(first - 1)
        fresh = list(entries_from(entries, self.log.head + 1 - first))
        self.log.extend(fresh)
        self.stored = max(self.stored, end)
        self.finished = is_end(entries[-1])
        self._trim()
        return [entry for entry in fresh if not isinstance(entry, Deltas)]

    def _trim(self) -> None:
        if self.log.head - self.log.start > 3 * WINDOW:
            self.log.drop(min(self.stored, self.log.head - WINDOW))


def is_end(entry: Entry) -> bool:
    """Whether nothing comes after an entry in its channel."""
    return not isinstance(entry, Deltas) and entry.ends_channel
