"""The stand-in model server, and the SDK pointed at it."""

from collections.abc import AsyncIterator

import anthropic
import pytest

from tests.support.model_server import ModelServer
from tests.support.sdk import open_client


@pytest.fixture
async def server() -> AsyncIterator[ModelServer]:
    """The stand-in, with nothing but its default scenario."""
    async with ModelServer() as server:
        yield server


@pytest.fixture
async def client(server: ModelServer) -> AsyncIterator[anthropic.AsyncAnthropic]:
    """The SDK pointed at it, which does not retry."""
    async with open_client(server.url) as client:
        yield client
