"""The demo responder says that it is one, reads at a person's pace, and keeps to its limit."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from unittest import mock

import msgspec
import pytest

from realtime.conversation import Message
from realtime.protocol import Role
from realtime.responders.base import Finish
from realtime.responders.demo import ANSWER, LABEL, LATER, demo
from realtime.tasks.clinical_note import Utterance, Visit, clinical_note
from tests.responders import answer_of, asked, session_with
from tests.tasks.scripted import context_of


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


async def test_demo_goes_on(waits: list[float]) -> None:
    """Later answers say something else, and again first that it is a demo; they quote, too."""
    said = ["One", "Two", "Three", "Four"]
    texts: list[str] = []
    messages: list[Message] = []
    for content in said:
        messages.append(Message("user", content))
        words = await answer_of(demo, asked("demo", *messages, max_output_tokens=4096))
        texts.append("".join(word for word in words if isinstance(word, str)))
        messages.append(Message("assistant", texts[-1]))
    assert texts[0] == ANSWER.format(said="One")
    assert len({text.split("”", 1)[1] for text in texts}) == 1 + len(LATER)
    for content, text in zip(said, texts, strict=True):
        assert text.startswith("This is the demo responder: no model is behind it")
        assert f"“{content}”" in text


def test_demo_s_first_answer_is_the_shortest() -> None:
    """Who stops it, and lets the next one end, sees that something was saved."""
    assert all(len(later.split()) > len(ANSWER.split()) for later in LATER)


VISIT: list[tuple[Role, str]] = [
    ("user", "Good morning. What brings you here?"),
    ("user", "My knee hurts for two days. My blood pressure was 120/80."),
    ("assistant", "I think that it is broken. Please rest."),
    ("user", "I think it is a sprain.\nPlease cool it for a day."),
]


async def test_demo_drafts_a_note_of_what_was_said(waits: list[float]) -> None:
    """People's own words, each in the part where its keywords put it, none of the assistant's; it says how, once."""
    context, reports = context_of(demo)
    note = await clinical_note(context, Visit(conversation=[Utterance(role, content) for role, content in VISIT]))
    assert msgspec.structs.astuple(note.sections) == (
        f"{LABEL}\n- “My knee hurts for two days.”",
        "- “My blood pressure was 120/80.”",
        "- “I think it is a sprain.”",
        "- “Please cool it for a day.”",
    )
    assert LABEL.startswith("- Demo: no model wrote this")
    assert note.text == reports.text


async def test_demo_makes_nothing_up(waits: list[float]) -> None:
    """A part on which nothing was said is not documented."""
    context, _ = context_of(demo)
    note = await clinical_note(context, Visit(conversation=[Utterance("user", "My knee hurts.")]))
    assert note.sections.plan == "- Not documented."


@pytest.mark.parametrize("lines", ["no JSON", "{}", '{"role": 1, "content": []}', ""])
async def test_demo_takes_what_only_looks_like_a_note_s_prompt(waits: list[float], lines: str) -> None:
    """Anybody may type anything: it is no failure."""
    text, finish = await said_to(f"<conversation 1>\n{lines}\n</conversation 1>\n\nWrite the section Plan: x")
    assert text == "- Not documented."
    assert finish.stop_reason == "end_turn"


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
