"""What answers carry for browsers: CORS for the pages that may, and what keeps the others out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from realtime.http_transport import MAX_HEAD_BYTES, MAX_HEADERS
from realtime.responders.base import Request
from tests.access.wire import PATIENCE_S, UPGRADE, Answer, ask, read_answer, telling_server
from tests.end_to_end import echo
from tests.support.client import attached
from tests.support.server import RunningServer, running_server

APP = "https://app.example.org"
ORIGIN = f"Origin: {APP}".encode()
LIMIT = 1000
EVERYWHERE = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
NOTHING = "default-src 'none'; frame-ancestors 'none'"


@pytest.fixture
async def server() -> AsyncIterator[RunningServer]:
    async with running_server(echo, allowed_origins=(APP,), max_body_bytes=LIMIT) as server:
        yield server


def assert_readable(answer: Answer) -> None:
    """A page of `APP` may read the answer, with credentials, and no cache gives it to another."""
    assert answer.all("access-control-allow-origin") == [APP]
    assert answer.all("access-control-allow-credentials") == ["true"]
    [exposed] = answer.all("access-control-expose-headers")
    assert exposed == "Location, Retry-After, RateLimit, RateLimit-Policy, Preference-Applied"
    assert "Origin" in ", ".join(answer.all("vary"))


# ------------------------------------------------------------------------------------------------------------ CORS


async def test_an_allowed_page_may_ask_first(server: RunningServer) -> None:
    """A preflight is answered for whatever path, without a token, and names what may be sent."""
    for path in ("/v1/sessions", "/v1/sessions/x/events", "/v1/complete", "/v1/anything"):
        asks = b"Access-Control-Request-Headers: authorization, content-type, last-event-id, idempotency-key, prefer"
        for method in (b"GET", b"POST", b"DELETE"):
            wants = b"Access-Control-Request-Method: " + method
            answer = await ask(server.port, f"OPTIONS {path}", ORIGIN, wants, asks)
            assert answer.status == 200
            assert answer.all("access-control-allow-origin") == [APP]
            assert answer.all("access-control-allow-credentials") == ["true"]
            assert answer.all("access-control-allow-methods") == ["GET, POST, DELETE"]


@pytest.mark.parametrize("asks", [b"Access-Control-Request-Method: PUT", b"Access-Control-Request-Headers: x-other"])
async def test_no_more_is_allowed_than_is_used(server: RunningServer, asks: bytes) -> None:
    """Other methods and other headers are not."""
    usual = (b"Access-Control-Request-Method: GET",) if b"Headers" in asks else ()
    assert (await ask(server.port, "OPTIONS /v1/sessions", ORIGIN, *usual, asks)).status == 400


async def test_answers_and_errors_can_be_read(server: RunningServer) -> None:
    """Also those from the outermost layers."""
    async with attached(server) as client:
        session = f"/v1/sessions/{client.session_id}"
        for line, status, *headers in (
            (f"GET {session}", 200),
            (f"GET {session}/events", 200),
            ("GET /v1/sessions/nobody", 404),
            ("GET /v1/nothing", 404),
            ("PUT /v1/sessions", 405),
            ("POST /v1/complete", 413, b"Content-Length: 1001"),
            ("POST /v1/complete", 415, b"Content-Encoding: gzip"),
            ("POST /v1/complete", 400, b"Content-Length: 0"),
            ("POST /v1/sessions", 201, b"Content-Length: 0"),
            (f"DELETE {session}", 204),
        ):
            answer = await ask(server.port, line, ORIGIN, *headers)
            assert answer.status == status, line
            assert_readable(answer)


async def test_a_fault_of_the_server_can_be_read(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 500 comes from outside of what an application calls its middleware."""

    def broken(*_: object) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr("realtime.sessions.session_id_in", broken)
    answer = await ask(server.port, "GET /v1/sessions/x", ORIGIN)
    assert (answer.status, answer.code) == (500, "internal_error")
    assert_readable(answer)
    assert answer.all("x-content-type-options") == ["nosniff"]


async def test_caches_are_told_that_the_origin_matters(server: RunningServer) -> None:
    """Also in the answer to a request without one, which allows nothing."""
    answer = await ask(server.port, "GET /v1/nothing")
    assert answer.all("vary") == ["Origin"]
    assert answer.all("access-control-allow-origin") == []


async def test_without_allowed_origins_there_is_no_cors() -> None:
    """The server's own page needs none."""
    async with running_server(echo) as server:
        own = b"Origin: http://127.0.0.1:%d" % server.port
        answer = await ask(server.port, "POST /v1/sessions", own, b"Content-Length: 0")
        assert answer.status == 201
        assert not [name for name, _ in answer.headers if name.startswith("access-control-") or name == "vary"]


# ------------------------------------------------------------------------------------------------------- all others


