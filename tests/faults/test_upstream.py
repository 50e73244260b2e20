"""Whatever the model, or the way to it, does wrong: one typed end, what came is kept, and nothing is told twice."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import random
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from unittest import mock

import pytest
import structlog

from realtime.errors import UpstreamError
from realtime.observe import logs
from realtime.responders.answering import answering
from realtime.responders.anthropic import AnthropicResponder
from realtime.responders.base import Finish, Responder, Text
from tests.responders import answer_of, anthropic_at, asked, first_retry_after, session_with
from tests.support.client import Client, Event, attached
from tests.support.clock import advancing_clock
from tests.support.model_server import ModelServer
from tests.support.scenarios import (
    PING,
    BadJson,
    Cut,
    ErrorEvent,
    Gate,
    HttpError,
    KeepOpenAfterStop,
    Ping,
    PingsOnly,
    Raw,
    Reset,
    Scenario,
    Stall,
    Start,
    Step,
    Stop,
    Thinking,
    Transcript,
    Usage,
    answer,
    error_body,
    event,
    split,
)
from tests.support.scenarios import Text as Says
from tests.support.sdk import turns
from tests.support.server import RunningServer, running_server
from tests.support.tcp_proxy import TcpProxy

CANARY = "canary-5f1c"
"""What a provider's error says to the server's owner, and no user may see."""

BAD_UTF8 = b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"\xff\xfe"}}\n\n'
LONE_SURROGATE = (
    b"event: content_block_delta\n"
    b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"\\ud83d"}}\n\n'
)

TRUNCATED = ("upstream_truncated", "The model's answer broke off before its end.")
LOST = ("upstream_disconnected", "The connection to the model was lost.")
STALLED = ("upstream_stalled", "The model has said nothing for too long.")
INVALID = ("upstream_invalid", "The model's answer could not be read.")
OVERLOADED = ("upstream_overloaded", "The model's provider is overloaded.")
LIMITED = ("upstream_rate_limited", "The model's provider limits this server's rate.")
UNAUTHORIZED = ("upstream_unauthorized", "The model's provider refuses this server's key.")
NOT_FOUND = ("upstream_not_found", "The model's provider knows no such model.")
TOO_LARGE = ("upstream_too_large", "The conversation is too large for the model's provider.")
REJECTED = ("upstream_rejected", "The model's provider refused the request.")
FAILED = ("upstream_failed", "The model's provider failed.")
UNREACHABLE = ("upstream_unreachable", "The model's provider can't be reached.")

IN_MID_STREAM: dict[str, tuple[list[Step], tuple[str, str]]] = {
    "clean end": ([], TRUNCATED),
    "clean end in a line": ([Raw(b'event: message_stop\ndata: {"type":"mess')], TRUNCATED),
    "lost by FIN": ([Cut()], LOST),
    "lost by RST": ([Reset()], LOST),
    "stall": ([Stall()], STALLED),
    "pings only": ([PingsOnly(0.02)], STALLED),
    "bad JSON": ([BadJson()], INVALID),
    "JSON of another shape": ([Raw(b'event: x\ndata: ["type"]\n\n')], INVALID),
    "JSON that nests without end": ([Raw(b'event: x\ndata: {"x":' + b"[" * 100_000 + b"\n\n")], INVALID),
    "text that is a number": ([Raw(event("content_block_delta", delta={"type": "text_delta", "text": 1}))], INVALID),
    "bad UTF-8": ([Raw(BAD_UTF8)], INVALID),
    "lone surrogate": ([Raw(LONE_SURROGATE)], INVALID),
    "overloaded_error": ([ErrorEvent("overloaded_error", CANARY)], OVERLOADED),
    "rate_limit_error": ([ErrorEvent("rate_limit_error", CANARY)], LIMITED),
    "api_error": ([ErrorEvent("api_error", CANARY)], FAILED),
    "invalid_request_error": ([ErrorEvent("invalid_request_error", CANARY)], REJECTED),
    "authentication_error": ([ErrorEvent("authentication_error", CANARY)], UNAUTHORIZED),
    "an error of a new type": ([ErrorEvent("quota_error", CANARY)], FAILED),
    "an error of no type": ([Raw(event("error", error={}))], FAILED),
}

BY_STATUS = {
    400: REJECTED,
    401: UNAUTHORIZED,
    402: FAILED,
    403: UNAUTHORIZED,
    404: NOT_FOUND,
    413: TOO_LARGE,
    422: REJECTED,
    429: LIMITED,
    500: FAILED,
    503: FAILED,
    529: OVERLOADED,
}
RETRIED = (408, 409, 429, 500, 502, 503, 504, 529)
NOT_RETRIED = (400, 401, 402, 403, 404, 413, 422)


@pytest.fixture
async def models() -> AsyncIterator[ModelServer]:
    """The stand-in; an answer of its default scenario is two deltas."""
    async with ModelServer(default=answer("all well")) as server:
        yield server


@pytest.fixture
def server_log() -> Iterator[io.StringIO]:
    """What the server logs at its most talkative, as it does when it is run."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    written = io.StringIO()
    with mock.patch("sys.stderr", written):
        logs.configure("json", "debug")
    try:
        yield written
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.getLogger("realtime").setLevel(logging.NOTSET)
        structlog.reset_defaults()


