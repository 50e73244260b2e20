"""Tool calls over the Anthropic responder: what the model is told of tools, how it calls them, and gets the results."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from msgspec import structs

from realtime.conversation import Message, ToolCall, ToolResult
from realtime.errors import UpstreamError
from realtime.responders import reading
from realtime.responders.base import Finish, Reasoning, Request, ResponderEvent, Text, Tool, ToolInput
from tests.responders import answer_of, anthropic_at, asked
from tests.support.model_server import ModelServer
from tests.support.scenarios import (
    Gate,
    Raw,
    Scenario,
    Stall,
    Start,
    Step,
    Stop,
    StopReason,
    Thinking,
    ToolUse,
    event,
    tool_calls,
)
from tests.support.scenarios import Text as Says

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = Tool("weather", "The weather of a city.", SCHEMA)
TIME = Tool("time", "The time.", {"type": "object"})

CALL = ToolUse("weather", {"city": "Zürich 🌧", "days": [1, 2.5, None]}, pieces=7)
CALLED = ToolCall("toolu_1", "weather", {"city": "Zürich 🌧", "days": [1, 2.5, None]})
INVALID = "upstream_tool_input_invalid"
TOO_LARGE = "upstream_tool_input_too_large"


@pytest.fixture
async def models() -> AsyncIterator[ModelServer]:
    """The stand-in."""
    async with ModelServer() as server:
        yield server


def with_tools(*messages: Message) -> Request:
    """A request that offers two tools."""
    return structs.replace(asked("any", *messages), tools=(WEATHER, TIME))


async def answer(models: ModelServer, request: Request, **options: Any) -> list[ResponderEvent]:
    """The responder's answer."""
    async with anthropic_at(models, **options) as responder:
        return await answer_of(responder, request)


async def failure(models: ModelServer, *steps: Step) -> tuple[str, str]:
    """The code and the words of the error that such an answer ends in."""
    models.default = Scenario(steps)
    with pytest.raises(UpstreamError) as raised:
        await answer(models, with_tools())
    return raised.value.code, raised.value.message


def calls(events: list[ResponderEvent]) -> tuple[ToolCall, ...]:
    """The calls, in their order."""
    return tuple(event for event in events if isinstance(event, ToolCall))


def finish(events: list[ResponderEvent]) -> Finish:
    """The end, which is the last event."""
    last = events[-1]
    assert isinstance(last, Finish)
    return last


def inputs(events: list[ResponderEvent]) -> str:
    """The pieces of the calls' inputs, joined."""
    return "".join(event.text for event in events if isinstance(event, ToolInput))


def next_request(events: list[ResponderEvent], *results: ToolResult) -> Request:
    """The request that follows an answer with calls, as a turn makes it."""
    text = "".join(event.text for event in events if isinstance(event, Text))
    said = Message("assistant", text, tool_calls=calls(events), raw=finish(events).raw)
    return with_tools(Message("user", "go"), said, Message("user", "", tool_results=results))


# --- what is sent --------------------------------------------------------------------------------------------------


async def test_tools_are_told_as_they_are(models: ModelServer) -> None:
    """Name, description and schema, in their order."""
    await answer(models, with_tools())
    assert models.received[0].body["tools"] == [
        {"name": "weather", "description": "The weather of a city.", "input_schema": SCHEMA},
        {"name": "time", "description": "The time.", "input_schema": {"type": "object"}},
    ]


async def test_calls_and_results_are_blocks(models: ModelServer) -> None:
    """Also where the responder has no words of its own to go by."""
    said = Message("assistant", "Let me look.", tool_calls=(CALLED, ToolCall("t2", "time", {})))
    results = (ToolResult("toolu_1", "rain"), ToolResult("t2", "no clock", is_error=True))
    await answer(models, with_tools(Message("user", "go"), said, Message("user", "Quick!", tool_results=results)))
    assert models.received[0].body["messages"] == [
        {"role": "user", "content": "go"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "Let me look."},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": CALLED.input},
                {"type": "tool_use", "id": "t2", "name": "time", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "rain"},
                {"type": "tool_result", "tool_use_id": "t2", "content": "no clock", "is_error": True},
                {"type": "text", "text": "Quick!"},
            ],
        },
    ]


