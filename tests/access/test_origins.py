"""Pages of other origins and requests by other names are refused, on every transport, before anything is done."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from structlog.testing import capture_logs

from realtime.access.origins import MAX_WARNED, allowed_origins
from realtime.settings import SettingsError
from tests.access.wire import UPGRADE, Answer, ask, telling_server, told
from tests.end_to_end import echo
from tests.support.client import attached
from tests.support.server import RunningServer, running_server

ALLOWED = ("https://app.example.org", "https://xn--bcher-kva.example")
ORIGINS = {
    "http://127.0.0.1:{port}": True,  # its own
    "https://app.example.org": True,
    "https://xn--bcher-kva.example": True,
    "http://app.example.org": False,
    "https://app.example.org.evil.com": False,
    "https://evil-app.example.org": False,
    "https://sub.app.example.org": False,
    "https://example.org": False,
    "https://app.example.org:8443": False,
    "https://app.example.org:443": False,  # no browser writes it
    "https://app.example.org.": False,
    "HTTPS://APP.EXAMPLE.ORG": False,
    "https://app.example.org/": False,
    "https://user@app.example.org": False,
    "https://app.example.org https://evil.com": False,
    "https://bücher.example": False,
    "null": False,
    "": False,
    "*": False,
    "https://127.0.0.1:{port}": False,
    "http://127.0.0.1": False,
    "http://localhost:{port}": False,  # not the name that it was asked by
}
TRANSPORTS = ("upgrade", "events", "post")
GRANTED = {"upgrade": 101, "events": 200, "post": 201}


@pytest.fixture
async def server() -> AsyncIterator[RunningServer]:
    async with running_server(echo, allowed_origins=ALLOWED) as server:
        yield server


async def asked(server: RunningServer, transport: str, *headers: bytes, host: bytes | None = None) -> Answer:
    """Ask by one of the transports."""
    if transport == "upgrade":
        return await ask(server.port, "GET /v1/realtime", *UPGRADE, *headers, host=host)
    if transport == "post":
        return await ask(server.port, "POST /v1/sessions", *headers, b"Content-Length: 0", host=host)
    async with attached(server) as client:
        return await ask(server.port, f"GET /v1/sessions/{client.session_id}/events", *headers, host=host)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("origin", ORIGINS)
async def test_an_origin_is_allowed_to_the_letter_or_refused(
    server: RunningServer, origin: str, transport: str
) -> None:
    """The same list for upgrades, event streams and POSTs, 403 before anything else."""
    answer = await asked(server, transport, f"Origin: {origin.format(port=server.port)}".encode())
    if ORIGINS[origin]:
        assert answer.status == GRANTED[transport]
    else:
        assert (answer.status, answer.code) == (403, "origin_not_allowed")
        assert answer.all("access-control-allow-origin") == ([] if transport == "upgrade" else ["*"])
        assert answer.all("access-control-allow-credentials") == []


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_two_origins_are_none(server: RunningServer, transport: str) -> None:
    """Whichever of them is allowed. An upgrade with two is a bad request by itself."""
    allowed, other = b"Origin: https://app.example.org", b"Origin: https://evil.com"
    for pair in ((allowed, other), (other, allowed), (allowed, allowed)):
        assert (await asked(server, transport, *pair)).status == (400 if transport == "upgrade" else 403)


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "PUT", "OPTIONS"])
async def test_every_method_is_held_to_it(server: RunningServer, method: str) -> None:
    """Also those that read only, and what a browser asks in advance."""
    preflight = (b"Access-Control-Request-Method: GET",) if method == "OPTIONS" else ()
    for origin, refused in ((b"https://evil.com", True), (b"https://app.example.org", False)):
        answer = await ask(server.port, f"{method} /v1/sessions/x", b"Origin: " + origin, *preflight)
        assert (answer.status == 403) is refused


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    "host",
    [b"evil.com", b"127.0.0.1.evil.com", b"localhost.", b"user@localhost", b"localhost:x", b"[::1", b"\xff", b" ", b""],
)
async def test_another_name_is_refused(server: RunningServer, host: bytes, transport: str) -> None:
    """Also one that is none, and none at all, where WebSockets are a bad request by themselves."""
    answer = await asked(server, transport, b"Origin: http://evil.com", host=host)
    assert answer.status in ({400, 403} if transport == "upgrade" else {403})
    assert answer.all("access-control-allow-origin") == []


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("host", [b"localhost", b"LOCALHOST:1", b"127.0.0.1", b"[::1]", b"[::1]:8000"])
async def test_its_names_count_without_the_port(server: RunningServer, host: bytes, transport: str) -> None:
    """The names of this machine, of both families."""
    assert (await asked(server, transport, host=host)).status == GRANTED[transport]


async def test_two_names_are_none(server: RunningServer) -> None:
    """Even if both are the server's: a proxy may have looked at the other one."""
    for other in (b"localhost", b"evil.com"):
        assert (await ask(server.port, "GET /healthz", b"Host: " + other)).status in {400, 403}


