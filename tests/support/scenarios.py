"""What the stand-in model answers: steps, the scenarios made of them, and the provider's events they become.

No I/O in here. A scenario is a list of steps, played in order; `model_server` plays it to one request.

The response's headers go out with the first step that has something to say. A `Gate`, `Pause`, `Stall`, `Cut`
or `Reset` in front of it therefore acts on a request that has seen no header yet; `Start()` sends the headers
and `message_start` alone. When the steps are over, the HTTP body ends cleanly. So a scenario with `Stop` is a
proper answer, and one without it is the truncated answer that looks complete.

A model that calls tools is asked again, with their results: `Scenario.then` is its answer to that, and `tool_calls`
makes such a scenario.
"""

import asyncio
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import msgspec

StopReason: TypeAlias = Literal[
    "end_turn",
    "max_tokens",
    "stop_sequence",
    "tool_use",
    "pause_turn",
    "refusal",
    "model_context_window_exceeded",
]


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """The token counts that an answer reports; `output_tokens=None` counts the deltas that were sent."""

    input_tokens: int = 10
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    output_tokens: int | None = None

    def after(self, tokens: int) -> dict[str, int]:
        """The `usage` object of an event, once so many deltas were sent."""
        counts: dict[str, int] = msgspec.structs.asdict(self)
        return counts if self.output_tokens is not None else counts | {"output_tokens": tokens}


class Start(msgspec.Struct, frozen=True):
    """Send the headers and `message_start`, nothing else."""


class Text(msgspec.Struct, frozen=True):
    """One `text_delta`, in a text block that is opened if need be; counts as one token."""

    text: str


class Thinking(msgspec.Struct, frozen=True):
    """One `thinking_delta`; counts as one token. `signature` is sent when its block ends."""

    thinking: str
    signature: str = "c2lnbmF0dXJl"


class ToolUse(msgspec.Struct, frozen=True):
    """One tool call, in a block of its own: its input in so many `input_json_delta`, after an empty one as the
    provider sends it; each counts as a token.

    An input that is a `str` is sent as it is, whether it is JSON or not. Calls of one answer need different ids.
    """

    name: str
    input: Mapping[str, Any] | str
    id: str = "toolu_1"
    pieces: int = 3

    def deltas(self) -> list[str]:
        """The input as it is sent: nothing, and then JSON, cut into pieces."""
        text = self.input if isinstance(self.input, str) else msgspec.json.encode(self.input).decode()
        return ["", *(split(text, tokens=min(self.pieces, len(text))) if text else [])]


class QuoteResults(msgspec.Struct, frozen=True):
    """One `text_delta` that quotes the tool results of the request: `get_note said: …` for each, errors as `failed`."""


class Paced(msgspec.Struct, frozen=True):
    """One `text_delta` a piece, the nth sent n / `rate_per_s` seconds after the first, without drift."""

    texts: Sequence[str]
    rate_per_s: float


class Ping(msgspec.Struct, frozen=True):
    """One `ping` event."""


class PingsOnly(msgspec.Struct, frozen=True):
    """A `ping` now and then every `interval_s` seconds, for ever."""

    interval_s: float = 0.1


class Pause(msgspec.Struct, frozen=True):
    """Nothing for `seconds`. To wait for the test rather than for a clock, use `Gate`."""

    seconds: float


class Gate:
    """Wait here until the test opens it. Once open it stays open, for every stream that comes by."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def open(self) -> None:
        """Let all streams pass. Idempotent."""
        self._event.set()

    async def passed(self) -> None:
        """Return when the gate is open. Safe to cancel."""
        await self._event.wait()


class Stall(msgspec.Struct, frozen=True):
    """Nothing more, with the connection open, until the peer leaves."""


class Raw(msgspec.Struct, frozen=True):
    """These bytes into the body as they are; no `message_start` is sent for them."""

    data: bytes


class BadJson(msgspec.Struct, frozen=True):
    """A `content_block_delta` whose data is cut-off JSON."""


class ErrorEvent(msgspec.Struct, frozen=True):
    """The provider's `error` event, inside a response whose status was 200."""

    type: str = "overloaded_error"
    message: str = "Overloaded"


class Stop(msgspec.Struct, frozen=True):
    """The end of the message: `message_delta` and `message_stop`; `usage=None` is the scenario's."""

    stop_reason: StopReason = "end_turn"
    usage: Usage | None = None


class Refusal(msgspec.Struct, frozen=True):
    """The end of the message with stop reason `refusal` and its details."""

    category: str | None = None
    explanation: str | None = None


