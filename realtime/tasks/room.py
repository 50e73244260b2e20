"""How many tasks run in a process at once, and which is next."""

from __future__ import annotations

import asyncio


class Line:
    """The tasks of one name, for whose next one at most one waits for a slot. The lower `urgency` comes first."""

    def __init__(self, *, urgency: int, limit: int) -> None:
        self.urgency = urgency
        self.limit = limit
        self.running = 0


class Room:
    """The slots of a process. The most urgent line gets the next one that is free; among equals who waits longest."""

    def __init__(self, slots: int) -> None:
        self.is_closed = False
        """Nobody gets a slot any more."""
        self.still = asyncio.Event()
        """Set while nothing is under way between `begin` and `end`."""
        self.still.set()
        self._free = slots
        self._waiting: dict[Line, asyncio.Future[None]] = {}
        self._under_way = 0

    async def take(self, line: Line) -> None:
        """Take a slot once there is one for the line; who is cancelled meanwhile may have got it."""
        turn = self._waiting[line] = asyncio.get_running_loop().create_future()
        self._admit()
        await turn

    def try_take(self, line: Line) -> bool:
        """Take a slot if there is one for the line; returns whether there was."""
        if self.is_closed or not self._free or line.running >= line.limit:
            return False
        self._free -= 1
        line.running += 1
        return True

    def release(self, line: Line) -> None:
        """Give a slot back."""
        self._free += 1
        line.running -= 1
        self._admit()

    def begin(self) -> None:
        """One more is under way."""
        self._under_way += 1
        self.still.clear()

    def end(self) -> None:
        """One less is under way."""
        self._under_way -= 1
        if not self._under_way:
            self.still.set()

    def _admit(self) -> None:
        for line in sorted(self._waiting, key=lambda line: line.urgency):
            if self.try_take(line):
                turn = self._waiting.pop(line)
                if not turn.done():
                    turn.set_result(None)