@pytest.mark.parametrize("content", ["", " \n"])
async def test_calls_and_results_without_a_word_are_sent(models: ModelServer, content: str) -> None:
    """A block of text without a word would be refused; the messages are not left out for it."""
    said = Message("assistant", content, tool_calls=(CALLED,))
    heard = Message("user", content, tool_results=(ToolResult("toolu_1", ""),))
    await answer(models, with_tools(Message("user", "go"), said, heard))
    sent = models.received[0].body["messages"]
    assert [[block["type"] for block in message["content"]] for message in sent[1:]] == [["tool_use"], ["tool_result"]]


async def test_greeting_ends_where_a_tool_is_called(models: ModelServer) -> None:
    """What was said before is told as an instruction; a call stays in front of its result."""
    said = Message("assistant", "", tool_calls=(CALLED,))
    heard = Message("user", "", tool_results=(ToolResult("toolu_1", "rain"),))
    await answer(models, with_tools(Message("assistant", "Welcome!"), said, heard))
    sent = models.received[0].body
    assert sent["system"] == "You began this conversation by saying:\nWelcome!"
    assert [message["role"] for message in sent["messages"]] == ["assistant", "user"]


# --- what comes back -----------------------------------------------------------------------------------------------


async def test_call_comes_after_its_input(models: ModelServer) -> None:
    """The text, the input as it comes, the call, the end, with the provider's count."""
    models.default = tool_calls(CALL, says="Let me look.")
    events = await answer(models, with_tools())
    assert [type(event) for event in events[-2:]] == [ToolCall, Finish]
    assert "".join(event.text for event in events if isinstance(event, Text)) == "Let me look."
    assert calls(events) == (CALLED,)
    assert inputs(events) == "".join(CALL.deltas())
    end = finish(events)
    assert end.stop_reason == "tool_use"
    assert end.count is not None
    assert end.count.output_tokens == 3 + 8


async def test_input_is_told_while_it_comes(models: ModelServer) -> None:
    """A model that writes a long input is not silent."""
    gate = Gate()
    start = {"type": "tool_use", "id": "t1", "name": "weather", "input": {}}
    models.default = Scenario(
        [
            Start(),
            Raw(event("content_block_start", index=0, content_block=start)),
            Raw(event("content_block_delta", index=0, delta={"type": "input_json_delta", "partial_json": '{"city"'})),
            gate,
            Raw(event("content_block_delta", index=0, delta={"type": "input_json_delta", "partial_json": ": null}"})),
            Raw(event("content_block_stop", index=0)),
            Stop("tool_use"),
        ]
    )
    async with anthropic_at(models) as responder, aclosing(responder(with_tools())) as events:  # type: ignore[type-var]
        async for said in events:
            if isinstance(said, ToolInput):
                break
        assert said == ToolInput('{"city"')
        gate.open()
        rest = [said async for said in events]
    assert calls(rest) == (ToolCall("t1", "weather", {"city": None}),)


@pytest.mark.parametrize("bytes_per_write", [1, 7, None])
async def test_several_calls_in_one_answer(models: ModelServer, bytes_per_write: int | None) -> None:
    """In their order, however the stream is cut."""
    uses: list[Step] = [ToolUse(f"t{number}", {"x": "ü" * number}, id=f"id{number}") for number in range(5)]
    models.default = Scenario([*uses, Stop("tool_use")], bytes_per_write=bytes_per_write)
    events = await answer(models, with_tools())
    assert calls(events) == tuple(ToolCall(f"id{n}", f"t{n}", {"x": "ü" * n}) for n in range(5))


async def test_call_without_an_input_has_an_empty_one(models: ModelServer) -> None:
    """As the provider sends it for a tool that takes nothing."""
    models.default = tool_calls(ToolUse("time", ""))
    assert calls(await answer(models, with_tools())) == (ToolCall("toolu_1", "time", {}),)


