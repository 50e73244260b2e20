"""The stand-in model's other wire format: OpenAI's chat completions. The scenarios are those of `scenarios`. No I/O."""

from collections.abc import Iterator
from itertools import takewhile
from typing import Any, Literal

import msgspec

from tests.support.scenarios import ErrorEvent, Refusal, Stop, ToolUse, Usage
from tests.support.tool_rounds import ToolMismatchError

FINISH_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "refusal": "content_filter",
    "tool_use": "tool_calls",
}
DONE = b"data: [DONE]\n\n"
BAD_JSON = b'data: {"id":"x","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"\n\n'


class Transcript:
    """One answer as chunks, as bytes to send; each call continues it where it stands."""

    def __init__(self, *, model: str, message_id: str, usage: Usage) -> None:
        self._head = {"id": message_id, "object": "chat.completion.chunk", "created": 1_700_000_000, "model": model}
        self._usage = usage
        self._started = False
        self._tokens = 0
        self._calls = 0

    def start(self) -> bytes:
        """The chunk with the role the first time, nothing after that."""
        if self._started:
            return b""
        self._started = True
        return self._chunk({"role": "assistant", "content": ""})

    def text(self, text: str) -> bytes:
        """One delta of the answer."""
        return self._delta({"content": text})

    def thinking(self, thinking: str, _signature: str = "") -> bytes:
        """One delta of the reasoning, as most compatible servers send it."""
        return self._delta({"reasoning_content": thinking})

    def tool_use(self, call: ToolUse) -> Iterator[bytes]:
        """A tool call, delta by delta: the first has its id and name."""
        index, self._calls = self._calls, self._calls + 1
        first = {"id": call.id, "type": "function"}
        for number, piece in enumerate(call.deltas()):
            named = {"name": call.name, "arguments": piece} if number == 0 else {"arguments": piece}
            yield self._delta({"tool_calls": [{"index": index, **(first if number == 0 else {}), "function": named}]})

    def ping(self) -> bytes:
        """A sign of life, which in this format is a comment."""
        return self.start() + b": ping\n\n"

    def bad_json(self) -> bytes:
        """A chunk that is cut-off JSON."""
        return BAD_JSON

    def error(self, error: ErrorEvent) -> bytes:
        """An error in mid-stream."""
        return data({"error": {"type": error.type, "message": error.message, "code": None, "param": None}})

    def stop(self, ending: Stop | Refusal) -> bytes:
        """The finish reason, the count, and `[DONE]`."""
        reason = ending.stop_reason if isinstance(ending, Stop) else "refusal"
        usage = ending.usage if isinstance(ending, Stop) and ending.usage else self._usage
        finish = self._chunk({}, finish_reason=FINISH_REASONS.get(reason, reason))
        return self.start() + finish + data({**self._head, "choices": [], "usage": counts(usage, self._tokens)}) + DONE

    def _delta(self, delta: dict[str, Any]) -> bytes:
        self._tokens += 1
        return self.start() + self._chunk(delta)

    def _chunk(self, delta: dict[str, Any], *, finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return data({**self._head, "choices": [choice], "usage": None})


def counts(usage: Usage, tokens: int) -> dict[str, Any]:
    """A count as this provider tells it, once so many deltas were sent: what the cache held is part of the input."""
    told = tokens if usage.output_tokens is None else usage.output_tokens
    sent = usage.input_tokens + usage.cache_read_input_tokens
    return {
        "prompt_tokens": sent,
        "completion_tokens": told,
        "total_tokens": sent + told,
        "prompt_tokens_details": {"cached_tokens": usage.cache_read_input_tokens},
    }


def data(value: object) -> bytes:
    """One server-sent event as the provider writes it."""
    return b"data: %s\n\n" % msgspec.json.encode(value)


def error_body(type_: str, message: str) -> bytes:
    """The provider's error object, as the body of a response that is no stream."""
    return msgspec.json.encode({"error": {"type": type_, "message": message, "code": None, "param": None}})


def tool_rounds(messages: list[dict[str, Any]]) -> int:
    """How often tools were called so far, and their results given. Raises `ToolMismatchError`."""
    rounds = 0
    due: list[str] = []
    for message in [*messages, {"role": "end"}]:
        if message["role"] == "tool":
            if message["tool_call_id"] not in due:
                raise ToolMismatchError(f"no call of id {message['tool_call_id']}")
            due.remove(message["tool_call_id"])
            continue
        if due:
            raise ToolMismatchError(f"calls {due} have no results")
        due = [call["id"] for call in message.get("tool_calls", [])]
        rounds += bool(due)
    return rounds


def quoted_results(messages: list[dict[str, Any]]) -> str:
    """The results at the end of the conversation, each with the name of its tool, in the order of the results."""
    names = {call["id"]: call["function"]["name"] for message in messages for call in message.get("tool_calls", [])}
    last = list(takewhile(lambda message: message["role"] == "tool", reversed(messages)))
    return " ".join(_quoted(result, names) for result in reversed(last))


def _quoted(result: dict[str, Any], names: dict[str, str]) -> str:
    verb: Literal["failed", "said"] = "failed" if result["content"].startswith("Error: ") else "said"
    return f"{names[result['tool_call_id']]} {verb}: {result['content'].removeprefix('Error: ')}"
