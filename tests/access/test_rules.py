"""What owners and guests may, as tables: each command, and each endpoint with each scope."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import nullcontext
from typing import Any

import httpx
import msgspec
import pytest

from realtime.access.principal import Principal
from realtime.access.rules import check_may_see, permit
from realtime.errors import NotFound, PermissionDenied
from realtime.protocol import (
    JSON,
    Overrides,
    Response,
    ResponseCreated,
    Session,
)
from realtime.session import SessionState
from tests.end_to_end import dialled, echo, frames_until_closed
from tests.support.client import attached
from tests.support.event_stream import http_client
from tests.support.principals import known
from tests.support.sample_tasks import MODULE
from tests.support.server import RunningServer, running_server
from tests.support.tokens import SECRET, bearer

SESSION = Session(
    id="sess_1",
    owner="ann",
    created_at="",
    expires_at="",
    instructions="",
    model="m",
    max_output_tokens=1,
    on_disconnect="cancel",
    disconnect_grace_ms=0,
    multitask_strategy="reject",
)


def guest(user: str = "gus", session_id: str = "sess_1") -> Principal:
    """A guest of the session."""
    return msgspec.structs.replace(known(user), session_id=session_id)


def state(*running: str, **settings: Any) -> SessionState:
    """A session in which these users' responses run, each called `of_` and its user."""
    found = SessionState(msgspec.structs.replace(SESSION, **settings))
    for user in running:
        made = Response(id=f"of_{user}", status="queued", model="m", created_at="", metadata={}, user=user)
        found.apply(ResponseCreated(response=made, overrides=Overrides()))
    return found


def refusal(principal: Principal, seen: SessionState, message: dict[str, Any]) -> str | None:
    """The code that refuses a message, if anything does."""
    command: Any = JSON.decode(msgspec.json.encode(message))
    try:
        permit(seen, command, principal)
    except PermissionDenied as error:
        return error.code
    return None


CREATE = {"type": "response.create"}
ITEM = {"type": "conversation.item.create"}
TASK = {"type": "task.create", "name": "t", "input": {}}
CANCEL_TASK = {"type": "task.cancel", "task_id": "t"}
TRUNCATE = {"type": "conversation.item.truncate", "heard_chars": 1}
COMMANDS: list[tuple[dict[str, Any], str | None]] = [
    ({"type": "session.update", "session": {}}, "owner_only"),
    ({"type": "session.close"}, "owner_only"),
    ({**ITEM, "item": {"role": "user", "content": "x"}}, None),
    ({**ITEM, "item": {"role": "assistant", "content": "x"}}, "owner_only"),
    ({**ITEM, "item": {"role": "system", "content": "x"}}, "owner_only"),
    (CREATE, None),
    ({**CREATE, "input": "x", "max_output_tokens": 1, "metadata": {"a": 1}}, None),
    ({**CREATE, "multitask_strategy": "enqueue"}, None),
    ({**CREATE, "multitask_strategy": "interrupt"}, "owner_only"),
    ({**CREATE, "instructions": "x"}, "owner_only"),
    ({**CREATE, "instructions": ""}, "owner_only"),
    ({**CREATE, "model": "m"}, "owner_only"),
    ({"type": "response.cancel", "response_id": "of_gus"}, None),
    ({"type": "response.cancel", "response_id": "of_ann"}, "owner_only"),
    ({"type": "response.cancel", "response_id": "of_ann", "heard_chars": 1}, "owner_only"),
    ({"type": "response.cancel", "response_id": "of_nobody"}, None),  # there is none, which is told next
    ({**TRUNCATE, "response_id": "of_gus"}, None),
    ({**TRUNCATE, "response_id": "of_ann"}, "owner_only"),
    (TASK, "owner_only"),
    (CANCEL_TASK, "owner_only"),
]


@pytest.mark.parametrize(("message", "code"), COMMANDS)
def test_what_a_guest_may(message: dict[str, Any], code: str | None) -> None:
    """Say what they say, ask, and stop what they have asked for."""
    assert refusal(guest(), state("ann", "gus"), message) == code


