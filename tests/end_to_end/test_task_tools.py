"""A model that calls a task as a tool: the task runs in the session, and its result goes back to the model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from realtime.responders.anthropic import AnthropicResponder
from tests.support.client import Client, attached
from tests.support.model_server import ModelRequest, ModelServer
from tests.support.scenarios import Scenario, ToolUse, tool_calls
from tests.support.server import running_server
from tests.support.tool_tasks import MODULE

CITY = {"city": "Zürich 🌧"}
RESULT = '{"city":"Zürich 🌧","sky":"rain"}'


@asynccontextmanager
async def talking_to(scenario: Scenario) -> AsyncIterator[tuple[Client, ModelServer]]:
    """A client of a server whose model follows a scenario."""
    async with ModelServer() as model:
        model.scenarios["caller"] = scenario
        responder = AnthropicResponder(base_url=model.url, api_key="test")
        async with running_server(responder, tasks=(MODULE,), model="caller") as server, attached(server) as client:
            yield client, model


def results_in(request: ModelRequest) -> list[dict[str, Any]]:
    """The tool results that a request ends with."""
    content = request.body["messages"][-1]["content"]
    return [block for block in content if block["type"] == "tool_result"]


async def test_the_model_calls_a_task_and_goes_on_with_its_result() -> None:
    """One response, one text; the task belongs to it, and every viewer sees it."""
    async with talking_to(tool_calls(ToolUse("weather", CITY), says="Let me look. ")) as (client, model):
        text = await client.answer("Is it raining?")
        assert text == f"Let me look. weather said: {RESULT}"
        [created] = [event for event in client.transcript.events if event["type"] == "task.created"]
        [response] = [event for event in client.transcript.events if event["type"] == "response.created"]
        assert (created["task"]["name"], created["task"]["response_id"]) == ("weather", response["response"]["id"])
        done = client.transcript.done[created["task"]["id"]]
        assert (done["status"], done["result"]) == ("complete", {"city": "Zürich 🌧", "sky": "rain"})
        end = client.transcript.done[response["response"]["id"]]
        assert (end["status"], end["stop_reason"], end["output_chars"]) == ("completed", "end_turn", utf16(text))
        first, second = model.received
        assert sorted(tool["name"] for tool in first.body["tools"]) == ["broken", "endless", "weather"]
        [tool] = [tool for tool in first.body["tools"] if tool["name"] == "weather"]
        assert tool["description"] == "The weather of a city."
        assert tool["input_schema"]["required"] == ["city"]
        assert [block["content"] for block in results_in(second)] == [RESULT]


def utf16(text: str) -> int:
    """Its length as clients count it."""
    return len(text.encode("utf-16-le")) // 2


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (ToolUse("broken", CITY), "There is no window."),
        (ToolUse("weather", {"city": 3}), "Expected `str`, got `int`."),
        (ToolUse("weather", {}), "Object missing required field `city`."),
    ],
    ids=["raises", "wrong", "missing"],
)
async def test_what_goes_wrong_with_a_tool_the_model_is_told(call: ToolUse, told: str) -> None:
    """It may try something else; the response does not fail."""
    async with talking_to(tool_calls(call)) as (client, model):
        assert await client.answer("go") == f"{call.name} failed: {told}"
        [result] = results_in(model.received[1])
        assert result["is_error"] is True


async def test_two_calls_at_once_have_each_its_result() -> None:
    """In the order in which they were asked for."""
    calls = [ToolUse("weather", {"city": "Bern"}, id="toolu_1"), ToolUse("broken", CITY, id="toolu_2")]
    async with talking_to(tool_calls(*calls)) as (client, model):
        await client.answer("go")
        assert [block["tool_use_id"] for block in results_in(model.received[1])] == ["toolu_1", "toolu_2"]


async def test_a_tool_may_be_called_again_and_again() -> None:
    """The usage is that of all calls together."""
    again = tool_calls(ToolUse("weather", {"city": "Bern"}, id="toolu_2"), says="Once more. ")
    async with talking_to(tool_calls(ToolUse("weather", CITY), says="First. ", then=again)) as (client, model):
        assert await client.answer("go") == 'First. Once more. weather said: {"city":"Bern","sky":"rain"}'
        [end] = [event for event in client.transcript.events if event["type"] == "response.done"]
        assert len(model.received) == 3
        assert end["usage"]["estimated"] is False
        assert end["usage"]["total_tokens"] == end["usage"]["input_tokens"] + end["usage"]["output_tokens"]


async def test_a_model_that_never_stops_calling_is_stopped() -> None:
    """The response ends; what it cost is bounded."""
    scenario = tool_calls(ToolUse("weather", CITY))
    for number in range(2, 30):
        scenario = tool_calls(ToolUse("weather", CITY, id=f"toolu_{number}"), then=scenario)
    async with talking_to(scenario) as (client, model):
        await client.respond("go")
        end = await client.until("response.done")
        assert (end["status"], end["stop_reason"]) == ("incomplete", "tool_use")
        assert len(model.received) == 20


@pytest.mark.parametrize("how", ["response.cancel", "session.close"])
async def test_who_stops_the_response_stops_its_task(how: str) -> None:
    """Nobody would read its result."""
    async with talking_to(tool_calls(ToolUse("endless", CITY))) as (client, model):
        response_id = await client.respond("go")
        task_id = (await client.until("task.created"))["task"]["id"]
        await client.until("task.started", task_id=task_id)
        await client.send(how, **({"response_id": response_id} if how == "response.cancel" else {}))
        while not {response_id, task_id} <= client.transcript.done.keys():
            await client.receive()
        assert client.transcript.done[response_id]["status"] == "cancelled"
        assert client.transcript.done[task_id]["status"] == "cancelled"
        assert len(model.received) == 1
