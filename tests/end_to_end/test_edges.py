"""What a strict reader of the contract found at its edges."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from realtime.responders.base import Request
from tests.support.client import attached
from tests.support.server import running_server


class Held:
    """A responder that says one word, and the rest once it is let go."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def __call__(self, request: Request, /) -> AsyncIterator[str]:
        yield "one"
        await self.go.wait()
        yield " two"


async def test_position_beyond_a_running_response_is_reset_once_it_has_ended() -> None:
    """A reader that names what it can't have is not left waiting: it is told all of it anew, and the end."""
    held = Held()
    async with running_server(held) as server, attached(server) as client:
        response_id = await client.respond()
        await client.until("response.output_text.delta")
        async with attached(server, client.session_id, after=f"session:2,{response_id}:9999") as ahead:
            ahead.transcript.positions = {"session": 2, response_id: 9999}
            held.go.set()
            first = await ahead.receive()
            assert (first["type"], first["seq"], first["reset"]) == ("response.in_progress", 1, True)
            await ahead.until("response.done")
            assert ahead.transcript.texts[response_id] == "one two"


async def test_response_that_was_created_running_tells_so_before_its_end() -> None:
    """Also if its cancellation follows at once: only what was stopped while queued has one event."""
    held = Held()
    async with running_server(held) as server, attached(server) as client:
        await client.send("response.create", response_id="r1", input="go")
        await client.send("response.cancel", response_id="r1")
        await client.until("response.done")
    kinds = [event["type"] for event in client.transcript.events if event.get("response_id") == "r1"]
    assert (kinds[0], kinds[-1]) == ("response.in_progress", "response.done")


async def test_connection_keeps_a_session_of_a_short_life_alive() -> None:
    """Whatever the lease: being attached is use."""
    async with running_server(Held(), session_ttl_s=0.3, lease_s=10) as server, attached(server) as client:
        loop = asyncio.get_running_loop()
        several_lives = loop.time() + 1.5
        while loop.time() < several_lives:  # a ping is no use of a session
            await client.send("ping")
            await client.until("pong")
        await client.send("conversation.item.create", item={"role": "user", "content": "still here"})
        await client.until("conversation.item.created")


async def test_clients_are_told_that_their_instance_goes_away() -> None:
    """Before the connection ends with 1012, with a time to come back at."""
    async with running_server(Held()) as server, attached(server) as client:
        server.stop()
        told = await client.until("session.going_away")
        assert told["reconnect_after_ms"] >= 0
        assert told["time_left_ms"] > 0
        assert await client.until_closed() == 1012
