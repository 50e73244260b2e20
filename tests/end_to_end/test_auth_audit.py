"""The audit log: exactly one line for each access over every transport, allowed or not, and nothing that was said."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, MutableMapping
from contextlib import suppress
from typing import Any, NamedTuple

import httpx
import pytest
from structlog.testing import capture_logs
from websockets.exceptions import InvalidStatus

from realtime.access.audit import hidden
from realtime.feed import Feed
from realtime.protocol import new_id
from tests.access.wire import ask
from tests.end_to_end import PATIENCE_S, Model, dialled, echo, frames_until_closed, refused
from tests.support.client import attached
from tests.support.event_stream import connections_of, http_client
from tests.support.instance import instance
from tests.support.sample_tasks import MODULE
from tests.support.server import RunningServer, running_server
from tests.support.tokens import SECRET, bearer, token

CANARY = "canary-77ab"
NAMED = {"response", "task"}
"""What only some lines have."""
FIELDS = {"event", "user", "session", "address", "allowed", "code", "log_level"}


class Line(NamedTuple):
    """What a line says of how it went."""

    action: str
    user: str | None
    allowed: bool
    code: str | None


class Log:
    """The audit lines since the last `take`."""

    def __init__(self, records: list[MutableMapping[str, Any]]) -> None:
        self.records = records

    @property
    def lines(self) -> list[MutableMapping[str, Any]]:
        return [record for record in self.records if "allowed" in record]

    def take(self) -> list[Line]:
        """Those there are, which are forgotten."""
        lines = self.lines
        self.records.clear()
        for line in lines:
            assert set(line) - NAMED == FIELDS
            assert line["address"] == "127.0.0.1"
            assert CANARY not in str(line)
            assert "eyJ" not in str(line)
        return [Line(line["event"], line["user"], line["allowed"], line["code"]) for line in lines]

    async def until(self, count: int) -> list[Line]:
        """Those, once there are so many."""
        await self.has(count)
        return self.take()

    async def has(self, count: int) -> None:
        """Return once there are so many."""
        async with asyncio.timeout(PATIENCE_S):
            while len(self.lines) < count:  # noqa: ASYNC110  # nothing tells of it
                await asyncio.sleep(0.005)


@pytest.fixture
def log() -> Iterator[Log]:
    with capture_logs() as records:
        yield Log(records)


@pytest.fixture
async def server() -> AsyncIterator[RunningServer]:
    async with running_server(echo, auth_secret=SECRET, tasks=(MODULE,)) as server:
        yield server


@pytest.fixture
async def http(server: RunningServer) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(base_url=server.url) as http:
        yield http


ANN, BOB = bearer("ann"), bearer("bob")
ONE = "/v1/sessions/{session}"
REQUESTS: list[tuple[str, str, Any, str]] = [
    ("POST", "/v1/sessions", {}, "session.create"),
    ("GET", ONE, None, "session.read"),
    ("POST", ONE + "/events", {"type": "response.create", "input": CANARY}, "response.create"),
    ("POST", ONE + "/events", {"type": "session.update", "session": {"instructions": CANARY}}, "session.update"),
    ("GET", ONE + "/tasks/{task}", None, "task.read"),
    ("GET", ONE + "/tasks/{task}/events", None, "task.stream"),
    ("GET", ONE + "/tasks/{task}/result", None, "task.result"),
    ("DELETE", ONE + "/tasks/{task}", None, "task.cancel"),
    ("POST", "/v1/tasks/echo", {"text": CANARY}, "task.create"),
    ("POST", "/v1/analyse", {"text": CANARY}, "task.create"),
    ("GET", "/v1/tasks/{lone}", None, "task.read"),
    ("GET", "/v1/tasks/{lone}/events", None, "task.stream"),
    ("GET", "/v1/tasks/{lone}/result", None, "task.result"),
    ("DELETE", "/v1/tasks/{lone}", None, "task.cancel"),
    ("POST", "/v1/stream", {"prompt": CANARY}, "oneshot.stream"),
    ("POST", "/v1/complete", {"prompt": CANARY}, "oneshot.complete"),
    ("POST", "/v1/summarise", {"text": CANARY}, "oneshot.summarise"),
    ("POST", "/v1/auth/cookie", None, "auth.cookie"),
    ("DELETE", ONE, None, "session.delete"),
]
BY_REQUEST = pytest.mark.parametrize(("method", "path", "body", "action"), REQUESTS)


async def ids_of(server: RunningServer, http: httpx.AsyncClient, log: Log) -> dict[str, str]:
    """A session of Ann's with a task, and a task in none, all of which have ended; the log is empty then."""
    async with attached(server, headers=ANN) as client:
        await client.send("task.create", name="echo", input={"text": CANARY})
        task_id = (await client.until("task.created"))["task"]["id"]
        await client.until("task.done")
    lone = (await http.post("/v1/tasks/echo", json={"text": CANARY}, headers=ANN)).json()["task_id"]
    await http.get(f"/v1/tasks/{lone}/events", headers=ANN)
    await log.until(4)
    return {"session": client.session_id, "task": task_id, "lone": lone}


