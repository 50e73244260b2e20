"""A responder that needs no key: it says that it is a demo, and streams at the pace of a person reading aloud."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator

from realtime.responders.base import Finish, Request, ResponderEvent

MODEL = "demo"
WORDS_PER_S = 25.0

ANSWER = """\
This is the demo responder: no model is behind it, because this server has no API key. You said: “{said}”

Everything around the words is real, though. They travel over one WebSocket, each as soon as it is born, and every one \
of them has a position in a log. So you can drop the connection while I speak, and it comes back and continues without \
a seam; you can open this page in a second tab and read along; you can stop me, or just say something else, and I stop \
at once. If you close the last tab, I stop too, because nobody pays for words that nobody reads.

To hear a real model, set ANTHROPIC_API_KEY or OPENAI_API_KEY and start the server again. 👋"""


async def demo(request: Request) -> AsyncIterator[ResponderEvent]:
    """Answers with `ANSWER`, `WORDS_PER_S` words a second; a word counts as a token."""
    said = request.messages[-1].content if request.messages else ""
    answer = ANSWER.format(said=said if len(said) <= 200 else said[:200] + "…")
    words = re.findall(r"\s*\S+", answer)
    for word in words[: request.max_output_tokens]:
        await asyncio.sleep(1 / WORDS_PER_S)
        yield word
    yield Finish("end_turn" if len(words) <= request.max_output_tokens else "max_tokens")
