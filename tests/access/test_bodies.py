"""Bodies that are too large, packed, too deep, or too slow; and connections that never get to say anything."""

from __future__ import annotations

import asyncio
import gzip
from unittest import mock

import pytest

from tests.access.wire import ask, read_answer
from tests.end_to_end import PATIENCE_S, echo
from tests.support.client import attached
from tests.support.server import RunningServer, running_server

BODIES = ["/v1/sessions", "/v1/sessions/x/events", "/v1/tasks/analyse", "/v1/analyse", "/v1/summarise"]
BODIES += ["/v1/stream", "/v1/complete"]
LIMIT = 1000
SLOW = 300


def post(path: str, *headers: str) -> bytes:
    """The head of a POST."""
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: 127.0.0.1", *headers, "", ""]).encode()


@pytest.mark.parametrize("path", [*BODIES, "/v1/nothing", "/"])
async def test_a_body_that_declares_too_much_is_refused_unread(path: str) -> None:
    """At once: the client has not been asked to go on."""
    async with running_server(echo, max_body_bytes=LIMIT, max_message_bytes=LIMIT) as server:
        answer = await ask(server.port, f"POST {path}", b"Content-Length: 1001", b"Expect: 100-continue")
        assert (answer.status, answer.code) == (413, "body_too_large")


async def test_a_message_may_be_smaller_than_a_body() -> None:
    """Each path has its own limit."""
    async with running_server(echo, max_message_bytes=LIMIT) as server:
        length = b"Content-Length: 1001"
        assert (await ask(server.port, "POST /v1/sessions/x/events", length)).status == 413
        assert (await ask(server.port, "POST /v1/complete", length, body=b"{" * 1001)).status == 400


@pytest.mark.parametrize("path", BODIES)
async def test_a_body_in_chunks_is_cut_at_the_limit(path: str) -> None:
    """Though it never ends."""
    async with running_server(echo, max_body_bytes=LIMIT, max_message_bytes=LIMIT) as server:
        chunks = b"100\r\n" + b" " * 256 + b"\r\n"
        answer = await ask(server.port, f"POST {path}", b"Transfer-Encoding: chunked", body=chunks * 4)
        assert (answer.status, answer.code) == (413, "body_too_large")


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip", "nonsense"])
async def test_a_packed_body_is_not_unpacked(encoding: str) -> None:
    """415, whatever it would come to; `identity` is none."""
    body = gzip.compress(b'{"prompt": "hello"}')
    async with running_server(echo) as server:
        head = (f"Content-Encoding: {encoding}".encode(), b"Content-Length: %d" % len(body))
        answer = await ask(server.port, "POST /v1/complete", *head, body=body)
        assert (answer.status, answer.code) == (415, "encoding_not_supported")
        plain = (b"Content-Encoding: identity", b"Content-Length: 16")
        assert (await ask(server.port, "POST /v1/complete", *plain, body=b'{"prompt": "hi"}')).status == 200


@pytest.mark.parametrize("path", BODIES)
async def test_deep_json_is_a_typed_error(path: str) -> None:
    """However deep, and whatever it is inside of."""
    async with running_server(echo, max_message_bytes=2**20) as server, attached(server) as client:
        target = path.replace("/x/", f"/{client.session_id}/")
        for depth in (100, 500, 900, 990, 1100, 100_000):
            nest = b"[" * depth + b"]" * depth
            task = b'{"type": "task.create", "name": "analyse", "input": {"text": %s}}' % nest
            for body in (nest, b"[" * depth, b'{"a":' * depth, b'{"text": %s}' % nest, b'{"prompt": %s}' % nest, task):
                answer = await ask(server.port, f"POST {target}", b"Content-Length: %d" % len(body), body=body)
                assert answer.status == 400, (depth, body[:50])
                assert answer.code in {
                    "invalid_json",
                    "invalid_message",
                    "invalid_input",
                    "unknown_field",
                    "unknown_type",
                }
        assert await client.answer("still served") == "still served"