@BY_REQUEST
async def test_what_is_allowed_is_one_line(
    server: RunningServer, http: httpx.AsyncClient, log: Log, method: str, path: str, body: Any, action: str
) -> None:
    """With the user, and the session where there is one."""
    ids = await ids_of(server, http, log)
    answer = await http.request(method, path.format(**ids), json=body, headers=ANN)
    assert answer.is_success, answer.text
    expected = {"session": ids["session"], "task": ids["session"], "lone": ids["lone"]}
    named = [session for name, session in expected.items() if f"{{{name}}}" in path]
    await log.has(1)
    [line] = log.lines
    if "task" in path and (task := ids["lone" if "{lone}" in path else "task"]) in path.format(**ids):
        assert line["task"] == task
    if named:
        assert line["session"] == named[0]
    elif action.endswith("create"):
        assert line["session"] in answer.text
    else:
        assert line["session"] is None
    assert log.take() == [Line(action, "ann", True, None)]


@pytest.mark.parametrize(("method", "path", "body", "action"), [one for one in REQUESTS if "{" in one[1]])
async def test_what_is_not_theirs_is_one_line(
    server: RunningServer, http: httpx.AsyncClient, log: Log, method: str, path: str, body: Any, action: str
) -> None:
    """Of who has tried."""
    ids = await ids_of(server, http, log)
    answer = await http.request(method, path.format(**ids), json=body, headers=BOB)
    assert await log.until(1) == [Line(action, "bob", False, answer.json()["error"]["code"])]


@BY_REQUEST
async def test_who_shows_no_token_is_one_line(
    http: httpx.AsyncClient, log: Log, method: str, path: str, body: Any, action: str
) -> None:
    """Of nobody known; what they ask of a session is not read."""
    path = path.format(session="sess_1", task="t", lone="task_1")
    action = "session.command" if path.endswith("sess_1/events") else action
    await http.request(method, path, json=body)
    assert await log.until(1) == [Line(action, None, False, "token_required")]
    await http.request(method, path, json=body, headers={"Authorization": f"Bearer {CANARY}"})
    assert await log.until(1) == [Line(action, None, False, "invalid_token")]


@pytest.mark.parametrize(
    ("body", "code"),
    [(b"{", "invalid_json"), (b'"' + CANARY.encode(), "invalid_json"), (b'{"type":"canary-77ab"}', "unknown_type")],
)
async def test_a_body_that_cant_be_read_is_one_line(http: httpx.AsyncClient, log: Log, body: bytes, code: str) -> None:
    """Allowed, but it came to nothing; nobody knows what it would have been."""
    await http.post("/v1/sessions/sess_1/events", content=body, headers=ANN)
    assert await log.until(1) == [Line("session.command", "ann", True, code)]


async def test_what_is_no_access_is_no_line(server: RunningServer, http: httpx.AsyncClient, log: Log) -> None:
    """Other paths and methods, health, metrics, the page, and pings."""
    for method, path in [("GET", "/v1/nothing"), ("PUT", "/v1/sessions"), ("PATCH", "/v1/sessions/s"), ("GET", "/")]:
        await http.request(method, path, headers=ANN)
    for path in ("/healthz", "/readyz", "/metrics"):
        assert (await http.get(path)).status_code == 200
    assert not log.take()
    async with attached(server, headers=ANN) as client:
        await client.send("ping")
        await client.until("pong")
        assert log.take() == [Line("session.attach", "ann", True, None)]
    assert not log.take()


