"""Who looks at a session, and when a response that nobody looks at has to end. Pure: time is an argument."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

from realtime.protocol import Participant, Session
from realtime.store.base import Viewer

UNSEEN_FLOOR_S = 15.0
"""A response that no connection has seen yet waits at least so long, from its creation."""
SERVER_ENDED_FLOOR_S = 15.0
"""So long waits a response whose last viewer was cut off by the server."""


class Audience:
    """The participants of a session, and since when there are none.

    `participants` maps connection ids to participants, the oldest first; it is replaced at each change and never
    changed, so a reader that kept the last one it was told of can tell what is new. Times are monotonic seconds.
    """

    __slots__ = ("_floor_s", "_instances", "_left_at", "_unseen", "participants")

    def __init__(self, viewers: Iterable[Viewer] = (), *, now: float) -> None:
        there = {viewer.participant.connection_id: viewer for viewer in viewers}
        self.participants: Mapping[str, Participant] = MappingProxyType(
            {connection_id: viewer.participant for connection_id, viewer in there.items()}
        )
        self._instances = {connection_id: viewer.instance for connection_id, viewer in there.items()}
        self._left_at = now
        self._floor_s = SERVER_ENDED_FLOOR_S
        self._unseen: dict[str, float] = {}

    def join(self, viewer: Viewer) -> None:
        """A connection looks at the session, and sees whatever runs in it."""
        connection_id = viewer.participant.connection_id
        self._instances[connection_id] = viewer.instance
        self.participants = MappingProxyType({**self.participants, connection_id: viewer.participant})
        self._unseen.clear()

    def leave(self, connection_id: str, *, floor_s: float, now: float) -> None:
        """A connection is gone; `floor_s` is the least grace that its end deserves."""
        if self._instances.pop(connection_id, None) is None:
            return
        self.participants = MappingProxyType(
            {key: value for key, value in self.participants.items() if key != connection_id}
        )
        self._left_at = now
        self._floor_s = floor_s

    def replace(self, viewers: Iterable[Viewer], *, now: float) -> None:
        """It is these connections that look at the session. Nobody knows how the others left: they had bad luck."""
        there = {viewer.participant.connection_id: viewer for viewer in viewers}
        for connection_id in self._instances.keys() - there.keys():
            self.leave(connection_id, floor_s=SERVER_ENDED_FLOOR_S, now=now)
        for connection_id in there.keys() - self._instances.keys():
            self.join(there[connection_id])
        if list(self.participants) != list(there):  # one has left and come back
            self.participants = MappingProxyType({key: viewer.participant for key, viewer in there.items()})

    @property
    def instances(self) -> Collection[str]:
        """The instances that the connections are attached to."""
        return set(self._instances.values())

    def attached_to(self, instance: str) -> list[str]:
        """The ids of the connections that are attached to an instance."""
        return [connection_id for connection_id, own in self._instances.items() if own == instance]

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
