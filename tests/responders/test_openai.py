"""What the OpenAI responder sends, what comes back of it from OpenAI and from compatible servers, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, cast
from unittest import mock

import httpx2
import pytest
from msgspec import structs

from realtime.conversation import Message, ToolCall, ToolResult
from realtime.errors import InvalidRequest, UpstreamError
from realtime.responders import openai as module
from realtime.responders import reading
from realtime.responders.base import Finish, Reasoning, Request, ResponderEvent, Text, TokenCount, Tool, ToolInput
from realtime.responders.openai_wire import CompletionReader
from tests.responders import answer_of, asked, first_retry_after, openai_at, session_with
from tests.responders.test_anthropic import TEXTS, done_of, texts, turn, until_text
from tests.support.completions import DONE, data
from tests.support.model_server import ModelServer
from tests.support.scenarios import (
    BadJson,
    Cut,
    ErrorEvent,
    Gate,
    HttpError,
    Ping,
    Raw,
    Reset,
    Scenario,
    Stall,
    Start,
    Step,
    Stop,
    Thinking,
    ToolUse,
    Usage,
    answer,
    tool_calls,
)
from tests.support.scenarios import Text as Says
from tests.support.tcp_proxy import TcpProxy

WEATHER = Tool("weather", "The weather of a city.", {"type": "object", "properties": {"city": {"type": "string"}}})
TIME = Tool("time", "The time.", {"type": "object"})
CALL = ToolUse("weather", {"city": "Zürich 🌧"}, id="call_a", pieces=5)
CALLED = ToolCall("call_a", "weather", {"city": "Zürich 🌧"})

FINISH_REASONS = {
    "stop": ("completed", "end_turn"),
    "length": ("incomplete", "max_tokens"),
    "content_filter": ("incomplete", "refusal"),
    "tool_calls": ("incomplete", "tool_use"),
    "eos": ("completed", "eos"),
}
"""What the server says of the end, and what becomes of it; the last is one that nobody knows."""

IN_MID_STREAM: dict[str, tuple[list[Step], str]] = {
    "clean end": ([], "upstream_truncated"),
    "[DONE] without a finish reason": ([Raw(DONE)], "upstream_truncated"),
    "lost by FIN": ([Cut()], "upstream_disconnected"),
    "lost by RST": ([Reset()], "upstream_disconnected"),
    "bad JSON": ([BadJson()], "upstream_invalid"),
    "JSON of another shape": ([Raw(data(["choices"]))], "upstream_invalid"),
    "text that is a number": ([Raw(data({"choices": [{"index": 0, "delta": {"content": 1}}]}))], "upstream_invalid"),
    "bad UTF-8": ([Raw(b'data: {"choices":[{"index":0,"delta":{"content":"\xff"}}]}\n\n')], "upstream_invalid"),
    "an error": ([ErrorEvent("server_error", "secret")], "upstream_failed"),
    "an error by its code": ([Raw(data({"error": {"code": "rate_limit_exceeded"}}))], "upstream_rate_limited"),
    "an error by its number": ([Raw(data({"error": {"code": 502, "message": "secret"}}))], "upstream_failed"),
    "an error in words": ([Raw(data({"error": "secret"}))], "upstream_failed"),
}

BY_STATUS = {
    400: "upstream_rejected",
    401: "upstream_unauthorized",
    404: "upstream_not_found",
    413: "upstream_too_large",
    429: "upstream_rate_limited",
    500: "upstream_failed",
    503: "upstream_overloaded",
}


@pytest.fixture
async def models() -> AsyncIterator[ModelServer]:
    """The stand-in; an answer of its default scenario is two deltas."""
    async with ModelServer(default=answer("all well")) as server:
        yield server


def with_tools(*messages: Message) -> Request:
    """A request that offers two tools."""
    return structs.replace(asked("any", *messages), tools=(WEATHER, TIME))


async def answered(models: ModelServer, request: Request, **options: Any) -> list[ResponderEvent]:
    """The responder's answer."""
    async with openai_at(models, **options) as responder:
        return await answer_of(responder, request)


async def code_of(models: ModelServer, request: Request, **options: Any) -> str:
    """The code of the error that the answer ends in."""
    with pytest.raises(UpstreamError) as raised:
        await answered(models, request, **options)
    assert "secret" not in raised.value.message
    return raised.value.code


