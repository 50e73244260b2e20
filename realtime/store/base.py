"""The store's interface and its guarantees. Every implementation passes `tests/contract/`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import Literal, Protocol, Self

from msgspec import Struct

from realtime.errors import ConflictError
from realtime.log import Deltas, Entry
from realtime.protocol import CONTROL_CHANNEL, Participant, Session


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


def only_deltas(write: Write) -> bool:
    """Whether a write says nothing but deltas: those that look at its session need not be told at once."""
    return all(isinstance(entry, Deltas) for entry in write.entries)


def ends_channel(write: Write) -> bool:
    """Whether the last entry of a write is the end of its channel."""
    last = write.entries[-1]
    return not isinstance(last, Deltas) and last.ends_channel


def is_free(write: Write) -> bool:
    """Whether a full session takes it all the same: what ends something, or asks for an end."""
    return write.channel == CONTROL_CHANNEL or ends_channel(write)


def session_full() -> ConflictError:
    """The session takes no more."""
    return ConflictError("session_full", "The session holds as much as a session may; start a new one.")


class Made(Struct, frozen=True, omit_defaults=True):
    """The ids of what a command has made."""

    response_id: str | None = None
    item_id: str | None = None
    task_id: str | None = None


class CommandRecord(Struct, frozen=True):
    """A command that is recorded with its effect. `event_id` is the client's, unique for its user in a session;
    `digest` tells whether another command under that id says the same; `made` is what it has made."""

    user: str
    event_id: str
    digest: bytes
    made: Made = Made()


class Batch(Struct, frozen=True):
    """One session's part of `Store.append_all`; `keep_s` as in `Store.append`."""

    session_id: str
    writes: Sequence[Write]
    keep_s: float = 0.0


class TaskRef(Struct, frozen=True, order=True, array_like=True):
    """A task: the session whose log it is told in, its channel there, and the name of what it runs."""

    session_id: str
    task_id: str
    name: str


class Head(Struct, frozen=True):
    """Where a channel stands; `finished` where its last event ended it."""

    position: int
    finished: bool


class Snapshot(Struct, frozen=True):
    """What the store knows of a session beside its logs: how it was made, how long it lives, its channels, and how
    often somebody has joined or left it."""

    session: Session
    expires_in_s: float
    size_bytes: int
    heads: dict[str, Head]
    audience: int


class Viewer(Struct, frozen=True):
    """A connection that looks at a session, and the instance that it is attached to: it counts while that one lives."""

    participant: Participant
    instance: str


class Standing(Struct, frozen=True):
    """Numbers that grow with what happens to a session: who knows them all has missed nothing of that kind.

    The positions of its own channel and of its control channel, and how often somebody joined or left.
    """

    session: int
    control: int
    audience: int


class Appended(Struct, frozen=True):
    """Told to watchers: `entries` now stand in `channel`, the first of them at position `first`."""

    channel: str
    first: int
    entries: Sequence[Entry]


class ViewerJoined(Struct, frozen=True):
    """Told to watchers: a connection looks at the session."""

    viewer: Viewer


class ViewerLeft(Struct, frozen=True):
    """Told to watchers: a connection is gone. `floor_s` is the least grace that its end deserves."""

    participant: Participant
    floor_s: float


class Missed(Struct, frozen=True):
    """Told to watchers: something may have happened that was not told. What the store has has to be read again."""


class Gone(Struct, frozen=True):
    """Told to watchers, once, at the latest when a call finds it out: the store does not have the session any more.

    Somebody has `deleted` it, or the store has `lost` it: by its expiry, or by a fault.
    """

    reason: Literal["deleted", "lost"]


Notice = Appended | ViewerJoined | ViewerLeft | Missed | Gone
Listener = Callable[[Notice], None]
"""Called on the event loop, in the order of the appends. It must not raise, await or append."""
Unwatch = Callable[[], None]
"""Ends a watch. Safe to call when the session is gone, and twice."""


