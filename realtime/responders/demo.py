"""A responder that needs no key: it says that it is a demo, and streams at the pace of a person reading aloud."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator

import msgspec

from realtime.responders.base import Finish, Request, ResponderEvent

MODEL = "demo"
WORDS_PER_S = 25.0
MAX_QUOTED_CHARS = 200
MAX_QUOTES = 12

ANSWER = """\
This is the demo responder: no model is behind it, because this server has no API key. You said: “{said}”

Everything around the words is real, though. They travel over one connection, each as soon as it is born, and every \
one of them has a position in a log. So you can drop the connection while I speak, and it comes back and continues \
without a seam; you can open this visit in a second tab and read along; you can stop me, or just say something else, \
and I stop at once. If you close the last tab, I stop too, because nobody pays for words that nobody reads.

To hear a real model, set ANTHROPIC_API_KEY or OPENAI_API_KEY and start the server again. 👋"""
"""What is said to the first message of a conversation."""

LATER = (
    """\
This is the demo responder: no model is behind it. You said: “{said}”

A model would now ask what a clinician wants to know: since when, where and how bad it is, what makes it better or \
worse, what goes with it, and what you take. It would ask about you, too: what you have had before, what runs in the \
family, what you are allergic to, how you sleep, and what worries you most, which is often not what one names first. \
And if anything sounded like an emergency, it would say so before all else. Tell it as if it had asked.

When you are through, press “Draft the note”: I sort what was said into the four parts of a note, by a few keywords, \
and it is written before your eyes.""",
    """\
This is the demo responder: no model is behind it. You said: “{said}”

I can't judge that, and would not, if I were a model: in a visit that is for the clinician. What I can do is to go on \
for a while, so that there is something to interrupt. Say the next thing now, and I stop at once; what you had read of \
me until then stays in the conversation, for everybody who looks on.

If you let me go on, look at “Underneath”. Each bar is a word, as high as it was awaited; after a cut, those that you \
had missed come at once. Below stands what was written so far, and what was saved by stopping me: nobody had to write \
those words, and nobody has to pay for them. Without “Assistant answers” the two of you talk among yourselves.""",
)
"""What is said to the others, in turn."""

LABEL = "- Demo: no model wrote this. It is what was said, sorted by keywords."
"""What stands first in a note's first section."""
FIRST_SECTION = "Subjective"

_NOTE = re.compile(
    r"<conversation (?P<number>\w+)>\n(?P<lines>.*)\n</conversation (?P=number)>.*^Write the section (?P<section>\w+):",
    re.DOTALL | re.MULTILINE,
)
"""How the task `clinical_note` asks for a section."""
_KEYWORDS = {
    "Plan": re.compile(
        r"\b(please|let us|let's|we will|we'll|you should|prescribe|refer you|follow[- ]?up|come back|stop taking)\b",
        re.I,
    ),
    "Assessment": re.compile(r"\b(I think|likely|probably|diagnosis|consistent with|suspect|sounds like)\b", re.I),
    "Objective": re.compile(
        r"\b(examination|on exam|blood pressure|temperature|pulse|weight|oxygen|\d+/\d+|\d+(\.\d+)? ?(°|mmHg|bpm|kg))",
        re.I,
    ),
}
"""What a sentence of a section has in it; the first one that fits has it, and Subjective has the rest."""
_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|\n+")


class _Utterance(msgspec.Struct):
    role: str
    content: str


async def demo(request: Request) -> AsyncIterator[ResponderEvent]:
    """Answers with `ANSWER`, then with `LATER`, and to the task `clinical_note` with what was said, sorted by keywords:
    `WORDS_PER_S` words a second. A word counts as a token."""
    words = re.findall(r"\s*\S+", _answer(request))
    for word in words[: request.max_output_tokens]:
        await asyncio.sleep(1 / WORDS_PER_S)
        yield word
    yield Finish("end_turn" if len(words) <= request.max_output_tokens else "max_tokens")


def _answer(request: Request) -> str:
    said = request.messages[-1].content if request.messages else ""
    if note := _NOTE.match(said):
        return _section(note["section"], note["lines"])
    turn = sum(message.role == "assistant" for message in request.messages)
    return (LATER[(turn - 1) % len(LATER)] if turn else ANSWER).format(said=_quoted(said))


def _section(name: str, lines: str) -> str:
    """What people said that belongs there, word for word: nothing of it is made up."""
    sentences = [part.strip() for said in _people_said(lines) for part in _SENTENCE_END.split(said)]
    found = [sentence for sentence in sentences if _is_told(sentence) and _section_of(sentence) == name]
    quotes = [f"- “{_quoted(sentence)}”" for sentence in found[:MAX_QUOTES]]
    label = [LABEL] if name == FIRST_SECTION else []
    return "\n".join([*label, *(quotes or ["- Not documented."])])


def _people_said(lines: str) -> list[str]:
    """What is not the assistant's own; nothing where they are no utterances, as somebody may type anything."""
    try:
        utterances = [msgspec.json.decode(line, type=_Utterance) for line in lines.split("\n")]
    except msgspec.DecodeError:
        return []
    return [one.content for one in utterances if one.role == "user"]


def _is_told(sentence: str) -> bool:
    """Neither a question nor a greeting."""
    return not sentence.endswith("?") and len(sentence.split()) > 2


def _section_of(sentence: str) -> str:
    return next((name for name, keywords in _KEYWORDS.items() if keywords.search(sentence)), FIRST_SECTION)


def _quoted(said: str) -> str:
    return said if len(said) <= MAX_QUOTED_CHARS else said[:MAX_QUOTED_CHARS] + "…"