@pytest.fixture
def no_wait() -> Iterator[None]:
    """Retry at once where the provider doesn't say when."""
    with first_retry_after(0.001):
        yield


async def failure_of(client: Client, model: str) -> Event:
    """The end of a response of that model, which has to be a failure."""
    response_id = await client.respond(model=model)
    done = await client.until("response.done", response_id=response_id)
    assert done["status"] == "failed"
    return done


def told(done: Event) -> tuple[str, str]:
    """The code and the message of a failure, which has to be the model's side's."""
    assert set(done["error"]) == {"type", "code", "message"}
    assert done["error"]["type"] == "upstream_error"
    return done["error"]["code"], done["error"]["message"]


async def error_of(responder: Responder, model: str) -> tuple[str, str]:
    """The code and the message of the error with which the responder ends."""
    with pytest.raises(UpstreamError) as raised:
        await answer_of(responder, asked(model))
    return raised.value.code, raised.value.message


def answer_body(text: str) -> bytes:
    """The body of a whole answer, a delta a word."""
    transcript = Transcript(model="m", message_id="msg_1", usage=Usage())
    return b"".join([*(transcript.text(piece) for piece in split(text)), PING, transcript.stop(Stop())])


@contextmanager
def delays() -> Iterator[list[float]]:
    """The waits between calls, in seconds, none of which is really waited for."""
    waited: list[float] = []

    async def note(seconds: float) -> None:
        waited.append(seconds)

    with mock.patch("realtime.responders.provider.asyncio", mock.Mock(wraps=asyncio, sleep=note)):
        yield waited


# --- in mid-stream -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("idle_s", [60, 0.5], ids=["faults", "silences"])
async def test_fault_in_mid_stream_is_one_typed_failure_that_keeps_what_came(
    models: ModelServer, idle_s: float
) -> None:
    """The response fails with the fault's own code, its text stays in the conversation, and it was asked once."""
    faults = [fault for fault, (_, error) in IN_MID_STREAM.items() if (error == STALLED) == (idle_s < 60)]
    assert faults
    async with (
        running_server(anthropic_at(models), upstream_idle_timeout_s=idle_s) as server,
        asyncio.TaskGroup() as sessions,
    ):
        for fault in faults:
            sessions.create_task(suffer(fault, server, models))


async def suffer(fault: str, server: RunningServer, models: ModelServer) -> None:
    """One session in which the fault comes once the client has seen what the model said before."""
    steps, expected = IN_MID_STREAM[fault]
    gate = Gate()
    models.scenarios[fault] = Scenario([Thinking("Let me see. "), Says("The first "), Says("half"), gate, *steps])
    async with attached(server) as client:
        response_id = await client.respond("What?", model=fault)
        while client.transcript.texts[response_id] != "The first half":
            await client.receive()
        gate.open()
        done = await client.until("response.done", response_id=response_id)
        assert (fault, done["status"], told(done)) == (fault, "failed", expected)
        assert done.get("stop_reason") is None
        assert done["output_chars"] == len("The first half")
        assert client.transcript.reasonings[response_id] == "Let me see. "
        assert done["usage"]["estimated"] is True
        assert await client.answer("And?", model=f"after {fault}") == "all well"
    asked_once, asked_after = (request for request in models.received if request.body["model"].endswith(fault))
    assert await asked_once.finished() != "open"
    assert asked_after.body["messages"] == [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "The first half"},
        {"role": "user", "content": "And?"},
    ]