def chunk(finish_reason: str | None = None, *, usage: Any = None, **delta: Any) -> Raw:
    """A chunk, as it is, of the only choice."""
    choices = [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
    return Raw(data({"choices": choices, "usage": usage}))


# --- what is sent --------------------------------------------------------------------------------------------------


async def test_request_has_the_model_the_limit_and_the_key(models: ModelServer) -> None:
    """Nothing is sent that was not asked for, but that the count is to come."""
    async with session_with(openai_at(models, api_key="sk-test")) as client:
        await client.answer("Hi", model="small", max_output_tokens=77)
    sent = models.received[0]
    assert sent.body == {
        "model": "small",
        "max_tokens": 77,
        "messages": [turn("user", "Hi")],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert sent.headers["authorization"] == "Bearer sk-test"


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("api.openai.com", "max_completion_tokens"),
        ("eu.api.openai.com", "max_completion_tokens"),
        ("mine.openai.azure.com", "max_completion_tokens"),
        ("notopenai.com", "max_tokens"),
        ("127.0.0.1", "max_tokens"),
    ],
)
def test_limit_has_the_name_that_the_server_knows(host: str, name: str) -> None:
    """OpenAI's newer models refuse its old name, other servers may pass over its new one."""
    client = mock.Mock(base_url=httpx2.URL(f"https://{host}/v1/"))
    assert module._limit(client, 7) == {name: 7}


async def test_system_message_comes_first_and_has_the_greeting(models: ModelServer) -> None:
    """Models' templates want one system message, and then the user."""
    said = [("assistant", "Welcome!"), ("system", "It is night."), ("user", "Hi"), ("user", " ")]
    request = asked("any", *(Message(cast(Any, role), text) for role, text in said), instructions="Be brief.")
    await answered(models, request)
    system = "Be brief.\n\nIt is night.\n\nYou began this conversation by saying:\nWelcome!"
    assert models.received[0].body["messages"] == [turn("system", system), turn("user", "Hi")]


async def test_nothing_to_respond_to_is_said_without_a_call(models: ModelServer) -> None:
    """Without a word of the user there is no model call."""
    with pytest.raises(InvalidRequest, match="nothing to respond to"):
        await answered(models, asked("any", Message("user", " ")))
    assert models.received == []


