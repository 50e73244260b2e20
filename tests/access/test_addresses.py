"""A client is who it seems to be, whatever it says about itself."""

from __future__ import annotations

from typing import Any

import pytest

from realtime.access.addresses import client_address, trusted_networks
from realtime.app import create_app
from realtime.responders.demo import demo
from realtime.settings import Settings, SettingsError
from tests.access.wire import UPGRADE, telling_server, told

MADE_UP = b"X-Forwarded-For: 203.0.113.9"


@pytest.mark.parametrize(
    ("client", "counted"),
    [
        (("203.0.113.9", 1), "203.0.113.9"),
        (("::ffff:203.0.113.9", 1), "203.0.113.9"),
        (("2001:db8:1:2:3:4:5:6", 1), "2001:db8:1:2::/64"),
        (("2001:db8:1:2::", 1), "2001:db8:1:2::/64"),
        (("2001:DB8:1:3::1", 1), "2001:db8:1:3::/64"),
        (("fe80::1%eth0", 1), "fe80::/64"),
        (("::1", 1), "::/64"),
        (("made up\r\n", 0), "unknown"),
        (("", 0), "unknown"),
        (None, "unknown"),
    ],
)
def test_a_client_counts_by_what_it_has_to_itself(client: tuple[str, int] | None, counted: str) -> None:
    """An address, or of IPv6 the network that each client has; what is no address is nobody's."""
    assert client_address({"client": client}) == counted
    assert client_address({}) == "unknown"


@pytest.mark.parametrize("entry", ["*", "nginx", "10.0.0.1/8", "10.0.0.0/33", "0.0.0.0/0", "::/0", "10.0.0.1:80"])
def test_what_is_no_proxy_stops_the_start(entry: str) -> None:
    """With one line; so does a network that holds every client."""
    with pytest.raises(SettingsError, match=r"\AREALTIME_TRUSTED_PROXIES=[^\n]* is not allowed: [^\n]*\Z"):
        create_app(demo, Settings(trusted_proxies=("127.0.0.1", entry)))


def test_addresses_of_ipv4_are_known_to_sockets_of_both_families() -> None:
    """Which show them as addresses of IPv6."""
    assert trusted_networks(["10.0.0.0/8", "::1"]) == ["10.0.0.0/8", "::ffff:10.0.0.0/104", "::1/128"]


async def test_what_a_client_makes_up_is_ignored() -> None:
    """Its address and its scheme are those of its connection, over HTTP and at an upgrade."""
    headers = (
        MADE_UP,
        b"X-Forwarded-Proto: https",
        b"X-Real-IP: 203.0.113.9",
        b"Forwarded: for=203.0.113.9;proto=https",
    )
    for proxies in ((), ("10.0.0.0/8", "2001:db8::/32")):
        async with telling_server(trusted_proxies=proxies) as port:
            assert await told(port, *headers) == {"client": "127.0.0.1", "scheme": "http", "page": False}
            upgrade = await told(port, *UPGRADE, *headers, line="GET /v1/realtime")
            assert upgrade == {"client": "127.0.0.1", "scheme": "ws", "page": False}


@pytest.mark.parametrize(
    ("headers", "client"),
    [
        ([], "127.0.0.1"),
        ([b"203.0.113.9"], "203.0.113.9"),
        ([b"203.0.113.9:4711"], "203.0.113.9"),
        ([b"[2001:db8::1]:4711"], "2001:db8::/64"),
        ([b"2001:db8::1"], "2001:db8::/64"),
        ([b"8.8.8.8, 203.0.113.9"], "203.0.113.9"),
        ([b"8.8.8.8, 203.0.113.9, 10.1.2.3"], "203.0.113.9"),
        ([b"8.8.8.8", b"203.0.113.9"], "203.0.113.9"),
        ([b"10.1.2.3, 203.0.113.9, 10.1.2.3, 127.0.0.1"], "203.0.113.9"),
        ([b"8.8.8.8, nonsense"], "unknown"),
        ([b"8.8.8.8, " + b"x" * 3000], "unknown"),
        ([b""], "127.0.0.1"),
    ],
)
async def test_a_trusted_proxy_tells_the_client(headers: list[bytes], client: str) -> None:
    """It is the last address that is no trusted proxy's; those before it are the client's own words."""
    forwarded = [b"X-Forwarded-For: " + value for value in headers]
    async with telling_server(trusted_proxies=("127.0.0.1", "10.0.0.0/8")) as port:
        assert (await told(port, *forwarded))["client"] == client
        assert (await told(port, *UPGRADE, *forwarded, line="GET /v1/realtime"))["client"] == client


@pytest.mark.parametrize(("told_scheme", "http", "websocket"), [("https", "https", "wss"), ("ftp", "http", "ws")])
async def test_a_trusted_proxy_tells_the_scheme(told_scheme: str, http: str, websocket: str) -> None:
    """Where it is one."""
    header = f"X-Forwarded-Proto: {told_scheme}".encode()
    async with telling_server() as port:
        assert (await told(port, header))["scheme"] == http
        assert (await told(port, *UPGRADE, header, line="GET /v1/realtime"))["scheme"] == websocket


@pytest.mark.parametrize("trusted", [True, False])
async def test_behind_tls_the_own_page_is_one_of_https(trusted: bool) -> None:
    """As far as the proxy that says so is believed."""
    settings: dict[str, Any] = {} if trusted else {"trusted_proxies": ("10.0.0.1",)}
    async with telling_server(allowed_hosts=("chat.example.org",), **settings) as port:
        for scheme, allowed in (("https", trusted), ("http", not trusted)):
            headers = (f"Origin: {scheme}://chat.example.org".encode(), b"X-Forwarded-Proto: https")
            for extra, line in (((), "POST /v1/x"), (UPGRADE, "GET /v1/realtime")):
                answer = await told(port, *extra, *headers, line=line, host=b"chat.example.org")
                assert ("page" in answer) is allowed