async def test_answer_that_breaks_off_anywhere_is_never_complete(models: ModelServer) -> None:
    """Of 1,000 bodies that end cleanly, each after another byte, every one is a truncated answer."""
    body = answer_body("The quick brown fox jumps over the lazy dog. " * 3)
    assert len(body) > 1000
    cuts = random.Random(1).sample(range(len(body)), 1000)
    for cut in cuts:
        models.scenarios[f"cut-{cut}"] = Scenario([Raw(body[:cut])])
    outcomes: set[tuple[str, str]] = set()

    async def read(responder: Responder, some: list[int]) -> None:
        for cut in some:
            outcomes.add(await error_of(responder, f"cut-{cut}"))

    async with anthropic_at(models) as responder, asyncio.TaskGroup() as readers:
        for reader in range(20):
            readers.create_task(read(responder, cuts[reader::20]))
    assert outcomes == {TRUNCATED}
    assert len(models.received) == 1000


async def test_response_that_breaks_off_is_never_marked_completed(models: ModelServer) -> None:
    """Twenty sessions at once, ten truncated answers each, seen by their clients: 200 of 200 failed."""
    models.default = Scenario([Says("All "), Says("but")])
    ends: list[tuple[str, str, str]] = []

    async def ask(server: RunningServer) -> None:
        async with attached(server) as client:
            for _ in range(10):
                done = await failure_of(client, "truncated")
                ends.append((done["status"], *told(done)))
            assert set(client.transcript.texts.values()) == {"All but"}

    async with running_server(anthropic_at(models)) as server, asyncio.TaskGroup() as clients:
        for _ in range(20):
            clients.create_task(ask(server))
    assert len(ends) == 200
    assert set(ends) == {("failed", *TRUNCATED)}


async def test_lines_may_be_split_at_every_byte(models: ModelServer) -> None:
    """However the network cuts the stream, also within characters, the answer is the same."""
    text = "Grüße, 世界 👩‍👩‍👧!\r\nzwei\u2028drei"
    async with anthropic_at(models) as responder:
        for size in (1, 2, 3, 5):
            models.default = answer(text, bytes_per_write=size)
            events = await answer_of(responder, asked("split"))
            assert "".join(event.text for event in events if isinstance(event, Text)) == text
            assert isinstance(events[-1], Finish)


async def test_line_may_come_in_two_parts_split_anywhere(models: ModelServer) -> None:
    """The second half of an event comes when the first was read for long, wherever the cut is."""
    line = event("content_block_delta", index=0, delta={"type": "text_delta", "text": "é€😀"})
    assert len(line) > 100
    end = Transcript(model="m", message_id="msg", usage=Usage()).stop(Stop())
    gates = {cut: Gate() for cut in range(1, len(line))}
    for cut, gate in gates.items():
        models.scenarios[str(cut)] = Scenario([Raw(line[:cut]), gate, Raw(line[cut:] + end)])

    async def read(responder: Responder, cut: int) -> str:
        events = await answer_of(responder, asked(str(cut)))
        return "".join(event.text for event in events if isinstance(event, Text))

    async with anthropic_at(models) as responder:
        reading = [asyncio.create_task(read(responder, cut)) for cut in gates]
        for _ in gates:
            request = await models.next_request()
            await request.until(lambda request: request.headers_sent)
        for gate in gates.values():
            gate.open()
        assert set(await asyncio.gather(*reading)) == {"é€😀"}


async def test_silence_is_counted_from_the_last_content(models: ModelServer) -> None:
    """Pings don't put the end off, content does; the clock is the test's."""
    first, second, third = Gate(), Gate(), Gate()
    models.scenarios["slow"] = Scenario([first, Says("a"), second, Ping(), Ping(), third, Says("b"), PingsOnly(0.01)])
    heard: asyncio.Queue[str] = asyncio.Queue()

    async def listen(responder: Responder) -> None:
        async with answering(responder, asked("slow"), idle_s=60) as coming:
            async for event in coming.events:
                if isinstance(event, Text):
                    coming.progress()
                    heard.put_nowait(event.text)

    async with anthropic_at(models) as responder:
        with advancing_clock() as advance:
            listening = asyncio.create_task(listen(responder))
            request = await models.next_request()
            advance(50)
            first.open()
            assert await heard.get() == "a"
            advance(50)
            second.open()
            third.open()
            assert await heard.get() == "b"
            advance(50)
            await turns()
            assert not listening.done()
            advance(11)
            with pytest.raises(UpstreamError) as raised:
                await listening
            assert raised.value.code == "upstream_stalled"
            assert await request.finished() == "peer_closed"


