"""What was said, shown or made up is in no log, metric, URL, dump, or answer to anybody else: canaries are looked for.

Each canary has a control: the place where the same search finds it. What is content comes back to its own client, and
stands in a Redis without sealing; what comes in heads and frames is logged by the plain stack: by nginx with a format
that leaves nothing out, and by uvicorn at the level debug.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec import Struct
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from tests.access.signing import SECRET, token
from tests.end_to_end import echo
from tests.support import sample_tasks
from tests.support.client import Client, Transcript
from tests.support.instance import Instance, instance
from tests.support.model_server import ModelServer
from tests.support.nginx import Nginx, nginx
from tests.support.redis_server import RedisServer, redis_server
from tests.support.scenarios import ErrorEvent, HttpError, Scenario, Start, Stop, Text, Thinking, error_body
from tests.support.server import running_server
from tests.support.upstream import Upstream
from tests.support.worker import worker

KEY = "k1:" + base64.b64encode(b"k" * 32).decode()
PATIENCE_S = 30.0
POLL_S = 0.05
SAID = {
    "prompt",
    "instructions of a response",
    "instructions of a session",
    "item",
    "metadata",
    "event id",
    "answer",
    "reasoning",
    "task input",
    "task that fails",
}
"""What is content, and kept in the store."""
PASSING = {"one-shot prompt", "one-shot instructions", "text to be summarised"}
"""What is content, and kept nowhere."""
UPSTREAM = {"upstream refusal", "upstream error"}
HEADS = {
    "query",
    "token in the query",
    "path",
    "user agent",
    "referer",
    "authorization",
    "cookie",
    "forwarded for",
    "idempotency key",
    "last event id",
    "prefer",
}
"""What comes with a request, wherever it goes."""
UPGRADES = {"subprotocol", "extension", "websocket key", "close reason", "frame", "upgrade query", "upgrade agent"}
"""What comes with a WebSocket, beside its messages."""
CHATTY = """log_format requests '$request $http_user_agent $http_referer $http_authorization $http_cookie '
 '$http_x_forwarded_for $http_idempotency_key $http_last_event_id $http_prefer';
 log_format unused escape=json"""
"""How nginx logs where nobody thinks of it, and more."""


class Canaries:
    """Strings that nobody else says, by what they are put into."""

    def __init__(self) -> None:
        self.words: dict[str, str] = {}

    def __getitem__(self, kind: str) -> str:
        return self.words.setdefault(kind, f"canary{secrets.token_hex(8)}")

    def hits(self, *texts: str | bytes) -> set[str]:
        """The kinds that are found in the texts, in capitals or not."""
        whole = "\n".join(text if isinstance(text, str) else text.decode("latin-1") for text in texts).lower()
        return {kind for kind, word in self.words.items() if word.lower() in whole}


class Site(Struct):
    """A whole deployment."""

    redis: RedisServer
    model: ModelServer
    instances: list[Instance]
    worker: Instance
    proxy: Nginx

    async def traces(self) -> dict[str, str]:
        """All that they have written, and what they count."""
        metrics = [(await asked("GET", f"{one.url}/metrics")).text for one in self.instances]
        return {
            **{f"log of instance {number}": "\n".join(one.log) for number, one in enumerate(self.instances)},
            "log of the worker": "\n".join(self.worker.log),
            "access log": "\n".join(self.proxy.access_log),
            "error log": "\n".join(self.proxy.error_log),
            "log of redis": self.redis.log,
            "metrics": "\n".join(metrics),
        }


@asynccontextmanager
async def site(words: Canaries, *, seal_keys: str = KEY) -> AsyncIterator[Site]:
    """nginx, two instances, a worker, a Redis that writes all it knows to its disk, and a model with a secret.

    One instance logs as much as it can, in JSON, the other one as for a person.
    """
    settings: dict[str, Any] = {
        "auth_secret": SECRET,
        "log_level": "debug",
        "seal_keys": seal_keys,
        "tasks": sample_tasks.MODULE,
        "thinking": "adaptive",
        "lease_s": 2,
    }
    files: dict[str, Any] = {"save": "3600 1000000", "rdbcompression": "no", "aof_use_rdb_preamble": "no"}
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(redis_server(append_only=True, appendfsync="always", **files))
        model = await stack.enter_async_context(ModelServer(default=secretive(words)))
        model.scenarios["refuses"] = Scenario(
            [HttpError(400, body=error_body("invalid_request_error", words["upstream refusal"]))]
        )
        model.scenarios["breaks"] = Scenario(
            [Start(), Text("so "), ErrorEvent("api_error", words["upstream error"])],
        )
        settings["redis_url"] = redis.url
        logs: list[dict[str, Any]] = [{"log_format": "json"}, {"log_format": "console", "log_level": "info"}]
        instances = [await stack.enter_async_context(instance(model=model.url, **{**settings, **log})) for log in logs]
        working = await stack.enter_async_context(worker(**settings))
        proxy = await stack.enter_async_context(nginx(*(one.port for one in instances)))
        yield Site(redis, model, instances, working, proxy)


def secretive(words: Canaries) -> Scenario:
    """An answer with something in it."""
    return Scenario([Thinking(words["reasoning"]), Text("It is "), Text(words["answer"]), Stop()])


async def asked(method: str, url: str, **options: Any) -> httpx.Response:
    """The answer to one request."""
    async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE_S) as client:
        return await client.request(method, url, **options)


@asynccontextmanager
async def joined(url: str, bearer: str = "", **options: Any) -> AsyncIterator[ClientConnection]:
    """A WebSocket of somebody with a token."""
    headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
    socket = await connect(url, compression=None, proxy=None, additional_headers=headers, **options)
    try:
        yield socket
    finally:
        await socket.close()


# ------------------------------------------------------------------------------------------------------- what is said


async def converse(here: Site, words: Canaries, bearer: str) -> tuple[str, str]:
    """Say all there is to say, over both instances and nginx; returns the session, and all that its owner was told."""
    async with AsyncExitStack() as stack:
        url = f"ws://127.0.0.1:{here.instances[0].port}/v1/realtime"
        first = await stack.enter_async_context(joined(url, bearer))
        client = await Client(first, Transcript()).start()
        others = []
        for address in (here.proxy.ws_url, here.instances[1].ws_url):
            socket = await stack.enter_async_context(joined(f"{address}?session_id={client.session_id}", bearer))
            others.append(await Client(socket, Transcript()).start())
        async with asyncio.timeout(2 * PATIENCE_S):
            await say(client, words)
            await work(client, words)
            for other in others:
                await other.send("ping", event_id="last")
                await other.until("pong")
        events = [event for one in (client, *others) for event in one.transcript.events]
        shown = await asked("GET", f"{here.proxy.url}/v1/sessions/{client.session_id}", headers=known(bearer))
        assert shown.status_code == 200
        return client.session_id, json.dumps(events) + shown.text


def known(bearer: str) -> dict[str, str]:
    """The header of somebody with a token."""
    return {"Authorization": f"Bearer {bearer}"}


async def say(client: Client, words: Canaries) -> None:
    """A conversation with a good answer, and two that fail."""
    instructions = words["instructions of a session"]
    await client.send("session.update", session={"instructions": instructions}, event_id=words["event id"])
    await client.until("session.updated")
    await client.send("conversation.item.create", item={"role": "user", "content": words["item"]})
    response = await client.answer(
        words["prompt"], metadata={"a": words["metadata"]}, instructions=words["instructions of a response"]
    )
    assert words["answer"] in response
    for model in ("refuses", "breaks"):
        response_id = await client.respond(words["prompt"], model=model)
        assert (await client.until("response.done", response_id=response_id))["status"] == "failed"
    await client.send("auth.refresh", token=words["token to refresh with"])
    assert (await client.until("error"))["error"]["code"] == "invalid_token"
    await client.socket.send('{"type": "' + words["unknown type"] + '"}')
    await client.until("error")
    await client.socket.send('{"' + words["no JSON"])
    await client.until("error")


async def work(client: Client, words: Canaries) -> None:
    """A task that comes to something, and one that fails."""
    await client.send("task.create", name="echo", input={"text": words["task input"]})
    assert (await client.until("task.done"))["result"] == words["task input"].upper()
    await client.send("task.create", name="spill", input={"text": words["task that fails"]})
    assert (await client.until("task.done"))["status"] == "failed"
    await client.send("task.create", name=words["task name"], input={})
    await client.until("error")


async def call(here: Site, words: Canaries, bearer: str) -> str:
    """One-shot calls, good and bad; returns what the caller is told."""
    asks = {"prompt": words["one-shot prompt"], "instructions": words["one-shot instructions"]}
    told = []
    for path, body, status in (
        ("/v1/complete", asks, 200),
        ("/v1/stream", asks, 200),
        ("/v1/summarise", {"text": words["text to be summarised"]}, 200),
        ("/v1/complete", {**asks, "model": "refuses"}, 502),
        ("/v1/stream", {**asks, "model": "breaks"}, 200),
        ("/v1/tasks/echo", {"text": {"no": words["prompt"]}}, 400),
    ):
        answer = await asked("POST", here.proxy.url + path, json=body, headers=known(bearer))
        assert answer.status_code == status, (path, answer.text)
        told.append(answer.text)
    return "\n".join(told)


# ------------------------------------------------------------------------------------------------- what only comes in


def heads(words: Canaries) -> dict[str, str]:
    """Headers of which none is what it should be."""
    return {
        "User-Agent": words["user agent"],
        "Referer": f"http://{words['referer']}/",
        "Authorization": f"Bearer {words['authorization']}",
        "Cookie": f"realtime_token={words['cookie']}",
        "X-Forwarded-For": words["forwarded for"],
        "Idempotency-Key": words["idempotency key"],
        "Last-Event-ID": words["last event id"],
        "Prefer": words["prefer"],
    }


def requests(words: Canaries) -> Iterator[tuple[str, str]]:
    """Methods and paths. What could be an id the audit log may name: it is there for that."""
    path = f"{words['path']}.no-id"
    query = f"?q={words['query']}&token={words['token in the query']}&session_id={words['query']}.no-id&after={path}"
    for method, where in (
        ("GET", "/"),
        ("GET", "/v1/realtime"),
        ("POST", "/v1/sessions"),
        ("GET", f"/v1/sessions/{path}"),
        ("GET", f"/v1/sessions/{path}/events"),
        ("POST", f"/v1/sessions/{path}/events"),
        ("DELETE", f"/v1/sessions/{path}/tasks/{path}"),
        ("POST", f"/v1/tasks/{path}"),
        ("GET", f"/v1/tasks/{path}/result"),
        ("POST", "/v1/complete"),
        ("POST", "/v1/auth/cookie"),
        ("POST", "/v1/admin/revoke"),
    ):
        yield method, where + query


async def knock(url: str, words: Canaries, **good: str) -> str:
    """Ask for everything with heads full of canaries, by nobody and by somebody; returns all that comes back."""
    told = []
    for method, path in requests(words):
        for headers in (heads(words), {**heads(words), **good}):
            async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE_S) as client:
                async with client.stream(method, url + path, headers=headers) as answer:
                    told += [str(answer.headers), "" if answer.status_code == 200 else (await answer.aread()).decode()]
    return "\n".join(told)


async def intrude(url: str, words: Canaries, bearer: str = "") -> None:
    """Open a WebSocket with all that can be put in its head, say what is no message, and a reason when leaving."""
    subprotocols = [Subprotocol("realtime.v1"), Subprotocol(f"bearer.{words['subprotocol']}")]
    headers = {
        "User-Agent": words["upgrade agent"],
        "Sec-WebSocket-Extensions": f"{words['extension']}; x=y",
        **(known(bearer) if bearer else {}),
    }
    address = f"{url}?token={words['upgrade query']}"
    socket = await connect(address, subprotocols=subprotocols, proxy=None, compression=None, additional_headers=headers)
    with suppress(ConnectionClosed):
        await socket.recv()
        await socket.send(words["frame"])
        await socket.recv()
    await socket.close(1000, words["close reason"])


async def mistype(port: int, words: Canaries) -> None:
    """An upgrade whose key is none, and one whose head is none."""
    upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    for key in (f"Sec-WebSocket-Key: {words['websocket key']}\r\n", f"{words['websocket key']}\0\r\n"):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET /v1/realtime HTTP/1.1\r\nHost: 127.0.0.1\r\n{upgrade}{key}\r\n".encode())
        with suppress(ConnectionError):
            async with asyncio.timeout(PATIENCE_S):
                await reader.read(1000)
        writer.transport.abort()


async def pry(here: Site, session_id: str) -> str:
    """Ask for what is another user's in every way; returns what comes back."""
    bearer = known(token(sub="bob"))
    told = []
    for method, path in (
        ("GET", ""),
        ("GET", "/events"),
        ("POST", "/events"),
        ("DELETE", ""),
        ("GET", "/tasks/task_x"),
    ):
        body = {"type": "response.create", "input": "show"} if method == "POST" else None
        answer = await asked(method, f"{here.proxy.url}/v1/sessions/{session_id}{path}", headers=bearer, json=body)
        assert answer.status_code == 404
        told.append(str(answer.headers) + answer.text)
    socket = await connect(
        f"{here.proxy.ws_url}?session_id={session_id}", additional_headers=bearer, proxy=None, compression=None
    )
    with suppress(ConnectionClosed):
        while True:
            told.append(str(await socket.recv()))
    return "\n".join([*told, socket.close_reason or ""])


