"""What becomes of a response whose viewers leave, over real sockets: at once, after its grace, later, or not at all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from websockets.exceptions import ConnectionClosed

from realtime.feed import Closing, Feed
from realtime.protocol import CloseCode
from realtime.responders.base import Request, ResponderEvent
from tests.support.client import Client, Transcript, attached
from tests.support.server import RunningServer, running_server

PATIENCE_S = 14.0
GRACE_MS = 150


class Gated:
    """A responder that says a piece, waits for its gate, and says another."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.closed = asyncio.Event()
        self.asked = 0

    async def __call__(self, request: Request) -> AsyncIterator[ResponderEvent]:
        """Answer."""
        self.asked += 1
        try:
            yield "one "
            await self.gate.wait()
            yield "two"
        finally:
            self.closed.set()


@pytest.fixture
def responder() -> Gated:
    """The responder of a test."""
    return Gated()


async def still_runs(responder: Gated, turns: int = 100) -> None:
    """The responder is not closed, now nor some turns of the loop later."""
    for _ in range(turns):
        await asyncio.sleep(0)
        assert not responder.closed.is_set()


async def left(server: RunningServer) -> None:
    """Wait until the server knows that nobody looks any more."""
    async with asyncio.timeout(PATIENCE_S):
        for live in server.engine.hub.sessions():
            while live.readers or live.audience.participants:  # noqa: ASYNC110
                await asyncio.sleep(0.001)


async def end_of(server: RunningServer, session_id: str, response_id: str) -> Transcript:
    """Attach and read until the response's end."""
    async with asyncio.timeout(PATIENCE_S), attached(server, session_id) as late:
        if response_id not in late.transcript.done:
            await late.until("response.done", response_id=response_id)
        return late.transcript


@asynccontextmanager
async def started(server: RunningServer, **fields: object) -> AsyncIterator[tuple[Client, str]]:
    """A client whose response has said its first piece."""
    async with asyncio.timeout(PATIENCE_S), attached(server) as client:
        response_id = await client.respond(**fields)  # type: ignore[arg-type]
        await client.until("response.output_text.delta")
        yield client, response_id


async def test_continue_runs_to_its_end_with_nobody_there(responder: Gated) -> None:
    """Who comes later finds the answer whole."""
    async with running_server(responder) as server:
        async with started(server, on_disconnect="continue") as (client, response_id):
            pass
        await left(server)
        await still_runs(responder)
        responder.gate.set()
        seen = await end_of(server, client.session_id, response_id)
        assert (seen.texts[response_id], seen.done[response_id]["status"]) == ("one two", "completed")


async def test_continue_as_the_servers_setting(responder: Gated) -> None:
    """What the server sets a response may change back for itself."""
    async with running_server(responder, on_disconnect="continue") as server:
        async with started(server) as (client, first):
            pass
        await left(server)
        await still_runs(responder)
        responder.gate.set()
        assert (await end_of(server, client.session_id, first)).done[first]["status"] == "completed"
        responder.gate.clear()
        responder.closed.clear()
        async with started(server, on_disconnect="cancel") as (client, second):
            pass
        assert (await end_of(server, client.session_id, second)).done[second]["stop_reason"] == "disconnected"


async def test_settings_of_the_session_hold_for_what_runs(responder: Gated) -> None:
    """A `session.update` while a response runs counts when the viewer leaves."""
    async with running_server(responder) as server:
        async with started(server) as (client, response_id):
            await client.send("session.update", session={"on_disconnect": "continue"})
            await client.until("session.updated")
        await left(server)
        await still_runs(responder)
        responder.gate.set()
        assert (await end_of(server, client.session_id, response_id)).done[response_id]["status"] == "completed"


async def test_a_viewer_that_returns_in_time_stops_the_clock(responder: Gated) -> None:
    """The response goes on for it, without a seam."""
    async with running_server(responder) as server:
        async with started(server, disconnect_grace_ms=60_000) as (client, response_id):
            pass
        await left(server)
        seen = client.transcript
        async with attached(server, client.session_id, transcript=seen, after=seen.after()) as returned:
            await still_runs(responder)
            responder.gate.set()
            assert (await returned.until("response.done"))["status"] == "completed"
        assert seen.texts[response_id] == "one two"


async def test_a_viewer_that_does_not_return_is_waited_for_its_grace(responder: Gated) -> None:
    """Not a moment shorter; then the response is cancelled with the reason `disconnected`."""
    async with running_server(responder) as server:
        async with started(server, disconnect_grace_ms=GRACE_MS) as (client, response_id):
            leaves_at = time.monotonic()
        async with asyncio.timeout(PATIENCE_S):
            await responder.closed.wait()
        assert time.monotonic() - leaves_at >= GRACE_MS / 1000 - 0.005
        end = (await end_of(server, client.session_id, response_id)).done[response_id]
        assert (end["status"], end["stop_reason"], end["usage"]["estimated"]) == ("cancelled", "disconnected", True)


