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
from typing import Any, Protocol

import msgspec
from msgspec import Struct

from realtime.conversation import BYTES_PER_TOKEN, Message, estimate_tokens
from realtime.conversation import ToolCall as ToolCall

FRAME_TOKENS = 16
"""More than a provider puts around each message, and around the whole."""


class Tool(Struct, frozen=True):
    """What the model is told of a tool that it may call; `input_schema` is the JSON schema of an object."""

    name: str
    description: str
    input_schema: dict[str, Any]

    def estimated_tokens(self) -> int:
        """About how many tokens the model is sent for it."""
        return estimate_tokens(self.name, self.description, msgspec.json.encode(self.input_schema).decode())


class Request(Struct, frozen=True, kw_only=True):
    """One model call: the conversation so far, oldest first, and how to answer it.

    `instructions` is empty where there are none. `response_id` and `session_id` are empty for a one-shot request. A
    model that has called `tools` is called again, with the same messages, its own with the calls, and the results.
    """

    messages: Sequence[Message]
    instructions: str
    model: str
    max_output_tokens: int
    session_id: str = ""
    response_id: str = ""
    tools: Sequence[Tool] = ()

    def estimated_tokens(self) -> int:
        """About how many tokens the model is sent."""
        return self.estimated_frame_tokens() + sum(message.estimated_tokens() for message in self.messages)

    def estimated_frame_tokens(self) -> int:
        """About how many of them are not its conversation."""
        return estimate_tokens(self.instructions) + sum(tool.estimated_tokens() for tool in self.tools)

    def most_tokens(self, context_tokens: int) -> int:
        """The most that the call can come to, of a model that holds `context_tokens`: every byte sent a token of its
        own, and as much said as may be."""
        sent = BYTES_PER_TOKEN * self.estimated_tokens() + FRAME_TOKENS * (1 + len(self.messages) + len(self.tools))
        return min(sent, context_tokens) + self.max_output_tokens


class Text(Struct, frozen=True):
    """The next piece of the answer; a plain `str` means the same."""

    text: str


class Reasoning(Struct, frozen=True):
    """The next piece of the model's reasoning; it is no part of the answer."""

    text: str


class ToolInput(Struct, frozen=True):
    """The next piece of a tool call's input, as JSON: it shows that the model is at work, and costs what text costs."""

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

    Returning without one means `end_turn`. `tool_use` means that the model waits for the results of the `ToolCall`s
    that were yielded before, and `raw` is for the `Message` that holds them; with any other reason the calls are not to
    be carried out.
    """

    stop_reason: str
    count: TokenCount | None = None
    raw: tuple[Any, ...] = ()


ResponderEvent = str | Text | Reasoning | ToolInput | ToolCall | TokenCount | Finish


class Responder(Protocol):
    """Answers requests. One that holds a client or a pool is also an async context manager: the server enters it
    when it starts, once, and leaves it when it stops."""

    def __call__(self, request: Request, /) -> AsyncIterator[ResponderEvent]:
        """Answer `request`. A raised `UpstreamError` is told to the client; any other error as `responder_failed`."""
