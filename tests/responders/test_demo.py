"""The demo responder says that it is one, reads at a person's pace, and keeps to its limit."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from unittest import mock

import pytest

from realtime.conversation import Message
from realtime.responders.base import Finish
from realtime.responders.demo import demo
from tests.responders import answer_of, asked, session_with


@pytest.fixture
def waits() -> Iterator[list[float]]:
    """The seconds that the demo waits before each word, none of which is really waited for."""
    waited: list[float] = []

    async def note(seconds: float) -> None:
        waited.append(seconds)

    with mock.patch("realtime.responders.demo.asyncio", mock.Mock(wraps=asyncio, sleep=note)):
        yield waited


async def said_to(content: str, *, max_output_tokens: int = 4096) -> tuple[str, Finish]:
    """The demo's answer to a user, and its end."""
    *words, finish = await answer_of(demo, asked("demo", Message("user", content), max_output_tokens=max_output_tokens))
    assert isinstance(finish, Finish)
    return "".join(word for word in words if isinstance(word, str)), finish


async def test_demo_says_what_it_is(waits: list[float]) -> None:
    """Nobody can take it for a model: it says so first, and how to get a real one."""
    text, finish = await said_to("Hello?")
    assert text.startswith("This is the demo responder: no model is behind it")
    assert "ANTHROPIC_API_KEY" in text
    assert "“Hello?”" in text
    assert finish.stop_reason == "end_turn"
    assert finish.count is None


async def test_demo_reads_at_a_person_s_pace(waits: list[float]) -> None:
    """There is a wait before each word: five to fifty words a second, and the whole in less than half a minute."""
    text, _ = await said_to("Hello?")
    assert len(waits) == len(text.split())
    assert all(0.02 <= wait_s <= 0.2 for wait_s in waits)
    assert sum(waits) < 30


async def test_demo_keeps_to_its_limit(waits: list[float]) -> None:
    """A word counts as a token; where words are left over, that is said."""
    whole, _ = await said_to("Hello?")
    count = len(whole.split())
    for limit in (1, 5, count - 1):
        text, finish = await said_to("Hello?", max_output_tokens=limit)
        assert (len(text.split()), finish.stop_reason) == (limit, "max_tokens")
        assert whole.startswith(text)
    text, finish = await said_to("Hello?", max_output_tokens=count)
    assert (text, finish.stop_reason) == (whole, "end_turn")


@pytest.mark.parametrize("said", ["", "{0} {said} {", "👩‍👩‍👧 \u2028 \x00", "a\r\n\r\nb", "x" * 200])
async def test_demo_quotes_what_was_said(waits: list[float], said: str) -> None:
    """As it was written, whatever it holds."""
    text, _ = await said_to(said)
    assert f"You said: “{said}”" in text


async def test_demo_quotes_only_the_start_of_much(waits: list[float]) -> None:
    """Two hundred characters of it."""
    text, _ = await said_to("x" * 201)
    assert f"“{'x' * 200}…”" in text


async def test_demo_streams_through_the_server(waits: list[float]) -> None:
    """A client that is given no key gets a whole conversation: text, status, and usage that is counted here."""
    async with session_with(demo) as client:
        text = await client.answer("Hello?")
        assert "“Hello?”" in text
        response_id = await client.respond("Again", max_output_tokens=3)
        done = await client.until("response.done", response_id=response_id)
        assert client.transcript.texts[response_id] == "This is the"
        assert (done["status"], done["stop_reason"]) == ("incomplete", "max_tokens")
        assert done["usage"]["estimated"] is True
