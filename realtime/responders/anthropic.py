"""Answers with a Claude model, over the Anthropic SDK.

The SDK builds the request and keeps the pool and the errors; its stream is taken raw and read by `anthropic_wire`,
because its typed event objects cost more per token than everything else together. Retries are ours: the SDK would
honour a `Retry-After` of any length.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from email.utils import parsedate_to_datetime
from functools import partial
from itertools import takewhile
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from msgspec import structs

from realtime.conversation import Message, ToolResult, joined
from realtime.errors import InvalidRequest, UpstreamError
from realtime.responders.anthropic_wire import AnswerReader, upstream_error
from realtime.responders.base import Finish, Request, ResponderEvent

if TYPE_CHECKING:
    import anthropic

DEFAULT_MODEL = "claude-haiku-5-5"
FIRST_RETRY_S = 0.5
MAX_ATTEMPTS = 3
CONNECT_TIMEOUT_S = 10.0
DRAIN_S = 0.05
"""How long the connection may take to end after `message_stop`; if it does in time it can be used again."""


_TYPE_OF_STATUS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    529: "overloaded_error",
}
_RETRIED = frozenset({408, 409, 429})


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
        self._address = (api_key, base_url)
        self._thinking = thinking
        self._retry_s = retry_s
        self._max_connections = max_connections
        self._client: anthropic.AsyncAnthropic

    async def __aenter__(self) -> Self:
        self._client = await asyncio.to_thread(_make_client, self._max_connections, self._address)
        self._sdk, self._broken = _loaded()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    async def __call__(self, request: Request) -> AsyncIterator[ResponderEvent]:
        """Stream the model's answer. Raises `UpstreamError`, with a code for each way in which a provider fails.

        What comes in one read is said in one piece.
        """
        async with self._stream(request) as chunks:
            reader = AnswerReader(tools=bool(request.tools))
            async for chunk in chunks:
                for event in reader.feed(chunk):
                    if isinstance(event, Finish):
                        await _drain(chunks)
                        yield event
                        return
                    yield event
        raise UpstreamError("upstream_truncated", "The model's answer broke off before its end.")

    @asynccontextmanager
    async def _stream(self, request: Request) -> AsyncIterator[AsyncIterator[bytes]]:
        """The body of the answer to `request` as it comes; leaving the block closes the model call."""
        call = await self._call(self._parameters(request))
        try:
            yield call.http_response.aiter_bytes()
        except self._broken as error:
            raise UpstreamError("upstream_disconnected", "The connection to the model was lost.") from error
        finally:
            await call.close()

    async def _call(self, parameters: dict[str, Any]) -> Any:
        """Call the model; returns once it answers. What may be retried is, while nothing was received."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._retry_s
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return await self._client.messages.with_streaming_response.create(**parameters).__aenter__()
            except self._sdk.APIError as error:
                delay_s = _retry_after_s(error, attempt)
                if attempt == MAX_ATTEMPTS or delay_s is None or loop.time() + delay_s > give_up_at:
                    raise self._told(error) from error
                await asyncio.sleep(delay_s)
            except self._broken as error:
                raise UpstreamError("upstream_disconnected", "The connection to the model was lost.") from error
        raise AssertionError("unreachable")

    def _told(self, error: anthropic.APIError) -> UpstreamError:
        if isinstance(error, self._sdk.APIStatusError):
            return upstream_error(_TYPE_OF_STATUS.get(error.status_code, ""))
        return UpstreamError("upstream_unreachable", "The model's provider can't be reached.")

    def _parameters(self, request: Request) -> dict[str, Any]:
        turns = [message for message in request.messages if message.role != "system" and _says_something(message)]
        greeting = [message.content for message in takewhile(_is_greeting, turns)]
        system = joined([request.instructions, *_system(request.messages), *map(_as_greeting, greeting)])
        if not turns[len(greeting) :]:
            raise InvalidRequest("empty_conversation", "There is nothing to respond to yet.")
        parameters: dict[str, Any] = {
            "model": request.model,
            "max_tokens": request.max_output_tokens,
            "messages": [{"role": turn.role, "content": _content(turn)} for turn in turns[len(greeting) :]],
            "stream": True,
        }
        if system.strip():
            parameters["system"] = system
        if request.tools:
            parameters["tools"] = [structs.asdict(tool) for tool in request.tools]
        if self._thinking:
            parameters["thinking"] = {"type": "adaptive", "display": "summarized"}
        return parameters


def _loaded() -> tuple[ModuleType, tuple[type[Exception], ...]]:
    """The SDK, and the errors of its transports: it passes those on as they are once an answer has begun."""
    import aiohttp
    import anthropic
    import httpx2

    return anthropic, (httpx2.HTTPError, httpx2.StreamError, aiohttp.ClientError, OSError)


def _make_client(max_connections: int, address: tuple[str | None, str | None]) -> anthropic.AsyncAnthropic:
    """The shared client. Importing the SDK takes seconds: this runs in a thread."""
    import anthropic
    import httpx2

    from realtime.responders.pool import make_session

    timeout = httpx2.Timeout(None, connect=CONNECT_TIMEOUT_S, pool=CONNECT_TIMEOUT_S)
    limits = httpx2.Limits(max_connections=max_connections, max_keepalive_connections=100)
    pool = anthropic.DefaultAioHttpClient(timeout=timeout, limits=limits)
    transport: Any = pool._transport
    transport.client = partial(make_session, max_connections, transport.ssl_context)
    api_key, base_url = address
    return anthropic.AsyncAnthropic(
        api_key=api_key,
        base_url=base_url,
        http_client=pool,
        timeout=timeout,
        max_retries=0,
        open_telemetry={"traces": False, "propagation": False},  # the span is ours, and can't hold content
    )


async def _drain(chunks: AsyncIterator[bytes]) -> None:
    """Read the end of the body, so that the connection goes back to the pool; not worth an error, nor a wait."""
    try:
        async with asyncio.timeout(DRAIN_S):
            async for _ in chunks:
                pass
    except Exception:  # the answer is whole already
        return


def _retry_after_s(error: anthropic.APIError, attempt: int) -> float | None:
    """How long to wait before another attempt; `None` where another is no use.

    As the provider says by `Retry-After` or `x-should-retry`; else twice as long each time, with jitter.
    """
    backoff_s: float = FIRST_RETRY_S * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
    response = getattr(error, "response", None)
    if response is None:
        return backoff_s
    told = response.headers.get("x-should-retry")
    if told == "false" or (told != "true" and response.status_code not in _RETRIED and response.status_code < 500):
        return None
    asked_s = _asked_delay_s(response.headers)
    return backoff_s if asked_s is None else max(0.0, asked_s)


def _asked_delay_s(headers: Mapping[str, str]) -> float | None:
    """What the provider asks for: milliseconds, seconds or a date; `None` where it says nothing that can be read."""
    with suppress(KeyError, ValueError):
        return float(headers["retry-after-ms"]) / 1000
    with suppress(KeyError, ValueError):
        return float(headers["retry-after"])
    with suppress(KeyError, ValueError):
        return parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time()
    return None


def _system(messages: Sequence[Message]) -> list[str]:
    return [message.content for message in messages if message.role == "system"]


def _says_something(message: Message) -> bool:
    """The API refuses a message without a word in it."""
    return bool(message.content.strip() or message.tool_calls or message.tool_results)


def _is_greeting(message: Message) -> bool:
    return message.role == "assistant" and not message.tool_calls


def _as_greeting(content: str) -> str:
    """The API wants the user to speak first; what the assistant said before that is told as an instruction."""
    return f"You began this conversation by saying:\n{content}"


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
