"""What isn't yours answers exactly like what doesn't exist: every verb of every transport, by others, with real ids."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, NamedTuple

import httpx
import msgspec
import pytest
from websockets.exceptions import ConnectionClosed

from realtime.store.memory import MemoryStore
from tests.end_to_end import PATIENCE_S, Model, Turn, dialled
from tests.support.client import Client, attached
from tests.support.event_stream import http_client
from tests.support.redis_server import redis_server
from tests.support.sample_tasks import MODULE
from tests.support.server import RunningServer, running_server
from tests.support.tokens import SECRET, bearer, token

TRIES = 1000
NOT_ALLOWED = {403, 404, 4404}
OF_THE_CLIENT = {"date", "sec-websocket-accept"}
"""Headers of an upgrade that say nothing of the session."""


class Ids(NamedTuple):
    """What somebody may name: a session, what is in it, and a task in none."""

    session: str
    response: str
    task: str
    item: str
    lone_task: str


class Site(NamedTuple):
    """A server with a session of Ann's in which a response and a task run, one of Bob's, and Bob's connection to it."""

    server: RunningServer
    http: httpx.AsyncClient
    ann: Client
    bob: Client
    ids: Ids
    running: Turn


Verb = Callable[[Site, Ids, dict[str, str]], Awaitable[Any]]


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    model = Model()
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(running_server(model, auth_secret=SECRET, tasks=(MODULE,)))
        http = await stack.enter_async_context(http_client(base_url=server.url))
        ann = await stack.enter_async_context(attached(server, headers=bearer("ann")))
        bob = await stack.enter_async_context(attached(server, headers=bearer("bob")))
        response_id = await ann.respond("a secret of hers")
        await ann.send("task.create", name="sleep", input={"seconds": 600})
        task_id = (await ann.until("task.created"))["task"]["id"]
        lone = await http.post("/v1/tasks/sleep", json={"seconds": 600}, headers=bearer("ann"))
        await ann.until("task.started")
        async with http.stream("GET", lone.headers["location"] + "/events", headers=bearer("ann")) as stream:
            lines = stream.aiter_lines()
            while "task.started" not in await anext(lines):
                pass
        item_id = ann.transcript.items[0]["id"]
        ids = Ids(ann.session_id, response_id, task_id, item_id, lone.json()["task_id"])
        yield Site(server, http, ann, bob, ids, await model.turn())


def made_up(ids: Ids, chance: random.Random) -> Ids:
    """Ids of the same form that nobody has."""
    return Ids(*(f"{one.partition('_')[0]}_{chance.randbytes(16).hex()}" for one in ids))


def told(answer: httpx.Response) -> Any:
    """All that an answer says."""
    headers = [(name, value) for name, value in answer.headers.multi_items() if name != "date"]
    return answer.status_code, headers, answer.content


def asking(method: str, path: str, **headers: str) -> Verb:
    """Ask over HTTP."""

    async def ask(site: Site, ids: Ids, shown: dict[str, str]) -> Any:
        url = path.format(**ids._asdict(), mine=site.bob.session_id)
        return told(await site.http.request(method, url, headers={**shown, **headers}))

    return ask


def posting(**command: Any) -> Verb:
    """Post a command to the session."""

    async def post(site: Site, ids: Ids, shown: dict[str, str]) -> Any:
        body = json.dumps(command).replace('"RESPONSE"', f'"{ids.response}"').replace('"TASK"', f'"{ids.task}"')
        return told(await site.http.post(f"/v1/sessions/{ids.session}/events", content=body, headers=shown))

    return post


def attaching(query: str = "", subprotocol: str = "realtime.v1") -> Verb:
    """Attach to the session."""

    async def attach(site: Site, ids: Ids, shown: dict[str, str]) -> Any:
        text = f"session_id={ids.session}" + query.format(**ids._asdict())
        async with dialled(site.server, text, subprotocols=(subprotocol,), additional_headers=shown) as socket:
            frames = []
            with suppress(ConnectionClosed):
                async with asyncio.timeout(PATIENCE_S):
                    while True:
                        frames.append(await socket.recv())
            assert socket.response is not None
            headers = [pair for pair in socket.response.headers.raw_items() if pair[0].lower() not in OF_THE_CLIENT]
            return socket.close_code, headers, frames, socket.close_reason

    return attach


