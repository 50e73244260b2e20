"""A session's messages as server-sent events, its commands each by a POST: for where WebSockets don't get through."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import msgspec

from realtime.client.events import Fields
from realtime.client.refusals import end_of_stream, error_in, refusal
from realtime.client.wire import LOST, OPEN_S, OVERLOADED, SILENCE_S, Closed, Target
from realtime.protocol import CloseCode

LONGEST_LINE_BYTES = 512 * 1024
"""A frame's, and more."""
TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=OPEN_S, sock_read=SILENCE_S)


class EventStreamWire:
    """The open stream."""

    acknowledges = True

    def __init__(
        self, http: aiohttp.ClientSession, address: str, answer: aiohttp.ClientResponse, *, made: bool
    ) -> None:
        self._http = http
        self._address = address
        self._answer = answer
        self._made = made

    async def events(self) -> AsyncIterator[Fields]:
        """See `Wire`."""
        last: Fields = {}
        async for data in _data(self._answer.content):
            last = msgspec.json.decode(data)
            if self._made and last["type"] == "session.resumed":  # one step for the caller: a session that this made
                last["type"] = "session.created"
            yield last
        raise end_of_stream(last)

    async def send(self, command: Fields) -> Fields | None:
        """See `Wire`."""
        try:
            async with self._http.post(self._address, data=msgspec.json.encode(command)) as answer:
                return _answered(command, answer.status, await answer.read())
        except (aiohttp.ClientError, OSError):
            raise Closed(LOST, "lost") from None


@asynccontextmanager
async def event_stream(target: Target) -> AsyncIterator[EventStreamWire]:
    """A stream that is open, of a session that is made if need be. Raises `Closed`."""
    options = {"headers": target.headers, "timeout": TIMEOUT, "read_bufsize": LONGEST_LINE_BYTES, "trust_env": True}
    try:
        async with aiohttp.ClientSession(**options) as http:  # type: ignore[arg-type]
            session_id = target.session_id or await _make_session(http, target)
            address = target.http(f"sessions/{session_id}/events")
            async with http.get(address, params=target.query) as answer:
                if answer.status != 200:
                    raise await _refusal(answer)
                yield EventStreamWire(http, address, answer, made=target.session_id is None)
    except (aiohttp.ClientError, OSError) as error:
        raise Closed(LOST, str(error)) from None


async def fetch(target: Target, url: str) -> bytes:
    """The body of an answer of the server. Raises `Closed`."""
    try:
        async with aiohttp.ClientSession(headers=target.headers, timeout=TIMEOUT, trust_env=True) as http:
            async with http.get(url) as answer:
                if answer.status != 200:
                    raise await _refusal(answer)
                return await answer.read()
    except (aiohttp.ClientError, OSError) as error:
        raise Closed(LOST, str(error)) from None


async def _make_session(http: aiohttp.ClientSession, target: Target) -> str:
    async with http.post(target.http("sessions")) as answer:
        if answer.status != 201:
            raise await _refusal(answer)
        made: Fields = msgspec.json.decode(await answer.read())
    return str(made["session"]["id"])


async def _refusal(answer: aiohttp.ClientResponse) -> Closed:
    if answer.status == 204:
        return Closed(CloseCode.NORMAL)
    return refusal(answer.status, await answer.read()) or Closed(OVERLOADED, f"HTTP {answer.status}")


def _answered(command: Fields, status: int, body: bytes) -> Fields | None:
    """The refusal of a command as a message of the session. Raises `Closed` where the session has not answered."""
    if status == 202:
        return None
    error = error_in(body)
    if status == 401:
        raise Closed(CloseCode.UNAUTHENTICATED, error["code"] if error else "")
    if error is None or (status == 503 and error["type"] == "rate_limit_error"):  # its instance is leaving
        raise Closed(OVERLOADED, f"HTTP {status}")
    return {"type": "error", "error": {**error, "event_id": command["event_id"], "fatal": False}}


async def _data(lines: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The data of each event."""
    data = b""
    async for line in lines:
        line = line.rstrip(b"\r\n")
        if line.startswith(b"data:"):
            data += line[5:]
        elif not line and data:
            yield data
            data = b""
