"""What a model is sent: the conversation so far, cut to what was heard and to what the model can hold. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from realtime.errors import InvalidRequest
from realtime.protocol import Item, Role, cut_utf16
from realtime.session import ResponseState, SessionState

BYTES_PER_TOKEN = 4
"""The usual rule of thumb for English text; used only where a provider reports no count, and said so."""


class ToolCall(Struct, frozen=True):
    """The model calls a tool; `id` is the provider's, and its result names it."""

    id: str
    name: str
    input: dict[str, Any]


class ToolResult(Struct, frozen=True):
    """What came of a tool call; with `is_error` the content says what went wrong."""

    call_id: str
    content: str
    is_error: bool = False


class Message(Struct, frozen=True):
    """One message of the conversation.

    Tool calls are the assistant's, after its `content`, and the user's message that follows has the results of all of
    them. `raw` is what the responder gave for such a message of the assistant's, and is for that responder alone: it
    may need more of its own words back than the text and the calls.
    """

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_results: tuple[ToolResult, ...] = ()
    raw: tuple[Any, ...] = ()

    def estimated_tokens(self) -> int:
        """About how many tokens it is, whatever it holds."""
        return estimate_tokens(*self._texts())

    def _texts(self) -> Iterator[str]:
        if self.raw:
            yield _as_json(self.raw)
        else:
            yield self.content
            yield from (call.name + _as_json(call.input) for call in self.tool_calls)
        yield from (result.content for result in self.tool_results)


def estimate_tokens(*texts: str) -> int:
    """About how many tokens texts are: their UTF-8 bytes by `BYTES_PER_TOKEN`, rounded up."""
    return -(-sum(len(text.encode()) for text in texts) // BYTES_PER_TOKEN)


def messages(state: SessionState, answers: Mapping[str, str], *, upto: ResponseState | None = None) -> list[Message]:
    """The conversation, or the one that response `upto` answers: everything in it but that response itself.

    `answers` has the texts of the session's responses. An interrupted answer counts as far as it came, or as far as
    it was heard where a client said so; an answer without text is left out.
    """
    found = []
    for entry in state.timeline:
        if isinstance(entry, Item):
            found.append(Message(entry.role, entry.content))
        elif entry is not upto and (text := _heard(state, entry.id, answers.get(entry.id, ""))):
            found.append(Message("assistant", text))
    return found


def fit(conversation: Sequence[Message], *, room_tokens: int, truncation: str) -> list[Message]:
    """The newest messages that fit into `room_tokens` (estimated); the last one and `system` items always stay.

    Tool calls, their results and the question that led to them go together, or stay together.

    Raises `InvalidRequest` (`context_length_exceeded`) where something has to go and `truncation` is `error`, or where
    what always stays is too much already.
    """
    room = room_tokens - sum(message.estimated_tokens() for message in conversation if message.role == "system")
    if room < 0:
        raise _too_long()
    start = _start(conversation, room)
    kept = [message for index, message in enumerate(conversation) if index >= start or message.role == "system"]
    if len(kept) < len(conversation) and (truncation == "error" or start == len(conversation)):
        raise _too_long()
    return kept


def _start(conversation: Sequence[Message], room: int) -> int:
    """Where the newest messages begin that fit into `room`; the conversation's length if the last one doesn't."""
    start = len(conversation)
    bound = False
    for index, message in reversed(list(enumerate(conversation))):
        if message.role == "system":
            continue
        room -= message.estimated_tokens()
        if room < 0:
            return start
        bound = bool(message.tool_results) or (bound and message.role == "assistant")
        if not bound:
            start = index
    return 0


def _too_long() -> InvalidRequest:
    return InvalidRequest("context_length_exceeded", "The conversation is longer than the model can hold.")


def joined(texts: Iterable[str]) -> str:
    """Texts as paragraphs, without the empty ones."""
    return "\n\n".join(text for text in texts if text)


def _heard(state: SessionState, response_id: str, text: str) -> str:
    units = state.heard.get(response_id)
    return text if units is None else cut_utf16(text, units)


def _as_json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
