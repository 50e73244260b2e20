"""The one-shot endpoints: an answer without a session, as a stream or whole, and nothing left running for nobody."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeAlias, cast
from unittest import mock

import httpx
import msgspec
import pytest
from starlette.types import Message as AsgiMessage

from realtime.call import ModelSettings
from realtime.errors import ServerError
from realtime.oneshot import OneShots
from realtime.responders.base import Request, Responder, ResponderEvent
from realtime.session import Limits
from tests.responders import anthropic_at
from tests.support.clock import advancing_clock
from tests.support.model_server import ModelServer
from tests.support.scenarios import (
    Cut,
    ErrorEvent,
    HttpError,
    Scenario,
    Stall,
    Start,
    Step,
    Stop,
    Text,
    Thinking,
    Usage,
    answer,
)
from tests.support.sdk import turns
from tests.support.server import RunningServer, running_server
from tests.support.tills import open_admission, open_connections, open_door

Events: TypeAlias = list[tuple[str, str]]
BOTH = pytest.mark.parametrize("path", ["/v1/stream", "/v1/complete"])
UNAVAILABLE = {"type": "upstream_error", "code": "upstream_failed", "message": "The model's provider failed."}


@pytest.fixture
async def models() -> AsyncIterator[ModelServer]:
    """The stand-in; an answer of its default scenario is two deltas."""
    async with ModelServer(default=answer("all well")) as server:
        yield server


@asynccontextmanager
async def http_to(responder: Responder, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client of a server whose answers are the responder's."""
    async with (
        running_server(responder, **settings) as server,
        httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=30) as client,
    ):
        yield client


async def events_of(client: httpx.AsyncClient, **body: Any) -> Events:
    """The events of a stream, each with its name, read by lines as a simple client does."""
    found: Events = []
    async with client.stream("POST", "/v1/stream", json=body) as response:
        assert response.status_code == 200
        name = ""
        async for line in response.aiter_lines():
            field, _, value = line.partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                found.append((name, value))
            else:
                assert line == ""
                name = ""
    return found


def text_of(events: Events) -> str:
    """The text that a stream told."""
    return "".join(json.loads(data)["text"] for name, data in events if name == "" and data != "[DONE]")


# --- answers -------------------------------------------------------------------------------------------------------


async def test_stream_is_the_text_then_its_end_then_done(models: ModelServer) -> None:
    """The events of the text have no name, `done` has usage and stop reason, and `[DONE]` is the last word."""
    models.default = Scenario(
        [Thinking("Hm."), Text("all "), Text("well"), Stop("max_tokens")],
        usage=Usage(input_tokens=7, cache_read_input_tokens=100),
    )
    async with http_to(anthropic_at(models)) as client:
        *said, (done, end), last = await events_of(client, prompt="Hi")
    assert {name for name, _ in said} == {""}
    assert text_of(said) == "all well"
    assert done == "done"
    assert json.loads(end) == {
        "usage": {
            "input_tokens": 7,
            "output_tokens": 3,
            "total_tokens": 110,
            "estimated": False,
            "cache_read_input_tokens": 100,
            "cache_creation_input_tokens": 0,
        },
        "stop_reason": "max_tokens",
    }
    assert last == ("", "[DONE]")


async def test_stream_is_not_held_back_on_its_way(models: ModelServer) -> None:
    """It says what proxies have to know, and the text comes while the model still speaks."""
    models.default = Scenario([Text("first"), Stall()])
    async with http_to(anthropic_at(models)) as client:
        async with client.stream("POST", "/v1/stream", json={"prompt": "Hi"}) as response:
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert response.headers["cache-control"] == "no-cache"
            assert response.headers["x-accel-buffering"] == "no"
            assert await anext(response.aiter_lines()) == 'data: {"text":"first"}'