# ------------------------------------------------------------------------------------------------------- the searches


async def dump(redis: RedisServer) -> bytes:
    """What Redis has on its disk."""
    await redis.command("SAVE")
    files = [path.read_bytes() for path in Path(redis._folder).rglob("*") if path.is_file() and "log" not in path.name]
    return b"\n".join(files)


def show_tokens(words: Canaries) -> str:
    """A good token whose signature is looked for as well."""
    bearer = token(sub="anna")
    words.words["token"] = bearer.rpartition(".")[2]
    return bearer


async def tell_everything(here: Site, words: Canaries) -> tuple[str, str]:
    """Do all of the above; returns what the owner was told, and what others were."""
    bearer = show_tokens(words)
    session_id, own = await converse(here, words, bearer)
    own += await call(here, words, bearer)
    others = await pry(here, session_id)
    for address in (here.proxy, here.instances[0]):
        others += await knock(address.url, words)
        others += await knock(address.url, words, Authorization=f"Bearer {token(sub='bob')}")
        await intrude(address.ws_url, words)
        await intrude(address.ws_url, words, token(sub="bob"))
        await mistype(address.port, words)
    cookie = {"Cookie": f"realtime_token={bearer}", "Origin": here.proxy.url}
    made = await asked("POST", f"{here.proxy.url}/v1/sessions?token={bearer}", headers=cookie)
    assert made.status_code == 201
    async with joined(here.proxy.ws_url, subprotocols=[Subprotocol("realtime.v1"), Subprotocol(f"bearer.{bearer}")]):
        pass
    return own, others