async def test_of_two_viewers_the_last_one_counts(responder: Gated) -> None:
    """One leaves in whatever way, and the other sees it leave and the response go on."""
    async with running_server(responder) as server:
        async with started(server) as (first, response_id):
            async with attached(server, first.session_id) as second:
                await second.until("response.output_text.delta")
                second.reset()
                left_one = (await first.until("participant.left"))["participant"]
                assert left_one["connection_id"] == second.first["connection_id"]
            await still_runs(responder)
        async with asyncio.timeout(PATIENCE_S):
            await responder.closed.wait()
        end = (await end_of(server, first.session_id, response_id)).done[response_id]
        assert end["stop_reason"] == "disconnected"


async def test_who_made_the_response_may_leave(responder: Gated) -> None:
    """It belongs to the session: whoever looks at it keeps it running."""
    async with running_server(responder) as server:
        async with started(server) as (first, response_id), attached(server, first.session_id) as second:
            await second.until("response.output_text.delta")
            await first.socket.close()
            await second.until("participant.left")
            await still_runs(responder)
            responder.gate.set()
            assert (await second.until("response.done", response_id=response_id))["status"] == "completed"


@pytest.mark.parametrize("code", [CloseCode.SLOW_READER, CloseCode.INTERNAL_ERROR])
async def test_who_was_cut_off_by_the_server_has_time_to_return(responder: Gated, code: CloseCode) -> None:
    """A response is not cancelled at once where the server ended the connection, grace or not."""
    async with running_server(responder) as server:
        async with started(server) as (client, response_id):
            for connection in connections(server):
                connection.drop(Closing(code, by_server=True))
            assert await close_code(client) == code
        await left(server)
        await still_runs(responder)
        async with attached(server, client.session_id) as returned:
            await returned.until("response.output_text.delta")
            responder.gate.set()
            assert (await returned.until("response.done", response_id=response_id))["status"] == "completed"


async def test_who_returned_after_a_cut_off_and_then_leaves_has_no_floor_left(responder: Gated) -> None:
    """The floor is that of the last end, not of an earlier one."""
    async with running_server(responder) as server:
        async with started(server) as (client, response_id):
            for connection in connections(server):
                connection.drop(Closing(CloseCode.SLOW_READER, by_server=True))
            await close_code(client)
        await left(server)
        async with attached(server, client.session_id) as returned:
            await returned.until("response.output_text.delta")
        async with asyncio.timeout(PATIENCE_S):
            await responder.closed.wait()
        end = (await end_of(server, client.session_id, response_id)).done[response_id]
        assert end["stop_reason"] == "disconnected"


@pytest.mark.parametrize("code", [1000, 1001, 1012, 4000])
async def test_the_code_that_a_client_closes_with_changes_nothing(responder: Gated, code: int) -> None:
    """1001 is what a browser sends whose tab is closed: the response ends at once, as with any other."""
    async with running_server(responder) as server:
        async with started(server) as (client, response_id):
            await client.socket.close(code)
        async with asyncio.timeout(PATIENCE_S):
            await responder.closed.wait()
        end = (await end_of(server, client.session_id, response_id)).done[response_id]
        assert end["stop_reason"] == "disconnected"


async def test_a_command_before_the_close_is_carried_out(responder: Gated) -> None:
    """A client that sends and leaves at once is taken at its word, `continue` included."""
    async with running_server(responder) as server:
        async with attached(server) as client:
            session_id = client.session_id
            await client.send("response.create", response_id="r", input="go", on_disconnect="continue")
        responder.gate.set()
        assert (await end_of(server, session_id, "r")).done["r"]["status"] == "completed"


async def test_a_response_of_a_client_that_left_at_once_is_cancelled(responder: Gated) -> None:
    """Its own viewer has seen it, or could have: there is no floor for it."""
    async with running_server(responder) as server:
        async with attached(server) as client:
            session_id = client.session_id
            await client.send("response.create", response_id="r", input="go")
        seen = await ended_or_cancelled(server, session_id)
        assert seen.done["r"]["stop_reason"] == "disconnected"


async def ended_or_cancelled(server: RunningServer, session_id: str) -> Transcript:
    """Wait until nothing runs and nobody looks; then read the session."""
    async with asyncio.timeout(PATIENCE_S):
        while server.busy_sessions:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    return await end_of(server, session_id, "r")


async def close_code(client: Client) -> int | None:
    """Receive until the connection is closed; returns the code."""
    with suppress(ConnectionClosed):
        while True:
            await client.receive()
    return client.socket.close_code


def connections(server: RunningServer) -> list[Feed]:
    """The connections that look at any session."""
    found = [reader for live in server.engine.hub.sessions() for reader in live.readers]
    return [reader for reader in found if isinstance(reader, Feed)]