@pytest.mark.parametrize("silence", [Stall(), PingsOnly(0.02)], ids=["stall", "pings only"])
async def test_silence_ends_the_response_no_sooner_than_it_may(models: ModelServer, silence: Step) -> None:
    """From the last content to the end it is at least `upstream_idle_timeout_s`, and the model call is closed."""
    models.scenarios["silent"] = Scenario([Says("Well"), silence])
    async with session_with(anthropic_at(models), upstream_idle_timeout_s=0.5) as client:
        done = await failure_of(client, "silent")
        ended_at = time.monotonic()
        assert told(done) == STALLED
        request = models.received[0]
        assert request.last_content_at is not None
        assert ended_at - request.last_content_at >= 0.45
        assert await request.finished() == "peer_closed"


async def test_silence_before_the_first_byte_is_a_stall_too(models: ModelServer) -> None:
    """A provider that takes the request and never answers is given up, and its call closed."""
    models.scenarios["silent"] = Scenario([Stall()])
    async with session_with(anthropic_at(models), upstream_idle_timeout_s=0.3) as client:
        assert told(await failure_of(client, "silent")) == STALLED
        assert await models.received[0].finished() == "peer_closed"
        assert len(models.received) == 1


async def test_done_does_not_wait_for_the_end_of_the_connection(models: ModelServer) -> None:
    """`message_stop` is the end, though the provider keeps the socket open for ever."""
    models.scenarios["open"] = Scenario([Says("Done."), KeepOpenAfterStop(Stop("end_turn"))])
    async with session_with(anthropic_at(models)) as client:
        response_id = await client.respond(model="open")
        done = await client.until("response.done", response_id=response_id)
        assert (done["status"], done["stop_reason"]) == ("completed", "end_turn")
        assert done["usage"]["estimated"] is False
        assert client.transcript.texts[response_id] == "Done."
        assert await models.received[0].finished() == "peer_closed"


async def test_nothing_that_follows_the_end_spoils_it(models: ModelServer) -> None:
    """What comes after `message_stop`, a lost connection included, is not worth an error, nor shown."""
    after: list[Step] = [BadJson(), Raw(BAD_UTF8), Says("more"), ErrorEvent(), Reset(), Cut()]
    async with anthropic_at(models) as responder:
        for step in after:
            models.default = Scenario([Says("Done."), Stop(), step])
            events = await answer_of(responder, asked("any"))
            assert [event.text for event in events if isinstance(event, Text)] == ["Done."]
            assert isinstance(events[-1], Finish)


# --- before the first byte -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", RETRIED)
async def test_failure_that_may_pass_is_tried_three_times(models: ModelServer, no_wait: None, status: int) -> None:
    """Without `Retry-After` there are two retries: the third call's answer counts, or its error."""
    models.scenarios["twice"] = Scenario([HttpError(status, times=2), Says("at last"), Stop()])
    models.scenarios["always"] = Scenario([HttpError(status)])
    async with anthropic_at(models) as responder:
        events = await answer_of(responder, asked("twice"))
        assert [event.text for event in events if isinstance(event, Text)] == ["at last"]
        assert len(models.received) == 3
        assert await error_of(responder, "always") == BY_STATUS.get(status, FAILED)
        assert len(models.received) == 6


@pytest.mark.parametrize("status", NOT_RETRIED)
async def test_failure_that_stays_is_told_at_once(models: ModelServer, status: int) -> None:
    """A request that the provider refuses is sent once."""
    models.scenarios["refused"] = Scenario([HttpError(status)])
    with first_retry_after(1000):
        async with anthropic_at(models) as responder:
            assert await error_of(responder, "refused") == BY_STATUS[status]
    assert len(models.received) == 1


