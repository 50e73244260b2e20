"""What a model is sent: the conversation so far, cut to what was heard and to what the model can hold. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct

from realtime.errors import InvalidRequest
from realtime.protocol import Item, Role, cut_utf16
from realtime.session import ResponseState, SessionState

BYTES_PER_TOKEN = 4
"""The usual rule of thumb for English text; used only where a provider reports no count, and said so."""


class Message(Struct, frozen=True):
    """One message of the conversation."""

    role: Role
    content: str


def estimate_tokens(*texts: str) -> int:
    """About how many tokens texts are: their UTF-8 bytes by `BYTES_PER_TOKEN`, rounded up."""
    return -(-sum(len(text.encode()) for text in texts) // BYTES_PER_TOKEN)


def messages(state: SessionState, answers: Mapping[str, str], *, upto: ResponseState) -> list[Message]:
    """The conversation that response `upto` answers: everything in it but that response itself.

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

    Raises `InvalidRequest` (`context_length_exceeded`) where something has to go and `truncation` is `error`, or where
    what always stays is too much already.
    """
    kept: list[Message] = []
    room = room_tokens - sum(_tokens(message) for message in conversation if message.role == "system")
    full = False
    if room < 0:
        raise _too_long()
    for index, message in reversed(list(enumerate(conversation))):
        if message.role == "system":
            kept.append(message)
            continue
        room -= _tokens(message)
        full = full or room < 0
        if full and (truncation == "error" or index == len(conversation) - 1):
            raise _too_long()
        if not full:
            kept.append(message)
    return kept[::-1]


def _too_long() -> InvalidRequest:
    return InvalidRequest("context_length_exceeded", "The conversation is longer than the model can hold.")


def joined(texts: Iterable[str]) -> str:
    """Texts as paragraphs, without the empty ones."""
    return "\n\n".join(text for text in texts if text)


def _heard(state: SessionState, response_id: str, text: str) -> str:
    units = state.heard.get(response_id)
    return text if units is None else cut_utf16(text, units)


def _tokens(message: Message) -> int:
    return estimate_tokens(message.content)