@pytest.mark.parametrize("message", [message for message, _ in COMMANDS])
def test_the_owner_may_all(message: dict[str, Any]) -> None:
    """In what runs for guests, too."""
    assert refusal(known("ann"), state("ann", "gus"), message) is None


@pytest.mark.parametrize("message", [message for message, code in COMMANDS if code and "response_id" not in message])
def test_a_guest_of_the_owners_name_is_a_guest(message: dict[str, Any]) -> None:
    """The token says what it is for. What runs in that name is their own."""
    expected = None if message.get("multitask_strategy") else "owner_only"
    assert refusal(guest("ann"), state("ann"), message) == expected


@pytest.mark.parametrize(("running", "code"), [((), None), (("gus",), None), (("gus", "ann"), "owner_only")])
def test_a_guest_interrupts_only_their_own(running: tuple[str, ...], code: str | None) -> None:
    """Also where the owner has it that everybody interrupts."""
    message = {**CREATE, "multitask_strategy": "interrupt"}
    assert refusal(guest(), state(*running), message) == code
    assert refusal(guest(), state(*running, multitask_strategy="interrupt"), CREATE) == code


@pytest.mark.parametrize("message", [TASK, CANCEL_TASK])
@pytest.mark.parametrize("who", [known("ann"), guest()])
def test_tasks_need_their_scope(message: dict[str, Any], who: Principal) -> None:
    """Whoever it is."""
    without = msgspec.structs.replace(who, scopes=frozenset({"session", "oneshot", "admin"}))
    assert refusal(without, state(), message) == "scope_missing"


@pytest.mark.parametrize(
    ("principal", "sees"),
    [
        (known("ann"), True),
        (known("bob"), False),
        (known(""), False),
        (guest("bob"), True),
        (guest("ann"), True),
        (guest("ann", "sess_2"), False),
        (guest("bob", "sess_2"), False),
        (msgspec.structs.replace(known("bob"), scopes=frozenset({"admin", "session"})), False),
    ],
)
def test_who_sees_a_session(principal: Principal, sees: bool) -> None:
    """Its owner and its guests; no scope helps others."""
    with nullcontext() if sees else pytest.raises(NotFound, match="no such session"):
        check_may_see(SESSION, principal)


# --- through the server --------------------------------------------------------------------------------------------


@pytest.fixture
async def server() -> AsyncIterator[RunningServer]:
    async with running_server(echo, auth_secret=SECRET, tasks=(MODULE,)) as server:
        yield server


@pytest.fixture
async def http(server: RunningServer) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(base_url=server.url) as http:
        yield http


ONE = "/v1/sessions/{session}"
ENDPOINTS: list[tuple[str, str, Any, str | None, str | None]] = [
    # method, path, body, the scope that it needs, what refuses a guest of the session
    ("POST", "/v1/sessions", {}, "session", "guest"),
    ("GET", ONE, None, "session", None),
    ("DELETE", ONE, None, "session", "owner_only"),
    ("GET", ONE + "/events?after=x", None, "session", None),
    (
        "POST",
        ONE + "/events",
        {"type": "conversation.item.create", "item": {"role": "user", "content": "x"}},
        "session",
        None,
    ),
    ("GET", ONE + "/tasks/{task}", None, "session", None),
    ("GET", ONE + "/tasks/{task}/events?after=x", None, "session", None),
    ("GET", ONE + "/tasks/{task}/result", None, "session", None),
    ("DELETE", ONE + "/tasks/{task}", None, "task", "owner_only"),
    ("POST", "/v1/tasks/echo", {"text": "x"}, "task", "guest"),
    ("POST", "/v1/analyse", {"text": "x"}, "task", "guest"),
    ("GET", "/v1/tasks/{lone}", None, "task", "guest"),
    ("GET", "/v1/tasks/{lone}/events?after=x", None, "task", "guest"),
    ("GET", "/v1/tasks/{lone}/result", None, "task", "guest"),
    ("DELETE", "/v1/tasks/{lone}", None, "task", "guest"),
    ("POST", "/v1/stream", {"prompt": "x"}, "oneshot", "guest"),
    ("POST", "/v1/complete", {"prompt": "x"}, "oneshot", "guest"),
    ("POST", "/v1/summarise", {"text": ""}, "oneshot", "guest"),
    ("POST", "/v1/admin/revoke", {"user": "nobody"}, "admin", "guest"),
    ("POST", "/v1/auth/cookie", None, None, None),
]
ALL = frozenset({"session", "task", "oneshot", "admin"})
BY_ENDPOINT = pytest.mark.parametrize(("method", "path", "body", "scope", "guests"), ENDPOINTS)


