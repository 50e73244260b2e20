"""Who is let in: tokens by header, subprotocol and cookie, over every transport; never by the query."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import jwt
import pytest
from starlette.routing import Route
from websockets.exceptions import InvalidStatus

from realtime.app import create_app
from realtime.settings import Settings
from tests.end_to_end import dialled, echo, frames_until_closed
from tests.support.client import attached
from tests.support.event_sources import chromium_source
from tests.support.event_stream import http_client, streaming
from tests.support.server import RunningServer, running_server
from tests.support.tokens import SECRET, bearer, token

EXPIRED_S = -3600


@pytest.fixture
async def server() -> AsyncIterator[RunningServer]:
    async with running_server(echo, auth_secret=SECRET) as server:
        yield server


@pytest.fixture
async def http(server: RunningServer) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(base_url=server.url) as http:
        yield http


def without_sub() -> str:
    return jwt.encode({"exp": time.time() + 60}, SECRET, "HS256")


def unsigned() -> str:
    return jwt.encode({"sub": "ann", "exp": time.time() + 60}, "", "none")


BAD: dict[str, Callable[[], str]] = {
    "garbage": lambda: "garbage",
    "another secret": lambda: token("ann", secret="another secret that is long enough"),
    "no sub": without_sub,
    "no signature": unsigned,
    "expired": lambda: token("ann", ttl_s=EXPIRED_S),
}
CODES = {name: "token_expired" if name == "expired" else "invalid_token" for name in BAD}


async def first_of(
    server: RunningServer, *subprotocols: str, query: str = "", **headers: str
) -> tuple[str | None, Any]:
    """The subprotocol that is selected, and the first frame."""
    async with dialled(server, query, subprotocols=subprotocols, additional_headers=headers) as socket:
        return socket.subprotocol, json.loads(await socket.recv())


async def refusal_of(server: RunningServer, *subprotocols: str, query: str = "", **headers: str) -> tuple[str, int]:
    """The code of the one frame, a fatal error, and the close code."""
    async with dialled(server, query, subprotocols=subprotocols, additional_headers=headers) as socket:
        [frame] = await frames_until_closed(socket)
        assert (frame["type"], frame["error"]["type"]) == ("error", "authentication_error")
        assert frame["error"]["fatal"] is True
        assert socket.close_code is not None
        return frame["error"]["code"], socket.close_code


async def test_a_token_in_the_header(server: RunningServer) -> None:
    """The user is who the token says."""
    _, first = await first_of(server, "realtime.v1", **bearer("ann"))
    assert (first["type"], first["session"]["owner"]) == ("session.created", "ann")
    assert first["participants"][0]["user"] == "ann"


@pytest.mark.parametrize("position", [0, 1])
async def test_a_token_as_a_subprotocol_is_never_selected(server: RunningServer, position: int) -> None:
    """It stands beside the one that is."""
    offered = ["realtime.v1"]
    offered.insert(position, f"bearer.{token('ann')}")
    selected, first = await first_of(server, *offered)
    assert (selected, first["session"]["owner"]) == ("realtime.v1", "ann")


async def test_a_token_as_a_subprotocol_beside_messagepack(server: RunningServer) -> None:
    """Likewise."""
    offered = (f"bearer.{token('ann')}", "realtime.v1.msgpack")
    async with dialled(server, subprotocols=offered) as socket:
        assert socket.subprotocol == "realtime.v1.msgpack"
        assert b"session.created" in await socket.recv(decode=False)


@pytest.mark.parametrize("shown", ["good", "bad"])
async def test_a_token_as_the_only_subprotocol_is_a_bad_request(server: RunningServer, shown: str) -> None:
    """There is nothing to select: 400, before anybody looks at it."""
    with pytest.raises(InvalidStatus) as refused:
        async with dialled(server, subprotocols=("bearer." + (token("ann") if shown == "good" else "x.y.z"),)):
            pass
    assert refused.value.response.status_code == 400


async def test_the_header_wins_over_the_subprotocol(server: RunningServer) -> None:
    """Also where it is the bad one: nobody tries one after the other."""
    offered = ("realtime.v1", f"bearer.{token('bob')}")
    _, first = await first_of(server, *offered, **bearer("ann"))
    assert first["session"]["owner"] == "ann"
    assert await refusal_of(server, *offered, Authorization="Bearer x") == ("invalid_token", 4401)


@pytest.mark.parametrize("name", ["token", "access_token", "authorization", "bearer", "realtime_token", "jwt"])
async def test_a_token_in_the_query_counts_for_nothing(
    server: RunningServer, http: httpx.AsyncClient, name: str
) -> None:
    """As if there were none, over every transport."""
    query = {name: token("ann")}
    assert await refusal_of(server, query=f"{name}={query[name]}") == ("token_required", 4401)
    session_id = (await http.post("/v1/sessions", headers=bearer("ann"))).json()["session"]["id"]
    for method, path in [("POST", "/v1/sessions"), ("GET", f"/v1/sessions/{session_id}/events")]:
        answer = await http.request(method, path, params=query)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "token_required")


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_token_is_told_after_the_upgrade(server: RunningServer, name: str) -> None:
    """A fatal error and 4401, by header and by subprotocol."""
    bad = BAD[name]()
    assert await refusal_of(server, Authorization=f"Bearer {bad}") == (CODES[name], 4401)
    assert await refusal_of(server, "realtime.v1", f"bearer.{bad}") == (CODES[name], 4401)


async def test_no_token_is_told_after_the_upgrade(server: RunningServer) -> None:
    """And so is one of another kind."""
    assert await refusal_of(server) == ("token_required", 4401)
    assert await refusal_of(server, Authorization="Basic YW5uOmFubg==") == ("invalid_token", 4401)


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("path", ["", "/events", "/tasks/t", "/tasks/t/events", "/tasks/t/result"])
async def test_a_bad_token_is_a_401_over_http(http: httpx.AsyncClient, name: str, path: str) -> None:
    """With `WWW-Authenticate`, also for streams."""
    answer = await http.get(f"/v1/sessions/sess_1{path}", headers={"Authorization": f"Bearer {BAD[name]()}"})
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert (answer.json()["error"]["type"], answer.json()["error"]["code"]) == ("authentication_error", CODES[name])


PATHS = [
    ("POST", "/v1/sessions"),
    ("GET", "/v1/sessions/sess_1"),
    ("DELETE", "/v1/sessions/sess_1"),
    ("GET", "/v1/sessions/sess_1/events"),
    ("POST", "/v1/sessions/sess_1/events"),
    ("GET", "/v1/sessions/sess_1/tasks/t"),
    ("DELETE", "/v1/sessions/sess_1/tasks/t"),
    ("GET", "/v1/sessions/sess_1/tasks/t/events"),
    ("GET", "/v1/sessions/sess_1/tasks/t/result"),
    ("POST", "/v1/tasks/analyse"),
    ("GET", "/v1/tasks/task_1"),
    ("DELETE", "/v1/tasks/task_1"),
    ("GET", "/v1/tasks/task_1/events"),
    ("GET", "/v1/tasks/task_1/result"),
    ("POST", "/v1/analyse"),
    ("POST", "/v1/summarise"),
    ("POST", "/v1/stream"),
    ("POST", "/v1/complete"),
    ("POST", "/v1/auth/cookie"),
    ("POST", "/v1/admin/revoke"),
]


@pytest.mark.parametrize(("method", "path"), PATHS)
async def test_no_endpoint_answers_without_a_token(http: httpx.AsyncClient, method: str, path: str) -> None:
    """Whatever the body is, which nobody looks at."""
    answer = await http.request(method, path, content=b"{" if method == "POST" else None)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "token_required")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_every_endpoint_is_among_those() -> None:
    """But for those that say nothing of anybody, and what forgets a cookie."""
    routes = [route for route in create_app(echo, Settings()).routes if isinstance(route, Route)]
    there = {(method, route.path) for route in routes for method in route.methods or () if "/v1/" in route.path}
    ids = {"sess_1": "{session_id}", "task_1": "{task_id}", "analyse": "{task_id}", "t": "{task_id}"}
    asked = {(method, "/".join(ids.get(part, part) for part in path.split("/"))) for method, path in PATHS}
    asked = (asked - {("POST", "/v1/{task_id}")}) | {("POST", "/v1/analyse")}
    assert there - {("DELETE", "/v1/auth/cookie")} == asked


async def cookie_of(http: httpx.AsyncClient, user: str = "ann", **claims: Any) -> str:
    """The cookie for a token, as a request shows it."""
    answer = await http.post("/v1/auth/cookie", headers=bearer(user, **claims))
    assert answer.status_code == 204
    return answer.headers["set-cookie"].partition(";")[0]


async def test_the_cookie_is_for_this_server_alone(http: httpx.AsyncClient) -> None:
    """No script reads it, no other site's page sends it, and it ends with its token."""
    answer = await http.post("/v1/auth/cookie", headers=bearer("ann", ttl_s=100))
    cookie, *attributes = answer.headers["set-cookie"].split("; ")
    assert cookie.startswith("realtime_token=")
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(attributes)
    assert "Secure" not in attributes
    [max_age] = [one.partition("=")[2] for one in attributes if one.startswith("Max-Age")]
    assert 50 < int(max_age) <= 100
    assert "no-store" in answer.headers["cache-control"]