class Store(Protocol):
    """Sessions, their logs, who looks at them, which instances live, and which tasks are unfinished. Owned by
    `async with`.

    Every method that names a session, but `create` and those that watch, raises `NotFound` (`session_not_found`) for
    one that the store doesn't know, whether it never was, expired, or was erased. Every method raises `StoreError`
    where the store does not answer, within 1.5 s: then the call may have had its effect, or may still have it.
    Cancelling a call leaves its effect either whole or absent.

    A session expires when it has not been used for its time to live. A use moves its end only if that is worth a
    twentieth of this time, and never back. To read is no use: whether somebody may see a session is known only then.
    """

    shared: bool
    """Whether other processes see the same sessions."""

    async def create(self, session: Session, ttl_s: float | None = None) -> None:
        """Make a session that lives for `ttl_s` after its last use; `None` is what the store gives every session. Its
        `expires_at` is not kept: the store knows better."""

    async def load(self, session_id: str) -> Snapshot:
        """What is known of a session."""

    async def use(self, session_id: str) -> None:
        """Say that a session is in use, by somebody who may use it."""

    async def append(
        self, session_id: str, writes: Sequence[Write], command: CommandRecord | None = None, *, keep_s: float = 0.0
    ) -> None:
        """Append to one or more channels of a session: all of it or nothing, and in the same step record `command`.

        Raises `PositionConflict` if a channel is not where its write expects it or has ended, `CommandSeen` if the
        command is recorded already, and `ConflictError` (`session_full`) if the session holds too much, unless all
        writes end a channel or go to the control channel. Watchers are told in the order of the appends, those of
        this process before the call returns. Counts as use of the session, which is kept for `keep_s` from now (less a
        twentieth of its time to live, as with any use) even if its time to live is shorter.
        """

    async def append_all(self, batches: Sequence[Batch]) -> list[Exception | None]:
        """Many sessions' appends in one round trip: each succeeds or fails alone, and its error is returned."""

    async def read(self, session_id: str, channel: str, after: int, max_chars: int) -> list[Entry]:
        """The entries after position `after`, in order: all, or at least one and about `max_chars` characters. It is no
        use of the session."""

    async def find_command(self, session_id: str, user: str, event_id: str) -> CommandRecord | None:
        """The record of a command; `None` if it was not carried out. At least the newest 1,000 are kept."""

    async def watch(self, session_id: str, listener: Listener) -> Unwatch:
        """Call `listener` for what happens to the session from when this returns, but for appends of deltas alone.

        Who watches first, then reads, then goes on by position misses nothing and sees nothing twice. Where a store
        can't be sure that it has told everything it tells `Missed`. An unknown session may be watched in vain.
        """

    async def follow(self, session_id: str, channel: str, listener: Listener) -> Unwatch:
        """The same for what `watch` leaves out, of one channel, whoever writes it: a process hears its own appends,
        before they return. So who shows what it says by itself must not follow it."""

    async def join(self, session_id: str, viewer: Viewer) -> None:
        """Say that a connection looks at the session; watchers are told. Nothing happens if it does already, but that
        it counts as use."""

    async def leave(self, session_id: str, connection_id: str, floor_s: float) -> None:
        """Say that a connection is gone; watchers are told. Nothing happens if it never joined."""

    async def viewers(self, session_id: str) -> list[Viewer]:
        """The connections that look at the session, the oldest first, those of lost instances included."""

    async def standings(self, session_ids: Sequence[str]) -> list[Standing | None]:
        """Where sessions stand, in one round trip; `None` for one that the store doesn't know."""

    async def erase(self, session_id: str) -> None:
        """Forget the session and everything of it, at once."""

    async def sign(self, instance: str, lease_s: float) -> None:
        """Say that an instance lives, for the next `lease_s`."""

    async def resign(self, instance: str) -> None:
        """Say that it doesn't any more."""

    async def living(self, instances: Collection[str]) -> set[str]:
        """Those of the instances that have signed and whose leases have not run out."""

    async def track(self, task: TaskRef, due_s: float, payer: str | None = None, most: int = 0) -> bool:
        """Remember a task that is about to be recorded: it has to be looked after in `due_s`, unless it is untracked
        before. For one that is remembered already this is its new time.

        Where there is a `payer`, of whose tasks `most` others are remembered already, nothing is done; returns whether
        something was. In one step: of many that call at once no more get through than there is room for.

        All is forgotten once the index was not used for a day and twice as long as any session or task lives that has
        the store's own time to live.
        """

    async def untrack(self, tasks: Sequence[TaskRef]) -> None:
        """Forget tasks that need no looking after; nothing happens for those that are not remembered."""

    async def overdue(self, again_s: float, limit: int) -> list[TaskRef]:
        """The tasks that have to be looked after now: those that have waited longest, `limit` at most.

        In the same step each has to be looked after again in `again_s`, so of many that call at once one gets it.
        """

    async def tracked(self) -> int:
        """How many tasks are remembered."""

    async def ping(self) -> None:
        """Return if the store answers; raise `StoreError` if not."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