async def test_input_that_comes_with_the_start_counts(models: ModelServer) -> None:
    """A compatible provider that does not stream it."""
    start = {"type": "tool_use", "id": "t1", "name": "time", "input": {"zone": "UTC"}}
    block = event("content_block_start", index=0, content_block=start) + event("content_block_stop", index=0)
    models.default = Scenario([Start(), Raw(block), Stop("tool_use")])
    assert calls(await answer(models, with_tools())) == (ToolCall("t1", "time", {"zone": "UTC"}),)


async def test_block_ends_once(models: ModelServer) -> None:
    """A second end makes no second call."""
    models.default = Scenario([CALL, Raw(event("content_block_stop", index=0)), Stop("tool_use")])
    events = await answer(models, with_tools())
    assert calls(events) == (CALLED,)
    assert len(finish(events).raw) == 1


async def test_tools_of_the_provider_itself_are_no_calls(models: ModelServer) -> None:
    """What it runs on its own is not for us to carry out."""
    start = {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {}}
    delta = {"type": "input_json_delta", "partial_json": '{"query": "x"}'}
    block = [
        event("content_block_start", index=0, content_block=start),
        event("content_block_delta", index=0, delta=delta),
        event("content_block_stop", index=0),
    ]
    models.default = Scenario([Start(), Raw(b"".join(block)), CALL, Stop("tool_use")])
    events = await answer(models, with_tools())
    assert calls(events) == (CALLED,)
    assert [part["type"] for part in finish(events).raw] == ["tool_use"]


async def test_nothing_is_called_that_was_not_offered(models: ModelServer) -> None:
    """Without tools a call is no event, and the end says why the model has stopped."""
    models.default = tool_calls(CALL, says="Hm.")
    events = await answer(models, asked("any"))
    assert calls(events) == ()
    assert finish(events).stop_reason == "tool_use"
    assert finish(events).raw == ()


# --- what can go wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '{"city": "SECRET',
        "SECRET",
        "[1]",
        "null",
        '"SECRET"',
        '{"x": NaN}',
        '{"x": "\\ud800"}',
        "{} {}",
        '{"x":' * 20_000,
    ],
    ids=lambda text: text[:12],
)
async def test_unreadable_input_has_an_error_of_its_own(models: ModelServer, text: str) -> None:
    """It must be the JSON of an object; the error does not repeat it."""
    code, message = await failure(models, ToolUse("weather", text), Stop("tool_use"))
    assert code == INVALID
    assert "SECRET" not in message


async def test_one_unreadable_input_spoils_the_answer(models: ModelServer) -> None:
    """The model waits for the results of all its calls."""
    code, _ = await failure(models, CALL, ToolUse("weather", "{", id="t2"), Stop("tool_use"))
    assert code == INVALID


async def test_call_without_an_end_is_unreadable(models: ModelServer) -> None:
    """Though its input may look whole."""
    start = {"type": "tool_use", "id": "t1", "name": "time", "input": {}}
    opened = Raw(event("content_block_start", index=0, content_block=start))
    code, _ = await failure(models, Start(), opened, Stop("tool_use"))
    assert code == INVALID


@pytest.mark.parametrize("reason", ["max_tokens", "model_context_window_exceeded", "refusal", "pause_turn"])
async def test_call_that_was_cut_off_is_no_error(models: ModelServer, reason: StopReason) -> None:
    """The model stopped within it, for a reason that is told; the calls before it are not to be carried out either."""
    models.default = Scenario([Says("Hm."), CALL, ToolUse("weather", '{"city": "Z', id="t2"), Stop(reason)])
    events = await answer(models, with_tools())
    assert finish(events).stop_reason == reason
    assert finish(events).raw == ()