async def test_a_body_that_drips_is_given_up() -> None:
    """Its deadline is for the whole of it: what comes in between does not put it off. Then the connection goes, too."""
    with mock.patch("realtime.http.BODY_TIMEOUT_S", 0.3), mock.patch("realtime.http_transport.HEAD_TIMEOUT_S", 0.3):
        async with running_server(echo) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            dripping = asyncio.ensure_future(drip(writer))
            writer.write(post("/v1/complete", "Content-Length: 1000"))
            async with asyncio.timeout(PATIENCE_S):
                answer = await read_answer(reader)
                assert (answer.status, answer.code) == (400, "body_timeout")
                await gone(reader)
            writer.transport.abort()
            dripping.cancel()
            await asyncio.wait([dripping])


@pytest.mark.parametrize("line", [b"GET /healthz HTTP/1.1", b"POST /nothing HTTP/1.1", b"POST /v1/sessions HTTP/1.1"])
async def test_what_drips_after_an_answer_holds_no_connection(line: bytes) -> None:
    """The rest of a body that nobody wanted, or empty lines, for which uvicorn itself would wait for ever."""
    declared = b"Content-Length: 100000\r\n" if line.startswith(b"POST") else b""
    with mock.patch("realtime.http_transport.HEAD_TIMEOUT_S", 0.3):
        async with running_server(echo, max_message_bytes=LIMIT) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(line + b"\r\nHost: 127.0.0.1\r\n" + declared + b"\r\n")
            async with asyncio.timeout(PATIENCE_S):
                await read_answer(reader)
                dripping = asyncio.ensure_future(drip(writer, b"\r\n"))
                await gone(reader)
            writer.transport.abort()
            dripping.cancel()
            await asyncio.wait([dripping])


async def drip(writer: asyncio.StreamWriter, piece: bytes = b" ") -> None:
    """Write a piece again and again, far more often than any deadline."""
    while not writer.is_closing():
        writer.write(piece)
        await asyncio.sleep(0.02)


async def gone(reader: asyncio.StreamReader) -> None:
    """Return once the server has closed, by FIN or RST."""
    try:
        while await reader.read(4096):
            pass
    except ConnectionError:
        pass


async def test_a_connection_is_kept_for_the_next_request() -> None:
    """The control of the test before: who asks again in time is served, also after a body that came late."""
    async with running_server(echo) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        async with asyncio.timeout(PATIENCE_S):
            writer.write(post("/nothing", "Content-Length: 5"))
            assert (await read_answer(reader)).status == 404
            writer.write(b"after" + b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert (await read_answer(reader)).status == 200
        writer.transport.abort()


async def test_three_hundred_that_never_get_to_the_point_are_gone_after_the_deadline() -> None:
    """Half-sent handshakes, bodies and nothing at all; meanwhile others are served."""
    beginnings = [
        b"",
        b"GET /v1/realtime HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: web",
        b"GET /v1/realtime HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n",
        post("/v1/complete", "Content-Length: 1000") + b"{",
        post("/v1/sessions", "Transfer-Encoding: chunked") + b"5\r\n{",
    ]
    with mock.patch("realtime.http.BODY_TIMEOUT_S", 1.0), mock.patch("realtime.http_transport.HEAD_TIMEOUT_S", 1.0):
        async with running_server(echo) as server, attached(server) as good:
            slow = [asyncio.ensure_future(lingering(server, beginnings[n % len(beginnings)])) for n in range(SLOW)]
            served = 0
            async with asyncio.timeout(6 * PATIENCE_S):
                while not all(one.done() for one in slow):
                    assert await good.answer(f"hello {served}") == f"hello {served}"
                    served += 1
                await asyncio.gather(*slow)
            assert served > 0


async def lingering(server: RunningServer, beginning: bytes) -> None:
    """Send a beginning, and return once the server has had enough."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(beginning)
    await gone(reader)
    writer.transport.abort()