async def test_the_host_header_counts_in_a_request_for_a_whole_url(server: RunningServer) -> None:
    """Its path is taken, and its name is nobody's."""
    assert (await ask(server.port, "GET http://evil.com/healthz")).status == 200
    assert (await ask(server.port, f"GET http://127.0.0.1:{server.port}/healthz", host=b"evil.com")).status == 403


async def test_any_name_may_be_allowed() -> None:
    """A server behind a proxy that looks at names: none is needed even, but two are still none."""
    async with running_server(echo, allowed_hosts=("*",)) as server:
        for host in (b"evil.com", b"x.:1", b""):
            assert (await ask(server.port, "GET /healthz", host=host)).status == 200
        assert (await ask(server.port, "GET /healthz", b"Host: a", host=b"b")).status in {400, 403}
        for host, origin in (
            (b"a.org:80", b"http://a.org"),
            (b"A.org", b"http://a.org"),
            (b"[::1]:8", b"http://[::1]:8"),
        ):
            assert (await ask(server.port, "GET /healthz", b"Origin: " + origin, host=host)).status == 200


@pytest.mark.parametrize(
    ("site", "mode", "status"),
    [
        ("cross-site", "no-cors", 403),
        ("same-site", "no-cors", 403),
        ("cross-site", "websocket", 403),
        ("cross-site", "navigate", 200),
        ("same-site", "navigate", 200),
        ("same-origin", "no-cors", 200),
        ("none", "navigate", 200),
    ],
)
async def test_what_another_page_embeds_is_refused(server: RunningServer, site: str, mode: str, status: int) -> None:
    """An image or a script comes without an origin; a link may be followed."""
    headers = (f"Sec-Fetch-Site: {site}".encode(), f"Sec-Fetch-Mode: {mode}".encode())
    assert (await asked(server, "events", *headers)).status == status


async def test_the_log_names_the_setting_once_for_each_origin(server: RunningServer) -> None:
    """Whoever develops a page finds why it is refused; nobody fills the log with origins, nor writes what is none."""
    origins = [f"http://localhost:{port}" for port in range(5173, 5173 + 2 * MAX_WARNED)]
    with capture_logs() as lines:
        for origin in ("null", "http://secret.example", "said://localhost", *(2 * origins[:1]), *origins):
            assert (await asked(server, "post", f"Origin: {origin}".encode())).status == 403
    warned = [line for line in lines if line["log_level"] == "warning"]
    assert [line["origin"] for line in warned] == ["another", *origins[: MAX_WARNED - 1]]
    assert {line["setting"] for line in warned} == {"REALTIME_ALLOWED_ORIGINS"}


async def test_whether_a_page_asks_is_known_further_in() -> None:
    """A cookie counts only where the browser vouches for the page."""
    origin = b"Origin: https://app.example.org"
    async with telling_server(allowed_origins=ALLOWED) as port:
        for headers, page in (
            ((), False),
            ((origin,), True),
            ((b"Sec-Fetch-Site: same-origin",), True),
            ((b"Sec-Fetch-Site: none",), False),
            ((b"Sec-Fetch-Site: cross-site", b"Sec-Fetch-Mode: navigate"), False),
            ((b"Sec-Fetch-Site: same-origin", b"Sec-Fetch-Site: cross-site", b"Sec-Fetch-Mode: navigate"), False),
        ):
            assert (await told(port, *headers))["page"] is page
            assert (await told(port, *UPGRADE, *headers, line="GET /v1/realtime"))["page"] is page


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("https://app.example.org", "https://app.example.org"),
        ("HTTPS://App.Example.org/", "https://app.example.org"),
        ("https://app.example.org:443", "https://app.example.org"),
        ("http://app.example.org:80", "http://app.example.org"),
        ("http://app.example.org:443", "http://app.example.org:443"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("capacitor://localhost", "capacitor://localhost"),
    ],
)
def test_an_origin_in_the_settings_is_read_as_browsers_write_it(written: str, read: str) -> None:
    """In lower case, without the port that goes without saying."""
    assert allowed_origins([written]) == {read}


@pytest.mark.parametrize(
    "written",
    ["*", "null", "app.example.org", "https://*.example.org", "https://a.org/x", "https://a.org.", "https://ü.org"],
)
def test_what_is_no_origin_in_the_settings_stops_the_start(written: str) -> None:
    """With one line, rather than a page that is refused for no visible reason."""
    with pytest.raises(SettingsError, match=r"\AREALTIME_ALLOWED_ORIGINS=[^\n]* is not allowed: [^\n]*\Z"):
        allowed_origins([written])
