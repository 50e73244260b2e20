"""What a client sends before it was answered: it waits, it is bounded, and it hides no hang-up."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any
from unittest import mock

import pytest

from realtime.http_transport import MAX_AHEAD_BYTES, MAX_HEADERS, MAX_REST_BYTES, MAX_UNREAD_BYTES, PunctualHttpProtocol
from realtime.responders.base import Request, ResponderEvent
from tests.access.wire import UPGRADE, read_answer
from tests.end_to_end import echo
from tests.support.client import attached
from tests.support.memory import resident_bytes
from tests.support.server import RunningServer, running_server

PATIENCE_S = 20.0
HOST = b"Host: 127.0.0.1\r\n"
ALIVE = b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n"
NOTHING_THERE = b"GET /nothing HTTP/1.1\r\n" + HOST + b"\r\n"
ONESHOT = b'{"prompt": "hi"}'
COMPLETE = b"POST /v1/complete HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(ONESHOT) + ONESHOT
IN_CHUNKS = b"POST /v1/complete HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
MOST_GROWTH_BYTES = 8 * 1024 * 1024
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Waiting:
    """A responder that says nothing until it is cancelled, and tells of both."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.left = asyncio.Event()

    async def __call__(self, _request: Request) -> AsyncIterator[ResponderEvent]:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.left.set()
        yield  # type: ignore[misc]  # never


@asynccontextmanager
async def connected(server: RunningServer) -> AsyncIterator[Connection]:
    """A connection of one's own; it has to get on in time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield reader, writer
    finally:
        writer.transport.abort()


def chunks(body: bytes) -> bytes:
    """A body in chunks of one byte, and the end."""
    return b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 3, 7, 1000, 100_000])
async def test_requests_that_come_at_once_are_answered_in_their_order(size: int) -> None:
    """However they are cut: heads, bodies whose length is told, bodies in chunks, with trailers, bodies that nobody
    asks for, and bodies that look like a request."""
    sly = b'{"prompt": "\\r\\n\\r\\n", "x": "' + ALIVE.replace(b"\r\n", b"\\r\\n") + b'"}'
    asked = [
        (ALIVE, 200),
        (COMPLETE, 200),
        (NOTHING_THERE, 404),
        (IN_CHUNKS + chunks(ONESHOT), 200),
        (IN_CHUNKS + chunks(ONESHOT)[:-2] + b"X-Trailer: 1\r\n\r\n", 200),
        (b"POST /nothing HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(ALIVE) + ALIVE, 404),
        (b"POST /nothing HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks(ALIVE), 404),
        (b"POST /v1/complete HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(sly) + sly, 400),
        (ALIVE, 200),
    ]
    sent = b"".join(request for request, _ in asked)
    async with running_server(echo) as server, connected(server) as (reader, writer):
        for at in range(0, len(sent), size):
            writer.write(sent[at : at + size])
            if size < 1000:
                await asyncio.sleep(0)
        assert [(await read_answer(reader)).status for _ in asked] == [status for _, status in asked]


@pytest.mark.parametrize("path", ["/v1/complete", "/v1/stream"])
async def test_a_request_behind_it_hides_no_hang_up(path: str) -> None:
    """The model's call ends with its client, whatever that has sent after it."""
    waiting = Waiting()
    async with running_server(waiting) as server:
        async with connected(server) as (_, writer):
            writer.write(COMPLETE.replace(b"/v1/complete", path.encode()) + ALIVE)
            await waiting.begun.wait()
            writer.write(ALIVE)
            await writer.drain()
        async with asyncio.timeout(PATIENCE_S):
            await waiting.left.wait()


async def test_an_upgrade_behind_a_request_comes_after_its_answer() -> None:
    upgrade = b"\r\n".join([b"GET /v1/realtime HTTP/1.1", HOST.strip(), *UPGRADE, b"", b""])
    async with running_server(echo) as server, connected(server) as (reader, writer):
        writer.write(ALIVE + upgrade)
        assert (await read_answer(reader)).status == 200
        assert (await reader.readline()) == b"HTTP/1.1 101 Switching Protocols\r\n"
        await reader.readuntil(b"session.created")


async def test_who_asks_without_end_is_cut_off_and_costs_no_memory() -> None:
    """As many requests as go down the line, answers read or not: uvicorn itself would hold them all."""
    async with running_server(echo) as server, attached(server) as other:
        gc.collect()
        before = resident_bytes()
        for reads in (True, False):
            async with connected(server) as (reader, writer):
                reading = asyncio.create_task(reader.read() if reads else asyncio.sleep(0))
                with suppress(ConnectionError):
                    while True:
                        writer.write(ALIVE * 2000)
                        await writer.drain()
                await asyncio.wait([reading])
                reading.exception()
        assert resident_bytes() - before < MOST_GROWTH_BYTES
        assert await other.answer("still served") == "still served"


