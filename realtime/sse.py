"""A session's events over HTTP: the same stream as a WebSocket's, as server-sent events, for clients without one."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.types import Receive, Send

from realtime.access.audit import Access
from realtime.engine import Engine
from realtime.errors import RealtimeError, ServerError
from realtime.feed import CLOSE_TIMEOUT_S, Closing, Feed
from realtime.http import STREAM_HEADERS, one_line, send_error, send_nothing, while_connected
from realtime.log import format_positions
from realtime.observe import logs
from realtime.opening import Opening
from realtime.protocol import CloseCode, ErrorMessage, ServerMessage, SessionGoingAway
from realtime.viewers import SERVER_ENDED_FLOOR_S

COMMENT_S = 15.0
"""How often a comment goes out: it keeps proxies from giving up, and shows a client that has vanished."""
LOST_FLOOR_S = 5.0
"""The least grace for a lost stream: `EventSource` takes seconds to come back, by design."""
SOON_MS = 100
"""When it is to come back where the stream itself has ended at the time to do so."""
RETRY_MS = 1000
"""When an `EventSource` whose connection is lost is to come back: within that grace."""


class EventStream:
    """One answer with a session's events, from its request to its end; `run` is its life."""

    def __init__(self, opening: Opening, access: Access, engine: Engine, receive: Receive, send: Send) -> None:
        assert opening.session_id is not None
        self.feed = Feed(opening, access.principal, transport="sse", floor_s=SERVER_ENDED_FLOOR_S)
        self._access = access
        self._session_id = opening.session_id
        self._comes_back = opening.comes_back
        self._engine = engine
        self._receive = receive
        self._asgi_send = send
        self._started = False

    async def run(self) -> None:
        """Attach, stream, and end. Returns when the client has hung up or the answer is whole."""
        closing = await self._until_closed()
        if closing is None:
            return
        if self._started:
            await self._end(closing)
        elif self._comes_back and _is_over(closing):
            await send_nothing(self._asgi_send)
        else:
            assert closing.error is not None
            await send_error(self._asgi_send, closing.error)

    async def _until_closed(self) -> Closing | None:
        """Stream until something ends it; `None` where the client itself has."""
        try:
            async with self._engine.attach(self._session_id, self.feed, self.feed.principal) as live:
                self._access.tell()
                if self._comes_back and live.state.closed:
                    return Closing(CloseCode.NORMAL)
                sending = self.feed.run(live, self._engine.describe, self._send, beat_s=COMMENT_S)
                await while_connected(self._receive, sending)
                self.feed.left(LOST_FLOOR_S)
                return None
        except Closing as closing:
            self.feed.left(SERVER_ENDED_FLOOR_S if closing.by_server else 0.0)
            return closing
        except RealtimeError as error:
            self._access.tell(error)
            return Closing.told(error)
        except Exception as error:  # a fault of ours ends this stream, and no other
            logs.report(error)
            failure = ServerError("internal_error", "Something went wrong here.")
            self._access.tell(failure)
            return Closing.told(failure)

    async def _send(self, message: ServerMessage | None) -> None:
        body = b":\n" if message is None else encode_event(message, self.feed.positions)
        if not self._started:
            self._started = True
            await self._asgi_send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
            body = b"retry: %d\n" % RETRY_MS + body  # again for each stream: an earlier one may have said another
        await self._asgi_send({"type": "http.response.body", "body": body, "more_body": True})
        if isinstance(message, SessionGoingAway):
            self._end_in(min(message.reconnect_after_ms, message.time_left_ms) / 1000)

    def _end_in(self, seconds: float) -> None:
        """End when the client is to come back, which an `EventSource` does not do by itself."""
        closing = Closing(CloseCode.TRY_AGAIN_LATER, by_server=True)
        asyncio.get_running_loop().call_later(seconds, self.feed.drop, closing)

    async def _end(self, closing: Closing) -> None:
        """Tell the client why, as far as it still takes anything, and complete the answer."""
        last = b""
        if closing.error is not None:
            last = encode_event(closing.error.as_message(fatal=True), self.feed.positions)
        with suppress(OSError):  # it takes nothing (TimeoutError), or is gone
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._asgi_send({"type": "http.response.body", "body": last})


def encode_event(message: ServerMessage, positions: dict[str, int]) -> bytes:
    """A message as an event, for a client that stands at `positions` once it has it."""
    tag = message.__struct_config__.tag
    name = "server_error" if isinstance(message, ErrorMessage) else tag  # `EventSource` has an `error` of its own
    retry = f"retry: {_rest_ms(message)}\n" if isinstance(message, SessionGoingAway) else ""
    head = f"event: {name}\nid: {format_positions(positions)}\n{retry}data: "
    return head.encode() + one_line(message) + b"\n\n"


def _rest_ms(message: SessionGoingAway) -> int:
    """How long after the end of its stream a client is to come back."""
    return max(message.reconnect_after_ms - message.time_left_ms, SOON_MS)


def _is_over(closing: Closing) -> bool:
    """Whether there is nothing more to come back for."""
    return closing.code in {CloseCode.NORMAL, CloseCode.DELETED} or (
        closing.error is not None and closing.error.code == "session_not_found"
    )