@pytest.mark.parametrize("split", [1, 2])
async def test_inputs_beyond_the_limit_end_the_answer(models: ModelServer, split: int) -> None:
    """Of one call, or of all together; the model is not listened to any further."""
    size = reading.MAX_INPUT_BYTES // split
    uses = [ToolUse("weather", {"x": "ü" * (size // 2)}, id=f"t{number}", pieces=50) for number in range(split)]
    code, _ = await failure(models, *uses, Stall())
    assert code == TOO_LARGE
    assert await models.received[0].finished() == "peer_closed"


async def test_input_of_just_the_limit_is_taken(models: ModelServer) -> None:
    """Counted in UTF-8 bytes of its JSON."""
    text = "x" * (reading.MAX_INPUT_BYTES - len('{"x":""}'))
    models.default = tool_calls(ToolUse("weather", {"x": text}, pieces=50))
    assert calls(await answer(models, with_tools())) == (ToolCall("toolu_1", "weather", {"x": text}),)


async def test_stream_that_breaks_off_after_a_call_is_truncated(models: ModelServer) -> None:
    """A call counts only once the answer has its end."""
    code, _ = await failure(models, Says("Hm."), CALL)
    assert code == "upstream_truncated"


# --- the round trip ------------------------------------------------------------------------------------------------


async def test_result_comes_back_to_the_model(models: ModelServer) -> None:
    """It has called, is told what came of it, and answers with that."""
    models.default = tool_calls(CALL, says="Let me look.")
    called = await answer(models, with_tools())
    told = await answer(models, next_request(called, ToolResult("toolu_1", "rain")))
    assert [event for event in told if isinstance(event, Text)] == [Text("weather said: rain")]
    assert finish(told).stop_reason == "end_turn"
    first, second = (request.body for request in models.received)
    assert second["tools"] == first["tools"]
    assert second["messages"] == [
        {"role": "user", "content": "go"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "Let me look."},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": CALLED.input},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "rain"}]},
    ]


async def test_results_of_several_calls_come_back_together(models: ModelServer) -> None:
    """Those that failed say so."""
    models.default = tool_calls(ToolUse("weather", {}, id="t1"), ToolUse("time", {}, id="t2"))
    called = await answer(models, with_tools())
    results = [ToolResult("t1", "rain"), ToolResult("t2", "no clock", is_error=True)]
    told = await answer(models, next_request(called, *results))
    assert Text("weather said: rain time failed: no clock") in told


async def test_thoughts_come_back_with_the_call(models: ModelServer) -> None:
    """The provider wants them as they were, signed and in their places; a block without a word it would refuse."""
    redacted = {"type": "redacted_thinking", "data": "c2VjcmV0"}
    hidden = event("content_block_start", index=0, content_block=redacted) + event("content_block_stop", index=0)
    steps: list[Step] = [Start(), Raw(hidden), Thinking("Let me "), Thinking("see. ", "c2lnMQ=="), Says("So, ")]
    steps += [Says("now."), Thinking("Hm.", "c2lnMg=="), Says("\n\n"), CALL, Stop("tool_use")]
    then = tool_calls(CALL).then
    models.default = Scenario(steps, then=then)
    async with anthropic_at(models, thinking=True) as responder:
        called = await answer_of(responder, with_tools())
        await answer_of(responder, next_request(called, ToolResult("toolu_1", "rain")))
    assert "".join(event.text for event in called if isinstance(event, Reasoning)) == "Let me see. Hm."
    assert models.received[1].body["messages"][1]["content"] == [
        redacted,
        {"type": "thinking", "thinking": "Let me see. ", "signature": "c2lnMQ=="},
        {"type": "text", "text": "So, now."},
        {"type": "thinking", "thinking": "Hm.", "signature": "c2lnMg=="},
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": CALLED.input},
    ]


async def test_thought_that_is_not_shown_comes_back_too(models: ModelServer) -> None:
    """It has a signature and no words."""
    steps: list[Step] = [Thinking("", "c2ln"), CALL, Stop("tool_use")]
    models.default = Scenario(steps)
    called = await answer(models, with_tools(), thinking=True)
    assert finish(called).raw[0] == {"type": "thinking", "thinking": "", "signature": "c2ln"}


def test_tools_count_as_input() -> None:
    """By all that the model is sent of them."""
    assert Tool("abcd", "efgh", {"type": "object"}).estimated_tokens() == 7  # 4 + 4 + 17 bytes