async def test_a_forgotten_cookie_is_one_line(http: httpx.AsyncClient, log: Log) -> None:
    """Of nobody: no token is needed for that."""
    await http.delete("/v1/auth/cookie")
    assert log.take() == [Line("auth.forget", None, True, None)]


async def test_a_revocation_is_one_line(http: httpx.AsyncClient, log: Log) -> None:
    """Whoever has tried it."""
    session_id = new_id("sess")
    body = {"session_id": session_id}
    await http.post("/v1/admin/revoke", json=body, headers=ANN)
    await http.post("/v1/admin/revoke", json=body, headers=bearer("root", scope="admin"))
    [first, second] = log.lines
    assert (first["session"], second["session"]) == (None, session_id)
    assert log.take() == [
        Line("admin.revoke", "ann", False, "scope_missing"),
        Line("admin.revoke", "root", True, None),
    ]


# --- WebSockets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "query", "line"),
    [
        ({}, "", (None, False, "token_required")),
        ({"Authorization": "Bearer x.y.z"}, "", (None, False, "invalid_token")),
        (bearer("ann", ttl_s=-3600), "", (None, False, "token_expired")),
        (bearer("ann", scope="task"), "", ("ann", False, "scope_missing")),
        (bearer("ann", session_id="sess_1"), "", ("ann", False, "guest")),
        (ANN, "session_id=sess_nowhere", ("ann", False, "session_not_found")),
        (ANN, f"session_id={CANARY}%0A%22", ("ann", False, "session_not_found")),
    ],
)
async def test_an_attach_that_is_refused_is_one_line(
    server: RunningServer, log: Log, shown: dict[str, str], query: str, line: tuple[str | None, bool, str]
) -> None:
    """After the upgrade."""
    async with dialled(server, query, additional_headers=shown) as socket:
        await frames_until_closed(socket)
    assert await log.until(1) == [Line("session.attach", *line)]


async def test_an_attach_that_is_refused_before_the_upgrade_is_one_line(server: RunningServer, log: Log) -> None:
    """A bad request, and an instance that is full or about to end."""
    for query, options in [("history=x", {}), ("", {"subprotocols": ("other",)})]:
        with suppress(InvalidStatus):
            async with dialled(server, query, additional_headers=ANN, **options):
                pass
    connections_of(server).draining = True
    with suppress(InvalidStatus):
        async with dialled(server, additional_headers=ANN):
            pass
    assert [line[2:] for line in await log.until(3)] == [
        (False, "invalid_query"),
        (False, "unknown_subprotocol"),
        (False, "draining"),
    ]


async def test_one_connection_too_many_is_one_line(log: Log) -> None:
    """By a limit of the user's."""
    async with running_server(echo, auth_secret=SECRET, max_connections_per_user=1) as server:
        async with attached(server, headers=ANN), dialled(server, additional_headers=ANN) as socket:
            await frames_until_closed(socket)
            assert await log.until(2) == [
                Line("session.attach", "ann", True, None),
                Line("session.attach", "ann", False, "too_many_connections"),
            ]


MESSAGES: list[tuple[dict[str, Any], bool, str | None]] = [
    ({"type": "session.update", "session": {"instructions": CANARY}}, True, None),
    ({"type": "conversation.item.create", "item": {"role": "user", "content": CANARY}}, True, None),
    ({"type": "response.create", "input": CANARY}, True, None),
    ({"type": "response.create", "model": CANARY, "response_id": "session", "input": "x"}, True, "reserved_id"),
    ({"type": "response.create", "response_id": "mine", "input": CANARY}, True, None),
    ({"type": "response.cancel", "response_id": "resp_1"}, False, "response_not_found"),
    ({"type": "conversation.item.truncate", "response_id": "resp_1", "heard_chars": 1}, False, "response_not_found"),
    ({"type": "task.create", "name": "echo", "input": {"text": CANARY}}, True, None),
    ({"type": "task.create", "task_id": "task_mine", "name": CANARY, "input": {}}, False, "unknown_task"),
    ({"type": "task.cancel", "task_id": "task_1"}, False, "task_not_found"),
    ({"type": "auth.refresh", "token": CANARY}, False, "invalid_token"),
    ({"type": "session.close"}, True, None),
]