class KeepOpenAfterStop(msgspec.Struct, frozen=True):
    """`Stop`, and then neither the body nor the connection ends until the peer leaves."""

    stop: Stop = Stop()


class Cut(msgspec.Struct, frozen=True):
    """Close the connection with a FIN, in the middle of the HTTP body."""


class Reset(msgspec.Struct, frozen=True):
    """Close the connection with an RST."""


class HttpError(msgspec.Struct, frozen=True):
    """Answer with this status instead of a stream.

    Only the scenario's first `times` requests are answered so, the later ones go on with the next step; None
    answers all so. `body=None` is the provider's error object for the status.
    """

    status: int
    headers: Mapping[str, str] = {}
    body: bytes | None = None
    times: int | None = None

    @property
    def type(self) -> str:
        """What the provider calls the status."""
        return _ERROR_TYPES.get(self.status, "api_error")

    @property
    def message(self) -> str:
        """What the provider's error object says."""
        return f"stand-in error {self.status}"


_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}

Step: TypeAlias = (
    Start
    | Text
    | Thinking
    | ToolUse
    | QuoteResults
    | Paced
    | Ping
    | PingsOnly
    | Pause
    | Gate
    | Stall
    | Raw
    | BadJson
    | ErrorEvent
    | Stop
    | Refusal
    | KeepOpenAfterStop
    | Cut
    | Reset
    | HttpError
)


class Scenario(msgspec.Struct, frozen=True, eq=False):
    """What is answered to every request for one model.

    `bytes_per_write` sends the body in pieces of so many bytes, each its own HTTP chunk and its own write, so
    that they cut through lines and UTF-8 sequences; None sends each event in one. Compared by identity.

    `then` is what is answered instead to a request that ends with the results of this scenario's tool calls; it may
    call tools itself.
    """

    steps: Sequence[Step]
    usage: Usage = Usage()
    bytes_per_write: int | None = None
    then: "Scenario | None" = None

    def after(self, rounds: int) -> "Scenario":
        """The answer after so many rounds of tool calls and results; the last one there is for those beyond it."""
        return self.then.after(rounds - 1) if rounds and self.then else self


def answer(
    text: str,
    *,
    tokens: int | None = None,
    rate_per_s: float | None = None,
    usage: Usage = Usage(),  # noqa: B008 - frozen
    bytes_per_write: int | None = None,
) -> Scenario:
    """A proper answer: `text` in so many deltas (None: one a word), at a rate or at once, then `Stop`."""
    pieces = split(text, tokens=tokens)
    said: list[Step] = [Paced(pieces, rate_per_s)] if rate_per_s else [Text(piece) for piece in pieces]
    return Scenario([*said, Stop()], usage=usage, bytes_per_write=bytes_per_write)


def tool_calls(*calls: ToolUse, says: str = "", then: Scenario | None = None) -> Scenario:
    """An answer that says something, perhaps, and calls tools; then one that quotes their results, unless `then` is
    given."""
    said: list[Step] = [Text(piece) for piece in split(says)]
    quote = Scenario([QuoteResults(), Stop()])
    return Scenario([*said, *calls, Stop("tool_use")], then=then or quote)


