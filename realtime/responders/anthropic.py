"""Answers with a Claude model, over the Anthropic SDK."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self

from msgspec import structs

from realtime.conversation import Message, ToolResult
from realtime.errors import UpstreamError
from realtime.responders.anthropic_wire import AnswerReader
from realtime.responders.base import Finish, Request, ResponderEvent
from realtime.responders.provider import Provider, drain, system_and_turns

DEFAULT_MODEL = "claude-haiku-5-5"


class AnthropicResponder:
    """A responder over one shared client, which lives as long as the `async with` block.

    `api_key` and `base_url` are what the SDK reads from the environment where they are not given. `thinking` asks the
    model to think, and its reasoning is then streamed; `retry_s` bounds all retries before the first byte;
    `max_connections` is the pool's.
    """

    provider = "anthropic"
    """What traces call it."""

    def __init__(
        self,
        *,
        api_key: str | None = None,
        base_url: str | None = None,
        thinking: bool = False,
        retry_s: float = 30.0,
        max_connections: int = 10_000,
    ) -> None:
        options = {
            "api_key": api_key,
            "base_url": base_url,
            "open_telemetry": {"traces": False, "propagation": False},  # the span is ours, and can't hold content
        }
        self._provider = Provider(
            "anthropic", "AsyncAnthropic", options=options, retry_s=retry_s, max_connections=max_connections
        )
        self._thinking = thinking

    async def __aenter__(self) -> Self:
        await self._provider.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._provider.__aexit__(kind, error, trace)

    async def __call__(self, request: Request) -> AsyncIterator[ResponderEvent]:
        """Stream the model's answer. Raises `UpstreamError`, with a code for each way in which a provider fails.

        What comes in one read is said in one piece.
        """
        parameters = self._parameters(request)
        async with self._provider.stream(
            lambda client: client.messages.with_streaming_response.create(**parameters)
        ) as chunks:
            reader = AnswerReader(tools=bool(request.tools))
            async for chunk in chunks:
                for event in reader.feed(chunk):
                    if isinstance(event, Finish):
                        await drain(chunks)
                        yield event
                        return
                    yield event
        raise UpstreamError("upstream_truncated", "The model's answer broke off before its end.")

    def _parameters(self, request: Request) -> dict[str, Any]:
        system, turns = system_and_turns(request)
        parameters: dict[str, Any] = {
            "model": request.model,
            "max_tokens": request.max_output_tokens,
            "messages": [{"role": turn.role, "content": _content(turn)} for turn in turns],
            "stream": True,
        }
        if system.strip():
            parameters["system"] = system
        if request.tools:
            parameters["tools"] = [structs.asdict(tool) for tool in request.tools]
        if self._thinking:
            parameters["thinking"] = {"type": "adaptive", "display": "summarized"}
        return parameters


def _content(message: Message) -> str | list[dict[str, Any]]:
    """A message as the API takes it; one with tool calls as the model gave it, with the thoughts that led to them."""
    if message.raw:
        return list(message.raw)
    blocks: list[dict[str, Any]] = [_result(result) for result in message.tool_results]
    if not blocks and not message.tool_calls:
        return message.content
    if message.content.strip():
        blocks.append({"type": "text", "text": message.content})
    return blocks + [{"type": "tool_use", **structs.asdict(call)} for call in message.tool_calls]


def _result(result: ToolResult) -> dict[str, Any]:
    block = {"type": "tool_result", "tool_use_id": result.call_id, "content": result.content}
    return block | {"is_error": True} if result.is_error else block
