"""The responders that the package ships; those of providers over the real SDKs, against the stand-in model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any
from unittest import mock

from realtime.conversation import Message
from realtime.responders.anthropic import AnthropicResponder
from realtime.responders.base import Request, Responder, ResponderEvent
from realtime.responders.openai import OpenAIResponder
from tests.support.client import Client, attached
from tests.support.model_server import ModelServer
from tests.support.server import running_server

GO = (Message("user", "go"),)


def asked(model: str, *messages: Message, instructions: str = "", max_output_tokens: int = 100) -> Request:
    """A request for an answer to `messages`, by default to a plain one."""
    return Request(messages=messages or GO, instructions=instructions, model=model, max_output_tokens=max_output_tokens)


def anthropic_at(models: ModelServer, **options: Any) -> AnthropicResponder:
    """The responder, pointed at the stand-in; `options` are its own."""
    return AnthropicResponder(**{"base_url": models.url, "api_key": "test", **options})


def openai_at(models: ModelServer, **options: Any) -> OpenAIResponder:
    """The responder for chat completions, pointed at the stand-in."""
    return OpenAIResponder(**{"base_url": f"{models.url}/v1", "api_key": "test", **options})


@asynccontextmanager
async def session_with(responder: Responder, **settings: Any) -> AsyncIterator[Client]:
    """A client in a new session of a server whose answers are the responder's, and whose journal writes at once."""
    async with (
        running_server(responder, **{"journal_interval_ms": 1, **settings}) as server,
        attached(server) as client,
    ):
        yield client


async def answer_of(responder: Responder, request: Request) -> list[ResponderEvent]:
    """Everything that the responder says, called as the server calls it but with nobody in between."""
    async with aclosing(responder(request)) as events:  # type: ignore[type-var]  # it is a generator
        return [event async for event in events]


@contextmanager
def first_retry_after(seconds: float) -> Iterator[None]:
    """Have retries wait so long at first, where the provider doesn't say how long."""
    with mock.patch("realtime.responders.provider.FIRST_RETRY_S", seconds):
        yield