def split(text: str, *, tokens: int | None = None) -> list[str]:
    """`text` in exactly `tokens` pieces of about the same length (None: one a word), none of them empty.

    Raises:
        ValueError: `text` has fewer than `tokens` characters.
    """
    if tokens is None:
        return re.findall(r"\S+\s*|\s+", text)
    if tokens > len(text):
        raise ValueError(f"cannot split {len(text)} characters into {tokens} tokens")
    return [text[a:b] for a, b in pairwise(len(text) * n // tokens for n in range(tokens + 1))]


def faults() -> dict[str, Scenario]:
    """A scenario for each fault, by a name that can be asked for as the model."""
    partial: list[Step] = [Thinking("Let me see. "), Text("The first "), Text("half")]
    return {
        "truncated": Scenario(partial),
        "cut": Scenario([*partial, Cut()]),
        "reset": Scenario([*partial, Reset()]),
        "stall": Scenario([*partial, Stall()]),
        "pings-only": Scenario([*partial, PingsOnly()]),
        "bad-json": Scenario([*partial, BadJson()]),
        "error-event": Scenario([*partial, ErrorEvent()]),
        "refusal": Scenario([*partial, Refusal("cyber", "Not this.")]),
        "keep-open": Scenario([*partial, KeepOpenAfterStop()]),
        "no-headers": Scenario([Stall()]),
        "reset-before-headers": Scenario([Reset()]),
        "http-429": Scenario([HttpError(429, {"retry-after": "1"})]),
        "http-500": Scenario([HttpError(500)]),
        "http-529": Scenario([HttpError(529)]),
        "http-529-once": Scenario([HttpError(529, times=1), *partial, Stop()]),
    }


class Transcript:
    """One answer in the events of the Messages API, as bytes to send; each call continues it where it stands."""

    def __init__(self, *, model: str, message_id: str, usage: Usage) -> None:
        self._model = model
        self._message_id = message_id
        self._usage = usage
        self._started = False
        self._tokens = 0
        self._index = 0
        self._signature: str | None = None
        self._block: Literal["text", "thinking", "tool_use"] | None = None

    def start(self) -> bytes:
        """`message_start` the first time, nothing after that."""
        if self._started:
            return b""
        self._started = True
        message: dict[str, Any] = {
            "id": self._message_id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "stop_details": None,
            "usage": self._usage.after(0) | {"output_tokens": 1, "service_tier": "standard"},
        }
        return event("message_start", message=message)

    def text(self, text: str) -> bytes:
        """One text delta."""
        opening = self._enter("text", {"type": "text", "text": ""})
        return opening + self._delta({"type": "text_delta", "text": text})

    def thinking(self, thinking: str, signature: str) -> bytes:
        """One thinking delta; `signature` is sent when its block is closed."""
        opening = self._enter("thinking", {"type": "thinking", "thinking": "", "signature": ""})
        self._signature = signature
        return opening + self._delta({"type": "thinking_delta", "thinking": thinking})

    def tool_use(self, call: ToolUse) -> Iterator[bytes]:
        """A tool call, delta by delta: with the first its block begins, with the last it ends."""
        opening = self.start() + self._leave()
        opening += self._enter("tool_use", {"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
        *pieces, last = call.deltas()
        for piece in pieces:
            yield opening + self._delta({"type": "input_json_delta", "partial_json": piece})
            opening = b""
        yield opening + self._delta({"type": "input_json_delta", "partial_json": last}) + self._leave()

    def ping(self) -> bytes:
        """A sign of life."""
        return self.start() + PING

    def bad_json(self) -> bytes:
        """A delta whose data is cut-off JSON."""
        return BAD_JSON

    def error(self, error: ErrorEvent) -> bytes:
        """An error in mid-stream."""
        return event("error", error={"type": error.type, "message": error.message})

    def stop(self, ending: Stop | Refusal) -> bytes:
        """The open block closed, `message_delta` and `message_stop`."""
        delta: dict[str, Any] = {"stop_reason": "refusal", "stop_sequence": None, "stop_details": None}
        usage = self._usage
        if isinstance(ending, Stop):
            delta["stop_reason"] = ending.stop_reason
            usage = ending.usage or usage
        else:
            details = {"type": "refusal", "category": ending.category, "explanation": ending.explanation}
            delta["stop_details"] = details
        counts = usage.after(self._tokens)
        parts = (
            self.start(),
            self._leave(),
            event("message_delta", delta=delta, usage=counts),
            event("message_stop"),
        )
        return b"".join(parts)

    def _enter(self, block: Literal["text", "thinking", "tool_use"], empty: dict[str, Any]) -> bytes:
        opening = self.start()
        if block != self._block:
            opening += self._leave() + event("content_block_start", index=self._index, content_block=empty)
        self._block = block
        return opening

    def _leave(self) -> bytes:
        if self._block is None:
            return b""
        closing = event("content_block_stop", index=self._index)
        if self._block == "thinking":
            closing = self._event_delta({"type": "signature_delta", "signature": self._signature}) + closing
        self._block = None
        self._index += 1
        return closing

    def _delta(self, delta: dict[str, Any]) -> bytes:
        self._tokens += 1
        return self._event_delta(delta)

    def _event_delta(self, delta: dict[str, Any]) -> bytes:
        return event("content_block_delta", index=self._index, delta=delta)


def event(type_: str, **fields: object) -> bytes:
    """One server-sent event as the provider writes it."""
    data = msgspec.json.encode({"type": type_, **fields})
    return b"event: %s\ndata: %s\n\n" % (type_.encode(), data)


def error_body(type_: str, message: str) -> bytes:
    """The provider's error object, as the body of a response that is no stream."""
    return msgspec.json.encode({"type": "error", "error": {"type": type_, "message": message}})


PING = event("ping")
BAD_JSON = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"type":"text_d\n\n'
