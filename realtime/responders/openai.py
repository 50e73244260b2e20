"""Answers over chat completions: with OpenAI's models, or those of a compatible server (vLLM, Ollama, llama.cpp, …)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Any, Self

import msgspec

from realtime.conversation import Message, ToolCall, ToolResult
from realtime.errors import UpstreamError
from realtime.responders.base import Request, ResponderEvent
from realtime.responders.openai_wire import CompletionReader, kind_of
from realtime.responders.provider import Provider, drain, system_and_turns, within

DEFAULT_MODEL = "gpt-5.4-mini"
COUNT_S = 2.0
"""How long the count of a whole answer may take to come."""
_OFFICIAL = (".openai.com", ".openai.azure.com")


class OpenAIResponder:
    """A responder over one shared client, which lives as long as the `async with` block.

    `api_key` and `base_url` are what the SDK reads from the environment where they are not given. `retry_s` bounds all
    retries before the first byte; `max_connections` is the pool's.
    """

    provider = "openai"
    """What traces call it."""

    def __init__(
        self,
        *,
        api_key: str | None = None,
        base_url: str | None = None,
        retry_s: float = 30.0,
        max_connections: int = 10_000,
    ) -> None:
        self._provider = Provider(
            "openai",
            "AsyncOpenAI",
            options={"api_key": api_key, "base_url": base_url},
            retry_s=retry_s,
            max_connections=max_connections,
            kind_of=_kind_of_error,
        )

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
        parameters = _parameters(request)
        async with self._provider.stream(
            lambda client: client.chat.completions.with_streaming_response.create(
                **parameters, **_limit(client, request.max_output_tokens)
            )
        ) as chunks:
            reader = CompletionReader(tools=bool(request.tools))
            async for chunk in chunks:
                for event in reader.feed(chunk):
                    yield event
                if reader.is_whole:
                    await _read_rest(reader, chunks)
                    for event in reader.end():
                        yield event
                    return
        raise UpstreamError("upstream_truncated", "The model's answer broke off before its end.")


async def _read_rest(reader: CompletionReader, chunks: AsyncIterator[bytes]) -> None:
    """Read what follows a whole answer: its count, if the server tells it, and the end of the body."""
    await within(COUNT_S, _read_count(reader, chunks))
    await drain(chunks)


async def _read_count(reader: CompletionReader, chunks: AsyncIterator[bytes]) -> None:
    while not reader.is_counted:
        for _ in reader.feed(await anext(chunks)):
            pass


def _kind_of_error(error: Any) -> str | None:
    """What the error's body says of itself, where its status alone would say less."""
    if kind_of({"code": error.code}) == "request_too_large":
        return "request_too_large"
    return "overloaded_error" if error.status_code == 503 else None


def _limit(client: Any, tokens: int) -> dict[str, int]:
    """OpenAI's newer models refuse the limit's old name, and some compatible servers don't know the new one."""
    host = f".{client.base_url.host}"
    return {"max_completion_tokens" if host.endswith(_OFFICIAL) else "max_tokens": tokens}


def _parameters(request: Request) -> dict[str, Any]:
    system, turns = system_and_turns(request)
    said = [sent for turn in turns for sent in _messages(turn)]
    parameters: dict[str, Any] = {
        "model": request.model,
        "messages": [{"role": "system", "content": system}, *said] if system.strip() else said,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if request.tools:
        parameters["tools"] = [
            {
                "type": "function",
                "function": {"name": tool.name, "description": tool.description, "parameters": tool.input_schema},
            }
            for tool in request.tools
        ]
    return parameters


def _messages(message: Message) -> Iterator[dict[str, Any]]:
    """A message as the API takes it: tool results are messages of their own."""
    yield from map(_result, message.tool_results)
    if message.tool_calls:
        calls = [_call(call) for call in message.tool_calls]
        yield {"role": message.role, "content": message.content or None, "tool_calls": calls}
    elif message.content.strip():
        yield {"role": message.role, "content": message.content}


def _call(call: ToolCall) -> dict[str, Any]:
    arguments = msgspec.json.encode(call.input).decode()
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _result(result: ToolResult) -> dict[str, Any]:
    """The API has no sign for what went wrong, so it is said."""
    content = f"Error: {result.content}" if result.is_error else result.content
    return {"role": "tool", "tool_call_id": result.call_id, "content": content}
