"""A session's messages as server-sent events, its commands each by a POST: for where WebSockets don't get through."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from urllib.parse import urlsplit

import aiohttp
import msgspec
from aiohttp.http_exceptions import HttpProcessingError

from realtime.client.events import Fields
from realtime.client.refusals import end_of_stream, error_in, refusal, stranger
from realtime.client.wire import LOST, OPEN_S, SILENCE_S, Closed, NotOpened, Target, decoded, message
from realtime.protocol import CloseCode

LONGEST_LINE_BYTES = 512 * 1024
"""A frame's, and more."""
TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=OPEN_S, sock_read=SILENCE_S)


class Id(msgspec.Struct, frozen=True):
    """A session's id."""

    id: str


class Made(msgspec.Struct, frozen=True):
    """What the server says of a session that it has made."""

    session: Id


class EventStreamWire:
    """The open stream."""

    acknowledges = True

    def __init__(
        self, http: aiohttp.ClientSession, target: Target, answer: aiohttp.ClientResponse, *, made: bool
    ) -> None:
        self._http = http
        self._target = target
        self._answer = answer
        self._made = made

    async def events(self) -> AsyncIterator[Fields]:
        """See `Wire`."""
        last: Fields = {}
        async for data in _data(self._answer.content):
            last = message(data)
            if self._made and last["type"] == "session.resumed":  # one step for the caller: a session that this made
                last["type"] = "session.created"
            yield last
        raise end_of_stream(last)

    async def send(self, command: Fields) -> Fields | None:
        """See `Wire`."""
        address = self._answer.url.with_query(None)
        try:
            async with self._http.post(address, data=msgspec.json.encode(command), allow_redirects=False) as answer:
                return await _answered(self._target, command, answer)
        except (aiohttp.ClientError, OSError):
            raise Closed(LOST, "lost") from None


@asynccontextmanager
async def event_stream(target: Target) -> AsyncIterator[EventStreamWire]:
    """A stream that is open, of a session that is made if need be. Raises `Closed`."""
    async with AsyncExitStack() as stack:
        with _failing_as_closed(target):
            http = await stack.enter_async_context(_http(target))
            session_id = target.session_id or await _make_session(http, target)
            address = target.http(f"sessions/{session_id}/events")
            opening = http.get(address, params=target.query, allow_redirects=False)
            answer = await stack.enter_async_context(opening)
            if answer.status != 200:
                raise await _refusal(target, answer)
        yield EventStreamWire(http, target, answer, made=target.session_id is None)


async def fetch(target: Target, url: str) -> bytes:
    """The body of an answer of the server. Raises `Closed`."""
    with _failing_as_closed(target):
        async with _http(target) as http, http.get(url, allow_redirects=False) as answer:
            if answer.status != 200:
                raise await _refusal(target, answer)
            return await answer.read()
    raise AssertionError("it returns or raises")


def _http(target: Target) -> aiohttp.ClientSession:
    """Raises `ValueError` where the proxy is none by HTTP."""
    if target.proxy is not None and urlsplit(target.proxy).scheme not in {"http", "https"}:
        raise ValueError("server-sent events can't take that proxy")
    return aiohttp.ClientSession(
        headers=target.headers, timeout=TIMEOUT, read_bufsize=LONGEST_LINE_BYTES, proxy=target.proxy
    )


@contextmanager
def _failing_as_closed(target: Target) -> Iterator[None]:
    try:
        yield
    except (aiohttp.ClientError, OSError, ValueError) as error:  # a proxy that is none is a wrong value
        words = error.message if isinstance(error, aiohttp.ClientResponseError) else str(error)
        raise NotOpened(LOST, target.told(words or type(error).__name__)) from None


async def _make_session(http: aiohttp.ClientSession, target: Target) -> str:
    async with http.post(target.http("sessions"), allow_redirects=False) as answer:
        if answer.status != 201:
            raise await _refusal(target, answer)
        return decoded(await answer.read(), Made).session.id


async def _refusal(target: Target, answer: aiohttp.ClientResponse) -> Closed:
    if answer.status == 204:
        return Closed(CloseCode.NORMAL)
    return refusal(answer.status, await answer.read()) or stranger(target, answer.status, answer.headers.items())


async def _answered(target: Target, command: Fields, answer: aiohttp.ClientResponse) -> Fields | None:
    """The refusal of a command as a message of the session. Raises `Closed` where the session has not answered."""
    if answer.status == 202:
        return None
    error = error_in(await answer.read())
    if answer.status == 401:
        raise Closed(CloseCode.UNAUTHENTICATED, error["code"] if error else "")
    if error is None or (answer.status == 503 and error["type"] == "rate_limit_error"):  # its instance is leaving
        raise stranger(target, answer.status, answer.headers.items())
    return {"type": "error", "error": {**error, "event_id": command["event_id"], "fatal": False}}


async def _data(lines: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The data of each event. Raises `Closed`."""
    data = b""
    try:
        async for line in lines:
            line = line.rstrip(b"\r\n")
            if line.startswith(b"data:"):
                data += line[5:]
            elif not line and data:
                yield data
                data = b""
    except (HttpProcessingError, ValueError):  # too long a line
        raise Closed(LOST, "unreadable") from None
    except (aiohttp.ClientError, OSError) as error:
        raise Closed(LOST, str(error)) from None