async def test_status_is_told_by_its_code_without_the_provider_s_words(models: ModelServer, no_wait: None) -> None:
    """A client sees the code and this server's own words, whatever the provider wrote."""
    bodies = {
        "error object": error_body("some_error", CANARY),
        "page": b"<html><h1>" + CANARY.encode() + b"</h1></html>",
        "nothing": b"",
        "other JSON": b'["' + CANARY.encode() + b'"]',
        "not text": b"\xff\xfe" + CANARY.encode(),
    }
    for status in BY_STATUS:
        for name, body in bodies.items():
            models.scenarios[f"{status} {name}"] = Scenario([HttpError(status, {"x-note": CANARY}, body)])
    async with session_with(anthropic_at(models)) as client:
        for model in models.scenarios:
            done = await failure_of(client, model)
            assert (model, told(done)) == (model, BY_STATUS[int(model[:3])])
            assert done["output_chars"] == 0
            assert CANARY not in repr(done)


async def test_each_wait_without_retry_after_is_twice_as_long(models: ModelServer) -> None:
    """Half a second and a second, with a quarter of jitter either way."""
    models.scenarios["always"] = Scenario([HttpError(529)])
    with delays() as waited:
        async with anthropic_at(models) as responder:
            assert await error_of(responder, "always") == OVERLOADED
    first_s, second_s = waited
    assert 0.375 <= first_s <= 0.625
    assert 0.75 <= second_s <= 1.25


@pytest.mark.parametrize(
    ("headers", "waits_s"),
    [
        ({"retry-after": "7"}, [7, 7]),
        ({"retry-after": "0.5"}, [0.5, 0.5]),
        ({"retry-after": "0"}, [0, 0]),
        ({"retry-after": "-3"}, [0, 0]),
        ({"retry-after": "nan"}, [0, 0]),
        ({"retry-after-ms": "1500"}, [1.5, 1.5]),
        ({"retry-after-ms": "1500", "retry-after": "2"}, [1.5, 1.5]),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after-ms": "soon"}, None),
        ({"retry-after": "30.5"}, []),
        ({"retry-after": "3600"}, []),
        ({"retry-after": "1e300"}, []),
        ({"retry-after": "inf"}, []),
    ],
    ids=str,
)
async def test_retry_after_is_honoured_within_bounds(
    models: ModelServer, headers: dict[str, str], waits_s: list[float] | None
) -> None:
    """It is waited for as the provider says; beyond `upstream_retry_s` there is no waiting at all."""
    models.scenarios["always"] = Scenario([HttpError(429, headers)])
    with first_retry_after(1.0), delays() as waited:
        async with anthropic_at(models, retry_s=30) as responder:
            assert await error_of(responder, "always") == LIMITED
    if waits_s is None:
        assert len(waited) == 2
        assert all(0.75 <= delay_s <= 2.5 for delay_s in waited)
    else:
        assert waited == pytest.approx(waits_s)
    assert len(models.received) == 1 + len(waited)


async def test_retry_after_may_be_a_date(models: ModelServer) -> None:
    """HTTP knows both forms; one that has passed means at once."""
    models.scenarios["soon"] = Scenario([HttpError(503, {"retry-after": formatdate(time.time() + 10, usegmt=True)})])
    models.scenarios["late"] = Scenario([HttpError(503, {"retry-after": formatdate(time.time() + 90, usegmt=True)})])
    models.scenarios["past"] = Scenario([HttpError(503, {"retry-after": formatdate(0, usegmt=True)})])
    async with anthropic_at(models) as responder:
        with delays() as waited:
            assert await error_of(responder, "soon") == FAILED
        assert len(waited) == 2
        assert all(0 < delay_s <= 10 for delay_s in waited)
        with delays() as waited:
            assert await error_of(responder, "late") == FAILED
        assert waited == []
        with delays() as waited:
            assert await error_of(responder, "past") == FAILED
        assert waited == [0, 0]


async def test_retry_after_is_really_waited_for(models: ModelServer) -> None:
    """Between two calls there is as much time as the provider asked for."""
    models.scenarios["once"] = Scenario([HttpError(429, {"retry-after": "0.2"}, times=1), Says("now"), Stop()])
    async with anthropic_at(models) as responder:
        await answer_of(responder, asked("once"))
    first, second = models.received
    assert second.started_at - first.started_at >= 0.19


async def test_retry_after_beyond_the_bound_fails_at_once_for_a_client(models: ModelServer) -> None:
    """A provider that says to come back in an hour is not waited for."""
    models.scenarios["later"] = Scenario([HttpError(429, {"retry-after": "3600"})])
    async with session_with(anthropic_at(models)) as client:
        assert told(await failure_of(client, "later")) == LIMITED
    assert len(models.received) == 1


