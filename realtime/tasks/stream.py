"""One task's channel as server-sent events, to its end."""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress

from starlette.types import Scope, Send

from realtime.access.principal import Principal
from realtime.cursor import Cursor, Start
from realtime.doorbell import Doorbell
from realtime.errors import InvalidRequest, RealtimeError, StoreError, task_not_found
from realtime.feed import CLOSE_TIMEOUT_S, Closing
from realtime.http import STREAM_HEADERS, send_nothing
from realtime.live import RETRY_S, UNBEGUN, LiveSession
from realtime.opening import read_stream_opening
from realtime.protocol import SESSION_CHANNEL, CloseCode, ServerMessage, SessionGoingAway
from realtime.sse import COMMENT_S, RETRY_MS, encode_event


class TaskStream:
    """One answer with a task's events: a `Held` connection. `open` is to be called first, then `run`."""

    def __init__(
        self, live: LiveSession, task_id: str, principal: Principal, send: Send, *, send_timeout_s: float
    ) -> None:
        self.principal = principal
        self.is_warned = True  # there is no word for that in a task's channel
        self.sending_since = math.inf  # it lets go of a client that stalls by itself
        self.name = task_id
        self.transport = "task"
        self.session_id = live.id
        self._live = live
        self._task_id = task_id
        self._asgi_send = send
        self._send_timeout_s = send_timeout_s
        self._bell = Doorbell()
        self._cursor: Cursor | None = None
        self._closing: Closing | None = None
        self._patience: asyncio.Timeout | None = None

    async def open(self, position: int | None) -> None:
        """Begin after `position` (`None`: at the start). Raises the store's errors."""
        heads = (await self._live.store.load(self._live.id)).heads
        head = heads.get(self._task_id, UNBEGUN)
        if position is not None and head.finished and position >= head.position:
            return
        start = Start({self._task_id: head}, {self._task_id: min(position or 0, head.position)})
        del start.positions[SESSION_CHANNEL]
        self._cursor = Cursor(self._live, start)

    async def run(self) -> None:
        """Send what there is, until the task has ended. A client that has all of it already is told that by a 204."""
        if self._cursor is None:
            await send_nothing(self._asgi_send)
            return
        await self._asgi_send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        self._live.bells.add(self._bell)
        try:
            async with asyncio.timeout(None) as self._patience:
                try:
                    await self._send(b"retry: %d\n" % RETRY_MS, self._patience)
                    await self._follow(self._cursor, self._patience)
                finally:
                    self._patience = None  # from here on it can't be moved any more
        except TimeoutError:
            return  # the client takes nothing: the connection is of no use any more
        except RealtimeError as error:
            last = encode_event(error.as_message(fatal=True), self._cursor.positions)
            with suppress(OSError):  # it takes nothing (TimeoutError), or is gone
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._asgi_send({"type": "http.response.body", "body": last})
        finally:
            self._live.bells.discard(self._bell)

    def warn(self) -> None:
        """Nobody is warned here."""

    def send_away(self, _message: SessionGoingAway) -> None:
        """End it where another instance can go on with it: an `EventSource` comes back by itself."""
        if self._live.store.shared:
            self.drop(Closing(CloseCode.TRY_AGAIN_LATER, by_server=True))

    def drop(self, closing: Closing) -> None:
        """End it, and tell the client of the closing's error, as far as it still takes anything."""
        if self._closing is None and self._patience is not None and not self._patience.expired():
            self._patience.reschedule(asyncio.get_running_loop().time() + CLOSE_TIMEOUT_S)
        self._closing = closing
        self._bell.ring()

    async def _follow(self, cursor: Cursor, patience: asyncio.Timeout) -> None:
        loop = asyncio.get_running_loop()
        while self._closing is None:
            try:
                event = await cursor.next(loop.time())
            except StoreError:
                await asyncio.sleep(RETRY_S)
                continue
            if event is not None and event.ends_channel:
                await self._send(self._encoded(event, event.seq), patience, more=False)
                return
            if event is not None:
                await self._send(self._encoded(event, event.seq), patience)
            elif self._live.gone:
                raise task_not_found()
            else:
                await self._wait(loop.time() + COMMENT_S, patience)
        if self._closing.error is not None:
            raise self._closing.error
        await self._send(b"", patience, more=False)

    async def _wait(self, until: float, patience: asyncio.Timeout) -> None:
        await self._bell.wait(until)
        if asyncio.get_running_loop().time() >= until:
            await self._send(b":\n", patience)

    async def _send(self, body: bytes, patience: asyncio.Timeout, *, more: bool = True) -> None:
        timeout_s = self._send_timeout_s if self._closing is None else CLOSE_TIMEOUT_S
        patience.reschedule(asyncio.get_running_loop().time() + timeout_s)
        await self._asgi_send({"type": "http.response.body", "body": body, "more_body": more})
        patience.reschedule(None)

    def _encoded(self, message: ServerMessage, position: int) -> bytes:
        return encode_event(message, {self._task_id: position})


def read_position(scope: Scope, task_id: str) -> int | None:
    """Where a client stands, by its `Last-Event-ID` or else its `after`: `task_9:12`. Raises `InvalidRequest`."""
    opening = read_stream_opening(scope, task_id)
    if opening.after is None:
        return None
    if task_id not in opening.after:
        raise InvalidRequest("invalid_positions", "The position is of another channel.", param="after")
    return opening.after[task_id]
