"""The provider's own SDK, as the tests of the stand-in use it: what it makes of a stream is the measure."""

import asyncio

import anthropic
from anthropic.types import Message, MessageParam, RawMessageStreamEvent

MESSAGES: list[MessageParam] = [{"role": "user", "content": "Hello?"}]


def open_client(url: str, max_retries: int = 0) -> anthropic.AsyncAnthropic:
    """The real SDK, to be closed by `async with`."""
    http_client = anthropic.DefaultAioHttpClient(trust_env=False)
    return anthropic.AsyncAnthropic(base_url=url, api_key="test", http_client=http_client, max_retries=max_retries)


async def open_stream(
    client: anthropic.AsyncAnthropic, model: str = "any"
) -> anthropic.AsyncStream[RawMessageStreamEvent]:
    """A stream of typed events."""
    return await client.messages.create(model=model, max_tokens=100, messages=MESSAGES, stream=True)


async def ask(client: anthropic.AsyncAnthropic, model: str = "any") -> Message:
    """The whole message, as the SDK puts it together."""
    async with client.messages.stream(model=model, max_tokens=100, messages=MESSAGES) as stream:
        return await stream.get_final_message()


async def read_until(stream: anthropic.AsyncStream[RawMessageStreamEvent], type_: str) -> None:
    """Read up to and with the next event of a type."""
    while (await anext(stream)).type != type_:
        pass


async def turns(count: int = 50) -> None:
    """Let the loop turn, for what might but shouldn't happen."""
    for _ in range(count):
        await asyncio.sleep(0)