async def test_tools_calls_and_results_are_sent_in_the_api_s_form(models: ModelServer) -> None:
    """A result is a message of its own, and one that is an error says so."""
    results = (ToolResult("call_a", "rain"), ToolResult("call_b", "no clock", is_error=True))
    conversation = (
        Message("user", "Well?"),
        Message("assistant", "Let me see.", (CALLED, ToolCall("call_b", "time", {}))),
        Message("user", "", tool_results=results),
    )
    await answered(models, with_tools(*conversation))
    body = models.received[0].body
    assert body["tools"][1] == {
        "type": "function",
        "function": {"name": "time", "description": "The time.", "parameters": {"type": "object"}},
    }
    calls = [
        {"id": "call_a", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Zürich 🌧"}'}},
        {"id": "call_b", "type": "function", "function": {"name": "time", "arguments": "{}"}},
    ]
    assert body["messages"] == [
        turn("user", "Well?"),
        {"role": "assistant", "content": "Let me see.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_a", "content": "rain"},
        {"role": "tool", "tool_call_id": "call_b", "content": "Error: no clock"},
    ]


async def test_one_connection_serves_one_answer_after_the_other(models: ModelServer) -> None:
    """The client is shared, and reads each answer to its end, so that its connection can be used again."""
    async with TcpProxy("127.0.0.1", int(models.url.rpartition(":")[2])) as proxy:
        async with openai_at(models, base_url=f"http://127.0.0.1:{proxy.port}/v1") as responder:
            for _ in range(5):
                await answer_of(responder, asked("any"))
        assert len(proxy.connections) == 1
    assert len(models.received) == 5


# --- what comes back -----------------------------------------------------------------------------------------------


async def test_text_comes_as_the_model_said_it(models: ModelServer) -> None:
    """Character for character, also where the network splits characters."""
    async with openai_at(models) as responder:
        for name, text in TEXTS.items():
            models.scenarios["letters"] = Scenario([*(Says(character) for character in text), Ping(), Stop()])
            models.scenarios["split"] = Scenario([Says(text), Stop()], bytes_per_write=3)
            for model in ("letters", "split"):
                events = await answer_of(responder, asked(model))
                assert (name, "".join(texts(events))) == (name, text)
                assert isinstance(events[-1], Finish)


ODDITIES: dict[str, dict[str, Any]] = {
    "counts that are null": {"usage": {"prompt_tokens": None, "completion_tokens": None}},
    "counts that are no integers": {"usage": {"prompt_tokens": 5.5, "completion_tokens": 6.5}},
    "a count that is none": {"usage": "many"},
    "reasoning that is an object": {"choices": [{"delta": {"content": "", "reasoning": {"effort": "low"}}}]},
    "reasoning content that is a list": {"choices": [{"delta": {"reasoning_content": [{"text": "Hm"}]}}]},
    "content in parts": {
        "choices": [
            {"delta": {"content": [{"type": "text", "text": "o"}, {"type": "odd"}, {"type": "text", "text": "d"}]}}
        ]
    },
}
"""What some servers send in the middle of an answer, and what does no harm."""


@pytest.mark.parametrize("oddity", ODDITIES)
async def test_an_oddity_does_not_fail_the_answer(models: ModelServer, oddity: str) -> None:
    """A count that can't be read is none, reasoning neither, and the text of content in parts is all of theirs."""
    models.default = Scenario([Says("Half"), Raw(data(ODDITIES[oddity])), Says(" and half"), Stop()])
    events = await answered(models, asked("any"))
    said = "Halfod and half" if "parts" in oddity else "Half and half"
    assert "".join(texts(events)) == said
    assert not [event for event in events if isinstance(event, Reasoning)]
    assert isinstance(events[-1], Finish)


def test_an_answer_whose_count_cant_be_read_is_not_counted() -> None:
    """In the chunk that ends it, or after."""
    odd = {"prompt_tokens": None, "completion_tokens": 5}
    end = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
    for chunks in ([{**end, "usage": odd}], [end, {"choices": [], "usage": odd}]):
        reader = CompletionReader()
        assert [event for chunk in chunks for event in reader.feed(data(chunk))] == []
        assert list(reader.end()) == [Finish("end_turn", None)]


async def test_reasoning_is_no_part_of_the_answer(models: ModelServer) -> None:
    """Servers of open models send it as `reasoning_content`, or as `reasoning`."""
    models.default = Scenario([Thinking("Hm, "), chunk(reasoning="世界"), Says("Yes"), Says("."), Stop()])
    events = await answered(models, asked("any"))
    assert "".join(event.text for event in events if isinstance(event, Reasoning)) == "Hm, 世界"
    assert "".join(texts(events)) == "Yes."


async def test_usage_has_what_the_cache_held(models: ModelServer) -> None:
    """The provider counts that as input, and here it stands beside it: the total is the same."""
    models.default = Scenario([Says("Yes."), Stop()], usage=Usage(cache_read_input_tokens=3000, output_tokens=40))
    async with session_with(openai_at(models)) as client:
        done = await done_of(client, "any")
    usage = done["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (10, 40, 3050)
    assert (usage["cache_read_input_tokens"], usage["estimated"]) == (3000, False)


async def test_finish_reason_says_whether_the_answer_is_complete(models: ModelServer) -> None:
    """It is told in this server's words."""
    async with session_with(openai_at(models)) as client:
        for reason, end in FINISH_REASONS.items():
            models.default = Scenario([Says("Well"), chunk(reason), Raw(DONE)])
            done = await done_of(client, "any")
            assert (done["status"], done["stop_reason"]) == end
            assert "error" not in done


async def test_refusal_in_words_is_told_and_incomplete(models: ModelServer) -> None:
    """Its finish reason is that of any answer."""
    models.default = Scenario([chunk(refusal="Not "), chunk(refusal="this."), Stop()])
    events = await answered(models, asked("any"))
    assert "".join(texts(events)) == "Not this."
    assert isinstance(events[-1], Finish)
    assert events[-1].stop_reason == "refusal"


async def test_stopped_answer_s_usage_is_estimated(models: ModelServer) -> None:
    """No count comes before the end: both sides are estimated, reasoning included, and the call is closed."""
    models.default = Scenario([Thinking("x" * 39), Says("é" * 20), Stall()])
    async with session_with(openai_at(models)) as client:
        response_id = await client.respond(model="slow")
        await until_text(client, response_id, "é" * 20)
        await client.send("response.cancel", response_id=response_id)
        done = await client.until("response.done", response_id=response_id)
        assert await models.received[0].finished() == "peer_closed"
    assert (done["usage"]["output_tokens"], done["usage"]["estimated"]) == (20, True)


@pytest.mark.parametrize(
    ("steps", "count"),
    [
        ([chunk("stop"), Raw(DONE)], None),
        ([chunk("stop")], None),
        ([chunk("stop", usage={"prompt_tokens": 3, "completion_tokens": 2})], (3, 2)),
        ([chunk(usage={"prompt_tokens": 3, "completion_tokens": 1}), chunk("stop"), Raw(DONE)], (3, 1)),
        ([chunk("stop"), Raw(data({"choices": None, "usage": {"prompt_tokens": 3, "completion_tokens": 2}}))], (3, 2)),
        ([chunk("stop"), Reset()], None),
        ([chunk("stop"), BadJson(), ErrorEvent(), Says("NO"), Raw(DONE)], None),
    ],
    ids=["no count", "no [DONE]", "count with the end", "running count", "null choices", "lost after it", "garbage"],
)
async def test_answer_is_whole_with_its_finish_reason(
    models: ModelServer, steps: list[Step], count: tuple[int, int] | None
) -> None:
    """Compatible servers differ in what follows it; whatever that is, the answer is not spoiled."""
    models.default = Scenario([Says("Yes."), *steps])
    events = await answered(models, asked("any"))
    assert texts(events) == ["Yes."]
    expected = count and TokenCount(input_tokens=count[0], output_tokens=count[1])
    assert events[-1] == Finish("end_turn", expected)


async def test_end_does_not_wait_for_a_count_that_never_comes(
    models: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that says nothing more, and keeps the connection, has answered all the same."""
    monkeypatch.setattr(module, "COUNT_S", 0.05)
    models.default = Scenario([Says("Yes."), chunk("stop"), Stall()])
    assert (await answered(models, asked("any")))[-1] == Finish("end_turn")
    assert await models.received[0].finished() == "peer_closed"


async def test_what_was_not_asked_for_is_passed_over(models: ModelServer) -> None:
    """Other choices, fields that are not known, comments and events without data."""
    other = Raw(data({"choices": [{"index": 1, "delta": {"content": "NO"}, "finish_reason": "length"}]}))
    models.default = Scenario([Start(), other, chunk(new={"NO": 1}), Raw(b": NO\n\nevent: x\n\n"), Says("."), Stop()])
    assert texts(await answered(models, asked("any"))) == ["."]


# --- tool calls ----------------------------------------------------------------------------------------------------


async def test_tool_calls_are_put_together_from_their_pieces(models: ModelServer) -> None:
    """Each with its id, name and input; the pieces count, and the end says that results are waited for."""
    models.default = tool_calls(CALL, ToolUse("time", "", id="call_b"), says="Let me see.")
    events = await answered(models, with_tools())
    assert [event for event in events if isinstance(event, ToolCall)] == [CALLED, ToolCall("call_b", "time", {})]
    assert "".join(event.text for event in events if isinstance(event, ToolInput)) == '{"city":"Zürich 🌧"}'
    assert isinstance(events[-1], Finish)
    assert events[-1].stop_reason == "tool_use"


async def test_calls_of_servers_that_send_them_whole_are_understood(models: ModelServer) -> None:
    """Without an index or an id, and with an end like any other."""
    whole = [{"function": {"name": "time", "arguments": "{}"}}]
    named = [{"id": "b", "function": {"name": "weather", "arguments": '{"city":"Rom"}'}}]
    models.default = Scenario([chunk(tool_calls=whole), chunk(tool_calls=named), chunk("stop"), Raw(DONE)])
    events = await answered(models, with_tools())
    assert events[-3:-1] == [ToolCall("call_1", "time", {}), ToolCall("b", "weather", {"city": "Rom"})]
    assert events[-1] == Finish("tool_use")


async def test_tool_results_lead_to_the_next_answer(models: ModelServer) -> None:
    """The whole round: the stand-in refuses calls and results that don't go together."""
    models.default = tool_calls(CALL)
    async with openai_at(models) as responder:
        first = await answer_of(responder, with_tools(Message("user", "Rain?")))
        called = tuple(event for event in first if isinstance(event, ToolCall))
        results = Message("user", "", tool_results=(ToolResult("call_a", "yes"),))
        conversation = (Message("user", "Rain?"), Message("assistant", "", called), results)
        second = await answer_of(responder, with_tools(*conversation))
    assert "".join(texts(second)) == "weather said: yes"


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (ToolUse("weather", '{"city": "Z'), "upstream_tool_input_invalid"),
        (ToolUse("weather", "[1]"), "upstream_tool_input_invalid"),
        (ToolUse("weather", "x" * (reading.MAX_INPUT_BYTES + 1), pieces=2), "upstream_tool_input_too_large"),
    ],
    ids=["cut off", "no object", "too large"],
)
async def test_input_that_can_t_be_read_is_a_failure(models: ModelServer, call: ToolUse, code: str) -> None:
    """It is not guessed at, and its memory is bounded."""
    models.default = tool_calls(call)
    assert await code_of(models, with_tools()) == code


async def test_calls_of_an_answer_that_was_cut_off_are_not_carried_out(models: ModelServer) -> None:
    """Nor those of a model that was offered no tools."""
    models.default = Scenario([CALL, Stop("max_tokens")])
    cut = await answered(models, with_tools())
    models.default = Scenario([CALL, Stop("tool_use")])
    unasked = await answered(models, asked("any"))
    assert not any(isinstance(event, ToolCall) for event in [*cut, *unasked])


# --- faults --------------------------------------------------------------------------------------------------------


async def test_fault_in_mid_stream_is_one_typed_failure_that_keeps_what_came(models: ModelServer) -> None:
    """The response fails with the fault's own code, and was asked for once; its text stays."""
    async with session_with(openai_at(models)) as client:
        for fault, (steps, code) in IN_MID_STREAM.items():
            models.default = Scenario([Says("Half"), *steps])
            done = await done_of(client, "any")
            assert (fault, done["status"], done["error"]["code"]) == (fault, "failed", code)
            assert "secret" not in repr(done)
            assert client.transcript.texts[done["response_id"]] == "Half"
    assert len(models.received) == len(IN_MID_STREAM)


async def test_silence_ends_the_response_and_the_call(models: ModelServer) -> None:
    """Comments are no content: they don't put the end off."""
    models.default = Scenario([Says("Well"), Ping(), Stall()])
    async with session_with(openai_at(models), upstream_idle_timeout_s=0.3) as client:
        done = await done_of(client, "any")
        assert done["error"]["code"] == "upstream_stalled"
        assert await models.received[0].finished() == "peer_closed"


async def test_statuses_have_codes_of_their_own(models: ModelServer) -> None:
    """Without a retry where there is no time for one; what the body says counts for more than its status."""
    for status, code in BY_STATUS.items():
        models.default = Scenario([HttpError(status)])
        assert (status, await code_of(models, asked("any"), retry_s=0.001)) == (status, code)
    body = b'{"error": {"code": "context_length_exceeded", "message": "secret", "type": "invalid_request_error"}}'
    models.default = Scenario([HttpError(400, body=body)])
    assert await code_of(models, asked("any")) == "upstream_too_large"


async def test_failure_before_the_first_byte_is_tried_again(models: ModelServer) -> None:
    """What may pass is asked for again, and told once."""
    models.default = Scenario([HttpError(429, times=2), Says("at last"), Stop()])
    with first_retry_after(0.001):
        assert texts(await answered(models, asked("any"))) == ["at last"]
    assert len(models.received) == 3


async def test_call_that_is_left_at_any_point_is_closed(models: ModelServer) -> None:
    """At each of its yields: the provider sees the end at once, and makes no more of what nobody wants."""
    kinds = [Reasoning, Text, Text]
    async with openai_at(models) as responder:
        for number in range(len(kinds)):
            gates = [Gate() for _ in kinds]
            pieces: list[Step] = [Thinking("a"), Says("b"), Says("c")]
            steps = [step for pair in zip(gates, pieces, strict=True) for step in pair]
            models.default = Scenario([*steps, Stall()])
            events = cast(AsyncGenerator[ResponderEvent, None], responder(asked("any")))
            for gate, kind in list(zip(gates, kinds, strict=True))[: number + 1]:
                gate.open()
                assert isinstance(await anext(events), kind)
            await events.aclose()
            assert await models.received[-1].finished() == "peer_closed"


async def test_call_that_is_cancelled_before_the_first_byte_is_closed(models: ModelServer) -> None:
    """The task that calls waits for the provider, and is stopped."""
    models.default = Scenario([Stall()])
    async with openai_at(models) as responder:
        reading = asyncio.create_task(answer_of(responder, asked("any")))
        request = await models.next_request()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert await request.finished() == "peer_closed"