async def test_a_body_in_tiny_chunks_lets_others_have_their_turn() -> None:
    """Of 300,000 bytes that have come, a turn of the loop takes few apart, whoever reads the body or leaves it."""
    fed: list[int] = []
    body = chunks(b" " * 50_000)
    with mock.patch("realtime.http_transport.httptools.HttpRequestParser", counting(fed)):
        async with running_server(echo) as server, attached(server) as other:
            for path, status in (("/v1/complete", 400), ("/nothing", 404)):
                async with connected(server) as (reader, writer):
                    writer.write(b"POST %s HTTP/1.1\r\n" % path.encode() + HOST + b"Transfer-Encoding: chunked\r\n\r\n")
                    writer.write(body + ALIVE)
                    assert await other.answer("meanwhile") == "meanwhile"
                    assert (await read_answer(reader)).status == status
                    if status == 400:  # all of it was read
                        assert (await read_answer(reader)).status == 200
                    else:  # it is too much to go through
                        assert await reader.read() == b""
    assert sum(fed) < len(body) + 2 * MAX_REST_BYTES
    assert max(fed) <= 1024


def counting(fed: list[int]) -> type:
    """uvicorn's parser, and how much it is given at once."""
    import httptools  # the one that is replaced

    real = httptools.HttpRequestParser

    class Counting:
        def __init__(self, protocol: object) -> None:
            self._parser = real(protocol)

        def __getattr__(self, name: str) -> object:
            return getattr(self._parser, name)

        def feed_data(self, data: bytes) -> None:
            fed.append(len(data))
            self._parser.feed_data(data)

    return Counting


