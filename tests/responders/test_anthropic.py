"""What the Anthropic responder sends to the model, what comes back, and that nothing of a call is left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from realtime.conversation import Message
from realtime.errors import InvalidRequest
from realtime.responders.anthropic import AnthropicResponder
from realtime.responders.base import Finish, Reasoning, ResponderEvent, Text, TokenCount
from tests.responders import answer_of, anthropic_at, asked, session_with
from tests.support.client import Client, Event, attached
from tests.support.model_server import ModelServer
from tests.support.scenarios import (
    Gate,
    Ping,
    Raw,
    Refusal,
    Scenario,
    Stall,
    Start,
    Step,
    Stop,
    StopReason,
    Thinking,
    Usage,
    answer,
    event,
)
from tests.support.scenarios import Text as Says
from tests.support.sdk import turns
from tests.support.server import running_server
from tests.support.tcp_proxy import TcpProxy

ROOT = Path(__file__).resolve().parents[2]

TEXTS = {
    "emoji": "family: 👩‍👩‍👧‍👦, flag: 🇪🇺, skin: 👍🏽, keycap: 1️⃣",
    "combining marks": "e\u0301 a\u0308\u0323 Z\u0351\u036b\u0343 and ö as one, o\u0308 as two",
    "right to left": "\u202b\u05e9\u05dc\u05d5\u05dd! \u0645\u0631\u062d\u0628\u0627\u202c \u200f(1)",
    "line ends": "a\r\nb\rc\nd\n\n\r\n\r\re",
    "separators": "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei",
    "NUL": "before\x00after\x01\x7f",
    "server-sent events": "data: x\n\nevent: message_stop\ndata: [DONE]\n\n: comment\nid: 1",
    "markup": '<script>alert("&amp;")</script> \\u0041 \\n "quoted" {"json": [1]}',
    "noncharacters": "\ufeff\ufffe\uffff\U0010ffff\ufffd",
    "spaces": "  leading, trailing \t ",
}

HEARD = [
    ("Once upon a time", 9, "Once upon"),
    ("Once upon a time", 1000, "Once upon a time"),
    ("ab😀cd", 3, "ab"),
    ("ab😀cd", 4, "ab😀"),
    ("Once", 0, ""),
]
"""What the model said, how much of it was heard, and what of that stays."""

STOP_REASONS: dict[StopReason, str] = {
    "end_turn": "completed",
    "stop_sequence": "completed",
    "max_tokens": "incomplete",
    "refusal": "incomplete",
    "pause_turn": "incomplete",
    "model_context_window_exceeded": "incomplete",
}


@pytest.fixture
async def models() -> AsyncIterator[ModelServer]:
    """The stand-in; an answer of its default scenario is two deltas."""
    async with ModelServer(default=answer("all well")) as server:
        yield server


def turn(role: str, content: str) -> dict[str, str]:
    """A message as the provider is sent it."""
    return {"role": role, "content": content}


async def item(client: Client, role: str, content: str) -> None:
    """Add an item to the conversation."""
    await client.send("conversation.item.create", item={"role": role, "content": content})
    await client.until("conversation.item.created")


async def done_of(client: Client, model: str) -> Event:
    """The end of a response of that model."""
    response_id = await client.respond(model=model)
    return await client.until("response.done", response_id=response_id)


async def until_text(client: Client, response_id: str, text: str) -> None:
    """Receive until the answer has come so far."""
    while client.transcript.texts[response_id] != text:
        await client.receive()


def texts(events: list[ResponderEvent]) -> list[str]:
    """The pieces of the answer."""
    return [event.text for event in events if isinstance(event, Text)]


# --- what is sent --------------------------------------------------------------------------------------------------


async def test_request_has_the_model_the_limit_and_the_key(models: ModelServer) -> None:
    """Nothing is sent that was not asked for: no system, no thinking."""
    async with session_with(anthropic_at(models, api_key="sk-test")) as client:
        await client.answer("Hi", model="claude-x", max_output_tokens=77)
    sent = models.received[0]
    assert sent.body == {
        "model": "claude-x",
        "max_tokens": 77,
        "messages": [turn("user", "Hi")],
        "stream": True,
    }
    assert sent.headers["authorization"] == "Bearer sk-test"


async def test_thinking_is_asked_for_only_where_it_is_wanted(models: ModelServer) -> None:
    """With `thinking` the model decides how much, and its reasoning is summarised for the reader."""
    async with anthropic_at(models, thinking=True) as responder:
        await answer_of(responder, asked("claude-x"))
    assert models.received[0].body["thinking"] == {"type": "adaptive", "display": "summarized"}


async def test_system_is_the_instructions_and_then_the_system_items(models: ModelServer) -> None:
    """They are paragraphs, in their order; none of them is among the messages."""
    async with session_with(anthropic_at(models)) as client:
        await client.send("session.update", session={"instructions": "Be brief."})
        await item(client, "system", "The user is a pilot.")
        await client.answer("Hi")
        await item(client, "system", "It is night now.")
        await client.answer("And now?", instructions="Be long.")
    first, second = (request.body for request in models.received)
    assert first["system"] == "Be brief.\n\nThe user is a pilot."
    assert first["messages"] == [turn("user", "Hi")]
    assert second["system"] == "Be long.\n\nThe user is a pilot.\n\nIt is night now."
    assert second["messages"] == [turn("user", "Hi"), turn("assistant", "all well"), turn("user", "And now?")]


async def test_conversation_grows_turn_by_turn(models: ModelServer) -> None:
    """Each call has everything that was said before it, reasoning left out."""
    models.default = Scenario([Thinking("Hm. "), Says("Yes"), Says("."), Stop()])
    async with session_with(anthropic_at(models)) as client:
        for question in ("One?", "Two?", "Three?"):
            await client.answer(question)
    assert models.received[2].body["messages"] == [
        turn("user", "One?"),
        turn("assistant", "Yes."),
        turn("user", "Two?"),
        turn("assistant", "Yes."),
        turn("user", "Three?"),
    ]


async def test_interrupted_answer_stays_as_far_as_it_came(models: ModelServer) -> None:
    """A cancelled answer is part of what the model is sent next; its call is closed."""
    models.scenarios["slow"] = Scenario([Says("Once upon"), Says(" a time"), Stall()])
    async with session_with(anthropic_at(models)) as client:
        response_id = await client.respond("Tell me.", model="slow")
        await until_text(client, response_id, "Once upon a time")
        await client.send("response.cancel", response_id=response_id)
        done = await client.until("response.done", response_id=response_id)
        assert done["status"] == "cancelled"
        assert await models.received[0].finished() == "peer_closed"
        await client.answer("Shorter.")
    assert models.received[1].body["messages"] == [
        turn("user", "Tell me."),
        turn("assistant", "Once upon a time"),
        turn("user", "Shorter."),
    ]


@pytest.mark.parametrize("verb", ["response.cancel", "conversation.item.truncate"])
async def test_interrupted_answer_stays_as_far_as_it_was_heard(models: ModelServer, verb: str) -> None:
    """The count is in UTF-16 units, and cuts no character; of what nobody heard nothing is sent."""
    async with running_server(anthropic_at(models)) as server:
        for said, heard_chars, kept in HEARD:
            models.scenarios["slow"] = Scenario([Says(said), Stall()])
            async with attached(server) as client:
                response_id = await client.respond("Tell me.", model="slow")
                await until_text(client, response_id, said)
                await client.send(verb, response_id=response_id, heard_chars=heard_chars)
                if verb != "response.cancel":
                    await client.until("conversation.item.truncated")
                    await client.send("response.cancel", response_id=response_id)
                done = await client.until("response.done", response_id=response_id)
                assert done["heard_chars"] == len(kept.encode("utf-16-le")) // 2
                await client.answer("Shorter.")
            heard = [turn("assistant", kept)] if kept else []
            conversation = [turn("user", "Tell me."), *heard, turn("user", "Shorter.")]
            assert models.received[-1].body["messages"] == conversation


async def test_answer_truncated_after_its_end_is_cut_too(models: ModelServer) -> None:
    """A listener is slower than the model: the whole answer was made, not all of it was heard."""
    async with session_with(anthropic_at(models)) as client:
        response_id = await client.respond("Hi")
        await client.until("response.done", response_id=response_id)
        await client.send("conversation.item.truncate", response_id=response_id, heard_chars=3)
        await client.until("conversation.item.truncated")
        await client.answer("What?")
    assert models.received[1].body["messages"][1] == turn("assistant", "all")


async def test_what_the_assistant_said_first_is_told_as_an_instruction(models: ModelServer) -> None:
    """The provider wants the user to speak first; a greeting is not lost for it."""
    async with session_with(anthropic_at(models)) as client:
        await item(client, "assistant", "Welcome!")
        await item(client, "assistant", "Ask me.")
        await client.answer("Hi", instructions="Be brief.")
    sent = models.received[0].body
    assert sent["messages"] == [turn("user", "Hi")]
    paragraphs = [f"You began this conversation by saying:\n{said}" for said in ("Welcome!", "Ask me.")]
    assert sent["system"] == "\n\n".join(["Be brief.", *paragraphs])


async def test_empty_items_are_left_out(models: ModelServer) -> None:
    """The provider refuses a message or a system prompt without a word in it."""
    async with session_with(anthropic_at(models)) as client:
        for role in ("system", "assistant", "user"):
            for content in ("", " \n\t"):
                await item(client, role, content)
        await client.answer("Hi", instructions=" ")
    sent = models.received[0].body
    assert sent["messages"] == [turn("user", "Hi")]
    assert "system" not in sent


@pytest.mark.parametrize("messages", [[("user", " ")], [("assistant", "Hello")], [("system", "Be brief.")]], ids=str)
async def test_nothing_to_respond_to_is_said_without_a_call(
    models: ModelServer, messages: list[tuple[Any, str]]
) -> None:
    """Without a word of the user there is no model call."""
    async with anthropic_at(models) as responder:
        with pytest.raises(InvalidRequest) as raised:
            await answer_of(responder, asked("any", *(Message(role, content) for role, content in messages)))
    assert raised.value.code == "empty_conversation"
    assert models.received == []


async def test_one_connection_serves_one_answer_after_the_other(models: ModelServer) -> None:
    """The client is shared, and reads each answer to its end, so that its connection can be used again."""
    async with TcpProxy("127.0.0.1", int(models.url.rpartition(":")[2])) as proxy:
        responder = anthropic_at(models, base_url=f"http://127.0.0.1:{proxy.port}")
        async with session_with(responder) as client:
            await client.answer()
            connection = proxy.connections[0]
            for _ in range(5):
                await client.answer()
            assert proxy.connections == [connection]
    assert len(models.received) == 6


async def test_more_than_a_hundred_answers_stream_at_once(models: ModelServer) -> None:
    """The pool is as large as it was asked to be, not as the transport's default."""
    gate = Gate()
    models.default = Scenario([Says("a"), gate, Says("b"), Stop()])
    async with anthropic_at(models) as responder, asyncio.TaskGroup() as group:
        answers = [group.create_task(answer_of(responder, asked("any"))) for _ in range(250)]
        for _ in answers:
            await (await models.next_request()).sent(1)
        assert len(models.active) == 250
        gate.open()
    assert all(texts(task.result()) == ["a", "b"] for task in answers)