async def ids_of(server: RunningServer, http: httpx.AsyncClient) -> dict[str, str]:
    """A session of Ann's with a task, and a task in none."""
    async with attached(server, headers=bearer("ann")) as client:
        await client.send("task.create", name="echo", input={"text": "x"})
        task_id = (await client.until("task.created"))["task"]["id"]
        await client.until("task.done")
    lone = await http.post("/v1/tasks/echo", json={"text": "x"}, headers=bearer("ann"))
    return {"session": client.session_id, "task": task_id, "lone": lone.json()["task_id"]}


def code_of(answer: httpx.Response) -> str | None:
    """The code of an error that says: not allowed."""
    if answer.status_code not in {401, 403}:
        return None
    assert (answer.status_code, answer.json()["error"]["type"]) == (403, "permission_error")
    code: str = answer.json()["error"]["code"]
    return code


@BY_ENDPOINT
async def test_an_endpoint_needs_its_scope(
    server: RunningServer, http: httpx.AsyncClient, method: str, path: str, body: Any, scope: str | None, guests: str
) -> None:
    """That one and no other; all the others don't make up for it."""
    url = path.format(**await ids_of(server, http))
    for name in sorted(ALL):
        for scopes in ({name}, ALL - {name}):
            shown = bearer("ann", scope=" ".join(scopes))
            found = code_of(await http.request(method, url, json=body, headers=shown))
            assert found == (None if scope is None or scope in scopes else "scope_missing"), scopes
            if path == ONE and method == "DELETE" and found is None:
                url = path.format(**await ids_of(server, http))


@BY_ENDPOINT
async def test_what_a_guest_may_ask_for(
    server: RunningServer, http: httpx.AsyncClient, method: str, path: str, body: Any, scope: str, guests: str | None
) -> None:
    """Of their session what is in it; of nothing else anything."""
    ids = await ids_of(server, http)
    shown = bearer("gus", session_id=ids["session"], scope=" ".join(ALL))
    answer = await http.request(method, path.format(**ids), json=body, headers=shown)
    assert code_of(answer) == guests
    assert guests or answer.status_code != 404


@BY_ENDPOINT
async def test_the_usual_scopes_are_all_but_admin(
    server: RunningServer, http: httpx.AsyncClient, method: str, path: str, body: Any, scope: str, guests: str
) -> None:
    """For a token that names none."""
    url = path.format(**await ids_of(server, http))
    found = code_of(await http.request(method, url, json=body, headers=bearer("ann")))
    assert found == ("scope_missing" if scope == "admin" else None)


@pytest.mark.parametrize(
    ("claims", "query", "code"),
    [
        ({"scope": "task oneshot admin"}, "", "scope_missing"),
        ({"scope": ""}, "", "scope_missing"),
        ({"scope": "SESSION sessions"}, "", "scope_missing"),
        ({"session_id": "sess_1"}, "", "guest"),
    ],
)
async def test_a_socket_needs_its_scope(server: RunningServer, claims: Any, query: str, code: str) -> None:
    """A fatal error and 4403, after the upgrade; a guest makes no session."""
    async with dialled(server, query, additional_headers=bearer("ann", **claims)) as socket:
        [frame] = await frames_until_closed(socket)
        assert (frame["error"]["type"], frame["error"]["code"]) == ("permission_error", code)
        assert (frame["error"]["fatal"], socket.close_code) == (True, 4403)


async def test_a_guest_attaches_to_their_session(server: RunningServer) -> None:
    """They are told apart by their own name, and what they ask for is theirs."""
    async with attached(server, headers=bearer("ann")) as owner:
        shown = bearer("gus", session_id=owner.session_id)
        async with attached(server, owner.session_id, headers=shown) as client:
            assert await client.answer("hello") == "hello"
            [item] = client.transcript.items
            assert item["user"] == "gus"
            await owner.until("participant.joined")
