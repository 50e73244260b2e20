"""The stand-in speaks the provider's protocol, tells how far each answer came, and sees the peer leave."""

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import anthropic
import msgspec
import pytest

from tests.support.http_connection import RST_ON_CLOSE
from tests.support.model_server import ModelRequest, ModelServer
from tests.support.scenarios import (
    Gate,
    HttpError,
    KeepOpenAfterStop,
    Pause,
    Ping,
    PingsOnly,
    Raw,
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
from tests.support.sdk import MESSAGES, ask, open_client, open_stream, turns

Peer: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def post(server: ModelServer, model: str) -> Peer:
    """A request on a connection of its own, by hand."""
    host, port = server.url.removeprefix("http://").split(":")
    peer = await asyncio.open_connection(host, int(port))
    body = msgspec.json.encode({"model": model, "messages": MESSAGES, "stream": True})
    peer[1].write(b"POST /v1/messages HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    return peer


def fin(peer: Peer) -> None:
    """Leave in the ordinary way."""
    peer[1].close()


def rst(peer: Peer) -> None:
    """Leave with an RST."""
    peer[1].get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_ON_CLOSE)
    peer[1].transport.abort()


def shut(peer: Peer) -> None:
    """Send a FIN, but do not close."""
    peer[1].write_eof()


async def hang_up(peer: Peer) -> None:
    """Close a connection, whatever state it is in."""
    peer[1].close()
    with contextlib.suppress(OSError):
        await peer[1].wait_closed()


async def test_stream_helper_reads_a_whole_answer(server: ModelServer, client: anthropic.AsyncAnthropic) -> None:
    """Thinking with its signature, text, usage and stop reason arrive through `messages.stream()`."""
    usage = Usage(input_tokens=7, cache_read_input_tokens=5, cache_creation_input_tokens=3, output_tokens=42)
    steps: list[Step] = [
        Thinking("Let me "),
        Thinking("see.", "c2ln"),
        Text("Grüß "),
        Ping(),
        Text("dich 👋"),
        Stop("max_tokens"),
    ]
    server.scenarios["m"] = Scenario(steps, usage=usage)
    message = await ask(client, "m")
    assert [block.to_dict() for block in message.content] == [
        {"type": "thinking", "thinking": "Let me see.", "signature": "c2ln"},
        {"type": "text", "text": "Grüß dich 👋"},
    ]
    assert (message.model, message.stop_reason) == ("m", "max_tokens")
    assert message.usage.input_tokens == 7
    assert message.usage.cache_read_input_tokens == 5
    assert message.usage.cache_creation_input_tokens == 3
    assert message.usage.output_tokens == 42


async def test_create_reads_the_events_in_the_providers_order(
    server: ModelServer, client: anthropic.AsyncAnthropic
) -> None:
    """`create(stream=True)` parses each event into its type, with the usage that stands at that moment."""
    server.scenarios["m"] = Scenario([Thinking("Hm."), Text("Yes."), Text(" No."), Stop()], usage=Usage())
    async with await open_stream(client, "m") as stream:
        events = [event async for event in stream]
    thinking = ["content_block_start", "content_block_delta", "content_block_delta", "content_block_stop"]
    text = ["content_block_start", "content_block_delta", "content_block_delta", "content_block_stop"]
    assert [event.type for event in events] == [
        "message_start",
        *thinking,
        *text,
        "message_delta",
        "message_stop",
    ]
    deltas = [event.delta.type for event in events if event.type == "content_block_delta"]
    assert deltas == ["thinking_delta", "signature_delta", "text_delta", "text_delta"]
    start, end = events[0], events[-2]
    assert start.type == "message_start"
    assert (start.message.usage.input_tokens, start.message.usage.output_tokens) == (10, 1)
    assert end.type == "message_delta"
    assert (end.delta.stop_reason, end.usage.output_tokens) == ("end_turn", 3)


@pytest.mark.parametrize("bytes_per_write", [None, 1, 7])
async def test_text_survives_any_cut_of_the_bytes(
    server: ModelServer, client: anthropic.AsyncAnthropic, bytes_per_write: int | None
) -> None:
    """Lines and UTF-8 sequences may be cut anywhere, and there are writes that do."""
    text = 'naïve 你好 👩‍👩‍👧 "quoted"\n\ndata: \u2028 done'
    server.scenarios["m"] = answer(text, tokens=9, bytes_per_write=bytes_per_write)
    message = await ask(client, "m")
    assert [block.to_dict() for block in message.content] == [{"type": "text", "text": text}]
    assert message.usage.output_tokens == 9


async def test_bytes_per_write_is_the_size_of_an_http_chunk(server: ModelServer) -> None:
    """A chunk ends in the middle of a character."""
    server.scenarios["m"] = Scenario([Raw("👋👋".encode())], bytes_per_write=3)
    peer = await post(server, "m")
    response = await peer[0].readuntil(b"\r\n0\r\n\r\n")
    assert response.endswith(b"\r\n\r\n3\r\n\xf0\x9f\x91\r\n3\r\n\x8b\xf0\x9f\r\n2\r\n\x91\x8b\r\n0\r\n\r\n")
    await hang_up(peer)


async def test_the_default_scenario_answers_unknown_models(client: anthropic.AsyncAnthropic) -> None:
    """A model nobody registered gets a proper answer."""
    message = await ask(client, "unknown")
    assert message.stop_reason == "end_turn"


async def test_records_what_was_asked(server: ModelServer, client: anthropic.AsyncAnthropic) -> None:
    """The body and the headers of each request are kept, in order of arrival."""
    for model in "a", "b":
        await ask(client, model)
    first, second = server.received
    assert (await server.next_request(), await server.next_request()) == (first, second)
    assert first.body == {"model": "a", "max_tokens": 100, "messages": MESSAGES, "stream": True}
    assert first.headers["authorization"] == "Bearer test"
    assert second.body["model"] == "b"


async def test_answers_many_at_once(server: ModelServer, client: anthropic.AsyncAnthropic) -> None:
    """Fifty streams wait at one gate, and all are active until it opens."""
    gate = Gate()
    server.scenarios["m"] = Scenario([Text("Hello"), gate, Text(" all"), Stop()])
    async with asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(ask(client, "m")) for _ in range(50)]
        for _ in asked:
            await (await server.next_request()).sent(1)
        assert len(server.active) == 50
        gate.open()
    assert {task.result().usage.output_tokens for task in asked} == {2}
    assert server.active == []