async def test_no_canary_is_found_where_it_does_not_belong() -> None:
    """Not in any log, nor in the metrics, nor in what others are told, nor in a Redis that is sealed."""
    words = Canaries()
    async with site(words) as here:
        own, others = await tell_everything(here, words)
        await here.worker.logged("ValueError")
        traces = await here.traces()
        kept = await dump(here.redis)
        asked_for = b"".join(json.dumps(request.body).encode() for request in here.model.received)
    assert words.hits(own, asked_for) >= SAID | PASSING, "its owner and the model are told"
    assert words.words.keys() >= SAID | PASSING | UPSTREAM | HEADS | UPGRADES | {"token"}, "all of it was said"
    assert {where: found for where, text in traces.items() if (found := words.hits(text))} == {}
    assert words.hits(others) == set()
    assert words.hits(kept) == set()
    assert b"k1" in kept, "it is sealed"
    for number in range(2):
        assert "anna" in traces[f"log of instance {number}"], "the audit log is there"
    lines = traces["log of instance 0"].splitlines()[1:]
    assert all(json.loads(line)["level"] in {"info", "warning", "error"} for line in lines)


async def test_the_control_an_open_redis_holds_what_was_said() -> None:
    """The same search finds all of it in the dump of a Redis without sealing."""
    words = Canaries()
    async with site(words, seal_keys="") as here:
        bearer = show_tokens(words)
        await converse(here, words, bearer)
        kept = await dump(here.redis)
    assert words.hits(kept) >= SAID - {"reasoning"}, "but for what is only passed on"


