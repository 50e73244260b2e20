"""Each fault that a scenario can play, and what the provider's own SDK makes of it when left alone."""

import asyncio
import json

import anthropic
import httpx2
import pytest

from tests.support.clock import advancing_clock
from tests.support.model_server import ModelServer
from tests.support.scenarios import (
    BadJson,
    Cut,
    ErrorEvent,
    Gate,
    HttpError,
    KeepOpenAfterStop,
    PingsOnly,
    Raw,
    Refusal,
    Reset,
    Scenario,
    Stall,
    Step,
    Stop,
    Text,
    answer,
    faults,
    split,
)
from tests.support.sdk import MESSAGES, ask, open_client, open_stream, read_until, turns

SDK_READ_TIMEOUT_S = 600.0
AT_ONCE = {"retry-after-ms": "1"}


async def test_truncated_looks_complete(server: ModelServer, client: anthropic.AsyncAnthropic) -> None:
    """A body that ends without `message_stop` is a normal return, without a stop reason."""
    server.scenarios["m"] = Scenario([Text("Only ha")])
    message = await ask(client, "m")
    assert [block.to_dict() for block in message.content] == [{"type": "text", "text": "Only ha"}]
    assert message.stop_reason is None
    assert server.received[0].ended == "completed"


@pytest.mark.parametrize("fault", [Cut(), Reset()])
async def test_a_lost_connection_is_no_error_of_the_sdk(
    server: ModelServer, client: anthropic.AsyncAnthropic, fault: Cut | Reset
) -> None:
    """FIN or RST in mid-stream comes out as an error of the HTTP library below."""
    gate = Gate()
    server.scenarios["m"] = Scenario([Text("Hello"), gate, fault])
    async with await open_stream(client, "m") as stream:
        await read_until(stream, "content_block_delta")
        gate.open()
        with pytest.raises(httpx2.TransportError) as failure:
            await anext(stream)
    assert not isinstance(failure.value, anthropic.AnthropicError)
    request = await server.next_request()
    assert await request.finished() == ("cut" if isinstance(fault, Cut) else "reset")
    await request.closed()


@pytest.mark.parametrize("fault", [Cut(), Reset()])
async def test_a_connection_lost_before_the_headers_is_an_error_of_the_sdk(
    server: ModelServer, client: anthropic.AsyncAnthropic, fault: Cut | Reset
) -> None:
    """With no byte of an answer yet, the SDK has a type for it."""
    server.scenarios["m"] = Scenario([fault])
    with pytest.raises(anthropic.APIConnectionError):
        await open_stream(client, "m")


async def test_bad_json_is_no_error_of_the_sdk(server: ModelServer, client: anthropic.AsyncAnthropic) -> None:
    """Cut-off JSON in an event comes out as the JSON library's own error."""
    server.scenarios["m"] = Scenario([Text("Hello"), BadJson(), Stall()])
    async with await open_stream(client, "m") as stream:
        with pytest.raises(json.JSONDecodeError):
            await read_until(stream, "message_stop")


async def test_a_stall_lasts_ten_minutes(server: ModelServer, client: anthropic.AsyncAnthropic) -> None:
    """Silence is noticed by the read timeout only, as an error of the HTTP library."""
    server.scenarios["m"] = Scenario([Text("Hello"), Stall()])
    with advancing_clock() as advance:
        async with await open_stream(client, "m") as stream:
            await read_until(stream, "content_block_delta")
            event = asyncio.ensure_future(anext(stream))
            await turns()
            advance(SDK_READ_TIMEOUT_S / 2)
            await turns()
            assert not event.done()
            advance(SDK_READ_TIMEOUT_S / 2)
            with pytest.raises(httpx2.TimeoutException):
                await event


async def test_pings_hide_a_stall_for_ever(server: ModelServer, client: anthropic.AsyncAnthropic) -> None:
    """Each ping starts the read timeout anew."""
    interval_s = SDK_READ_TIMEOUT_S * 2 / 3
    server.scenarios["m"] = Scenario([PingsOnly(interval_s)])
    async with client.messages.with_streaming_response.create(
        model="m", max_tokens=100, messages=MESSAGES, stream=True
    ) as response:
        raw = anthropic.AsyncStream.raw_events(response.http_response)
        with advancing_clock() as advance:
            assert (await anext(raw)).event == "message_start"
            for _ in range(4):
                assert (await anext(raw)).event == "ping"
                advance(interval_s)


async def test_the_sdk_waits_for_the_end_after_the_stop(server: ModelServer, client: anthropic.AsyncAnthropic) -> None:
    """After `message_stop` the SDK's iterator goes on waiting while the connection is open."""
    server.scenarios["m"] = Scenario([Text("Hello"), KeepOpenAfterStop()])
    async with await open_stream(client, "m") as stream:
        await read_until(stream, "message_stop")
        event = asyncio.ensure_future(anext(stream))
        await turns()
        assert not event.done()
        event.cancel()
        await asyncio.wait([event])
    request = await server.next_request()
    await request.closed()
    assert request.ended == "peer_closed"
    assert request.stopped_at is not None


async def test_an_error_event_is_an_error_of_the_sdk(server: ModelServer, client: anthropic.AsyncAnthropic) -> None:
    """The provider's own error in mid-stream has its type and message."""
    server.scenarios["m"] = Scenario([Text("Hello"), ErrorEvent("overloaded_error", "Busy"), Stall()])
    async with await open_stream(client, "m") as stream:
        with pytest.raises(anthropic.APIStatusError) as failure:
            await read_until(stream, "message_stop")
    assert failure.value.body == {"type": "error", "error": {"type": "overloaded_error", "message": "Busy"}}


