"""The instance that tests are given is a real one, and is gone afterwards, whatever was done to it."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import AsyncExitStack
from urllib.request import urlopen

import pytest

from tests.support.instance import Instance, instance
from tests.support.model_server import ModelServer
from tests.support.ports import free_port


def get(one: Instance, path: str = "/healthz") -> int:
    """The status of an answer."""
    with urlopen(one.url + path, timeout=30) as response:
        return int(response.status)


def post(one: Instance, path: str, body: bytes) -> bytes:
    """The body of an answer."""
    with urlopen(one.url + path, data=body, timeout=30) as response:
        return bytes(response.read())


async def test_it_is_up_and_gone_afterwards() -> None:
    """Its URLs are those that it said, and its process ends with the context."""
    async with instance() as one:
        assert (one.url, one.ws_url) == (f"http://127.0.0.1:{one.port}", f"ws://127.0.0.1:{one.port}/v1/realtime")
        assert await asyncio.to_thread(get, one) == 200
    with pytest.raises(ProcessLookupError):
        os.kill(one.pid, 0)


async def test_the_model_and_the_settings_are_as_asked_for() -> None:
    """The stand-in model answers, and a setting has the name of its field."""
    async with ModelServer() as model, instance(model=model.url, model_context_tokens=5000, max_body_bytes=100) as one:
        answer = await asyncio.to_thread(post, one, "/v1/complete", b'{"prompt": "hello"}')
        assert b"Hello from the stand-in model." in answer
        with pytest.raises(OSError, match="413"):
            await asyncio.to_thread(post, one, "/v1/complete", b'{"prompt": "%s"}' % (b"x" * 100))


async def test_several_start_at_once_on_ports_that_were_asked_for() -> None:
    """A start takes seconds of processor time, but nobody waits in line."""
    ports = [free_port(), free_port()]
    async with AsyncExitStack() as stack:
        contexts = [instance(port=port) for port in ports]
        ones = await asyncio.gather(*map(stack.enter_async_context, contexts))
        assert [one.port for one in ones] == ports


async def test_it_tells_how_it_ended() -> None:
    """A SIGTERM lets it end in order; a SIGKILL does not, also if it hangs."""
    async with instance(drain_s=1) as one:
        one.terminate()
        async with asyncio.timeout(30):
            assert await one.exit_status() == 0
    async with instance() as one:
        one.pause()
        one.kill()
        async with asyncio.timeout(30):
            assert await one.exit_status() == -signal.SIGKILL


async def test_a_paused_one_goes_on() -> None:
    """It says nothing while it is paused, and answers afterwards."""
    async with instance() as one:
        one.pause()
        asked = asyncio.create_task(asyncio.to_thread(get, one))
        done, _ = await asyncio.wait([asked], timeout=0.2)
        assert not done
        one.resume()
        assert await asked == 200


async def test_a_start_that_fails_says_why() -> None:
    """The error holds what the instance wrote."""
    with pytest.raises(RuntimeError, match="REALTIME_DRAIN_S='soon' is not allowed"):
        async with instance(drain_s="soon"):
            pass


async def test_the_log_is_read_all_the_time() -> None:
    """What it writes is there line by line, and never fills the pipe."""
    async with instance(log_format="json", nonsense="1") as one:
        assert "REALTIME_NONSENSE" in await one.logged("unknown setting")