def saying(kind: str, **fields: str) -> Verb:
    """Send a command that names the ids, in a session of one's own."""

    async def say(site: Site, ids: Ids, _shown: dict[str, str]) -> Any:
        named = {name: value.format(**ids._asdict()) for name, value in fields.items()}
        heard = {"heard_chars": 1} if "truncate" in kind else {}
        await site.bob.send(kind, event_id="it", **named, **heard)
        async with asyncio.timeout(PATIENCE_S):
            return 404, await site.bob.until("error")

    return say


SESSION = "/v1/sessions/{session}"
VERBS: dict[str, Verb] = {
    "show": asking("GET", SESSION),
    "erase": asking("DELETE", SESSION),
    "stream": asking("GET", SESSION + "/events"),
    "stream after": asking("GET", SESSION + "/events?after=session:1,{response}:0"),
    "stream far after": asking("GET", SESSION + "/events?after=session:100000"),
    "stream again": asking("GET", SESSION + "/events", **{"Last-Event-ID": "session:1"}),
    "update": posting(type="session.update", session={"instructions": "x"}),
    "close": posting(type="session.close"),
    "item": posting(type="conversation.item.create", item={"role": "user", "content": "x"}),
    "truncate": posting(type="conversation.item.truncate", response_id="RESPONSE", heard_chars=1),
    "respond": posting(type="response.create", input="x"),
    "respond by id": posting(type="response.create", input="x", response_id="RESPONSE", event_id="e"),
    "cancel": posting(type="response.cancel", response_id="RESPONSE"),
    "make a task": posting(type="task.create", name="sleep", input={"seconds": 1}),
    "make no task": posting(type="task.create", name="none", input={}),
    "cancel a task": posting(type="task.cancel", task_id="TASK"),
    "nonsense": posting(type="nonsense"),
    "show a task": asking("GET", SESSION + "/tasks/{task}"),
    "stop a task": asking("DELETE", SESSION + "/tasks/{task}"),
    "stream a task": asking("GET", SESSION + "/tasks/{task}/events"),
    "stream a task after": asking("GET", SESSION + "/tasks/{task}/events?after=nonsense:1"),
    "result of a task": asking("GET", SESSION + "/tasks/{task}/result"),
    "a task in another session": asking("GET", "/v1/sessions/{mine}/tasks/{task}"),
    "its stream": asking("GET", "/v1/sessions/{mine}/tasks/{task}/events"),
    "its result": asking("GET", "/v1/sessions/{mine}/tasks/{task}/result"),
    "its end": asking("DELETE", "/v1/sessions/{mine}/tasks/{task}"),
    "show a lone task": asking("GET", "/v1/tasks/{lone_task}"),
    "stop a lone task": asking("DELETE", "/v1/tasks/{lone_task}"),
    "stream a lone task": asking("GET", "/v1/tasks/{lone_task}/events"),
    "result of a lone task": asking("GET", "/v1/tasks/{lone_task}/result"),
    "a task as a lone one": asking("GET", "/v1/tasks/{task}"),
    "a lone task as a session": asking("GET", "/v1/sessions/{lone_task}"),
    "attach": attaching(),
    "attach in MessagePack": attaching(subprotocol="realtime.v1.msgpack"),
    "attach after": attaching("&after=session:2,{response}:0"),
    "attach far after": attaching("&after=session:100000"),
    "attach without history": attaching("&history=none"),
    "say cancel": saying("response.cancel", response_id="{response}"),
    "say truncate": saying("conversation.item.truncate", response_id="{response}"),
    "say cancel a task": saying("task.cancel", task_id="{task}"),
    "say cancel a lone task": saying("task.cancel", task_id="{lone_task}"),
    "say cancel a session": saying("response.cancel", response_id="{session}"),
}


def others(site: Site) -> list[dict[str, str]]:
    """What those show whose session it is not: another user, guests of other sessions, Ann's own guests, and Ann with
    a token for another session."""
    return [
        bearer("bob"),
        bearer("bob", scope="session task oneshot admin"),
        bearer("bob", session_id=site.bob.session_id),
        bearer("bob", session_id="sess_nowhere"),
        bearer("ann", session_id=site.bob.session_id),
        bearer("ANN"),
    ]


async def stands(site: Site) -> Any:
    """How Ann's session and task are, but for the time until which they are."""
    shown = (await site.http.get(f"/v1/sessions/{site.ids.session}", headers=bearer("ann"))).json()
    lone = (await site.http.get(f"/v1/tasks/{site.ids.lone_task}", headers=bearer("ann"))).json()
    del shown["session"]["expires_at"]
    return shown, lone["status"]