async def test_a_refusal_has_its_details(server: ModelServer, client: anthropic.AsyncAnthropic) -> None:
    """Stop reason and category arrive."""
    server.scenarios["m"] = Scenario([Text("I"), Refusal("bio", "No.")])
    message = await ask(client, "m")
    assert message.stop_reason == "refusal"
    assert message.stop_details is not None
    assert (message.stop_details.category, message.stop_details.explanation) == ("bio", "No.")


async def test_raw_bytes_pass_as_they_are(server: ModelServer, client: anthropic.AsyncAnthropic) -> None:
    """A comment and an event the provider does not have yet do not disturb the SDK."""
    unknown = b': comment\n\nevent: news\ndata: {"type":"news"}\n\n'
    server.scenarios["m"] = Scenario([Text("Hello"), Raw(unknown), Text(" there"), Stop()])
    message = await ask(client, "m")
    assert [block.to_dict() for block in message.content] == [{"type": "text", "text": "Hello there"}]


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (429, anthropic.RateLimitError),
        (500, anthropic.InternalServerError),
        (529, anthropic.APIStatusError),
        (401, anthropic.AuthenticationError),
    ],
)
async def test_an_error_status_has_its_type(
    server: ModelServer,
    client: anthropic.AsyncAnthropic,
    status: int,
    error: type[anthropic.APIStatusError],
) -> None:
    """Status, headers and the provider's error object arrive."""
    server.scenarios["m"] = Scenario([HttpError(status, {"retry-after": "7"})])
    with pytest.raises(error) as failure:
        await ask(client, "m")
    assert failure.value.status_code == status
    assert failure.value.response.headers["retry-after"] == "7"
    assert isinstance(failure.value.body, dict)
    assert failure.value.body["type"] == "error"


async def test_an_error_body_may_be_anything(server: ModelServer, client: anthropic.AsyncAnthropic) -> None:
    """A gateway's page instead of the provider's JSON is sent as it is."""
    page = HttpError(502, {"content-type": "text/html"}, b"<h1>Bad gateway</h1>")
    server.scenarios["m"] = Scenario([page])
    with pytest.raises(anthropic.InternalServerError) as failure:
        await ask(client, "m")
    assert failure.value.response.text == "<h1>Bad gateway</h1>"


async def test_errors_may_pass_on_a_later_attempt(server: ModelServer) -> None:
    """The SDK retries twice before the first byte; each status is answered as often as it says."""
    failing: list[Step] = [HttpError(429, AT_ONCE, times=1), HttpError(529, AT_ONCE, times=1)]
    server.scenarios["m"] = Scenario([*failing, Text("Hello"), Stop()])
    async with open_client(server.url, max_retries=2) as client:
        message = await ask(client, "m")
        assert message.stop_reason == "end_turn"
    assert [request.tokens_sent for request in server.received] == [0, 0, 1]


async def test_errors_that_last_longer_than_the_retries(server: ModelServer) -> None:
    """After its two retries the SDK gives up."""
    server.scenarios["m"] = Scenario([HttpError(529, AT_ONCE)])
    async with open_client(server.url, max_retries=2) as client:
        with pytest.raises(anthropic.APIStatusError):
            await ask(client, "m")
    assert len(server.received) == 3


async def test_a_scenario_registered_anew_counts_anew(server: ModelServer, client: anthropic.AsyncAnthropic) -> None:
    """Attempts are counted by scenario, not by name."""
    for _ in range(2):
        server.scenarios["m"] = Scenario([HttpError(500, times=1), Text("a"), Stop()])
        with pytest.raises(anthropic.InternalServerError):
            await ask(client, "m")
        assert (await ask(client, "m")).stop_reason == "end_turn"


async def test_a_rate_spreads_the_tokens(server: ModelServer, client: anthropic.AsyncAnthropic) -> None:
    """At one token in five minutes, each comes so long after the one before."""
    server.scenarios["m"] = answer("abc", tokens=3, rate_per_s=1 / 300)
    with advancing_clock() as advance:
        asked = asyncio.ensure_future(ask(client, "m"))
        request = await server.next_request()
        for tokens in 1, 2, 3:
            await request.sent(tokens)
            await turns()
            assert request.tokens_sent == tokens
            advance(300.0)
        assert (await asked).usage.output_tokens == 3


@pytest.mark.parametrize("name", faults())
async def test_every_fault_by_name_plays(server: ModelServer, name: str) -> None:
    """Each named fault reaches its request, and none is mistaken for the default."""
    server.scenarios.update(faults())
    async with open_client(server.url) as client:
        asked = asyncio.ensure_future(ask(client, name))
        request = await server.next_request()
        await turns()
        asked.cancel()
        await asyncio.wait([asked])
        asked.cancelled() or asked.exception()
    await request.closed()
    assert request.body["model"] == name


@pytest.mark.parametrize("tokens", [None, 1, 3, 11])
def test_split_loses_nothing(tokens: int | None) -> None:
    """The pieces make the text, and are as many as asked for."""
    pieces = split(" two  words", tokens=tokens)
    assert "".join(pieces) == " two  words"
    assert all(pieces)
    assert len(pieces) == (3 if tokens is None else tokens)


def test_split_refuses_more_tokens_than_characters() -> None:
    """Empty deltas are not made up."""
    with pytest.raises(ValueError, match="3 characters into 4 tokens"):
        split("abc", tokens=4)
