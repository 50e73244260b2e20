"""What a connection is told that belongs to no log: answers to its own messages, and who came and went."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping

from realtime.protocol import Participant, ParticipantJoined, ParticipantLeft, ServerMessage

MAX_WAITING = 64
"""Messages that may wait on one connection; who has more to tell it waits then."""


class Asides:
    """The few messages beside the logs that wait for one connection.

    Participants need no queue: `known` is the audience that the client was told of, and what has changed since is
    found when it is ready to be told.
    """

    __slots__ = ("_closed", "_room", "_waiting", "known")

    def __init__(self) -> None:
        self.known: Mapping[str, Participant] = {}
        self._waiting: deque[ServerMessage] | None = None  # made when needed: most connections never need it
        self._closed = False
        self._room: asyncio.Future[None] | None = None

    async def put(self, message: ServerMessage) -> None:
        """Let `message` wait; returns once fewer than `MAX_WAITING` do, or nobody is told any more."""
        self.add(message)
        while not self._closed and self._waiting and len(self._waiting) >= MAX_WAITING:
            self._room = self._room or asyncio.get_running_loop().create_future()
            await asyncio.shield(self._room)

    def close(self) -> None:
        """Nobody is told any more: who waits goes on."""
        self._closed = True
        self._make_room()

    def next(self, audience: Mapping[str, Participant]) -> ServerMessage | None:
        """The next message, `None` if there is none; `audience` is who looks at the session now."""
        if audience is not self.known:
            self._note_changes(audience)
        if not self._waiting:
            return None
        self._make_room()
        return self._waiting.popleft()

    def _make_room(self) -> None:
        if self._room is not None:
            self._room.set_result(None)
            self._room = None

    def add(self, message: ServerMessage) -> None:
        """Let `message` wait, however many do."""
        if self._waiting is None:
            self._waiting = deque()
        self._waiting.append(message)

    def _note_changes(self, audience: Mapping[str, Participant]) -> None:
        known, self.known = self.known, audience
        for connection_id, participant in known.items():
            if connection_id not in audience:
                self.add(ParticipantLeft(participant=participant))
        for connection_id, participant in audience.items():
            if connection_id not in known:
                self.add(ParticipantJoined(participant=participant))
