"""The connections of this process, over every transport: how many there may be, who stalls, and how all of them end."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager

from realtime.errors import Unavailable
from realtime.feed import Closing, Feed
from realtime.observe import logs
from realtime.protocol import CloseCode, SessionGoingAway

LOOKS_PER_TIMEOUT = 10
MAX_LOOK_S = 1.0
RETRY_MS = 1000
"""When a client that was not let in may try again."""


class Connections:
    """The feeds of the open connections. `watch` has to run beside it.

    While it is `draining` nothing new is let in.
    """

    def __init__(self, *, max_connections: int, send_timeout_s: float) -> None:
        self.draining = False
        self._max_connections = max_connections
        self._send_timeout_s = send_timeout_s
        self._feeds: set[Feed] = set()
        self._emptied = asyncio.Event()

    def __len__(self) -> int:
        return len(self._feeds)

    def admit(self) -> None:
        """Raise `Unavailable` if there may not be one more connection."""
        self.check_open()
        if len(self._feeds) >= self._max_connections:
            raise Unavailable("too_many_connections", "This instance is full.", retry_after_ms=RETRY_MS)

    def check_open(self) -> None:
        """Raise `Unavailable` if this instance is about to end, and begins nothing any more."""
        if self.draining:
            raise Unavailable("draining", "This instance is shutting down.", retry_after_ms=RETRY_MS)

    @contextmanager
    def holding(self, feed: Feed) -> Iterator[None]:
        """Count a connection as open for as long as the block lasts."""
        self._feeds.add(feed)
        try:
            yield
        finally:
            self._feeds.discard(feed)
            if not self._feeds:
                self._emptied.set()

    async def empty(self) -> None:
        """Return once there is none."""
        while self._feeds:
            self._emptied.clear()
            await self._emptied.wait()

    async def watch(self) -> None:
        """Drop, for ever, the connections whose clients have taken nothing for the send timeout."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(MAX_LOOK_S, self._send_timeout_s / LOOKS_PER_TIMEOUT))
            stalled_since = loop.time() - self._send_timeout_s
            for feed in [one for one in self._feeds if one.sending_since <= stalled_since]:
                logs.info("slow reader dropped", connection=feed.participant.connection_id)
                feed.drop(Closing(CloseCode.SLOW_READER, by_server=True))

    def say_goodbye(self, time_left_s: float, spread_s: float) -> None:
        """Tell every client that its connection ends in `time_left_s`, and to come back at a random time of its own
        within the next `spread_s`."""
        for feed in self._feeds:
            after_ms = round(random.uniform(0, spread_s) * 1000)
            feed.send_away(
                SessionGoingAway(reason="shutdown", time_left_ms=round(time_left_s * 1000), reconnect_after_ms=after_ms)
            )