async def test_pool_s_limit_is_kept(models: ModelServer) -> None:
    """One call more than the pool allows waits for its turn, and gets it."""
    gate = Gate()
    models.default = Scenario([Says("a"), gate, Stop()])
    async with anthropic_at(models, max_connections=2) as responder, asyncio.TaskGroup() as group:
        answers = [group.create_task(answer_of(responder, asked("any"))) for _ in range(5)]
        for _ in range(2):
            await (await models.next_request()).sent(1)
        await turns()
        assert len(models.received) == 2
        gate.open()
    assert all(texts(task.result()) == ["a"] for task in answers)
    assert len(models.received) == 5


# --- what comes back -----------------------------------------------------------------------------------------------


async def test_text_comes_as_the_model_said_it(models: ModelServer) -> None:
    """Character for character, also where the network splits characters, and in the next turn's conversation."""
    async with running_server(anthropic_at(models)) as server:
        for name, text in TEXTS.items():
            models.scenarios["letters"] = Scenario([*(Says(character) for character in text), Stop()])
            models.scenarios["split"] = Scenario([Says(text), Stop()], bytes_per_write=3)
            async with attached(server) as client:
                assert (name, await client.answer(model="letters")) == (name, text)
                assert (name, await client.answer(model="split")) == (name, text)
                for done in client.transcript.done.values():
                    assert (name, done["status"]) == (name, "completed")
                    assert done["output_chars"] == len(text.encode("utf-16-le")) // 2
                await client.answer("Again")
            assert models.received[-1].body["messages"][1] == turn("assistant", text)