@pytest.mark.parametrize(("proxies", "is_secure"), [(("127.0.0.1",), True), (("10.9.9.9",), False)])
async def test_the_cookie_is_secure_where_a_trusted_proxy_tells_of_tls(
    proxies: tuple[str, ...], is_secure: bool
) -> None:
    """Not where anybody else does."""
    async with running_server(echo, auth_secret=SECRET, trusted_proxies=proxies) as server:
        async with http_client(base_url=server.url) as http:
            headers = {**bearer("ann"), "X-Forwarded-Proto": "https"}
            answer = await http.post("/v1/auth/cookie", headers=headers)
    assert ("Secure" in answer.headers["set-cookie"].split("; ")) is is_secure


async def test_the_cookie_is_forgotten(http: httpx.AsyncClient) -> None:
    """Without a token: it may have expired."""
    answer = await http.delete("/v1/auth/cookie")
    assert answer.status_code == 204
    assert answer.headers["set-cookie"].startswith("realtime_token=; Path=/; Max-Age=0")


FOREIGN = "https://elsewhere.example"


@pytest.mark.parametrize(
    ("vouched", "status"),
    [
        ({"Origin": "SELF"}, 200),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({}, 401),
        ({"Sec-Fetch-Site": "none"}, 401),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": FOREIGN}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": FOREIGN, "Sec-Fetch-Site": "same-origin"}, 403),
    ],
)
async def test_the_cookie_counts_only_for_pages_that_are_allowed(
    server: RunningServer, http: httpx.AsyncClient, vouched: dict[str, str], status: int
) -> None:
    """A browser has to vouch for that, over HTTP as for the upgrade."""
    session_id = (await http.post("/v1/sessions", headers=bearer("ann"))).json()["session"]["id"]
    shown = {name: value.replace("SELF", server.url) for name, value in vouched.items()}
    shown["Cookie"] = await cookie_of(http)
    assert (await http.get(f"/v1/sessions/{session_id}", headers=shown)).status_code == status
    if status == 200:
        assert (await first_of(server, **shown))[1]["session"]["owner"] == "ann"
    elif status == 401:
        assert await refusal_of(server, **shown) == ("token_required", 4401)
    else:
        with pytest.raises(InvalidStatus):
            await first_of(server, **shown)