@pytest.mark.parametrize(("message", "allowed", "code"), MESSAGES)
async def test_a_message_is_one_line(
    server: RunningServer, log: Log, message: dict[str, Any], allowed: bool, code: str | None
) -> None:
    """Named as it is on the wire, with the response or the task that it names: as a hash, as a client has thought of
    them."""
    async with attached(server, headers=ANN) as client:
        log.take()
        await client.send_raw(message)
        await log.has(1)
        named = {name: log.lines[0][name] for name in ("response", "task") if f"{name}_id" in message}
        assert named == {name: hidden(message[f"{name}_id"]) for name in named}
        assert log.take() == [Line(message["type"], "ann", allowed, code)]
    assert not log.take()


async def test_what_a_command_has_made_stands_in_its_line(
    server: RunningServer, http: httpx.AsyncClient, log: Log
) -> None:
    """Over a WebSocket as over HTTP: the ids of the response and of the task that nobody has chosen."""
    response, task = {"type": "response.create", "input": CANARY}, {"type": "task.create", "name": "echo"}
    async with attached(server, headers=ANN) as client:
        log.take()
        await client.send_raw(response)
        response_id = (await client.until("response.created"))["response"]["id"]
        await client.until("response.done")
        await client.send_raw({**task, "input": {"text": "x"}})
        task_id = (await client.until("task.created"))["task"]["id"]
        await log.has(2)
        assert (log.lines[0]["response"], log.lines[1]["task"]) == (response_id, task_id)
        log.take()
        url = f"/v1/sessions/{client.session_id}/events"
        for command in (response, {**task, "input": {"text": "x"}}):
            made = (await http.post(url, json=command, headers=ANN)).json()
            await log.has(1)
            [line] = log.lines
            assert (line.get("response"), line.get("task")) == (made.get("response_id"), made.get("task_id"))
            log.take()


async def test_a_token_that_is_accepted_is_one_line(server: RunningServer, log: Log) -> None:
    """And is not in it."""
    async with attached(server, headers=ANN) as client:
        log.take()
        await client.send("auth.refresh", token=token("ann"))
        assert await log.until(1) == [Line("auth.refresh", "ann", True, None)]


async def test_a_command_that_comes_twice_is_two_lines(server: RunningServer, log: Log) -> None:
    """Twice somebody has asked for it; over HTTP likewise."""
    async with attached(server, headers=ANN) as client, http_client(base_url=server.url) as http:
        log.take()
        command = {"type": "session.update", "session": {}, "event_id": "e"}
        for _ in range(2):
            await client.send_raw(command)
        await http.post(f"/v1/sessions/{client.session_id}/events", json=command, headers=ANN)
        await log.until(3)
        await refused(client, "session.update", session={"max_output_tokens": 1}, event_id="e")
        assert await log.until(1) == [Line("session.update", "ann", True, "event_id_reused")]


async def test_messages_that_cant_be_read_are_one_line_each(server: RunningServer, log: Log) -> None:
    """As with bodies."""
    async with attached(server, headers=ANN) as client:
        log.take()
        await client.socket.send("{" + CANARY)
        await client.socket.send('{"type":"canary-77ab"}')
        expected = [Line("session.command", "ann", True, code) for code in ("invalid_json", "unknown_type")]
        assert await log.until(2) == expected


async def test_messages_that_come_too_soon_are_one_line_each(log: Log) -> None:
    """Refused, without a look at them."""
    async with running_server(echo, auth_secret=SECRET, rate_messages="1/hour") as server:
        async with attached(server, headers=ANN) as client:
            log.take()
            for _ in range(3):
                await client.send("session.update", session={})
            lines = await log.until(3)
    assert sorted(lines) == sorted(
        [Line("session.update", "ann", True, None), *[Line("session.command", "ann", False, "rate_limited")] * 2]
    )


