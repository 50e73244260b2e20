"""The stand-in calls tools as the provider does, and quotes what it is told of them: the SDK is the measure."""

import json
from typing import Any

import anthropic
import pytest
from anthropic.types import Message, MessageParam, ToolResultBlockParam, ToolUseBlock

from tests.support.model_server import ModelServer
from tests.support.scenarios import Scenario, Step, Stop, Text, Thinking, ToolUse, tool_calls
from tests.support.sdk import MESSAGES, open_stream
from tests.support.tool_rounds import ToolMismatchError, quoted_results, tool_rounds

WEATHER = ToolUse("weather", {"city": "Zürich", "days": [1, 2]}, pieces=5)


async def ask(client: anthropic.AsyncAnthropic, *messages: MessageParam) -> Message:
    """The whole answer to a conversation, as the SDK puts it together."""
    async with client.messages.stream(model="m", max_tokens=100, messages=[*MESSAGES, *messages]) as stream:
        return await stream.get_final_message()


def given(message: Message) -> MessageParam:
    """An answer, as a part of the conversation."""
    return {"role": "assistant", "content": message.content}


def results(**contents: str) -> MessageParam:
    """The results of calls, by their ids."""
    found: list[ToolResultBlockParam] = [
        {"type": "tool_result", "tool_use_id": call_id, "content": content} for call_id, content in contents.items()
    ]
    return {"role": "user", "content": found}


def uses(message: Message) -> list[tuple[str, str, Any]]:
    """The calls of an answer."""
    return [(block.id, block.name, block.input) for block in message.content if isinstance(block, ToolUseBlock)]


async def test_call_arrives_whole(server: ModelServer, client: anthropic.AsyncAnthropic) -> None:
    """After the text, with its input put together, and the stop reason that says so."""
    server.scenarios["m"] = tool_calls(WEATHER, says="Let me look.")
    message = await ask(client)
    assert [block.type for block in message.content] == ["text", "tool_use"]
    assert uses(message) == [("toolu_1", "weather", {"city": "Zürich", "days": [1, 2]})]
    assert message.stop_reason == "tool_use"
    assert message.usage.output_tokens == server.received[0].tokens_sent == 3 + 1 + 5


async def test_input_comes_in_pieces(server: ModelServer, client: anthropic.AsyncAnthropic) -> None:
    """Between the start and the end of a block of its own, the first of them empty."""
    server.scenarios["m"] = Scenario([Thinking("Hm."), WEATHER, Text("So."), Stop()])
    async with await open_stream(client, "m") as stream:
        events = [event async for event in stream]
    types = [event.type for event in events if getattr(event, "index", None) == 1]
    assert types == ["content_block_start", *["content_block_delta"] * 6, "content_block_stop"]
    deltas = [event.delta for event in events if event.type == "content_block_delta" and event.index == 1]
    pieces = [delta.partial_json for delta in deltas if delta.type == "input_json_delta"]
    assert pieces[0] == ""
    assert json.loads("".join(pieces)) == WEATHER.input
    assert len(pieces) == 6


async def test_results_are_quoted(server: ModelServer, client: anthropic.AsyncAnthropic) -> None:
    """Those of several calls at once; the request that had them is kept."""
    server.scenarios["m"] = tool_calls(ToolUse("a", {}, id="t1"), ToolUse("b", {"x": None}, id="t2"))
    called = await ask(client)
    assert uses(called) == [("t1", "a", {}), ("t2", "b", {"x": None})]
    told = await ask(client, given(called), results(t2="two", t1="one"))
    assert [block.to_dict() for block in told.content] == [{"type": "text", "text": "b said: two a said: one"}]
    assert told.stop_reason == "end_turn"
    assert server.received[1].body["messages"][2] == results(t2="two", t1="one")


async def test_one_round_follows_the_other(server: ModelServer, client: anthropic.AsyncAnthropic) -> None:
    """Each is answered by what comes then; a request that begins anew begins anew."""
    server.scenarios["m"] = tool_calls(WEATHER, then=tool_calls(ToolUse("b", {}, id="t2")))
    first = await ask(client)
    rounds = [given(first), results(toolu_1="rain")]
    second = await ask(client, *rounds)
    rounds += [given(second), results(t2="two")]
    third = await ask(client, *rounds)
    assert [len(uses(message)) for message in (first, second, third)] == [1, 1, 0]
    assert [block.to_dict() for block in third.content] == [{"type": "text", "text": "b said: two"}]
    assert uses(await ask(client)) == uses(first)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [results(other="x")],
        [results()],
        [results(toolu_1="x", other="x")],
        [{"role": "user", "content": "x"}, results(toolu_1="x")],
    ],
)
async def test_call_without_its_result_is_refused(
    server: ModelServer, client: anthropic.AsyncAnthropic, messages: list[MessageParam]
) -> None:
    """As the provider does it."""
    server.scenarios["m"] = tool_calls(WEATHER)
    called = given(await ask(client))
    with pytest.raises(anthropic.BadRequestError):
        await ask(client, called, *messages)


async def test_result_without_its_call_is_refused(server: ModelServer, client: anthropic.AsyncAnthropic) -> None:
    """It must stand right behind it."""
    with pytest.raises(anthropic.BadRequestError):
        await ask(client, results(toolu_1="x"))
    assert server.received == []


@pytest.mark.parametrize("text", ["", "{", '{"city": "Zü'])
async def test_broken_input_is_sent_as_it_is(server: ModelServer, client: anthropic.AsyncAnthropic, text: str) -> None:
    """Whatever somebody makes of it."""
    steps: list[Step] = [ToolUse("weather", text), Stop("tool_use")]
    server.scenarios["m"] = Scenario(steps)
    async with await open_stream(client, "m") as stream:
        deltas = [event.delta async for event in stream if event.type == "content_block_delta"]
    assert "".join(delta.partial_json for delta in deltas if delta.type == "input_json_delta") == text


def test_failed_results_are_told_apart() -> None:
    """By the word between the tool and its result."""
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "a", "input": {}}]}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "no", "is_error": True}
    messages = [call, {"role": "user", "content": [result]}]
    assert tool_rounds(messages) == 1
    assert quoted_results(messages) == "a failed: no"


def test_call_at_the_end_is_a_mismatch() -> None:
    """Nobody has answered it."""
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "a", "input": {}}]}
    with pytest.raises(ToolMismatchError):
        tool_rounds([call])