async def test_thinking_comes_as_reasoning(models: ModelServer) -> None:
    """It streams on its own, character for character, and is no part of the answer."""
    models.default = Scenario([Thinking("Hm, "), Thinking("世界\r\n"), Says("Yes"), Thinking("!"), Says("."), Stop()])
    async with session_with(anthropic_at(models, thinking=True)) as client:
        response_id = await client.respond()
        done = await client.until("response.done", response_id=response_id)
        assert client.transcript.reasonings[response_id] == "Hm, 世界\r\n!"
        assert client.transcript.texts[response_id] == "Yes."
        assert done["output_chars"] == 4


async def test_usage_has_what_the_cache_did(models: ModelServer) -> None:
    """The provider's counts are told as they are, and the total is the sum of the four."""
    usage = Usage(input_tokens=11, cache_creation_input_tokens=200, cache_read_input_tokens=3000, output_tokens=40)
    models.default = Scenario([Says("Yes."), Stop()], usage=usage)
    async with session_with(anthropic_at(models)) as client:
        done = await done_of(client, "any")
    assert done["usage"] == {
        "input_tokens": 11,
        "output_tokens": 40,
        "total_tokens": 3251,
        "cache_read_input_tokens": 3000,
        "cache_creation_input_tokens": 200,
        "estimated": False,
    }


