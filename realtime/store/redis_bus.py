"""What is published in Redis, heard over one connection of this process.

Publishing is a doorbell and no more: whoever is not sure to have heard everything reads the logs. A connection that has
died in silence would go unnoticed for ever, so a beat is published every second, and who hears nothing for three takes
the connection for dead, makes a new one, and tells everybody to read again.

This reads the connection itself. redis-py's own subscriber reconnects without saying so, and in version 8.1 its loops
spin without giving way once a connection has died of ETIMEDOUT.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from redis.asyncio.connection import Connection
from redis.exceptions import RedisError

from realtime.errors import StoreError
from realtime.observe import logs
from realtime.store.redis_calls import TIMEOUT_S, Calls, unavailable

BEAT_S = 1.0
SILENCE_S = 3.0
"""A connection on which nothing is heard for so long is dead."""
REBUILD_S = 0.2
MAX_NAMED = 500
"""Topics that one command subscribes to."""
BROKEN = (RedisError, OSError, TimeoutError, RuntimeError, AttributeError)
"""What a connection that has died may come to. The last two are what a write comes to that began before its end:
uvloop's word for a closed transport, and redis-py's for a writer that is not there any more."""


class Bus:
    """The topics that this process hears. `hear` is called with topic and message, `doubt` when some may be lost."""

    def __init__(
        self, calls: Calls, *, beat: str, hear: Callable[[str, bytes], None], doubt: Callable[[], None]
    ) -> None:
        self._calls = calls
        self._beat = beat
        self._hear = hear
        self._doubt = doubt
        self._topics: dict[str, asyncio.Future[None]] = {}
        """Those that are wanted, each with the future that is done once Redis has confirmed it."""
        self._unconfirmed: Counter[str] = Counter()
        """How many confirmations are still to come over this connection."""
        self._connection: Connection | None = None
        self._sending: set[asyncio.Task[None]] = set()

    async def subscribe(self, topic: str) -> None:
        """Hear a topic; returns once everything that is published from now on is heard. Raises `StoreError`."""
        confirmed = self._topics.get(topic)
        if confirmed is None:
            confirmed = self._topics[topic] = asyncio.get_running_loop().create_future()
            self._unconfirmed[topic] += self._connection is not None
            await self._send("SUBSCRIBE", topic)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await asyncio.shield(confirmed)
        except TimeoutError:
            raise unavailable() from None

    def unsubscribe(self, topic: str) -> None:
        """Hear a topic no more; who still waits to hear it does not have to."""
        confirmed = self._topics.pop(topic, None)
        if confirmed is not None and not confirmed.done():
            confirmed.set_result(None)
        if confirmed is not None and self._connection is not None:
            sending = asyncio.create_task(self._unsubscribe(topic))
            self._sending.add(sending)
            sending.add_done_callback(self._sending.discard)

    async def listen(self) -> None:
        """Hear what is published, for ever, over as many connections as it takes."""
        is_first = True
        while True:
            try:
                connection = await self._calls.connection()
                try:
                    await self._listen_on(connection, is_first=is_first)
                finally:
                    self._connection = None
                    await connection.disconnect(nowait=True)
            except (RedisError, OSError, RuntimeError):  # the last is uvloop's word for a closed transport
                pass
            except Exception as error:  # whatever it is, this process must not stay deaf for it
                logs.report(error)
            is_first = False
            await asyncio.sleep(REBUILD_S)

    async def beat(self) -> None:
        """Say something once a second, for ever, so that silence means something."""
        while True:
            with suppress(StoreError):
                await self._calls.call("PUBLISH", self._beat, b"")
            await asyncio.sleep(BEAT_S)

    async def _listen_on(self, connection: Connection, *, is_first: bool) -> None:
        await connection.connect()  # type: ignore[no-untyped-call]
        self._connection = connection
        wanted = [self._beat, *self._topics]
        self._unconfirmed = Counter(wanted)
        for start in range(0, len(wanted), MAX_NAMED):
            await connection.send_command("SUBSCRIBE", *wanted[start : start + MAX_NAMED])
        doubtful = not is_first
        while True:
            heard = await connection.read_response(timeout=SILENCE_S)
            if heard is None:  # silence, or ETIMEDOUT, which redis-py takes for the same: it is a `TimeoutError`, too
                return
            kind, name, message = heard
            topic = name.decode()
            if kind == b"message":
                self._hear(topic, message)
            elif kind == b"subscribe":
                self._confirm(topic)
            if doubtful and not self._unconfirmed:
                doubtful = False
                self._doubt()

    def _confirm(self, topic: str) -> None:
        self._unconfirmed[topic] -= 1
        if self._unconfirmed[topic] <= 0:
            del self._unconfirmed[topic]
            confirmed = self._topics.get(topic)
            if confirmed is not None and not confirmed.done():
                confirmed.set_result(None)

    async def _unsubscribe(self, topic: str) -> None:
        if topic not in self._topics:  # nobody has come back meanwhile
            await self._send("UNSUBSCRIBE", topic)

    async def _send(self, command: str, topic: str) -> None:
        """Tell Redis, if it can be told: whoever makes the next connection names all topics anew."""
        if self._connection is not None:
            with suppress(*BROKEN):
                await self._connection.send_command(command, topic)