async def test_a_connection_serves_one_request_after_another(
    server: ModelServer, client: anthropic.AsyncAnthropic
) -> None:
    """The SDK's pool keeps using the connection of a completed answer."""
    for _ in range(3):
        await ask(client)
    assert [request.ended for request in server.received] == ["completed"] * 3
    assert [request.closed_at for request in server.received] == [None] * 3
    assert server.connections == 1
    await client.close()
    for request in server.received:
        await request.closed()
    assert server.connections == 0
    assert [request.ended for request in server.received] == ["completed"] * 3


async def test_progress_of_a_stream_can_be_awaited(server: ModelServer, client: anthropic.AsyncAnthropic) -> None:
    """Headers, tokens, stop and end are recorded as they happen."""
    before, middle = Gate(), Gate()
    server.scenarios["m"] = Scenario([before, Text("a"), Text("b"), middle, Stop()])
    asked = asyncio.ensure_future(ask(client, "m"))
    request = await server.next_request()
    assert (request.headers_sent, request.tokens_sent, request.last_content_at) == (False, 0, None)
    before.open()
    await request.sent(2)
    assert (request.headers_sent, request.ended, request.stopped_at) == (True, "open", None)
    middle.open()
    stopped_at = await request.stopped()
    assert await request.finished() == "completed"
    assert request.last_content_at is not None
    assert request.started_at <= request.last_content_at <= stopped_at
    await asked


async def test_waiting_for_what_will_not_come_fails(server: ModelServer, client: anthropic.AsyncAnthropic) -> None:
    """A test that waits for tokens of an answer that has ended is told so."""
    server.scenarios["m"] = Scenario([Text("a")])
    await ask(client, "m")
    request = await server.next_request()
    with pytest.raises(RuntimeError, match=r"\(completed\) after 1 of 2 tokens"):
        await request.sent(2)
    with pytest.raises(RuntimeError, match="without message_stop"):
        await request.stopped()


def has_token(request: ModelRequest) -> bool:
    """The first token was sent."""
    return request.tokens_sent == 1