async def test_a_thousand_tries_tell_nothing(site: Site) -> None:
    """Each is answered to the byte as if there were nothing, and does nothing to what there is."""
    chance = random.Random(4404)
    while "progress" not in (before := await stands(site))[0]["tasks"][0]:  # noqa: ASYNC110  # the task is at it
        await asyncio.sleep(0.01)
    verbs = list(VERBS) * (TRIES // len(VERBS) + 1)
    chance.shuffle(verbs)
    for name in verbs[:TRIES]:
        shown = chance.choice(others(site))
        theirs = await VERBS[name](site, site.ids, shown)
        nobodys = await VERBS[name](site, made_up(site.ids, chance), shown)
        assert theirs == nobodys, name
        assert theirs[0] in (NOT_ALLOWED | {400} if name == "nonsense" else NOT_ALLOWED | {204}), (name, theirs)
    assert await stands(site) == before
    assert not site.running.closed.is_set()


async def test_nobody_is_told_of_tries(site: Site) -> None:
    """Who looks at a session hears nothing of those who were not let in."""
    for name in ("attach", "stream", "close", "respond"):
        await VERBS[name](site, site.ids, bearer("bob"))
    site.running.end("the answer")
    await site.ann.until("response.done")
    kinds = {event["type"] for event in site.ann.transcript.events}
    assert kinds.isdisjoint({"participant.joined", "participant.left", "session.updated", "session.closed"})


@pytest.mark.parametrize("name", [name for name in VERBS if name.startswith(("show", "result", "update", "item"))])
async def test_the_owner_may(site: Site, name: str) -> None:
    """So what is told others is not what everybody is told."""
    answer = await VERBS[name](site, site.ids, bearer("ann"))
    assert answer[0] not in NOT_ALLOWED, answer


async def test_ids_of_others_are_free_in_a_session_of_ones_own(site: Site) -> None:
    """A response, an item and a task may be called as another's: that is made, and the other is as it was."""
    await site.bob.send("response.create", input="x", response_id=site.ids.response, event_id="e")
    await site.bob.until("response.created", for_event_id="e")
    await site.bob.send("conversation.item.create", item={"id": site.ids.item, "role": "user", "content": "x"})
    await site.bob.until("conversation.item.created")
    await site.bob.send("task.create", task_id=site.ids.task, name="sleep", input={"seconds": 600})
    await site.bob.until("task.created")
    await site.bob.send("task.cancel", task_id=site.ids.task)
    await site.bob.until("task.done", task_id=site.ids.task)
    await site.bob.send("response.cancel", response_id=site.ids.response)
    await site.bob.until("response.done", response_id=site.ids.response)
    shown, lone = await stands(site)
    assert [one["status"] for one in (*shown["responses"], *shown["tasks"])] == ["in_progress", "running"], shown
    assert lone == "running"


@pytest.mark.parametrize("who", ["ann", "bob"])
async def test_what_was_erased_looks_like_what_never_was(site: Site, who: str) -> None:
    """To its owner, and to others."""
    assert (await VERBS["erase"](site, site.ids, bearer("ann")))[0] == 204
    await site.ann.until_closed()
    there = {name: verb for name, verb in VERBS.items() if "lone" not in name}
    nowhere = made_up(site.ids, random.Random(1))
    for name, verb in there.items():
        assert await verb(site, site.ids, bearer(who)) == await verb(site, nowhere, bearer(who)), name


async def test_what_was_revoked_looks_like_what_never_was(site: Site) -> None:
    """To those whose it is not; who could have used it, the owner or a guest, is told."""
    strangers = others(site)
    insiders = [bearer("ann"), bearer("gus", session_id=site.ids.session)]
    revoked = {"session_id": site.ids.session}
    answer = await site.http.post("/v1/admin/revoke", json=revoked, headers=bearer("root", scope="admin"))
    assert answer.status_code == 204
    nowhere = made_up(site.ids, random.Random(1))
    for name, verb in VERBS.items():
        for shown in strangers:
            assert await verb(site, site.ids, shown) == await verb(site, nowhere, shown), name
    for shown in insiders:
        for name in ("show", "stream", "attach", "show a task", "stream a task", "item", "erase"):
            answer = await VERBS[name](site, site.ids, shown)
            assert answer[0] in {401, 4401}, (name, answer)
            assert "token_revoked" in str(answer), name


@asynccontextmanager
async def expired() -> AsyncIterator[tuple[RunningServer, str]]:
    """A server, and a session of Ann's whose keys are not there any more, as after their time."""
    async with redis_server() as redis, running_server(Model(), auth_secret=SECRET, redis_url=redis.url) as server:
        async with http_client(base_url=server.url) as http:
            made = await http.post("/v1/sessions", headers=bearer("ann"))
        await redis.command("FLUSHALL")
        yield server, made.json()["session"]["id"]


async def test_what_has_expired_looks_like_what_never_was() -> None:
    """Likewise."""
    async with expired() as (server, session_id), http_client(base_url=server.url) as http:
        for who in ("ann", "bob"):
            for path in ("", "/events", "/tasks/t"):
                there = await http.get(f"/v1/sessions/{session_id}{path}", headers=bearer(who))
                nowhere = await http.get(f"/v1/sessions/sess_nowhere{path}", headers=bearer(who))
                assert told(there) == told(nowhere)
                assert there.status_code == 404


class Ageing(NamedTuple):
    """A server, the path of a session of Ann's that lives for 100 s, what says how old it is, whether it is there."""

    http: httpx.AsyncClient
    session: str
    grow: Callable[[float], None]
    is_there: Callable[[], Awaitable[bool]]


@asynccontextmanager
async def ageing() -> AsyncIterator[Ageing]:
    age_s = 0.0

    def grow(to_s: float) -> None:
        nonlocal age_s
        age_s = to_s

    async def is_there() -> bool:
        return await store.standings([session_id]) != [None]

    async with running_server(Model(), auth_secret=SECRET, session_ttl_s=100) as server:
        store = server.engine.store
        assert isinstance(store, MemoryStore)
        store._clock = lambda: time.monotonic() + age_s
        async with http_client(base_url=server.url) as http:
            made = await http.post("/v1/sessions", headers=bearer("ann"))
            session_id = made.json()["session"]["id"]
            yield Ageing(http, made.headers["location"], grow, is_there)


@pytest.mark.parametrize(("who", "status"), [("bob", 404), ("ann", 401)])
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "", ""),
        ("GET", "/events", ""),
        ("POST", "/events", '{"type": "session.close"}'),
        ("GET", "/tasks/t", ""),
        ("DELETE", "", ""),
    ],
)
async def test_nobody_keeps_a_session_who_may_not_use_it(
    who: str, status: int, method: str, path: str, body: str
) -> None:
    """However often others ask for it, or an owner whose tokens for it were taken back: its time runs out."""
    async with ageing() as (http, session, grow, is_there):
        revoked = {"session_id": session.rpartition("/")[2]}
        if who == "ann":
            await http.post("/v1/admin/revoke", json=revoked, headers=bearer("root", scope="admin"))
        for age_s in (40, 80):
            grow(age_s)
            answer = await http.request(method, session + path, content=body, headers=bearer(who))
            assert answer.status_code == status, answer.text
        grow(101)
        assert not await is_there()


