"""Who looks at a session, and when a response that nobody looks at has to end. Pure: time is an argument."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from realtime.protocol import Participant, Session

UNSEEN_FLOOR_S = 15.0
"""A response that no connection has seen yet waits at least so long, from its creation."""
SERVER_ENDED_FLOOR_S = 15.0
"""So long waits a response whose last viewer was cut off by the server."""


class Audience:
    """The participants of a session, and since when there are none.

    `participants` maps connection ids to participants, the oldest first; it is replaced at each change and never
    changed, so a reader that kept the last one it was told of can tell what is new. Times are monotonic seconds.
    """

    __slots__ = ("_floor_s", "_left_at", "_unseen", "participants")

    def __init__(self, participants: Iterable[Participant] = (), *, now: float) -> None:
        self.participants: Mapping[str, Participant] = MappingProxyType(
            {participant.connection_id: participant for participant in participants}
        )
        self._left_at = now
        self._floor_s = SERVER_ENDED_FLOOR_S
        self._unseen: dict[str, float] = {}

    def join(self, participant: Participant) -> None:
        """A connection looks at the session, and sees whatever runs in it."""
        self.participants = MappingProxyType({**self.participants, participant.connection_id: participant})
        self._unseen.clear()

    def leave(self, participant: Participant, *, floor_s: float, now: float) -> None:
        """A connection is gone; `floor_s` is the least grace that its end deserves."""
        left = participant.connection_id
        self.participants = MappingProxyType({key: value for key, value in self.participants.items() if key != left})
        self._left_at = now
        self._floor_s = floor_s

    def created(self, response_id: str, *, now: float) -> None:
        """A response was created: without viewers its clock starts now."""
        if not self.participants:
            self._unseen[response_id] = now

    def ended(self, response_id: str) -> None:
        """A response has ended; its clock is not needed any more."""
        self._unseen.pop(response_id, None)

    def due(self, response_id: str, settings: Session) -> float | None:
        """When the response has to be cancelled for want of viewers; `None`: not as things are."""
        if self.participants or settings.on_disconnect == "continue":
            return None
        grace_s = settings.disconnect_grace_ms / 1000
        if response_id in self._unseen:
            return self._unseen[response_id] + max(grace_s, UNSEEN_FLOOR_S)
        return self._left_at + max(grace_s, self._floor_s)