async def test_what_is_not_asked_for_of_a_body_is_not_read() -> None:
    """The application takes its time: the client's bytes wait with the client."""
    gate = asyncio.Event()

    async def late(_receive: object, _most: int) -> bytes:
        await gate.wait()
        return ONESHOT

    async with running_server(echo, max_body_bytes=2**26) as server, connected(server) as (reader, writer):
        with mock.patch("realtime.oneshot.read_body", late):
            writer.write(b"POST /v1/complete HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % 2**26)
            gc.collect()
            before = resident_bytes()
            sent = 0
            with suppress(TimeoutError):
                while sent < 2**25:
                    writer.write(bytes(2**16))
                    async with asyncio.timeout(0.5):
                        await writer.drain()
                    sent += 2**16
            assert sent < 2**25, "all of it was read"
            assert resident_bytes() - before < MOST_GROWTH_BYTES + MAX_UNREAD_BYTES
            gate.set()
            assert (await read_answer(reader)).status == 200


async def test_garbage_behind_an_answer_that_goes_on_is_no_part_of_it() -> None:
    async with running_server(echo) as server, attached(server) as client, connected(server) as (reader, writer):
        path = f"/v1/sessions/{client.session_id}/events"
        writer.write(b"GET %s HTTP/1.1\r\n" % path.encode() + HOST + b"\r\n")
        await reader.readuntil(b"session.resumed")
        writer.write(b"GARBAGE\r\n\r\n")
        await client.send("conversation.item.create", item={"role": "user", "content": "hello"})
        told = await reader.readuntil(b"conversation.item.created")
        assert b"HTTP/1.1" not in told


async def test_a_slow_reader_gets_a_large_answer_whole() -> None:
    """For longer than a head may take: who takes something is not late. Who takes nothing is cut off."""
    with (
        mock.patch("realtime.http_transport.HEAD_TIMEOUT_S", 0.2),
        mock.patch("realtime.http_transport.TAKE_TIMEOUT_S", 1.0),
    ):
        async with running_server(echo) as server, attached(server) as client:
            for _ in range(30):
                await client.send("conversation.item.create", item={"role": "user", "content": "a" * 50_000})
                await client.until("conversation.item.created")
            assert server._server is not None
            open_ones = server._server.server_state.connections
            before = len(open_ones)
            for takes in (True, False):
                with slow_socket(server) as one:
                    loop = asyncio.get_running_loop()
                    await loop.sock_sendall(one, f"GET /v1/sessions/{client.session_id} HTTP/1.1\r\n".encode())
                    await loop.sock_sendall(one, HOST + b"\r\n")
                    if not takes:
                        await _changes(open_ones, before)
                    got = await taken(one, pause_s=0.05 if takes else 0.0)
                    head, _, body = got.partition(b"\r\n\r\n")
                    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                    assert (len(body) == length) is takes
                    if takes:
                        json.loads(body)


async def _changes(open_ones: set[Any], before: int) -> None:
    """Return once there is one connection more than before, and then as many as before."""
    async with asyncio.timeout(PATIENCE_S):
        for count in (before + 1, before):
            while len(open_ones) != count:  # noqa: ASYNC110  # nothing tells of it
                await asyncio.sleep(0.02)


def slow_socket(server: RunningServer) -> socket.socket:
    """A connection with a small buffer."""
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
    one.connect(("127.0.0.1", server.port))
    one.setblocking(False)
    return one


async def taken(one: socket.socket, *, pause_s: float) -> bytes:
    """All that comes until the other side closes; a pause before each read."""
    got = b""
    with suppress(ConnectionError):
        async with asyncio.timeout(PATIENCE_S):
            while piece := await _after(pause_s, one):
                got += piece
    return got


async def _after(pause_s: float, one: socket.socket) -> bytes:
    await asyncio.sleep(pause_s)
    return await asyncio.get_running_loop().sock_recv(one, 200_000)


async def test_an_upgrade_with_a_body_is_told_so() -> None:
    for declared in (b"Content-Length: 5", b"Transfer-Encoding: chunked"):
        upgrade = b"\r\n".join([b"GET /v1/realtime HTTP/1.1", HOST.strip(), *UPGRADE, declared, b"", b""])
        async with running_server(echo) as server, connected(server) as (reader, writer):
            writer.write(upgrade)
            answer = await read_answer(reader)
            assert answer.status == 400
            assert answer.all("x-content-type-options") == ["nosniff"]


async def test_what_is_only_read_takes_no_body() -> None:
    for declared in (b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n"):
        async with running_server(echo) as server, connected(server) as (reader, writer):
            writer.write(b"GET /healthz HTTP/1.1\r\n" + HOST + declared + b"\r\n")
            answer = await read_answer(reader)
            assert (answer.status, answer.code) == (400, "body_not_allowed")


async def test_too_many_headers_are_refused() -> None:
    for count, status in ((MAX_HEADERS - 1, 200), (MAX_HEADERS, 431)):  # and Host
        async with running_server(echo) as server, connected(server) as (reader, writer):
            writer.write(b"GET /healthz HTTP/1.1\r\n" + HOST + b"a: b\r\n" * count + b"\r\n")
            assert (await read_answer(reader)).status == status


async def test_what_waits_is_bounded_while_an_answer_is_under_way() -> None:
    waiting = Waiting()
    async with running_server(waiting) as server:
        async with connected(server) as (reader, writer):
            writer.write(COMPLETE)
            await waiting.begun.wait()
            writer.write(bytes(MAX_AHEAD_BYTES + 1))
            with suppress(ConnectionError):
                assert await reader.read() == b""
            await waiting.left.wait()


async def test_a_connection_that_is_over_leaves_nothing_to_collect() -> None:
    """Neither one that was closed, nor one that is a WebSocket now: collecting garbage takes time from all."""
    async with running_server(echo) as server:
        gc.collect()
        gc.disable()
        try:
            async with connected(server) as (reader, writer):
                writer.write(ALIVE)
                await read_answer(reader)
            async with attached(server), asyncio.timeout(PATIENCE_S):
                while any(type(one) is PunctualHttpProtocol for one in gc.get_objects()):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        finally:
            gc.enable()


async def test_who_is_refused_hears_it_whatever_it_still_sends() -> None:
    """A large body that nobody wants is neither taken apart nor answered by a reset that hides the answer."""
    async with running_server(echo) as server, connected(server) as (reader, writer):
        size = 50_000_000
        writer.write(b"POST /v1/complete HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % size)
        for _ in range(size // 1_000_000):
            writer.write(bytes(1_000_000))
            await writer.drain()
        answer = await read_answer(reader)
        assert (answer.status, answer.code) == (413, "body_too_large")
        assert await reader.read() == b""


@pytest.mark.parametrize("before", [b"", ALIVE])
@pytest.mark.parametrize("headers", [b"", b"Connection: Upgrade\r\nUpgrade: h2c\r\n", b"Content-Length: 5\r\n"])
@pytest.mark.parametrize("line", [b"CONNECT localhost:80", b"GET //[", b"OPTIONS *", b"TRACE /", b"GET /healthz"])
async def test_odd_requests_are_answered_and_nothing_hangs(line: bytes, headers: bytes, before: bytes) -> None:
    """Also as the second one, with something behind it: each gets one answer, or the end."""
    async with running_server(echo) as server, attached(server) as other, connected(server) as (reader, writer):
        writer.write(before + line + b" HTTP/1.1\r\n" + HOST + headers + b"\r\n" + b"hello" + ALIVE)
        for _ in range(2 if before else 1):
            assert (await read_answer(reader)).status in {200, 400, 404, 405}
        assert await other.answer("still served") == "still served"
