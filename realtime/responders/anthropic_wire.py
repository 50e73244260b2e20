"""Reads the provider's stream: bytes in, what the model said out. No I/O.

The structs know the few fields that are needed; events and pieces of kinds that are not known yet are passed over.
"""

from __future__ import annotations

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


class _Usage(Struct):
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None


class _Message(Struct):
    usage: _Usage


class _Error(Struct):
    type: str = ""


class _Delta(Struct):
    """Of a `content_block_delta` or `_start` what it says or what it is, of a `message_delta` the stop reason."""

    type: str | None = None
    text: str = ""
    thinking: str = ""
    partial_json: str = ""
    signature: str = ""
    data: str = ""
    id: str = ""
    name: str = ""
    input: dict[str, Any] | None = None
    stop_reason: str | None = None


class _Event(Struct):
    """Any event of the stream; one struct for all, so that kinds that are not known yet pass."""

    type: str
    delta: _Delta | None = None
    content_block: _Delta | None = None
    message: _Message | None = None
    usage: _Usage | None = None
    error: _Error | None = None


_decode = msgspec.json.Decoder(_Event).decode

_KINDS = frozenset(
    {
        "content_block_delta",
        "content_block_start",
        "content_block_stop",
        "message_start",
        "message_delta",
        "message_stop",
        "error",
    }
)
_PIECES = frozenset(
    {
        "text_delta",
        "text",
        "thinking_delta",
        "thinking",
        "signature_delta",
        "redacted_thinking",
        "input_json_delta",
        "tool_use",
        None,
    }
)
"""What a `_Delta` may be; `None` is that of a `message_delta`."""


class _Blocks:
    """The blocks of one answer put together: its tool calls, and itself as the provider wants it back (`raw`).

    `unread` is how many tool calls have begun and were not, or not yet, read to their end.
    """

    __slots__ = ("_input_bytes", "_open", "_pieces", "raw", "unread")

    def __init__(self) -> None:
        self.raw: list[dict[str, Any]] = []
        self.unread = 0
        self._open: _Delta | None = None
        self._pieces: list[str] = []
        self._input_bytes = 0

    def start(self, block: _Delta) -> None:
        """A block begins, perhaps with a part of what it says."""
        self._open = block
        self._pieces = [block.text or block.thinking]
        self.unread += block.type == "tool_use"

    def add(self, piece: _Delta) -> None:
        """The next piece of the block. Raises `UpstreamError` where the inputs grow beyond what is allowed."""
        if self._open is None:
            return
        self._open.signature = piece.signature or self._open.signature
        self._pieces.append(piece.text or piece.thinking or piece.partial_json)
        self._input_bytes += len(piece.partial_json.encode())
        check_input_bytes(self._input_bytes)

    def end(self) -> ToolCall | None:
        """The block ends; returns the tool call that it was. One that can't be read stays `unread`."""
        block, self._open = self._open, None
        if block is None:
            return None
        said = "".join(self._pieces)
        match block.type:
            case "text" if said.strip():  # the provider refuses one without a word in it
                self.raw.append({"type": "text", "text": said})
            case "thinking":
                self.raw.append({"type": "thinking", "thinking": said, "signature": block.signature})
            case "redacted_thinking":
                self.raw.append({"type": "redacted_thinking", "data": block.data})
            case "tool_use":
                return self._call(block, said)
            case _:
                pass
        return None

    def _call(self, block: _Delta, said: str) -> ToolCall | None:
        try:
            call = ToolCall(block.id, block.name, decode_input(said) if said else block.input or {})
        except UNREADABLE:
            return None
        self.unread -= 1
        self.raw.append({"type": "tool_use", "id": call.id, "name": call.name, "input": call.input})
        return call


class AnswerReader(StreamReader):
    """One answer's stream, fed with its bytes, split anywhere. It is whole once `feed` has given a `Finish`.

    With `tools` the answer may hold tool calls; without, it holds none, whatever the model says.
    """

    __slots__ = ("_blocks", "_count", "_final", "_stop_reason")

    def __init__(self, *, tools: bool = False) -> None:
        super().__init__()
        self._blocks = _Blocks() if tools else None
        self._count = TokenCount(input_tokens=0, output_tokens=0)
        self._final = False
        self._stop_reason = "end_turn"

    def read(self, data: bytes) -> tuple[ResponderEvent, ...]:
        """As `StreamReader.read`; an event says one thing at most."""
        event = _read(data)
        said = None if event is None else self._take(event)
        return () if said is None else (said,)

    def _take(self, event: _Event) -> ResponderEvent | None:
        match event.type:
            case "content_block_start" if event.content_block is not None:
                if self._blocks is not None:
                    self._blocks.start(event.content_block)
                return _said(event.content_block)
            case "content_block_delta" if event.delta is not None:
                if self._blocks is not None:
                    self._blocks.add(event.delta)
                return _said(event.delta)
            case "content_block_stop" if self._blocks is not None:
                return self._blocks.end()
            case "message_start" if event.message is not None:
                self._count = _counted(self._count, event.message.usage)
                return self._count
            case "message_delta":
                self._count = _counted(self._count, event.usage)
                self._final = self._final or event.usage is not None
                self._stop_reason = (event.delta and event.delta.stop_reason) or self._stop_reason
            case "error":
                raise upstream_error(event.error.type if event.error else "")
            case "message_stop":
                return self._finish()
            case _:
                pass
        return None

    def _finish(self) -> Finish:
        """The end. Tool calls that were cut off matter only if the model waits for their results."""
        count = self._count if self._final else None
        if self._blocks is None or self._stop_reason != "tool_use":
            return Finish(self._stop_reason, count)
        if self._blocks.unread:
            raise unreadable_input()
        return Finish("tool_use", count, tuple(self._blocks.raw))


def _read(data: bytes) -> _Event | None:
    """The event in `data`; `None` for one of a kind that is not known yet and has fields of other types."""
    try:
        return _decode(data)
    except msgspec.ValidationError:
        if _is_new(msgspec.json.decode(data)):
            return None
        raise


def _is_new(event: Any) -> bool:
    if not isinstance(event, dict) or not isinstance(event.get("type"), str):
        return False
    pieces = [piece for name in ("delta", "content_block") if isinstance(piece := event.get(name), dict)]
    return event["type"] not in _KINDS or any(piece.get("type") not in _PIECES for piece in pieces)


def _said(piece: _Delta) -> Text | Reasoning | ToolInput | None:
    """What a piece of the answer says, if it is of a kind that says something."""
    if piece.type not in _PIECES:
        return None
    if piece.text:
        return Text(piece.text)
    if piece.thinking:
        return Reasoning(piece.thinking)
    return ToolInput(piece.partial_json) if piece.partial_json else None


def _counted(count: TokenCount, usage: _Usage | None) -> TokenCount:
    """`count`, with what `usage` tells anew: its counts are cumulative, and some are only told at the start."""
    if usage is None:
        return count
    told = {name: value for name in usage.__struct_fields__ if (value := getattr(usage, name)) is not None}
    return msgspec.structs.replace(count, **told)