@pytest.mark.parametrize(
    ("line", "status", "headers"),
    [
        ("GET /", 200, ()),
        ("GET /static/style.css", 200, ()),
        ("GET /static/nothing", 404, ()),
        ("GET /healthz", 200, ()),
        ("GET /metrics", 200, ()),
        ("GET /nothing", 404, ()),
        ("GET /v1/sessions/nobody", 404, ()),
        ("GET /v1/sessions/nobody/events", 204, (b"Last-Event-ID: session:1",)),
        ("PUT /v1/sessions", 405, ()),
        ("POST /v1/sessions", 201, (b"Content-Length: 0",)),
        ("POST /v1/sessions", 403, (b"Origin: https://evil.com",)),
        ("POST /v1/complete", 413, (b"Content-Length: 1001",)),
        ("POST /v1/stream", 200, (b"Content-Length: 15",)),
        ("GET /v1/realtime", 403, (*UPGRADE, b"Origin: https://evil.com")),
        ("GET /v1/realtime?history=x", 400, UPGRADE),
        ("GET /healthz", 404, UPGRADE),
    ],
)
async def test_every_answer_has_them_once(
    server: RunningServer, line: str, status: int, headers: tuple[bytes, ...]
) -> None:
    """Pages, answers, errors, streams and refused upgrades; over plain HTTP nothing is said of TLS."""
    body = b'{"prompt":"hi"}' if "stream" in line else b""
    answer = await ask(server.port, line, *headers, body=body)
    assert answer.status == status
    for name, value in EVERYWHERE.items():
        assert answer.all(name) == [value], name
    [policy], [caching] = answer.all("content-security-policy"), answer.all("cache-control")
    is_page = line in {"GET /", "GET /static/style.css"}
    assert "unsafe" not in policy
    assert (policy == NOTHING) is not is_page
    assert caching == ("no-cache" if is_page or "/stream" in line else "no-store")
    assert answer.all("permissions-policy") == (
        ["camera=(), display-capture=(), geolocation=(), microphone=(self), payment=(), usb=()"] if is_page else []
    )
    assert answer.all("strict-transport-security") == []
    assert answer.all("server") == []


ENDLESS = b"GET /healthz HTTP/1.1\r\n".ljust(MAX_HEAD_BYTES, b"x")


def head(line: bytes, *headers: bytes) -> bytes:
    """The head of a request."""
    return b"\r\n".join([line + b" HTTP/1.1", b"Host: 127.0.0.1", *headers, b"", b""])


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (head(b"GET /healthz", b"no header"), 400),
        (head(b"GET /healthz", b"Content-Length: x"), 400),
        (ENDLESS, 431),
        (head(b"GET /v1/realtime", *UPGRADE, *[b"x: x"] * MAX_HEADERS), 431),
        (head(b"POST /v1/realtime", *UPGRADE), 405),
        (head(b"GET /v1/realtime", *UPGRADE[:2]), 400),
        (head(b"GET /v1/realtime", *UPGRADE[:3], b"Sec-WebSocket-Key: x"), 400),
    ],
)
async def test_what_reaches_no_application_has_them_too(server: RunningServer, sent: bytes, status: int) -> None:
    """Requests that can't be parsed, heads that are too large, upgrades that are none."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(sent)
        async with asyncio.timeout(PATIENCE_S):
            answer = await read_answer(reader)
            assert await reader.read() == b""
    finally:
        writer.close()
    assert answer.status == status
    for name, value in {**EVERYWHERE, "content-security-policy": NOTHING, "cache-control": "no-store"}.items():
        assert answer.all(name) == [value], name
    assert answer.all("connection") == ["close"]
    assert answer.all("server") == []


async def test_over_tls_browsers_are_told_to_stay_there() -> None:
    """As a trusted proxy says; what a client says of that counts for nothing."""
    secure = b"X-Forwarded-Proto: https"
    for proxies, told in ((("127.0.0.1",), ["max-age=31536000"]), ((), [])):
        async with telling_server(trusted_proxies=proxies) as port:
            for line, headers in (("GET /v1/x", ()), ("GET /v1/realtime", UPGRADE), ("GET /x", (b"Origin: null",))):
                assert (await ask(port, line, secure, *headers)).all("strict-transport-security") == told


async def silent(request: Request) -> AsyncIterator[str]:
    """A responder that says one word."""
    yield "word"


async def test_streams_work_as_before() -> None:
    """The headers are about the beginning of an answer: an event stream goes on, a WebSocket is opened."""
    async with running_server(silent, allowed_origins=(APP,)) as server, attached(server) as client:
        assert await client.answer("hello") == "word"
        answer = await ask(server.port, f"GET /v1/sessions/{client.session_id}/events", ORIGIN)
        assert answer.all("content-type") == ["text/event-stream; charset=utf-8"]
        assert answer.all("cache-control") == ["no-cache"]
