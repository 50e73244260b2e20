"""A model's provider over its SDK: one shared client, retries before the first byte, and the answer's raw bytes.

The SDK builds the request and keeps the pool and the errors; its stream is taken raw, because its typed event objects
cost more per token than everything else together. Retries are ours: the SDK would honour a `Retry-After` of any length.
Both SDKs that are used here are made by one generator, and have the same names.
"""

from __future__ import annotations

import asyncio
import importlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from email.utils import parsedate_to_datetime
from functools import partial
from itertools import takewhile
from types import ModuleType, TracebackType
from typing import Any, Self

from realtime.conversation import Message, joined
from realtime.errors import InvalidRequest, UpstreamError
from realtime.responders.base import Request
from realtime.responders.reading import upstream_error

FIRST_RETRY_S = 0.5
MAX_ATTEMPTS = 3
CONNECT_TIMEOUT_S = 10.0
DRAIN_S = 0.05
"""How long the connection may take to end after the answer; if it does in time it can be used again."""

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

Create = Callable[[Any], AbstractAsyncContextManager[Any]]
"""Makes, of the SDK's client, the call whose answer is streamed."""


class Provider:
    """The client, which lives as long as the `async with` block.

    `client` is the name of its class in the module `sdk`, and `options` are for that. `retry_s` bounds all retries
    before the first byte; `max_connections` is the pool's. `kind_of` may know better than its status what an error is.
    """

    def __init__(
        self,
        sdk: str,
        client: str,
        *,
        options: Mapping[str, Any],
        retry_s: float,
        max_connections: int,
        kind_of: Callable[[Any], str | None] = lambda _error: None,
    ) -> None:
        self._make_client = partial(_make_client, sdk, client, options, max_connections)
        self._retry_s = retry_s
        self._kind_of = kind_of
        self._client: Any = None
        self._sdk: Any = None
        self._broken: tuple[type[Exception], ...] = ()

    async def __aenter__(self) -> Self:
        self._sdk, self._client = await asyncio.to_thread(self._make_client)
        self._broken = _transport_errors()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    @asynccontextmanager
    async def stream(self, create: Create) -> AsyncIterator[AsyncIterator[bytes]]:
        """The body of an answer as it comes; leaving the block closes the model call.

        Raises `UpstreamError`, with a code for each way in which a provider fails.
        """
        call = await self._call(create)
        try:
            yield call.http_response.aiter_bytes()
        except self._broken as error:
            raise UpstreamError("upstream_disconnected", "The connection to the model was lost.") from error
        finally:
            await call.close()

    async def _call(self, create: Create) -> Any:
        """Call the model; returns once it answers. What may be retried is, while nothing was received."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._retry_s
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return await create(self._client).__aenter__()
            except self._sdk.APIError as error:
                delay_s = _retry_after_s(error, attempt)
                if attempt == MAX_ATTEMPTS or delay_s is None or loop.time() + delay_s > give_up_at:
                    raise self._told(error) from error
                await asyncio.sleep(delay_s)
            except self._broken as error:
                raise UpstreamError("upstream_disconnected", "The connection to the model was lost.") from error
        raise AssertionError("unreachable")

    def _told(self, error: Any) -> UpstreamError:
        if isinstance(error, self._sdk.APIStatusError):
            failure = upstream_error(self._kind_of(error) or _TYPE_OF_STATUS.get(error.status_code, ""))
            failure.answered = error.status_code
            return failure
        return UpstreamError("upstream_unreachable", "The model's provider can't be reached.")


def system_and_turns(request: Request) -> tuple[str, list[Message]]:
    """What the model is told beforehand, as one text, and the conversation proper, which the user begins.

    Raises `InvalidRequest` where there is nothing to respond to.
    """
    turns = [message for message in request.messages if message.role != "system" and _says_something(message)]
    greeting = [message.content for message in takewhile(_is_greeting, turns)]
    system = joined([request.instructions, *_system(request.messages), *map(_as_greeting, greeting)])
    if not turns[len(greeting) :]:
        raise InvalidRequest("empty_conversation", "There is nothing to respond to yet.")
    return system, turns[len(greeting) :]


async def drain(chunks: AsyncIterator[bytes]) -> None:
    """Read the end of the body, so that the connection goes back to the pool; not worth an error, nor a wait."""
    await within(DRAIN_S, _read_all(chunks))


async def within(seconds: float, reading: Awaitable[None]) -> None:
    """Read what follows a whole answer, for so long at most; whatever goes wrong with it does not matter any more."""
    try:
        async with asyncio.timeout(seconds):
            await reading
    except Exception:  # the answer is whole already
        return


async def _read_all(chunks: AsyncIterator[bytes]) -> None:
    async for _ in chunks:
        pass


def _make_client(name: str, client: str, options: Mapping[str, Any], max_connections: int) -> tuple[ModuleType, Any]:
    """The SDK and the shared client. Importing an SDK takes seconds: this runs in a thread."""
    import httpx2

    from realtime.responders.pool import make_session

    sdk = importlib.import_module(name)
    timeout = httpx2.Timeout(None, connect=CONNECT_TIMEOUT_S, pool=CONNECT_TIMEOUT_S)
    limits = httpx2.Limits(max_connections=max_connections, max_keepalive_connections=100)
    pool = sdk.DefaultAioHttpClient(timeout=timeout, limits=limits)
    transport = pool._transport
    transport.client = partial(make_session, max_connections, transport.ssl_context)
    return sdk, getattr(sdk, client)(**options, http_client=pool, timeout=timeout, max_retries=0)


def _transport_errors() -> tuple[type[Exception], ...]:
    """The errors of the SDKs' transports: they are passed on as they are once an answer has begun."""
    import aiohttp
    import httpx2

    return httpx2.HTTPError, httpx2.StreamError, aiohttp.ClientError, OSError


def _retry_after_s(error: Any, attempt: int) -> float | None:
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
    """Providers refuse a message without a word in it."""
    return bool(message.content.strip() or message.tool_calls or message.tool_results)


def _is_greeting(message: Message) -> bool:
    return message.role == "assistant" and not message.tool_calls


def _as_greeting(content: str) -> str:
    """Providers, or their models' templates, want the user to speak first; what the assistant said before that is told
    as an instruction."""
    return f"You began this conversation by saying:\n{content}"