@pytest.mark.parametrize(("header", "status", "calls"), [("false", 529, 1), ("true", 400, 3)])
async def test_provider_decides_whether_to_retry(
    models: ModelServer, no_wait: None, header: str, status: int, calls: int
) -> None:
    """`x-should-retry` counts for more than the status."""
    models.scenarios["told"] = Scenario([HttpError(status, {"x-should-retry": header})])
    async with anthropic_at(models) as responder:
        assert await error_of(responder, "told") == BY_STATUS[status]
    assert len(models.received) == calls


async def test_no_retry_where_its_time_is_up(models: ModelServer) -> None:
    """With hardly any time for retries the first failure is the last."""
    models.scenarios["always"] = Scenario([HttpError(500)])
    async with anthropic_at(models, retry_s=0.01) as responder:
        assert await error_of(responder, "always") == FAILED
    assert len(models.received) == 1


async def test_cancelling_ends_the_wait_for_a_retry(models: ModelServer) -> None:
    """A response that is cancelled between two calls never makes the second."""
    models.scenarios["busy"] = Scenario([HttpError(529, {"retry-after": "20"}, times=1), Says("late"), Stop()])
    async with session_with(anthropic_at(models)) as client:
        response_id = await client.respond(model="busy")
        await (await models.next_request()).finished()
        await client.send("response.cancel", response_id=response_id)
        done = await client.until("response.done", response_id=response_id)
        assert done["status"] == "cancelled"
    assert len(models.received) == 1


@pytest.mark.parametrize("how", [Reset(), Cut()], ids=["reset", "cut"])
async def test_connection_lost_before_the_first_byte_is_retried(models: ModelServer, no_wait: None, how: Step) -> None:
    """Nothing was received, so nothing can be told twice: three calls, then the failure."""
    models.scenarios["lost"] = Scenario([how])
    async with session_with(anthropic_at(models)) as client:
        assert told(await failure_of(client, "lost")) == UNREACHABLE
    assert len(models.received) == 3


async def test_connection_lost_after_the_headers_is_not_retried(models: ModelServer, no_wait: None) -> None:
    """From the headers on it is one call, though no text came yet."""
    models.scenarios["lost"] = Scenario([Start(), Cut()])
    async with session_with(anthropic_at(models)) as client:
        assert told(await failure_of(client, "lost")) == LOST
    assert len(models.received) == 1


async def test_two_answers_are_never_glued(models: ModelServer, no_wait: None) -> None:
    """After a retried call the text is the second one's alone; after a broken answer there is no other."""
    models.scenarios["retried"] = Scenario([HttpError(529, times=1), Says("one "), Says("two"), Stop()])
    models.scenarios["broken"] = Scenario([Says("one "), Says("two"), ErrorEvent(), Says("one two"), Stop()])
    async with session_with(anthropic_at(models)) as client:
        assert await client.answer(model="retried") == "one two"
        done = await failure_of(client, "broken")
        assert client.transcript.texts[done["response_id"]] == "one two"
    assert [request.body["model"] for request in models.received] == ["retried", "retried", "broken"]


# --- no way to the provider ----------------------------------------------------------------------------------------