async def test_who_may_see_a_session_keeps_it() -> None:
    """Its owner, and a guest."""
    async with ageing() as (http, session, grow, is_there):
        for age_s, user in ((80, "ann"), (160, "gus")):
            grow(age_s)
            shown = bearer(user, session_id=session.rpartition("/")[2])
            assert (await http.get(session, headers=shown)).status_code == 200
        grow(240)
        assert await is_there()


@pytest.mark.parametrize("position", ["session:1", ""])
async def test_a_reader_that_comes_back_is_told_the_same(site: Site, position: str) -> None:
    """An `EventSource` that comes back to a session that isn't its user's is stopped, as for one that is nowhere."""
    headers = {**bearer("bob"), "Last-Event-ID": position}
    answers = [
        told(await site.http.get(f"/v1/sessions/{session_id}/events", headers=headers))
        for session_id in (site.ids.session, "sess_nowhere")
    ]
    assert answers[0] == answers[1]
    assert answers[0][0] == (204 if position else 404)


async def test_a_frame_says_who_may_not_in_messagepack(site: Site) -> None:
    """The same words in the other encoding."""
    shown = f"bearer.{token('bob')}"
    offered = ("realtime.v1.msgpack", shown)
    async with dialled(site.server, {"session_id": site.ids.session}, subprotocols=offered) as socket:
        error = msgspec.msgpack.decode(await socket.recv(decode=False))["error"]
    assert (error["type"], error["code"], error["fatal"]) == ("not_found_error", "session_not_found", True)