@pytest.mark.parametrize("others", ['a={"b": 1}; {}', "é=ü; {}", "a b=c; {}; =", "{}; x=[1,2]", 'q="; {}'])
async def test_cookies_of_others_do_not_hide_it(server: RunningServer, http: httpx.AsyncClient, others: str) -> None:
    """However they are written."""
    text = others.replace("{}", await cookie_of(http))
    headers = [(b"cookie", text.encode()), (b"sec-fetch-site", b"same-origin")]
    assert (await http.post("/v1/sessions", headers=headers)).status_code == 201


async def test_a_browsers_event_source_shows_the_cookie(server: RunningServer, http: httpx.AsyncClient) -> None:
    """A page has the cookie set, and streams a session of the user's."""
    async with attached(server, headers=bearer("ann")) as client:
        url = f"{server.url}/v1/sessions/{client.session_id}/events"
        async with chromium_source(url, signed_in_by=f"Bearer {token('ann')}") as source:
            await client.answer("hello")
            done = await source.until("response.done")
            assert source.transcript.texts[done["response_id"]] == "hello"


async def test_a_browsers_event_source_without_the_cookie_is_refused(server: RunningServer) -> None:
    """It gives up at once."""
    async with attached(server, headers=bearer("ann")) as client:
        async with chromium_source(f"{server.url}/v1/sessions/{client.session_id}/events") as source:
            await source.until_stopped()
            assert source.opened == 0


async def test_a_stream_by_header(server: RunningServer) -> None:
    """For clients that can set one."""
    async with attached(server, headers=bearer("ann")) as client:
        url = f"{server.url}/v1/sessions/{client.session_id}/events"
        async with streaming(url, headers=bearer("ann")) as stream:
            assert stream.first["session"]["owner"] == "ann"