async def test_stop_reason_says_whether_the_answer_is_complete(models: ModelServer) -> None:
    """It is told as the provider gave it, with the provider's count."""
    async with session_with(anthropic_at(models)) as client:
        for stop_reason, status in STOP_REASONS.items():
            models.default = Scenario([Says("Well"), Stop(stop_reason)])
            done = await done_of(client, "any")
            assert (done["status"], done["stop_reason"]) == (status, stop_reason)
            assert done["usage"]["estimated"] is False
            assert "error" not in done


async def test_refusal_with_details_is_incomplete(models: ModelServer) -> None:
    """What the provider adds to a refusal is no trouble, and not told."""
    models.default = Scenario([Refusal("cyber", "Not this.")])
    async with session_with(anthropic_at(models)) as client:
        done = await done_of(client, "any")
    assert (done["status"], done["stop_reason"]) == ("incomplete", "refusal")
    assert "Not this." not in repr(done)


async def test_stopped_answer_s_usage_is_estimated(models: ModelServer) -> None:
    """The input as the provider counted it, the output by what came, reasoning included."""
    usage = Usage(input_tokens=11, cache_read_input_tokens=300)
    models.scenarios["slow"] = Scenario([Thinking("x" * 39), Says("é" * 20), Stall()], usage=usage)
    async with session_with(anthropic_at(models)) as client:
        response_id = await client.respond(model="slow")
        await until_text(client, response_id, "é" * 20)
        await client.send("response.cancel", response_id=response_id)
        done = await client.until("response.done", response_id=response_id)
    assert done["usage"] == {
        "input_tokens": 11,
        "output_tokens": 20,
        "total_tokens": 331,
        "cache_read_input_tokens": 300,
        "cache_creation_input_tokens": 0,
        "estimated": True,
    }


@pytest.mark.parametrize("usage", [{}, {"usage": None}], ids=str)
async def test_answer_without_a_final_count_is_estimated(models: ModelServer, usage: dict[str, None]) -> None:
    """A compatible provider that counts nothing at the end has not used one token."""
    end = event("message_delta", delta={"stop_reason": "end_turn"}, **usage) + event("message_stop")
    models.default = Scenario([Says("x" * 400), Raw(end)])
    async with session_with(anthropic_at(models)) as client:
        done = await done_of(client, "any")
    assert (done["status"], done["stop_reason"]) == ("completed", "end_turn")
    assert done["usage"]["estimated"] is True
    assert done["usage"]["output_tokens"] == 100


async def test_new_kinds_of_events_and_deltas_are_passed_over(models: ModelServer) -> None:
    """The provider adds kinds without a new version: what is not known says nothing, whatever its fields hold."""
    new = [
        event("telemetry", delta={"type": "text_delta", "text": "NO"}),
        event("telemetry", delta="NO", content_block=[1], message={"usage": "NO"}, usage=7, error="NO"),
        event("telemetry", error={"type": "overloaded_error"}),
        event("content_block_delta", index=0, delta={"type": "citations_delta", "citation": {"text": "NO"}}),
        event("content_block_delta", index=0, delta={"type": "note_delta", "text": "NO", "thinking": "NO"}),
        event("content_block_delta", index=0, delta={"type": "note_delta", "text": {"NO": 1}}),
        event("content_block_start", index=1, content_block={"type": "note", "text": "NO"}),
        event("content_block_start", index=1, content_block={"type": "web_search_tool_result", "content": ["NO"]}),
        event("content_block_delta", index=1),
        event("message_delta", delta={"new": "NO"}, usage={"output_tokens": 2, "new": {"NO": 1}}),
        b"event: telemetry\n\n",
        b"data:\n\n",
        b"retry: 10\n\n",
        b": a comment\n\n",
    ]
    steps: list[Step] = [Start(), Ping()]
    for unknown in new:
        steps += [Says("."), Raw(unknown)]
    models.default = Scenario([*steps, Stop()])
    async with anthropic_at(models) as responder:
        events = await answer_of(responder, asked("any"))
    assert "".join(texts(events)) == "." * len(new)
    assert not any(isinstance(event, Reasoning) for event in events)
    assert isinstance(events[-1], Finish)
    assert events[-1].stop_reason == "end_turn"