PHASES: dict[str, tuple[Callable[[], list[Step]], Callable[[ModelRequest], bool]]] = {
    "before the headers": (lambda: [Stall()], lambda request: not request.headers_sent),
    "before the first token": (lambda: [Start(), Stall()], lambda request: request.headers_sent),
    "at a gate": (lambda: [Text("a"), Gate(), Stop()], has_token),
    "in a pause": (lambda: [Text("a"), Pause(3600.0), Stop()], has_token),
    "while it is pinged": (lambda: [Text("a"), PingsOnly(0.0)], has_token),
    "with its buffers full": (lambda: [Text("a"), Raw(bytes(64_000_000))], has_token),
    "after the stop": (lambda: [KeepOpenAfterStop()], lambda request: request.stopped_at is not None),
}


@pytest.mark.parametrize("how", [fin, rst, shut])
@pytest.mark.parametrize("phase", PHASES)
async def test_sees_the_peer_leave(server: ModelServer, phase: str, how: Callable[[Peer], None]) -> None:
    """Whatever the answer is doing, the peer's close ends it and is recorded."""
    steps, reached = PHASES[phase]
    server.scenarios["m"] = Scenario(steps())
    peer = await post(server, "m")
    request = await server.next_request()
    await request.until(reached)
    await turns()
    assert (request.ended, request.closed_at, server.active) == ("open", None, [request])
    how(peer)
    assert await request.closed() >= request.started_at
    assert (request.ended, server.active) == ("peer_closed", [])
    await hang_up(peer)


async def test_sees_the_sdk_leave(server: ModelServer, client: anthropic.AsyncAnthropic) -> None:
    """A stream that is closed early is seen closed."""
    server.scenarios["m"] = Scenario([Text("a"), Stall()])
    async with await open_stream(client, "m") as stream:
        await anext(stream)
    request = await server.next_request()
    await request.closed()
    assert request.ended == "peer_closed"


async def test_sees_a_cancelled_request_leave(server: ModelServer, client: anthropic.AsyncAnthropic) -> None:
    """So is a request that is cancelled before its headers have come."""
    server.scenarios["m"] = Scenario([Stall()])
    asked = asyncio.ensure_future(ask(client, "m"))
    request = await server.next_request()
    asked.cancel()
    await request.closed()
    assert (request.ended, request.headers_sent) == ("peer_closed", False)
    assert asked.cancelled()


async def test_leaving_cuts_what_is_open() -> None:
    """The end of the context closes streams that would never have ended."""
    async with ModelServer(default=Scenario([Text("a"), Stall()])) as server:
        peer = await post(server, "m")
        request = await server.next_request()
        await request.sent(1)
    assert request.ended == "cut"
    assert b"text_delta" in await peer[0].read()
    await hang_up(peer)


async def test_a_scenario_without_sense_fails_the_owner() -> None:
    """An error status cannot follow a stream's headers, and the test is told."""

    async def wait_for_an_answer() -> None:
        async with ModelServer(default=Scenario([Start(), HttpError(500)])) as server:
            peer = await post(server, "m")
            try:
                await peer[0].read()
            finally:
                peer[1].close()

    with pytest.raises(ExceptionGroup) as failure:
        await wait_for_an_answer()
    assert failure.group_contains(ValueError, match="after the response's headers")


@pytest.mark.parametrize(
    ("request_line", "body", "status"),
    [
        (b"GET /v1/messages", b"", b"404"),
        (b"POST /v1/other", b"{}", b"404"),
        (b"POST /v1/messages", b"{", b"400"),
        (b"POST /v1/messages", b'{"model": "m"}', b"400"),
    ],
)
async def test_refuses_other_requests(server: ModelServer, request_line: bytes, body: bytes, status: bytes) -> None:
    """What the stand-in does not know is refused and not recorded."""
    peer = await post(server, "m")
    await peer[0].readuntil(b"\r\n0\r\n\r\n")
    peer[1].write(b"%s HTTP/1.1\r\ncontent-length: %d\r\n\r\n%s" % (request_line, len(body), body))
    assert (await peer[0].readline()).split()[1] == status
    assert len(server.received) == 1
    await hang_up(peer)


async def test_runs_as_a_process() -> None:
    """It prints its URL, streams the tokens it was told to, knows the faults by name, and ends on SIGTERM."""
    options = ["--port", "0", "--rate", "100000", "--tokens", "20"]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.support.model_server", *options),
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    url = (await process.stdout.readline()).decode().strip()
    async with open_client(url) as client:
        message = await ask(client)
        refusal = await ask(client, "refusal")
    process.send_signal(signal.SIGTERM)
    assert await process.wait() == 0
    assert [block.to_dict() for block in message.content] == [
        {"type": "text", "text": "".join(f"{number} " for number in range(1, 21))}
    ]
    assert refusal.stop_reason == "refusal"
