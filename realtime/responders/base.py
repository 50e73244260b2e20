"""What a responder is: an async generator that takes a conversation and yields an answer.

The shortest one yields strings::

    async def shout(request):
        for word in request.messages[-1].content.split():
            yield word.upper() + " "

A responder is closed (`aclose()`, or a `CancelledError` at the point where it waits) the moment nobody wants its
answer any more; whatever it holds open, it releases then, in `finally` or by `async with`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from msgspec import Struct

from realtime.conversation import Message


class Request(Struct, frozen=True, kw_only=True):
    """One model turn: the conversation so far, oldest first, and how to answer it.

    `instructions` is empty where there are none. `response_id` and `session_id` are empty for a one-shot request.
    """

    messages: Sequence[Message]
    instructions: str
    model: str
    max_output_tokens: int
    session_id: str = ""
    response_id: str = ""


class Text(Struct, frozen=True):
    """The next piece of the answer; a plain `str` means the same."""

    text: str


class Reasoning(Struct, frozen=True):
    """The next piece of the model's reasoning; it is no part of the answer."""

    text: str


class TokenCount(Struct, frozen=True, kw_only=True):
    """What a model call has used so far, as its provider says. `input_tokens` leaves out what its cache held or took:
    all that was processed is the sum of the four."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None


class Finish(Struct, frozen=True):
    """The answer is whole, or stops here for `stop_reason`; `count` is the provider's final count, if it gave one.

    Returning without one means `end_turn`.
    """

    stop_reason: str
    count: TokenCount | None = None


ResponderEvent = str | Text | Reasoning | TokenCount | Finish


class Responder(Protocol):
    """Answers requests. One that holds a client or a pool is also an async context manager: the server enters it
    when it starts, once, and leaves it when it stops."""

    def __call__(self, request: Request, /) -> AsyncIterator[ResponderEvent]:
        """Answer `request`. A raised `UpstreamError` is told to the client; any other error as `responder_failed`."""
