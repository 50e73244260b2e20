"""The store's interface and its guarantees. Every implementation passes `tests/contract/`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Literal, Protocol, Self

from msgspec import Struct

from realtime.log import Entry
from realtime.protocol import Participant, Session


class PositionConflict(Exception):
    """A write expected another position: somebody else got there first. Nothing was written.

    Whoever decided on a fold of the log folds again and decides again; whoever owned the channel has lost it.
    """


class CommandSeen(Exception):
    """The command of an append was carried out before. Nothing was written."""


class Write(Struct, frozen=True):
    """Entries for the end of one channel; `expect` is the position that the channel must have now, `None` any."""

    channel: str
    entries: Sequence[Entry]
    expect: int | None = None


class CommandRecord(Struct, frozen=True):
    """A command that is recorded with its effect. `event_id` is the client's, unique for its user in a session;
    `digest` tells whether another command under that id says the same."""

    user: str
    event_id: str
    digest: bytes


class Batch(Struct, frozen=True):
    """One session's part of `Store.append_all`."""

    session_id: str
    writes: Sequence[Write]


class Head(Struct, frozen=True):
    """Where a channel stands; `finished` where its last event ended it."""

    position: int
    finished: bool


class Snapshot(Struct, frozen=True):
    """What the store knows of a session beside its logs: how it was made, how long it lives, its channels."""

    session: Session
    expires_in_s: float
    size_bytes: int
    heads: dict[str, Head]


class Appended(Struct, frozen=True):
    """Told to watchers: `entries` now stand in `channel`, the first of them at position `first`."""

    channel: str
    first: int
    entries: Sequence[Entry]


class ViewerJoined(Struct, frozen=True):
    """Told to watchers: a connection looks at the session."""

    participant: Participant


class ViewerLeft(Struct, frozen=True):
    """Told to watchers: a connection is gone. `floor_s` is the least grace that its end deserves."""

    participant: Participant
    floor_s: float


class Gone(Struct, frozen=True):
    """Told to watchers: the store does not have the session any more."""

    reason: Literal["deleted", "expired"]


Notice = Appended | ViewerJoined | ViewerLeft | Gone
Listener = Callable[[Notice], None]
"""Called on the event loop, in the order of the appends. It must not raise, await or append."""


class Store(Protocol):
    """Sessions, their logs, and who looks at them. Owned by `async with`.

    Every method but `create` and `ping` raises `NotFound` (`session_not_found`) for a session that the store doesn't
    know, whether it never was, expired, or was erased. Cancelling a call leaves its effect either whole or absent.
    """

    async def create(self, session: Session) -> None:
        """Make a session. Its `expires_at` is not kept: the store knows better."""

    async def load(self, session_id: str) -> Snapshot:
        """What is known of a session; counts as use of it."""

    async def append(self, session_id: str, writes: Sequence[Write], command: CommandRecord | None = None) -> None:
        """Append to one or more channels of a session: all of it or nothing, and in the same step record `command`.

        Raises `PositionConflict` if a channel is not where its write expects it, `CommandSeen` if the command is
        recorded already, and `ConflictError` (`session_full`) if the session holds too much, unless the writes end a
        channel or go to the control channel. Watchers are told in the order of the appends. Counts as use of the
        session.
        """

    async def append_all(self, batches: Sequence[Batch]) -> list[Exception | None]:
        """Many sessions' appends in one round trip: each succeeds or fails alone, and its error is returned."""

    async def read(self, session_id: str, channel: str, after: int, max_chars: int) -> list[Entry]:
        """The entries after position `after`, in order: all, or at least one and about `max_chars` characters."""

    async def find_command(self, session_id: str, user: str, event_id: str) -> CommandRecord | None:
        """The record of a command; `None` if it was not carried out. At least the newest 1,000 are kept."""

    def watch(self, session_id: str, listener: Listener) -> Callable[[], None]:
        """Call `listener` for what happens to the session from now on; returns the function that ends it.

        Who watches first, then reads, then goes on by position misses nothing and sees nothing twice.
        """

    async def hold(self, session_id: str, viewers: Sequence[Participant], lease_s: float) -> None:
        """Say that these connections look at the session for the next `lease_s`, unless said again before.

        Counts as use of the session, also without viewers. Watchers are told of new ones.
        """

    async def release(self, session_id: str, connection_id: str, floor_s: float) -> None:
        """Say that a connection is gone; watchers are told. Nothing happens if it isn't held."""

    async def viewers(self, session_id: str) -> list[Participant]:
        """The connections that look at the session, the oldest first."""

    async def erase(self, session_id: str) -> None:
        """Forget the session and everything of it, at once."""

    async def ping(self) -> None:
        """Return if the store answers; raise `StoreError` if not."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
