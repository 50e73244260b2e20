"""Reads a stream of chat completions, OpenAI's or a compatible server's: bytes in, what the model said out. No I/O.

The structs know the few fields that are needed. An answer is whole once it has a `finish_reason`; its count and the
`[DONE]` follow, and some servers leave out either.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import msgspec
from msgspec import Struct

from realtime.responders.base import Finish, Reasoning, ResponderEvent, Text, TokenCount, ToolCall, ToolInput
from realtime.responders.reading import (
    UNREADABLE,
    StreamReader,
    check_input_bytes,
    decode_input,
    unreadable_input,
    upstream_error,
)


class _Function(Struct):
    name: str | None = None
    arguments: str | None = None


class _CallPiece(Struct):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Delta(Struct):
    """`reasoning_content` is what most servers call it, `reasoning` what some do."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[_CallPiece] | None = None


class _Choice(Struct):
    index: int = 0
    delta: _Delta | None = None
    finish_reason: str | None = None


class _InputDetails(Struct):
    cached_tokens: int | None = None


class _Usage(Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _InputDetails | None = None


class _Chunk(Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


class _Call(Struct):
    """A tool call that is coming in."""

    id: str
    name: str = ""
    pieces: list[str] = []


_decode = msgspec.json.Decoder(_Chunk).decode
_DONE = b"[DONE]"
_THOUGHTS = ("reasoning_content", "reasoning")

_STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "content_filter": "refusal",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
}
_KINDS = {
    "invalid_api_key": "authentication_error",
    "model_not_found": "not_found_error",
    "context_length_exceeded": "request_too_large",
    "rate_limit_exceeded": "rate_limit_error",
    "insufficient_quota": "rate_limit_error",
    "server_overloaded": "overloaded_error",
}
"""What the codes and types of errors mean, where they are not named as at Anthropic."""


class CompletionReader(StreamReader):
    """One answer's stream. Once it `is_whole`, `end` says what is left to be said.

    With `tools` the answer may hold tool calls; without, it holds none, whatever the model says.
    """

    __slots__ = ("_calls", "_count", "_input_bytes", "_is_refusal", "_order", "_stop_reason", "is_counted")

    def __init__(self, *, tools: bool = False) -> None:
        super().__init__()
        self.is_counted = False
        """Whether nothing more is to come but the end of the body."""
        self._calls: dict[int, _Call] | None = {} if tools else None
        self._order: list[_Call] = []
        self._count: TokenCount | None = None
        self._input_bytes = 0
        self._is_refusal = False
        self._stop_reason = ""

    @property
    def is_whole(self) -> bool:
        """Whether the model has said that it has ended."""
        return bool(self._stop_reason)

    def read(self, data: bytes) -> Iterator[ResponderEvent]:
        """As `StreamReader.read`."""
        if self.is_whole:
            self._read_count(data)
        elif data.strip() != _DONE:
            yield from self._read_chunk(_read(data))

    def end(self) -> Iterator[ToolCall | Finish]:
        """The tool calls, if the model waits for their results, and the end of the answer.

        Raises `UpstreamError` where a call can't be read.
        """
        stop_reason = self._stop_reason
        if self._order and stop_reason in {"tool_use", "end_turn"}:  # some servers stop for tools as for anything
            yield from [_whole(call) for call in self._order]
            stop_reason = "tool_use"
        yield Finish(stop_reason, self._count)

    def _read_chunk(self, chunk: _Chunk) -> Iterator[ResponderEvent]:
        if chunk.error:
            raise upstream_error(kind_of(chunk.error))
        for choice in chunk.choices or ():
            if choice.index == 0:  # no other was asked for
                yield from self._take(choice)
        if chunk.usage is not None:
            self._count = _counted(chunk.usage)
            self.is_counted = self.is_whole

    def _read_count(self, data: bytes) -> None:
        """What follows a whole answer; nothing that is wrong with it matters any more."""
        if data.strip() == _DONE:
            self.is_counted = True
            return
        with suppress(*UNREADABLE):
            if usage := _read(data).usage:
                self._count = _counted(usage)
                self.is_counted = True

    def _take(self, choice: _Choice) -> Iterator[ResponderEvent]:
        delta = choice.delta or _Delta()
        if thought := delta.reasoning_content or delta.reasoning:
            yield Reasoning(thought)
        if said := delta.content or delta.refusal:
            yield Text(said)
        self._is_refusal = self._is_refusal or bool(delta.refusal)
        for piece in delta.tool_calls or ():
            if arguments := piece.function and piece.function.arguments:
                yield ToolInput(arguments)
            self._add(piece)
        if reason := choice.finish_reason:
            self._stop_reason = _STOP_REASONS.get(reason, reason)
            if self._is_refusal and reason == "stop":
                self._stop_reason = "refusal"

    def _add(self, piece: _CallPiece) -> None:
        """A piece of a tool call; the first has its id and name. Some servers send calls whole, or without an index."""
        if self._calls is None:
            return
        function = piece.function or _Function()
        index = piece.index or 0
        call = self._calls.get(index)
        if call is None or (piece.id and piece.id != call.id):
            call = self._calls[index] = _Call(piece.id or f"call_{len(self._order) + 1}")
            self._order.append(call)
        call.name = call.name or function.name or ""
        arguments = function.arguments or ""
        call.pieces.append(arguments)
        self._input_bytes += len(arguments.encode())
        check_input_bytes(self._input_bytes)


def kind_of(error: Any) -> str:
    """The kind of an error object, by its name at Anthropic; of one that is not known, its own, or none."""
    if not isinstance(error, dict):
        return ""
    names = [str(name) for field in ("code", "type") if (name := error.get(field))]
    return next((_KINDS[name] for name in names if name in _KINDS), names[-1] if names else "")


def _read(data: bytes) -> _Chunk:
    """What an event says. Raises one of `UNREADABLE`."""
    try:
        return _decode(data)
    except msgspec.ValidationError:
        return msgspec.convert(_mended(msgspec.json.decode(data)), _Chunk)


def _mended(chunk: Any) -> Any:
    """The same without the oddities of some servers: an unreadable count is none, and so is unreadable reasoning."""
    if not isinstance(chunk, dict):
        return chunk
    choices = chunk.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and isinstance(delta := choice.get("delta"), dict):
            choice["delta"] = _mended_delta(delta)
    return chunk if _is_count(chunk.get("usage")) else {**chunk, "usage": None}


def _mended_delta(delta: dict[str, Any]) -> dict[str, Any]:
    """The same with a text for content that comes in parts, of which only those count that are text."""
    thoughts = {name: None for name in _THOUGHTS if not isinstance(delta.get(name), str)}
    content = delta.get("content")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if _is_text(part))
    return {**delta, **thoughts, "content": content}


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _is_count(usage: Any) -> bool:
    try:
        msgspec.convert(usage, _Usage | None)
    except msgspec.ValidationError:
        return False
    return True


def _whole(call: _Call) -> ToolCall:
    said = "".join(call.pieces)
    try:
        return ToolCall(call.id, call.name, decode_input(said) if said.strip() else {})
    except UNREADABLE:
        raise unreadable_input() from None


def _counted(usage: _Usage) -> TokenCount:
    """A count as it is told here: what the cache held is no part of the input."""
    details = usage.prompt_tokens_details
    cached = None if details is None else details.cached_tokens
    return TokenCount(
        input_tokens=max(0, usage.prompt_tokens - (cached or 0)),
        output_tokens=usage.completion_tokens,
        cache_read_input_tokens=cached,
    )
