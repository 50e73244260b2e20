"""What reading a provider's stream has in common, whoever the provider: bytes in, what the model said out. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from realtime.decoding import field_of
from realtime.errors import UpstreamError
from realtime.responders.base import Reasoning, ResponderEvent, Text, ToolInput
from realtime.responders.sse import EventParser, EventTooLarge

MAX_INPUT_BYTES = 1024 * 1024
"""How large the inputs of one answer's tool calls may be, all together."""

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
decode_input = msgspec.json.Decoder(dict[str, Any]).decode
"""A tool call's input, which is a JSON object. Raises one of `UNREADABLE`."""

_ERRORS = {
    "authentication_error": ("upstream_unauthorized", "The model's provider refuses this server's key."),
    "permission_error": ("upstream_unauthorized", "The model's provider refuses this server's key."),
    "not_found_error": ("upstream_not_found", "The model's provider knows no such model."),
    "request_too_large": ("upstream_too_large", "The conversation is too large for the model's provider."),
    "invalid_request_error": ("upstream_rejected", "The model's provider refused the request."),
    "rate_limit_error": ("upstream_rate_limited", "The model's provider limits this server's rate."),
    "overloaded_error": ("upstream_overloaded", "The model's provider is overloaded."),
}


class StreamReader:
    """One answer's stream, fed with its bytes, split anywhere. `read` says what the `data` of each event says."""

    __slots__ = ("_parser",)

    def __init__(self) -> None:
        self._parser = EventParser()

    def read(self, data: bytes) -> Iterable[ResponderEvent]:
        """What an event says. Raises `UpstreamError`, or one of `UNREADABLE`."""
        raise NotImplementedError

    def feed(self, chunk: bytes) -> Iterator[ResponderEvent]:
        """What the events that `chunk` completes say, with neighbouring pieces of one kind as one.

        Raises `UpstreamError` where the stream tells of an error or can't be read, after what it said before.
        """
        kind: type[Text | Reasoning | ToolInput] = Text
        texts: list[str] = []
        try:
            for event in self._events(chunk):
                if texts and type(event) is not kind:
                    yield kind("".join(texts))
                    texts = []
                if isinstance(event, Text | Reasoning | ToolInput):
                    kind = type(event)
                    texts.append(event.text)
                else:
                    yield event
        except UpstreamError:
            if texts:
                yield kind("".join(texts))
            raise
        if texts:
            yield kind("".join(texts))

    def _events(self, chunk: bytes) -> Iterator[ResponderEvent]:
        try:
            for data in self._parser.feed(chunk):
                yield from self.read(data)
        except (*UNREADABLE, EventTooLarge) as error:
            failure = UpstreamError("upstream_invalid", "The model's answer could not be read.")
            failure.field = field_of(error)
            raise failure from error


def upstream_error(kind: str) -> UpstreamError:
    """The error that a provider's kind of error means, by its name at Anthropic."""
    code, message = _ERRORS.get(kind, ("upstream_failed", "The model's provider failed."))
    return UpstreamError(code, message)


def unreadable_input() -> UpstreamError:
    """The error for a tool call whose input is no JSON object."""
    return UpstreamError("upstream_tool_input_invalid", "The model has called a tool with an unreadable input.")


def check_input_bytes(count: int) -> None:
    """Raise `UpstreamError` for tool inputs that are larger than `MAX_INPUT_BYTES`, all together."""
    if count > MAX_INPUT_BYTES:
        raise UpstreamError("upstream_tool_input_too_large", "The model has called a tool with too large an input.")