async def test_the_control_a_chatty_nginx_logs_every_head() -> None:
    """The same search finds all of them in an access log that leaves nothing out."""
    words = Canaries()
    replacing = {"log_format requests escape=json": CHATTY}
    async with Upstream() as upstream, nginx(upstream.port, replacing=replacing) as proxy:
        await knock(proxy.url, words)
        await proxy.logged("/v1/admin/revoke", times=2)
        assert words.hits(*proxy.access_log) == HEADS


@pytest.fixture
def open_uvicorn(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What uvicorn's logger takes down at the level debug, which the server does not open."""
    caplog.set_level(logging.DEBUG, "uvicorn.error")
    return caplog


async def test_the_control_uvicorn_logs_what_comes_by_websockets(open_uvicorn: pytest.LogCaptureFixture) -> None:
    """At the level debug heads, frames and close reasons stand in its log: it is the server that keeps it closed."""
    words = Canaries()
    async with running_server(echo) as server:
        await intrude(server.ws_url, words)
        await mistype(server.port, words)
        async with joined(server.ws_url) as socket:
            await socket.send(words["frame"])
            await socket.close(1000, words["close reason"])
    told = "\n".join(record.getMessage() for record in open_uvicorn.records if record.name == "uvicorn.error")
    assert words.hits(told) >= UPGRADES - {"websocket key"}


# ------------------------------------------------------------------------------------------ where an id is a credential


@pytest.mark.parametrize("log_format", ["json", "console"])
async def test_without_authentication_no_session_id_is_told(log_format: str) -> None:
    """Whoever knows it may use it: logs hold a hash of it, and neither nginx nor the metrics hold it at all."""
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(instance(log_format=log_format, log_level="debug"))
        proxy = await stack.enter_async_context(nginx(one.port))
        socket = await stack.enter_async_context(joined(proxy.ws_url))
        client = await Client(socket, Transcript()).start()
        await client.answer("hello")
        session_id = client.session_id
        for method, below in (("GET", ""), ("POST", "/events"), ("GET", "/tasks/task_x/events"), ("DELETE", "")):
            await asked(method, f"{proxy.url}/v1/sessions/{session_id}{below}?session_id={session_id}")
        await client.until_closed()
        with suppress(ConnectionClosed):
            async with joined(f"{proxy.ws_url}?session_id={session_id}") as gone:
                await gone.recv()
        await one.logged("session_not_found")
        figures = (await asked("GET", f"{one.url}/metrics")).text
        written = "\n".join([*one.log, *proxy.access_log, *proxy.error_log, figures])
    assert "response.create" in written
    assert session_id not in written
    assert session_id.removeprefix("sess_") not in written
    hashes = set(re.findall(r"session.{1,12}(#[0-9a-f]{16})", written))
    assert len(hashes) == 1
