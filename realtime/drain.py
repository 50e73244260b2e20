"""How an instance leaves: it closes its door, says goodbye, waits for what runs, and ends what is left."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any, Protocol

from realtime.errors import RealtimeError, ServerError

GOODBYE_S = 0.1
"""Between the last word to the clients and the end of their connections."""
MAX_ENDS_S = 2.0
"""How much of the drain is kept for ending what still runs: responders take their time, and so do stores."""
MAX_ENDS_SHARE = 0.25
"""How much of a drain that is short."""
MAX_RETURN_S = 2.0
"""Over how long the clients of the only instance are spread when they come back to its successor."""


class Visitors(Protocol):
    """Who is connected. While they are `draining` nobody else is let in; their length is how many they are."""

    draining: bool

    def __len__(self) -> int: ...

    def say_goodbye(self, time_left_s: float, spread_s: float) -> None:
        """Tell every client that its connection ends in `time_left_s`, and to come back at a random time of its own
        within the next `spread_s`."""

    async def empty(self) -> None:
        """Return once there is nobody."""


class Work(Protocol):
    """Model calls that run here. While it is `draining` no more of them begin."""

    draining: bool

    async def finish_turns(self) -> None:
        """Return once none runs."""

    async def end_turns(self, error: RealtimeError) -> None:
        """End them all with `error`. Returns once that is told and stored, or after a bounded time."""


class Drain:
    """The end of an instance, up to where whoever has the listener closes it and cuts what is still connected.

    Where the store is `shared`, clients have other instances to go to: they get the time to leave by themselves, spread
    over the whole drain. Where it is not there is nothing to go to: only what runs is waited for, and the clients are
    told at the last moment, or they would leave while they are still being answered.
    """

    def __init__(self, visitors: Visitors, works: Sequence[Work], *, drain_s: float, shared: bool) -> None:
        self._visitors = visitors
        self._works = works
        self._shared = shared
        self._drain_s = drain_s
        self._wait_s = drain_s - min(MAX_ENDS_S, drain_s * MAX_ENDS_SHARE)

    async def run(self) -> None:
        """Returns when nothing runs any more, after `drain_s` at the latest.

        To be called once. Cancelled, it leaves what still runs as it is.
        """
        started = asyncio.get_running_loop().time()
        self._close()
        if self._shared:
            self._visitors.say_goodbye(self._wait_s, self._wait_s)
        await _until(started + self._wait_s, self._finish())
        await _until(started + self._drain_s, self._end())
        if not self._shared:
            self._visitors.say_goodbye(GOODBYE_S, MAX_RETURN_S)
        if len(self._visitors):
            await asyncio.sleep(GOODBYE_S)

    def _close(self) -> None:
        self._visitors.draining = True
        for work in self._works:
            work.draining = True

    async def _finish(self) -> None:
        for work in self._works:
            await work.finish_turns()
        if self._shared:
            await self._visitors.empty()

    async def _end(self) -> None:
        error = ServerError("instance_shutdown", "The instance was shut down before the answer was whole.")
        await asyncio.gather(*(work.end_turns(error) for work in self._works))


async def _until(deadline: float, work: Coroutine[Any, Any, None]) -> None:
    """Do `work`, or as much of it as can be done until loop time `deadline`."""
    with suppress(TimeoutError):
        async with asyncio.timeout_at(deadline):
            await work