async def test_block_that_starts_with_text_is_shown_from_its_start(models: ModelServer) -> None:
    """The API allows it, though blocks usually start empty."""
    start = event("content_block_start", index=0, content_block={"type": "text", "text": "Once"})
    thought = event("content_block_start", index=0, content_block={"type": "thinking", "thinking": "Hm"})
    models.default = Scenario([Raw(thought + start), Says(" upon"), Stop()])
    async with anthropic_at(models) as responder:
        events = await answer_of(responder, asked("any"))
    assert "".join(texts(events)) == "Once upon"
    assert Reasoning("Hm") in events


# --- nothing is left behind ----------------------------------------------------------------------------------------

YIELDS = [TokenCount, Reasoning, Text, Text, Finish]


def test_call_that_is_left_at_any_point_leaves_nothing() -> None:
    """Closed, thrown into or cancelled at each of its yields: asyncio in debug mode has nothing to say."""
    program = "import tests.responders.test_anthropic as t, asyncio; asyncio.run(t.leave_everywhere())"
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONASYNCIODEBUG": "1"},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.split() == ["left", "20", "calls"]


async def leave_everywhere() -> None:
    """What the test above runs in a process of its own."""
    asyncio.get_running_loop().slow_callback_duration = 60  # a slow machine is not at issue
    left = 0
    async with ModelServer() as models, anthropic_at(models) as responder:
        for leave in (close, throw_cancellation, throw_error, cancel_task):
            for number in range(len(YIELDS)):
                await leave(Call(responder, models), number)
                assert await models.received[-1].finished() == "peer_closed"
                left += 1
        await close(Call(responder, models), -1)
        assert len(models.received) == left
        await cancel_before_the_first_byte(responder, models)
        gc.collect()
        await turns()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    print("left", left, "calls")


class Call:
    """A call whose answer comes piece by piece, each only when it is read: no two of them in one read."""

    def __init__(self, responder: AnthropicResponder, models: ModelServer) -> None:
        self.events = cast(AsyncGenerator[ResponderEvent, None], responder(asked("any")))
        self._gates = [Gate() for _ in YIELDS]
        pieces: list[Step] = [Start(), Thinking("a"), Says("b"), Says("c"), Stop()]
        steps = [step for pair in zip(self._gates, pieces, strict=True) for step in pair]
        models.default = Scenario([*steps, Stall()])

    async def at_yield(self, number: int) -> AsyncGenerator[ResponderEvent, None]:
        """The call's generator, which stands at its `number`th yield (from 0)."""
        for gate, expected in list(zip(self._gates, YIELDS, strict=True))[: number + 1]:
            gate.open()
            event = await anext(self.events)
            assert isinstance(event, expected), event
        return self.events


async def close(call: Call, number: int) -> None:
    """`aclose`, as the server does; twice is no harm."""
    events = await call.at_yield(number)
    await events.aclose()
    await events.aclose()


async def throw_cancellation(call: Call, number: int) -> None:
    """A cancellation at the yield comes out as it is."""
    with pytest.raises(asyncio.CancelledError):
        await (await call.at_yield(number)).athrow(asyncio.CancelledError())


async def throw_error(call: Call, number: int) -> None:
    """So does any other error."""
    with pytest.raises(ZeroDivisionError):
        await (await call.at_yield(number)).athrow(ZeroDivisionError())


async def cancel_task(call: Call, number: int) -> None:
    """The task that reads is cancelled while it waits for what comes after that yield."""
    seen = asyncio.Event()

    async def read() -> None:
        events = await call.at_yield(number)
        seen.set()
        try:
            async for _ in events:
                pass
            await asyncio.get_running_loop().create_future()
        finally:
            await events.aclose()

    reading = asyncio.create_task(read())
    await seen.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


async def cancel_before_the_first_byte(responder: AnthropicResponder, models: ModelServer) -> None:
    """The task that calls is cancelled while the provider has not answered."""
    for _ in models.received:
        await models.next_request()
    models.default = Scenario([Stall()])
    reading = asyncio.create_task(answer_of(responder, asked("any")))
    request = await models.next_request()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert await request.finished() == "peer_closed"