async def test_complete_is_the_answer_whole(models: ModelServer) -> None:
    """Text, usage, stop reason and model, as one JSON body."""
    async with http_to(anthropic_at(models)) as client:
        response = await client.post("/v1/complete", json={"prompt": "Hi", "model": "claude-x"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert (body["text"], body["stop_reason"], body["model"]) == ("all well", "end_turn", "claude-x")
    assert body["usage"]["total_tokens"] == 12


async def test_text_is_the_same_on_every_client(models: ModelServer) -> None:
    """No character that some take for a line end, and none that ends an event, breaks the stream."""
    text = "a\r\nb\rc\n\nd\u2028e\u2029f\x85g\x0bh\x0ci\x1cj\x00k 👩‍👩‍👧 data: [DONE]\n\nevent: done"
    models.default = Scenario([*(Text(character) for character in text), Stop()])
    async with http_to(anthropic_at(models)) as client:
        assert text_of(await events_of(client, prompt="Hi")) == text
        assert (await client.post("/v1/complete", json={"prompt": "Hi"})).json()["text"] == text


@BOTH
async def test_model_is_sent_what_was_asked_for(models: ModelServer, path: str) -> None:
    """A prompt is one message of the user; messages go as they are; the rest has its place."""
    conversation = [
        {"role": "system", "content": "You fly."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Where to?"},
    ]
    async with http_to(anthropic_at(models), model="claude-d", max_output_tokens=500) as client:
        await client.post(path, json={"prompt": "Hi"})
        asked = {"messages": conversation, "model": "claude-x", "max_tokens": 9, "instructions": "Be brief."}
        await client.post(path, json=asked)
    first, second = (request.body for request in models.received)
    assert first == {
        "model": "claude-d",
        "max_tokens": 500,
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": True,
    }
    assert second == {
        "model": "claude-x",
        "max_tokens": 9,
        "messages": conversation[1:],
        "system": "Be brief.\n\nYou fly.",
        "stream": True,
    }


@BOTH
async def test_conversation_is_cut_to_what_the_model_holds(models: ModelServer, path: str) -> None:
    """The oldest messages go first, and the last one always stays."""
    conversation = [{"role": "user", "content": f"{number} " + "x" * 398} for number in range(5)]
    async with http_to(anthropic_at(models), model_context_tokens=320, max_output_tokens=100) as client:
        await client.post(path, json={"messages": conversation})
    assert models.received[0].body["messages"] == conversation[-2:]


# --- refusals ------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[bytes, str, str | None]] = {
    "no JSON": (b"{", "invalid_json", None),
    "nothing": (b"", "invalid_json", None),
    "not UTF-8": (b'{"prompt": "\xff"}', "invalid_json", None),
    "lone surrogate": (b'{"prompt": "\\ud800"}', "invalid_json", None),
    "deep JSON": (b'{"prompt": "x", "messages": ' + b"[" * 100_000, "invalid_message", "messages[0]"),
    "a list": (b"[]", "invalid_message", None),
    "neither": (b"{}", "invalid_message", "prompt"),
    "both": (b'{"prompt": "x", "messages": [{"role": "user", "content": "x"}]}', "invalid_message", "prompt"),
    "no messages": (b'{"messages": []}', "invalid_message", "messages"),
    "too many messages": (
        json.dumps({"messages": [{"role": "user", "content": "x"}] * 2001}).encode(),
        "invalid_message",
        "messages",
    ),
    "unknown role": (b'{"messages": [{"role": "tool", "content": "x"}]}', "invalid_message", "messages[0].role"),
    "unknown field": (b'{"prompt": "x", "temperature": 1}', "unknown_field", "temperature"),
    "no tokens": (b'{"prompt": "x", "max_tokens": 0}', "invalid_message", "max_tokens"),
    "too many tokens": (b'{"prompt": "x", "max_tokens": 4097}', "max_output_tokens_too_large", "max_tokens"),
    "prompt of another type": (b'{"prompt": 1}', "invalid_message", "prompt"),
    "model not offered": (b'{"prompt": "x", "model": "other"}', "model_not_found", "model"),
    "too long": (b'{"prompt": "' + b"x" * 800_000 + b'"}', "context_length_exceeded", None),
}


@BOTH
async def test_bad_request_is_refused_before_any_model_call(models: ModelServer, path: str) -> None:
    """The status is 400, the error says what is wrong and where, and the connection can be used again."""
    async with http_to(anthropic_at(models), allowed_models=()) as client:
        for name, (body, code, param) in REFUSED.items():
            response = await client.post(path, content=body)
            error = response.json()["error"]
            expected = {"type": "invalid_request_error", "code": code, **({"param": param} if param else {})}
            assert (name, response.status_code) == (name, 400)
            assert error == {**expected, "message": error["message"]}, name
            assert "xxx" not in error["message"]
        assert (await client.post(path, json={"prompt": "Hi"})).status_code == 200
    assert len(models.received) == 1


@BOTH
async def test_body_has_a_limit(models: ModelServer, path: str) -> None:
    """One byte more is refused with 413, whether or not the length was told before."""

    async def in_chunks(body: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    fitting = b'{"prompt": "Hi"}'.ljust(1000)
    async with http_to(anthropic_at(models), max_body_bytes=1000) as client:
        assert (await client.post(path, content=fitting)).status_code == 200
        for content in (fitting + b" ", in_chunks(fitting + b" ")):
            response = await client.post(path, content=content)
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "body_too_large"
    assert len(models.received) == 1


@BOTH
async def test_body_has_a_deadline(models: ModelServer, path: str) -> None:
    """A client that sends half a body and then nothing is told so."""
    with mock.patch("realtime.http.BODY_TIMEOUT_S", 0.05):
        async with running_server(anthropic_at(models)) as server:
            reader, writer = await raw_post(server, path, b'{"prompt":', length=100)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 400 ")
            assert b'"code":"body_timeout"' in await reader.readuntil(b"}}")
            await hang_up(writer)
    assert models.received == []


@BOTH
async def test_call_beyond_the_rate_is_refused_unread(models: ModelServer, path: str) -> None:
    """Its body may be as long as it likes and hold what it likes: nothing of it is looked at. What was looked at has
    counted, and says so."""
    async with running_server(anthropic_at(models), rate_oneshots="1/day") as server:
        reader, writer = await raw_post(server, path, b"nonsense")
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert b'ratelimit: "oneshots";r=0;' in head.lower()
        await hang_up(writer)
        reader, writer = await raw_post(server, path, b'{"prompt":', length=1_000_000)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 429 ")
        await hang_up(writer)
    assert models.received == []


@BOTH
async def test_only_post_is_allowed(models: ModelServer, path: str) -> None:
    """Other methods get the protocol's error."""
    async with http_to(anthropic_at(models)) as client:
        response = await client.get(path)
    assert response.status_code == 405
    assert response.json()["error"]["code"] == "method_not_allowed"


# --- failures ------------------------------------------------------------------------------------------------------


async def test_failure_of_a_stream_is_an_event_and_then_done(models: ModelServer) -> None:
    """What came before it was told, and no `done` claims that it was all."""
    models.scenarios["before"] = Scenario([HttpError(400)])
    models.scenarios["truncated"] = Scenario([Text("half")])
    models.scenarios["cut"] = Scenario([Text("half"), Cut()])
    models.scenarios["overloaded"] = Scenario([Text("half"), ErrorEvent()])
    codes = ["upstream_rejected", "upstream_truncated", "upstream_disconnected", "upstream_overloaded"]
    async with http_to(anthropic_at(models)) as client:
        for model, code in zip(models.scenarios, codes, strict=True):
            *said, (name, data), last = await events_of(client, prompt="Hi", model=model)
            assert text_of(said) == ("" if model == "before" else "half")
            error = json.loads(data)
            assert (name, error["type"], error["code"]) == ("server_error", "upstream_error", code)
            assert last == ("", "[DONE]")


async def test_failure_of_complete_is_a_status(models: ModelServer) -> None:
    """A model that fails is 502, whatever came before."""
    models.scenarios["before"] = Scenario([HttpError(402)])
    models.scenarios["within"] = Scenario([Text("half"), ErrorEvent("api_error", "secret")])
    async with http_to(anthropic_at(models)) as client:
        for model in models.scenarios:
            response = await client.post("/v1/complete", json={"prompt": "Hi", "model": model})
            assert response.status_code == 502
            assert response.json() == {"error": UNAVAILABLE}


async def test_empty_prompt_is_the_client_s_fault(models: ModelServer) -> None:
    """There is nothing to respond to: 400, or the same in the stream, and no model call."""
    async with http_to(anthropic_at(models)) as client:
        response = await client.post("/v1/complete", json={"prompt": " "})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "empty_conversation")
        (name, data), last = await events_of(client, prompt=" ")
        assert (name, json.loads(data)["code"]) == ("server_error", "empty_conversation")
        assert last == ("", "[DONE]")
    assert models.received == []


async def test_silent_model_is_given_up(models: ModelServer) -> None:
    """After `upstream_idle_timeout_s` without content both endpoints say so, and the call is closed."""
    models.default = Scenario([Text("Well"), Stall()])
    async with http_to(anthropic_at(models), upstream_idle_timeout_s=0.3) as client:
        response = await client.post("/v1/complete", json={"prompt": "Hi"})
        assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_stalled")
        *said, (name, data), _ = await events_of(client, prompt="Hi")
        assert text_of(said) == "Well"
        assert (name, json.loads(data)["code"]) == ("server_error", "upstream_stalled")
    assert {await request.finished() for request in models.received} == {"peer_closed"}


async def raises_timeout(request: Request) -> AsyncIterator[ResponderEvent]:
    """A responder with a timeout of its own."""
    yield "half"
    raise TimeoutError("secret")


async def raises_other(request: Request) -> AsyncIterator[ResponderEvent]:
    """A responder with a bug."""
    yield "half"
    raise ZeroDivisionError("secret")


async def says_no_text(request: Request) -> AsyncIterator[ResponderEvent]:
    """A responder that says what UTF-8 can't hold."""
    yield "half"
    yield "\ud800"


@pytest.mark.parametrize("responder", [raises_timeout, raises_other, says_no_text])
async def test_responder_that_fails_is_told_without_its_words(responder: Responder) -> None:
    """Whatever it raises, a timeout of its own too, is `responder_failed`, and the stream has its proper end."""
    async with http_to(responder) as client:
        response = await client.post("/v1/complete", json={"prompt": "Hi"})
        assert (response.status_code, response.json()["error"]["code"]) == (500, "responder_failed")
        *said, (name, data), last = await events_of(client, prompt="Hi")
        assert text_of(said) == "half"
        assert (name, json.loads(data)["code"]) == ("server_error", "responder_failed")
        assert last == ("", "[DONE]")
        assert "secret" not in data + response.text


# --- clients that leave --------------------------------------------------------------------------------------------

Peer: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def raw_post(server: RunningServer, path: str, body: bytes, *, length: int | None = None) -> Peer:
    """A request on a connection of its own, by hand; `length` is what it claims for its body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    length = len(body) if length is None else length
    writer.write(f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n\r\n".encode() + body)
    return reader, writer


async def hang_up(writer: asyncio.StreamWriter) -> None:
    """Leave in the ordinary way."""
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


async def reset(writer: asyncio.StreamWriter) -> None:
    """Leave with an RST."""
    linger = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    await hang_up(writer)


PHASES: dict[str, list[Step]] = {
    "before the headers": [Stall()],
    "before the first token": [Start(), Stall()],
    "in mid-stream": [Text("half"), Stall()],
    "while it thinks": [Thinking("Hm"), Stall()],
}


@BOTH
@pytest.mark.parametrize("leave", [hang_up, reset])
async def test_hanging_up_closes_the_model_call(models: ModelServer, path: str, leave: Callable[..., Any]) -> None:
    """In every phase: no token for nobody."""
    for phase, steps in PHASES.items():
        models.scenarios[phase] = Scenario(steps)
    async with running_server(anthropic_at(models)) as server:
        for phase, steps in PHASES.items():
            body = json.dumps({"prompt": "Hi", "model": phase}).encode()
            _, writer = await raw_post(server, path, body)
            request = await models.next_request()
            if len(steps) == 2:
                await request.until(lambda request: request.headers_sent)
            await leave(writer)
            assert await request.finished() == "peer_closed"
    assert len(models.received) == len(PHASES)


@BOTH
async def test_hanging_up_while_the_model_is_overloaded_makes_no_further_call(models: ModelServer, path: str) -> None:
    """Nobody waits for the retry any more, so there is none: the responder was closed while it waited."""
    models.default = Scenario([HttpError(529, {"retry-after": "20"})])
    responder = Watched(anthropic_at(models))
    async with running_server(responder) as server:
        _, writer = await raw_post(server, path, b'{"prompt": "Hi"}')
        await (await models.next_request()).finished()
        await hang_up(writer)
        await responder.closed.wait()
    assert len(models.received) == 1


class Watched:
    """A responder that tells when its answer was closed."""

    def __init__(self, responder: Any) -> None:
        self.closed = asyncio.Event()
        self._responder = responder

    async def __aenter__(self) -> None:
        await self._responder.__aenter__()

    async def __aexit__(self, *error: Any) -> None:
        await self._responder.__aexit__(*error)

    async def __call__(self, request: Request) -> AsyncIterator[ResponderEvent]:
        events = self._responder(request)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()
            self.closed.set()


async def test_client_that_reads_nothing_is_given_up(models: ModelServer) -> None:
    """After `send_timeout_s` in which it took nothing the model call is closed."""
    models.default = Scenario([*(Text("x" * 60_000) for _ in range(400)), Stall()])
    async with running_server(anthropic_at(models), send_timeout_s=0.3) as server:
        _, writer = await raw_post(server, "/v1/stream", b'{"prompt": "Hi"}')
        request = await models.next_request()
        assert await request.finished() == "peer_closed"
        assert request.tokens_sent < 400
        await reset(writer)


# --- without a network: a client whose every move is the test's -----------------------------------------------------


class Asgi:
    """The server's side of one request; `taken` are the bodies that the client took, for as long as it had `room`."""

    def __init__(self, *body: AsgiMessage) -> None:
        self.start: AsgiMessage = {}
        self.room = 100
        self.taken: list[bytes] = []
        self.offered = asyncio.Event()
        self.roomier = asyncio.Event()
        self._body = list(body)

    async def receive(self) -> AsgiMessage:
        if self._body:
            return self._body.pop(0)
        return cast(AsgiMessage, await asyncio.get_running_loop().create_future())

    async def send(self, message: AsgiMessage) -> None:
        if message["type"] == "http.response.start":
            self.start = message
        if message["type"] == "http.response.body":
            self.offered.set()
            while len(self.taken) >= self.room:
                await self.roomier.wait()
            self.taken.append(message["body"])


def one_shots(responder: Responder, *, idle_timeout_s: float = 60, send_timeout_s: float = 30) -> OneShots:
    """The endpoints over a responder."""
    model = ModelSettings(
        responder=responder,
        default_model="m",
        max_output_tokens=100,
        context_tokens=1000,
        truncation="auto",
        idle_timeout_s=idle_timeout_s,
    )
    limits = Limits(frozenset("*"), 100)
    return OneShots(
        model,
        limits,
        open_door(),
        open_admission(),
        open_connections(),
        max_body_bytes=1000,
        send_timeout_s=send_timeout_s,
    )


async def says_two_words(request: Request) -> AsyncIterator[ResponderEvent]:
    """A responder that never waits."""
    yield "one"
    yield "two"


PROMPT: AsgiMessage = {"type": "http.request", "body": b'{"prompt": "Hi"}'}


@pytest.mark.parametrize("taken", range(4))
@pytest.mark.parametrize("responder", [says_two_words, raises_other])
async def test_client_that_stalls_at_any_event_is_given_up(responder: Responder, taken: int) -> None:
    """Whichever event it doesn't take, the last and an error's included, that is the end, and no fault of ours."""
    client = Asgi(PROMPT)
    client.room = taken
    await one_shots(responder, send_timeout_s=0.01).stream({}, client.receive, client.send)
    assert len(client.taken) == min(taken, 4 if responder is says_two_words else 3)


async def test_slow_client_is_not_taken_for_a_silent_model() -> None:
    """A client may take longer for an event than a model may for a token."""
    client = Asgi(PROMPT)
    client.room = 0
    with advancing_clock() as advance:
        endpoint = one_shots(says_two_words, idle_timeout_s=5, send_timeout_s=30)
        serving = asyncio.create_task(endpoint.stream({}, client.receive, client.send))
        await client.offered.wait()
        advance(10)
        await turns()
        client.room = 100
        client.roomier.set()
        await serving
    assert client.taken[-1] == b"data: [DONE]\n\n"


@pytest.mark.parametrize("endpoint", ["stream", "complete"])
async def test_client_that_leaves_within_its_body_starts_nothing(endpoint: str) -> None:
    """What it sent may look whole, but was not what it said it would send."""
    called: list[Request] = []

    async def note(request: Request) -> AsyncIterator[ResponderEvent]:
        called.append(request)
        yield "one"

    client = Asgi({**PROMPT, "more_body": True}, {"type": "http.disconnect"}, {"type": "http.disconnect"})
    await getattr(one_shots(note), endpoint)({}, client.receive, client.send)
    assert called == []


# --- an instance that shuts down -----------------------------------------------------------------------------------

SHUTDOWN = ServerError("instance_shutdown", "The instance was shut down.")
FAILURE = {"type": "server_error", "code": "instance_shutdown", "message": "The instance was shut down."}


class Halfway:
    """A responder that says one word and waits; `closed` is set once it was let go."""

    def __init__(self) -> None:
        self.said = asyncio.Event()
        self.go_on = asyncio.Event()
        self.closed = asyncio.Event()

    async def __call__(self, request: Request) -> AsyncIterator[ResponderEvent]:
        try:
            yield "one"
            self.said.set()
            await self.go_on.wait()
            yield "two"
        finally:
            self.closed.set()


@asynccontextmanager
async def under_way(model: Halfway, name: str) -> AsyncIterator[tuple[OneShots, asyncio.Task[None], Asgi]]:
    """A call of an endpoint that waits for the rest of its answer."""
    client, endpoints = Asgi(PROMPT), one_shots(model)
    call = asyncio.create_task(getattr(endpoints, name)({}, client.receive, client.send))
    await model.said.wait()
    try:
        yield endpoints, call, client
    finally:
        call.cancel()
        await asyncio.wait([call])


@pytest.mark.parametrize("endpoint", ["stream", "complete"])
async def test_nothing_begins_while_the_instance_drains(endpoint: str) -> None:
    """Not even what was asked for before, if its body comes only now."""
    called: list[Request] = []

    async def note(request: Request) -> AsyncIterator[ResponderEvent]:
        called.append(request)
        yield "one"

    client, endpoints = Asgi(PROMPT), one_shots(note)
    endpoints.draining = True
    await getattr(endpoints, endpoint)({}, client.receive, client.send)
    assert called == []
    assert (client.start["status"], dict(client.start["headers"])[b"retry-after"]) == (503, b"1")
    error = json.loads(client.taken[0])["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "draining")


@pytest.mark.parametrize("endpoint", ["stream", "complete"])
async def test_calls_that_run_are_waited_for(endpoint: str) -> None:
    """To the end of what their clients are told."""
    model = Halfway()
    async with under_way(model, endpoint) as (endpoints, call, client):
        endpoints.draining = True
        finished = asyncio.create_task(endpoints.finish_turns())
        await turns()
        assert not finished.done()
        client.room = 0
        model.go_on.set()
        await turns()
        assert not finished.done(), "the client has not taken it yet"
        client.room = 100
        client.roomier.set()
        await finished
        await call
    assert b"two" in b"".join(client.taken)
    assert b"instance_shutdown" not in b"".join(client.taken)


async def test_stream_that_is_ended_says_so_and_then_done() -> None:
    """The model call is closed, and what it said before is not lost."""
    model = Halfway()
    async with under_way(model, "stream") as (endpoints, call, client):
        await endpoints.end_turns(SHUTDOWN)
        assert model.closed.is_set()
        await call
    first, failure, last, *rest = client.taken
    assert first == b'data: {"text":"one"}\n\n'
    assert failure == b"event: server_error\ndata: " + msgspec.json.encode(FAILURE) + b"\n\n"
    assert (last, rest) == (b"data: [DONE]\n\n", [])


async def test_complete_that_is_ended_is_an_error() -> None:
    """It has said nothing yet, so it can."""
    model = Halfway()
    async with under_way(model, "complete") as (endpoints, call, client):
        await endpoints.end_turns(SHUTDOWN)
        assert model.closed.is_set()
        await call
    assert [json.loads(body) for body in client.taken] == [{"error": FAILURE}]


async def test_stream_whose_client_stalls_is_ended_as_soon_as_it_takes_something() -> None:
    """The end does not wait behind what the client does not take."""
    client, endpoints = Asgi(PROMPT), one_shots(says_two_words)
    client.room = 0
    call = asyncio.create_task(endpoints.stream({}, client.receive, client.send))
    await client.offered.wait()
    ended = asyncio.create_task(endpoints.end_turns(SHUTDOWN))
    await turns()
    assert not ended.done()
    client.room = 100
    client.roomier.set()
    await ended
    await call
    assert [b"instance_shutdown" in body for body in client.taken] == [True, False]


async def test_end_that_comes_late_changes_nothing() -> None:
    """An answer that is whole is told as whole."""
    client, endpoints = Asgi(PROMPT), one_shots(says_two_words)
    client.room = 2  # the client has the text, and is told how it ended
    call = asyncio.create_task(endpoints.stream({}, client.receive, client.send))
    while len(client.taken) < 2:
        await turns(1)
    await turns()
    ended = asyncio.create_task(endpoints.end_turns(SHUTDOWN))
    await turns()
    client.room = 100
    client.roomier.set()
    await ended
    await call
    assert client.taken[2].startswith(b"event: done\n")
    assert len(client.taken) == 4


async def test_end_before_the_first_word() -> None:
    """Also of a call whose responder has not been asked yet."""
    client, endpoints = Asgi(PROMPT), one_shots(says_two_words)
    call = asyncio.create_task(endpoints.stream({}, client.receive, client.send))
    for _ in range(20):
        if endpoints._running:
            break
        await turns(1)
    await endpoints.end_turns(SHUTDOWN)
    await endpoints.end_turns(SHUTDOWN)
    await call
    assert [b"instance_shutdown" in body for body in client.taken] == [True, False]
