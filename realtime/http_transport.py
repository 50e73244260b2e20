"""HTTP below the application: uvicorn's protocol, bounded in time and in what one client makes it do.

Of what comes no more is taken apart than somebody waits for: the head of the next request, once the one before is
answered, and of a body what the application asks for. What a client sends ahead of that waits, up to a limit, and the
connection goes on being read: that is how a hang-up is noticed.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from enum import Enum, auto

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from realtime.access.arrivals import Arrivals
from realtime.access.headers import USUAL

HEAD_TIMEOUT_S = 10.0
"""How long the head of a request may take, and the rest of a body that nobody wants."""
MAX_HEAD_BYTES = 32 * 1024
"""How long the head of a request may be."""
MAX_HEADERS = 128
"""How many headers a request may have, those behind a body among them."""
MAX_AHEAD_BYTES = 64 * 1024
"""How much a client may send before what it has asked for is answered."""
MAX_UNREAD_BYTES = 64 * 1024
"""With so much of a body that waits to be asked for no more is read."""
MAX_REST_BYTES = 64 * 1024
"""How much of a body is taken apart that nobody wants, so that the connection can be used again."""
CHUNKS_BYTES = 1024
"""How much of a body in chunks is taken apart at once: they can be as small as six bytes, and each costs."""
TAKE_TIMEOUT_S = 30.0
"""How long the client may take nothing of an answer. A kernel tells of it in lumps of up to 85 KiB."""
NOTHING = memoryview(b"")
END = b"\r\n\r\n"
"""With this a head ends, and a body in chunks."""


class _Phase(Enum):
    HEAD = auto()
    BODY = auto()
    """There may be more of the body, and it is not answered."""
    ANSWER = auto()
    """The request is whole, and not answered."""
    REST = auto()
    """It is answered, and there may be more of its body."""
    OVER = auto()
    """It is answered, and there is too much more: what still comes is passed over, until the client has seen that."""


class _Flow(FlowControl):
    """As uvicorn's, which has more read when more is wanted; here what has come already is first."""

    def __init__(self, transport: asyncio.Transport, want: Callable[[], None]) -> None:
        super().__init__(transport)
        self._want = want

    def resume_reading(self) -> None:
        """More is wanted."""
        self._want()

    def read_on(self) -> None:
        """Have more read."""
        super().resume_reading()

    def forget(self) -> None:
        """Nobody is there any more who could be told what is wanted."""
        self._want = _nothing


class PunctualHttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, with one request at a time, a deadline and a largest size for the head of each, a body
    that is taken apart as it is asked for, and a deadline for who takes nothing of an answer."""

    flow: _Flow

    def __init__(self, *args: object, arrivals: Arrivals, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]  # uvicorn's own
        self._arrivals = arrivals
        self._deadline: asyncio.TimerHandle | None = None
        self._phase = _Phase.HEAD
        self._unread = NOTHING
        self._seam = b""
        """The last bytes that were taken apart, with which an end may begin."""
        self._head_bytes = 0
        """How much has come of a head."""
        self._headers = 0
        self._body_left: float = 0
        """How much of a body has not come; infinite for one in chunks."""
        self._rest_bytes = 0
        """How much has come of a body since it was answered."""
        self._untaken: float = math.inf
        """How much of an answer its client had not taken when that was last looked at."""
        self._goes_on = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there: once it is its turn it has to say what it wants."""
        super().connection_made(transport)
        self.flow = _Flow(transport, self._go_on)
        wait_s = self._arrivals.wait_s(self.client[0] if self.client else "", self.loop.time())
        if wait_s is None:
            transport.abort()
        elif wait_s:
            transport.pause_reading()
            self._deadline = self.loop.call_later(wait_s, self._begin)
        else:
            self._expect_head()

    def _begin(self) -> None:
        self.transport.resume_reading()
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Some more has come."""
        self._unset_keepalive_if_required()
        if self._phase is not _Phase.OVER:
            self._unread = memoryview(bytes(self._unread) + data)
            self._take_apart()

    def _go_on(self) -> None:
        """Take apart what has come, in a moment: others have their turn between any two pieces of a body."""
        if not self._goes_on:
            self._goes_on = True
            self.loop.call_soon(self._take_apart)

    def _take_apart(self) -> None:
        self._goes_on = False
        while self._is_mine() and self._unread and self._is_wanted():
            self._feed(self._next_piece())
            if self._phase is _Phase.REST:
                self._pass_over()
                break
        if self._is_mine():
            self._regulate()
        else:
            self._unread = NOTHING

    def _pass_over(self) -> None:
        """Some of a body that nobody wants was taken apart; of too much the rest is not looked at.

        To close at once could lose the client its answer: it would hear of data that nobody took (RFC 9112, 9.6).
        """
        if self._rest_bytes <= MAX_REST_BYTES:
            self._go_on()
        elif self.transport.can_write_eof():
            self._phase, self._unread = _Phase.OVER, NOTHING
            self.transport.write_eof()
        else:
            self.transport.close()

    def _is_mine(self) -> bool:
        """Whether the connection is open, and not a WebSocket by now."""
        return not self.transport.is_closing() and self.transport.get_protocol() is self

    def _is_wanted(self) -> bool:
        """Whether somebody waits for the next piece."""
        return self._phase in {_Phase.HEAD, _Phase.REST} or (
            self._phase is _Phase.BODY and self._body_left > 0 and not self.cycle.body
        )

    def _regulate(self) -> None:
        """Have more read, unless too much waits."""
        if self._phase is _Phase.ANSWER and len(self._unread) > MAX_AHEAD_BYTES:
            self.transport.abort()
        elif self._phase in {_Phase.BODY, _Phase.REST} and len(self._unread) > MAX_UNREAD_BYTES:
            self.flow.pause_reading()
        else:
            self.flow.read_on()

    def _next_piece(self) -> bytes:
        """As much as is taken apart at once: no piece goes beyond the end of a request."""
        if self._phase is not _Phase.HEAD and self._body_left < math.inf:
            size = min(int(self._body_left), MAX_UNREAD_BYTES)
        else:
            most = MAX_HEAD_BYTES - self._head_bytes if self._phase is _Phase.HEAD else CHUNKS_BYTES
            end = (self._seam + self._unread[:most]).find(END)
            size = most if end < 0 else end + len(END) - len(self._seam)
        piece, self._unread = bytes(self._unread[:size]), self._unread[size:] or NOTHING
        self._seam = (self._seam + piece)[1 - len(END) :]
        return piece

    def _feed(self, piece: bytes) -> None:
        if self._phase is _Phase.HEAD:
            self._head_bytes += len(piece)
        else:
            self._body_left -= len(piece)
            self._rest_bytes += len(piece) if self._phase is _Phase.REST else 0
        upgrades = False
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade:
            upgrades = self._should_upgrade()
        except httptools.HttpParserError:
            self._refuse("400 Bad Request", "Invalid HTTP request received.")
            return
        if self.pipeline:  # one piece held two requests, by a reading of the end that is not ours
            self.transport.abort()
        elif self._headers > MAX_HEADERS or (self._phase is _Phase.HEAD and self._head_bytes >= MAX_HEAD_BYTES):
            self._refuse("431 Request Header Fields Too Large", "")
        elif upgrades:
            self.handle_websocket_upgrade()
            self._let_go()

    def _refuse(self, status: str, text: str) -> None:
        """Say so and close; just close where an answer has begun."""
        answers = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete  # type: ignore[redundant-expr]  # None at first
        if self._phase is not _Phase.REST and not answers:
            headers = [*USUAL, (b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
            headers.append((b"content-length", b"%d" % len(text)))
            head = b"".join(b"%s: %s\r\n" % pair for pair in headers)
            self.transport.write(b"HTTP/1.1 %s\r\n%s\r\n%s" % (status.encode(), head, text.encode()))
        self.transport.close()

    def on_message_begin(self) -> None:
        """A request begins: what came until now in one piece with it counts as its head's."""
        super().on_message_begin()
        self._unset_keepalive_if_required()
        head_bytes = self._head_bytes
        self._expect_head()
        self._head_bytes = head_bytes

    def on_header(self, name: bytes, value: bytes) -> None:
        """One of its headers."""
        self._headers += 1
        if self._headers <= MAX_HEADERS:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Its head is whole."""
        super().on_headers_complete()  # raises for a target that is none
        self._forget_deadline()
        self._phase = _Phase.BODY
        fields = dict(self.headers)
        self._body_left = math.inf if b"transfer-encoding" in fields else int(fields.get(b"content-length", b"0"))

    def on_message_complete(self) -> None:
        """Its body is whole."""
        super().on_message_complete()
        if self._phase is _Phase.REST:
            self._expect_head()
        else:
            self._phase = _Phase.ANSWER

    def on_response_complete(self) -> None:
        """It is answered: another may follow."""
        super().on_response_complete()
        if self._phase is _Phase.ANSWER:
            self._expect_head()
        else:
            self._phase = _Phase.REST
            self._rest_bytes = 0
            self._set_deadline()
        self._go_on()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        super().connection_lost(exc)
        self._let_go()

    def _let_go(self) -> None:
        """It is over: nothing refers to this in a circle, so that it is gone at once."""
        self._forget_deadline()
        self._unread = NOTHING
        self.parser = None  # type: ignore[assignment]  # as uvicorn does
        self.flow.forget()

    def _expect_head(self) -> None:
        self._phase = _Phase.HEAD
        self._head_bytes = self._headers = 0
        self._set_deadline()

    def _set_deadline(self) -> None:
        self._forget_deadline()
        self._untaken = math.inf
        self._deadline = self.loop.call_later(HEAD_TIMEOUT_S, self._be_late)

    def _be_late(self) -> None:
        """Nothing has come in time; but who still takes what was written is not late."""
        untaken = self.transport.get_write_buffer_size()
        if 0 < untaken < self._untaken:
            self._untaken = untaken
            self._deadline = self.loop.call_later(TAKE_TIMEOUT_S, self._be_late)
        else:
            self.transport.abort()

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _nothing() -> None:
    pass