@pytest.mark.parametrize(
    ("line", "header", "code", "allowed"),
    [
        ("POST /v1/sessions", "Host: {}", "host_not_allowed", False),
        ("GET /v1/sessions/sess_1/events", "Origin: https://{}", "origin_not_allowed", False),
        ("POST /v1/complete", "Content-Length: 999999999", "body_too_large", False),
        ("POST /v1/complete", "Content-Encoding: {}", "encoding_not_supported", False),
    ],
)
async def test_what_is_refused_at_the_edge_is_one_line(
    server: RunningServer, log: Log, line: str, header: str, code: str, allowed: bool
) -> None:
    """Nobody has looked who asks, and for what: it says from where, and why."""
    host = b"" if header.startswith("Host") else None
    answer = await ask(server.port, line, header.format(CANARY).encode(), host=host)
    assert answer.code == code
    assert await log.until(1) == [Line("request", None, allowed, code)]


async def test_a_request_that_is_given_up_is_one_line(log: Log) -> None:
    """Its client hangs up while the model works."""
    model = Model()
    async with running_server(model, auth_secret=SECRET) as server, http_client(base_url=server.url) as http:
        for path, action in (("/v1/complete", "oneshot.complete"), ("/v1/stream", "oneshot.stream")):
            asking = asyncio.create_task(http.post(path, json={"prompt": CANARY}, headers=ANN))
            turn = await model.turn()
            asking.cancel()
            await turn.closed.wait()
            assert await log.until(1) == [Line(action, "ann", True, None)]
    assert not log.take()


async def test_a_fault_of_ours_is_one_line(
    server: RunningServer, http: httpx.AsyncClient, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over every transport."""

    async def fail(*_arguments: Any) -> None:
        raise RuntimeError(CANARY)

    async with attached(server, headers=ANN) as client:
        log.take()
        monkeypatch.setattr(server.engine.commands, "execute", fail)
        assert (await refused(client, "session.update", session={}))["code"] == "internal_error"
        url = f"/v1/sessions/{client.session_id}/events"
        assert (await http.post(url, json={"type": "session.close"}, headers=ANN)).status_code == 500
        actions = ("session.update", "session.close")
        assert await log.until(2) == [Line(action, "ann", True, "internal_error") for action in actions]
        monkeypatch.setattr(Feed, "begin", fail)
        async with dialled(server, additional_headers=ANN) as socket:
            await frames_until_closed(socket)
        assert [line.action for line in await log.until(1)] == ["session.attach"]


# --- a real instance -----------------------------------------------------------------------------------------------


async def lines_of(log: list[str]) -> list[dict[str, Any]]:
    """The audit lines of an instance, each of which has to be JSON."""
    found = [json.loads(line) for line in log if '"allowed"' in line]
    return [line for line in found if "allowed" in line]


async def test_lines_come_at_any_level_and_hold_no_secret() -> None:
    """As JSON, one each, however odd the names are."""
    odd = 'o"\\dd {"a":1} \u00e9'
    async with instance(auth_secret=SECRET, log_level="error", log_format="json") as one:
        async with http_client(base_url=one.url) as http, attached(one, headers=bearer(odd)) as client:
            await client.answer(CANARY)
            await http.get("/v1/sessions/a%0Ab%22%E2%80%A8", headers=bearer(odd))
            async with asyncio.timeout(PATIENCE_S):
                await one.logged("session.read")
        lines = await lines_of(one.log)
    assert [line["event"] for line in lines] == ["session.attach", "response.create", "session.read"]
    assert {line["user"] for line in lines} == {odd}
    assert lines[0]["session"] == client.session_id
    assert lines[2]["session"].startswith("#")
    text = "\n".join(one.log)
    assert CANARY not in text
    assert "eyJ" not in text
    assert SECRET not in text


async def test_without_authentication_no_line_holds_a_sessions_id() -> None:
    """It is a credential; lines of one session have one hash."""
    async with instance(log_level="debug", log_format="json") as one, attached(one) as client:
        async with http_client(base_url=one.url) as http:
            await client.answer("hello")
            await http.get(f"/v1/sessions/{client.session_id}")
            async with asyncio.timeout(PATIENCE_S):
                await one.logged("session.read")
        lines = await lines_of(one.log)
        assert client.session_id not in "\n".join(one.log)
    assert {line["user"] for line in lines} == {"anonymous"}
    assert len({line["session"] for line in lines}) == 1
