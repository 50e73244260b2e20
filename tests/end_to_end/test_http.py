"""The plain HTTP side: health, the page, what doesn't exist; and upgrades where there is nothing to upgrade."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from realtime.page import STATIC
from tests.end_to_end import ERROR_TYPES, dialled, echo
from tests.support.server import RunningServer, running_server

PAGE_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


@pytest.fixture
async def server() -> AsyncIterator[RunningServer]:
    async with running_server(echo) as server:
        yield server


@pytest.fixture
async def http(server: RunningServer) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.url, trust_env=False) as client:
        yield client


def assert_error(response: httpx.Response, status: int) -> None:
    """The answer is an error in the protocol's shape."""
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert {"type", "code", "message"} <= set(body["error"])
    assert body["error"]["type"] in ERROR_TYPES
    assert "fatal" not in body["error"]
    assert "server" not in response.headers


async def test_health_and_readiness(http: httpx.AsyncClient) -> None:
    """A server that is up is alive and ready, says so in JSON, and lets nobody cache it."""
    for path, status in (("/healthz", "ok"), ("/readyz", "ready")):
        response = await http.get(path)
        assert (response.status_code, response.json()) == (200, {"status": status})
        assert response.headers["content-type"] == "application/json"
        assert response.headers["cache-control"] == "no-store"


async def test_health_answers_reads_alone(http: httpx.AsyncClient) -> None:
    """A method that makes no sense is a 405 in the error's shape."""
    for path in ("/healthz", "/readyz"):
        for method in ("POST", "DELETE", "PUT"):
            assert_error(await http.request(method, path), 405)


async def test_head_is_get_without_a_body(http: httpx.AsyncClient) -> None:
    """A HEAD has the status and headers of the GET."""
    for path in ("/", "/healthz", "/readyz", "/static/style.css", "/nothing"):
        head, get = await http.head(path), await http.get(path)
        assert head.status_code == get.status_code
        assert head.content == b""
        for name in ("content-type", "content-length", "cache-control", "content-security-policy"):
            assert head.headers.get(name) == get.headers.get(name), (path, name)


async def test_page_is_served_with_what_keeps_it_safe(http: httpx.AsyncClient) -> None:
    """The page comes from `/`, under a policy that allows its own host and nothing inline, framed or foreign."""
    response = await http.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    assert response.content == (STATIC / "index.html").read_bytes()
    assert PAGE_HEADERS.items() <= dict(response.headers).items()
    policy = dict(
        part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";") if part.strip()
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert "unsafe" not in response.headers["content-security-policy"]


async def test_everything_that_the_page_names_is_there(http: httpx.AsyncClient) -> None:
    """Each file that the page links to comes with its type and the same headers."""
    page = (await http.get("/")).text
    paths = set(re.findall(r'(?:src|href)="([^"#]+)"', page))
    assert "static/style.css" in paths
    for path in paths:
        response = await http.get(f"/{path}")
        assert response.status_code == 200, path
        assert PAGE_HEADERS.items() <= dict(response.headers).items()
        assert "content-security-policy" in response.headers
    script = await http.get("/static/demo.js")
    assert "javascript" in script.headers["content-type"]
    assert "svg" in (await http.get("/static/icon.svg")).headers["content-type"]


async def test_static_files_are_not_sent_twice(http: httpx.AsyncClient) -> None:
    """A browser that has the file is told so."""
    first = await http.get("/static/style.css")
    again = await http.get("/static/style.css", headers={"if-none-match": first.headers["etag"]})
    assert again.status_code == 304


async def test_what_does_not_exist_is_a_404_in_the_errors_shape(http: httpx.AsyncClient) -> None:
    """Unknown paths, unknown files, and paths that would lead out of the folder are all the same answer."""
    paths = ["/nothing", "/v1", "/v1/nothing", "/static/nothing.js", "/static/..%2fpyproject.toml", "/favicon.ico"]
    paths += ["/static/%2e%2e/pyproject.toml", "/static/%00", "/static/....//x", "/" + "a" * 2000, "/%F0%9F%99%82"]
    for path in paths:
        response = await http.get(path)
        assert_error(response, 404)
        assert response.json()["error"]["type"] == "not_found_error", path


async def test_wrong_methods_are_a_405_in_the_errors_shape(http: httpx.AsyncClient) -> None:
    """A path that exists and a method that it doesn't have."""
    for method, path in (
        ("GET", "/v1/stream"),
        ("GET", "/v1/complete"),
        ("DELETE", "/v1/complete"),
        ("POST", "/"),
        ("PUT", "/static/style.css"),
    ):
        assert_error(await http.request(method, path), 405)


async def test_endpoint_of_websockets_is_none_of_http(http: httpx.AsyncClient) -> None:
    """A plain request to the WebSocket endpoint is refused in the error's shape."""
    response = await http.get("/v1/realtime")
    assert response.status_code in {400, 404, 405, 426}
    assert_error(response, response.status_code)
    posted = await http.post("/v1/realtime", content=b"{}")
    assert_error(posted, posted.status_code)


async def test_websocket_on_unknown_paths_is_refused(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    """There is one endpoint for WebSockets; an upgrade anywhere else gets a 403 or 404, and is no error of ours."""
    for path in ("/", "/nothing", "/v1/realtime/", "/v1", "/healthz", "/static/demo.js", "/v1/complete"):
        with pytest.raises(InvalidStatus) as refused:
            async with connect(f"ws://127.0.0.1:{server.port}{path}", proxy=None):
                pass
        assert refused.value.response.status_code in {403, 404}, path
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_server_does_not_say_what_it_is(server: RunningServer, http: httpx.AsyncClient) -> None:
    """No header names a library and its version, over HTTP or at an upgrade."""
    response = await http.get("/healthz")
    async with dialled(server) as socket:
        assert json.loads(await socket.recv())["type"] == "session.created"
        assert socket.response is not None
        upgrade = {name.lower(): value for name, value in socket.response.headers.raw_items()}
    for headers in (dict(response.headers), upgrade):
        assert not re.search(r"uvicorn|starlette|websockets|python", json.dumps(headers), re.IGNORECASE)
