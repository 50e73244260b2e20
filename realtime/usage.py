"""Counts what one model turn says and uses."""

from __future__ import annotations

from realtime.conversation import BYTES_PER_TOKEN
from realtime.protocol import ResponseStatus, Usage, utf16_length
from realtime.responders.base import Finish, TokenCount

INCOMPLETE = frozenset({"max_tokens", "model_context_window_exceeded", "refusal", "pause_turn"})
"""Stop reasons of a model that has not said all it had to say."""


def status_of(stop_reason: str) -> ResponseStatus:
    """`completed`, or `incomplete` where the model stopped before it had said everything."""
    return "incomplete" if stop_reason in INCOMPLETE else "completed"


class Meter:
    """What one turn has said so far. `chars` are UTF-16 code units of the answer, without the reasoning."""

    __slots__ = ("_bytes", "_count", "_final", "chars")

    def __init__(self, input_tokens: int) -> None:
        self.chars = 0
        self._bytes = 0
        self._count = TokenCount(input_tokens=input_tokens, output_tokens=0)
        self._final = False

    def said(self, text: str) -> None:
        """A piece of the answer."""
        self.chars += utf16_length(text)
        self.thought(text)

    def thought(self, text: str) -> None:
        """A piece that costs, and is no part of the answer."""
        self._bytes += len(text) if text.isascii() else len(text.encode())

    def counted(self, count: TokenCount) -> None:
        """What the provider says so far."""
        self._count = count

    def finished(self, finish: Finish) -> None:
        """The end, with the provider's final count if it gave one."""
        if finish.count is not None:
            self._count = finish.count
            self._final = True

    def usage(self) -> Usage:
        """What the provider counted, or, where it gave no final count, what can be counted here: `estimated`."""
        count = self._count
        output_tokens = count.output_tokens
        if not self._final:
            output_tokens = max(output_tokens, -(-self._bytes // BYTES_PER_TOKEN))
        read, created = count.cache_read_input_tokens, count.cache_creation_input_tokens
        return Usage(
            input_tokens=count.input_tokens,
            output_tokens=output_tokens,
            total_tokens=count.input_tokens + output_tokens + (read or 0) + (created or 0),
            estimated=not self._final,
            cache_read_input_tokens=read,
            cache_creation_input_tokens=created,
        )
