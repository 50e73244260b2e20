"""The stand-in's chat completions are what OpenAI's own SDK takes for such."""

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion

from tests.support.model_server import ModelServer
from tests.support.scenarios import ErrorEvent, HttpError, Refusal, Scenario, Stop, Text, Thinking, Usage, tool_calls
from tests.support.scenarios import ToolUse as Calls

MESSAGES: Any = [{"role": "user", "content": "Hello?"}]


@pytest.fixture
async def server() -> AsyncIterator[ModelServer]:
    """The stand-in."""
    async with ModelServer() as running:
        yield running


async def ask(server: ModelServer, messages: Any = MESSAGES) -> ChatCompletion:
    """The whole answer, as the SDK puts it together from the stream."""
    pool = openai.DefaultAioHttpClient(trust_env=False)
    base_url = f"{server.url}/v1"
    async with openai.AsyncOpenAI(base_url=base_url, api_key="test", http_client=pool, max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="any", messages=messages, stream=True, stream_options={"include_usage": True}
        )
        state: Any = ChatCompletionStreamState()
        async for chunk in stream:
            state.handle_chunk(chunk)
        whole: ChatCompletion = state.get_final_completion()
        return whole


async def test_answer_has_its_text_its_end_and_its_count(server: ModelServer) -> None:
    """However it is split on the way."""
    usage = Usage(cache_read_input_tokens=7)
    server.default = Scenario([Thinking("Hm"), Text("Grüße, "), Text("世界"), Stop()], usage, bytes_per_write=3)
    whole = await ask(server)
    assert whole.choices[0].message.content == "Grüße, 世界"
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (17, 3, 20)


@pytest.mark.parametrize(("end", "reason"), [(Stop("max_tokens"), "length"), (Refusal(), "content_filter")])
async def test_ends_have_the_provider_s_names(server: ModelServer, end: Stop | Refusal, reason: str) -> None:
    """The SDK raises for these two where it puts an answer together, and its error names them."""
    server.default = Scenario([Text("Well"), end])
    with pytest.raises(openai.LengthFinishReasonError if reason == "length" else openai.ContentFilterFinishReasonError):
        await ask(server)


async def test_tool_calls_are_put_together(server: ModelServer) -> None:
    """Two of them, in pieces; and the results lead to what comes then."""
    server.default = tool_calls(Calls("a", {"x": "é"}, id="c1"), Calls("b", {}, id="c2"), says="Let me see.")
    message = (await ask(server)).choices[0].message
    called = [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or ()]  # type: ignore[union-attr]
    assert called == [("c1", "a", '{"x":"é"}'), ("c2", "b", "{}")]
    results = [{"role": "tool", "tool_call_id": "c1", "content": "one"}]
    results += [{"role": "tool", "tool_call_id": "c2", "content": "Error: two"}]
    sent = [*MESSAGES, message.model_dump(exclude_none=True), *results]
    assert (await ask(server, sent)).choices[0].message.content == "a said: one b failed: two"


async def test_calls_without_results_are_refused(server: ModelServer) -> None:
    """As the provider does."""
    call = {"id": "c1", "type": "function", "function": {"name": "a", "arguments": "{}"}}
    with pytest.raises(openai.BadRequestError):
        await ask(server, [*MESSAGES, {"role": "assistant", "tool_calls": [call]}, *MESSAGES])


async def test_errors_are_the_sdk_s(server: ModelServer) -> None:
    """By status, and in mid-stream."""
    server.default = Scenario([HttpError(429)])
    with pytest.raises(openai.RateLimitError, match="stand-in error 429"):
        await ask(server)
    server.default = Scenario([Text("Hello"), ErrorEvent("server_error", "Sorry")])
    with pytest.raises(openai.APIError, match="Sorry"):
        await ask(server)
