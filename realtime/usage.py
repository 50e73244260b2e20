"""Counts what one model turn says and uses."""

from __future__ import annotations

from realtime.conversation import BYTES_PER_TOKEN
from realtime.protocol import ResponseStatus, Usage, utf16_length
from realtime.responders.base import Finish, TokenCount

INCOMPLETE = frozenset({"max_tokens", "model_context_window_exceeded", "refusal", "pause_turn", "tool_use"})
"""Stop reasons of a model that has not said all it had to say; `tool_use` is one where nobody carries the calls out."""


def status_of(stop_reason: str) -> ResponseStatus:
    """`completed`, or `incomplete` where the model stopped before it had said everything."""
    return "incomplete" if stop_reason in INCOMPLETE else "completed"


class Meter:
    """What one turn has said and used so far, over all its model calls; it begins with the first.

    `chars` are UTF-16 code units of the answer, without the reasoning.
    """

    __slots__ = ("_bytes", "_count", "_earlier", "_final", "chars")

    def __init__(self, input_tokens: int) -> None:
        self.chars = 0
        self._earlier: Usage | None = None
        self._begin(input_tokens)

    def next_call(self, input_tokens: int) -> None:
        """The model is called once more, with about so many tokens: what is counted from here on is that call's."""
        self._earlier = self.usage()
        self._begin(input_tokens)

    def said(self, text: str) -> None:
        """A piece of the answer."""
        self.chars += utf16_length(text)
        self.thought(text)

    def thought(self, text: str) -> None:
        """A piece that costs, and is no part of the answer."""
        self._bytes += len(text) if text.isascii() else len(text.encode())

    def counted(self, count: TokenCount) -> None:
        """What the provider says so far of this call."""
        self._count = count

    def finished(self, finish: Finish) -> None:
        """The end of this call, with the provider's final count if it gave one."""
        if finish.count is not None:
            self._count = finish.count
            self._final = True

    def usage(self) -> Usage:
        """What the provider counted, or, where it gave no final count for a call, what can be counted here:
        `estimated`."""
        return self._this_call() if self._earlier is None else _sum(self._earlier, self._this_call())

    def _begin(self, input_tokens: int) -> None:
        self._bytes = 0
        self._count = TokenCount(input_tokens=input_tokens, output_tokens=0)
        self._final = False

    def _this_call(self) -> Usage:
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


def _sum(one: Usage, other: Usage) -> Usage:
    """What two calls used; a count that neither has is `None`."""
    return Usage(
        input_tokens=one.input_tokens + other.input_tokens,
        output_tokens=one.output_tokens + other.output_tokens,
        total_tokens=one.total_tokens + other.total_tokens,
        estimated=one.estimated or other.estimated,
        cache_read_input_tokens=_sum_known(one.cache_read_input_tokens, other.cache_read_input_tokens),
        cache_creation_input_tokens=_sum_known(one.cache_creation_input_tokens, other.cache_creation_input_tokens),
    )


def _sum_known(one: int | None, other: int | None) -> int | None:
    return None if one is None and other is None else (one or 0) + (other or 0)