async def test_refused_connection(no_wait: None) -> None:
    """A provider that doesn't listen is unreachable, and a client is told so in a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    responder = AnthropicResponder(base_url=f"http://127.0.0.1:{port}", api_key="test")
    async with session_with(responder) as client:
        assert told(await failure_of(client, "any")) == UNREACHABLE


async def test_name_that_does_not_resolve(no_wait: None) -> None:
    """DNS that fails is asked three times, then the provider is unreachable."""
    loop = asyncio.get_running_loop()
    failure = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    responder = AnthropicResponder(base_url="http://model.invalid", api_key="test")
    async with responder:
        with mock.patch.object(loop, "getaddrinfo", side_effect=failure) as lookup:
            assert await error_of(responder, "any") == UNREACHABLE
    assert lookup.call_count == 3


async def test_something_that_is_no_http_server(no_wait: None) -> None:
    """Whoever answers with other than HTTP is unreachable too."""

    async def babble(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n")
        writer.close()

    server = await asyncio.start_server(babble, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        async with AnthropicResponder(base_url=f"http://127.0.0.1:{port}", api_key="test") as responder:
            assert await error_of(responder, "any") == UNREACHABLE


async def test_network_that_is_cut_in_mid_stream(models: ModelServer) -> None:
    """A cut and a reset on the way come to the same as at the provider."""
    models.scenarios["slow"] = Scenario([Says("so far"), Stall()])
    async with TcpProxy("127.0.0.1", int(models.url.rpartition(":")[2])) as proxy:
        responder = anthropic_at(models, base_url=f"http://127.0.0.1:{proxy.port}")
        async with session_with(responder) as client:
            for end in (proxy.cut, proxy.reset):
                response_id = await client.respond(model="slow")
                await client.until("response.output_text.delta", response_id=response_id)
                await end()
                done = await client.until("response.done", response_id=response_id)
                assert told(done) == LOST
                assert client.transcript.texts[response_id] == "so far"


async def test_network_that_swallows_everything(models: ModelServer) -> None:
    """Where nothing comes through any more, not even an end, silence ends the response."""
    models.scenarios["slow"] = Scenario([Says("so far"), Stall()])
    async with TcpProxy("127.0.0.1", int(models.url.rpartition(":")[2])) as proxy:
        responder = anthropic_at(models, base_url=f"http://127.0.0.1:{proxy.port}")
        async with session_with(responder, upstream_idle_timeout_s=0.5) as client:
            response_id = await client.respond(model="slow")
            await client.until("response.output_text.delta", response_id=response_id)
            await proxy.blackhole()
            assert told(await client.until("response.done", response_id=response_id)) == STALLED


# --- what is told to nobody ----------------------------------------------------------------------------------------


async def test_no_fault_brings_content_or_a_traceback_into_the_log(
    models: ModelServer, no_wait: None, server_log: io.StringIO
) -> None:
    """Whatever fails, at any log level: not a word of the prompt, of the answer, or of the provider's error."""
    said = Says(CANARY)
    for name, (steps, expected) in IN_MID_STREAM.items():
        if expected != STALLED:
            models.scenarios[name] = Scenario([Thinking(CANARY), said, *steps])
    for status in BY_STATUS:
        models.scenarios[str(status)] = Scenario([HttpError(status, {}, error_body("some_error", CANARY))])
    models.scenarios["no headers"] = Scenario([Reset()])
    async with session_with(anthropic_at(models)) as client:
        for name in models.scenarios:
            await client.send("response.create", input=CANARY, instructions=CANARY, model=name)
            done = await client.until("response.done")
            assert done["status"] == "failed"
            assert CANARY not in repr(done)
        logs.warning("that is a log")
    assert "that is a log" in server_log.getvalue()
    assert CANARY not in server_log.getvalue()
    assert "Traceback" not in server_log.getvalue()


async def test_a_call_that_fails_is_one_line_that_says_why(
    models: ModelServer, no_wait: None, server_log: io.StringIO
) -> None:
    """With the response's id, the provider and the model, and what is known of the cause; however often it was tried.
    One that is cancelled is none."""
    odd = Raw(event("content_block_delta", delta={"type": "text_delta", "text": [CANARY]}))
    models.scenarios["429"] = Scenario([HttpError(429, {}, error_body("some_error", CANARY))])
    models.scenarios["odd"] = Scenario([Says(CANARY), odd])
    models.scenarios["lost"] = Scenario([Says(CANARY), Reset()])
    models.scenarios["waits"] = Scenario([Says("Well"), Stall()])
    expected: dict[str, dict[str, str | int]] = {
        "429": {"code": LIMITED[0], "answered": 429, "cause": "RateLimitError"},
        "odd": {"code": INVALID[0], "field": "delta.text", "cause": "ValidationError"},
        "lost": {"code": LOST[0]},
    }
    async with session_with(anthropic_at(models)) as client:
        ids = {model: (await failure_of(client, model))["response_id"] for model in expected}
        response_id = await client.respond(model="waits")
        await client.until("response.output_text.delta", response_id=response_id)
        await client.send("response.cancel", response_id=response_id)
        await client.until("response.done", response_id=response_id)
    records = [json.loads(line) for line in server_log.getvalue().splitlines()]
    lines = [record for record in records if record["event"] == "model call failed"]
    assert [line["response"] for line in lines] == list(ids.values())
    for line, (model, fields) in zip(lines, expected.items(), strict=True):
        wanted = {"model": model, "provider": "anthropic", "level": "warning", **fields}
        assert line.items() >= wanted.items()
    assert CANARY not in server_log.getvalue()
