"""A response is stopped in each of its phases, in each way: the model's stream closes, and one end tells why."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from realtime.responders.anthropic import AnthropicResponder
from tests.support.client import Client, Event, Transcript, attached
from tests.support.http_connection import RST_ON_CLOSE
from tests.support.model_server import ModelRequest, ModelServer
from tests.support.scenarios import Gate, Scenario, Stall, Start, Step, Stop, Text, answer
from tests.support.sdk import turns
from tests.support.server import RunningServer, running_server
from tests.support.tcp_proxy import TcpProxy

PATIENCE_S = 14.0
PING_INTERVAL_S = 0.25
"""Short, but long enough for a busy machine: who vanishes is gone after two of these."""

PHASES: dict[str, Callable[[Gate], list[Step]]] = {
    "queued": lambda gate: [Text("Hello "), Text("there"), Stall()],
    "before headers": lambda gate: [Stall()],
    "before the first token": lambda gate: [Start(), Stall()],
    "mid-stream": lambda gate: [Text("Hello "), Text("there"), Stall()],
    "completing": lambda gate: [Text("Hello "), gate, Text("there"), Stop()],
}
"""What the model answers while a response is in a phase. `queued` is behind one that streams."""

TEXTS = {
    "queued": {""},
    "before headers": {""},
    "before the first token": {""},
    "mid-stream": {"Hello there"},
    "completing": {"Hello ", "Hello there"},
}
"""What a response may have said when it is stopped in a phase."""


class Case:
    """A server with its model, one client over a proxy, and a response that has reached its phase."""

    def __init__(self, phase: str, server: RunningServer, model: ModelServer, proxy: TcpProxy, client: Client) -> None:
        self.phase = phase
        self.server = server
        self.model = model
        self.proxy = proxy
        self.client = client
        self.gate = Gate()
        self.running = ""
        """The response whose model call is open."""
        self.response = ""
        """The one that the test is about: another one only if that is queued."""
        self.request: ModelRequest

    async def enter(self) -> None:
        """Bring the response into the phase."""
        self.model.scenarios["case"] = Scenario(PHASES[self.phase](self.gate))
        self.response = self.running = await self.client.respond(model="case")
        self.request = await self.model.next_request()
        if self.phase == "before the first token":
            await self.request.until(lambda request: request.headers_sent)
            await turns()
        elif self.phase != "before headers":
            await self.client.until("response.output_text.delta")
            while self.phase != "completing" and self.client.transcript.texts[self.running] != "Hello there":
                await self.client.until("response.output_text.delta")
        if self.phase == "queued":
            self.response = await self.client.respond(model="case", multitask_strategy="enqueue")

    async def upstream_closed(self) -> None:
        """Wait until the model sees its stream closed, and that it was not closed for being over."""
        await self.request.finished()
        assert self.request.ended in ({"peer_closed", "completed"} if self.phase == "completing" else {"peer_closed"})
        assert len(self.model.received) == 1

    async def cancelled_end(self, seen: Transcript, stop_reason: str, event_id: str | None = None) -> None:
        """The response has one end, by that cause; one that completed at the same moment may have won."""
        end = seen.done[self.response]
        text = seen.texts[self.response]
        assert text in TEXTS[self.phase]
        assert end["output_chars"] == len(text)
        if self.phase == "completing" and end["status"] == "completed":
            assert (text, end["stop_reason"], end.get("for_event_id")) == ("Hello there", "end_turn", None)
            return
        assert (end["status"], end["stop_reason"]) == ("cancelled", stop_reason)
        assert end.get("for_event_id") == event_id
        assert "error" not in end
        usage = end["usage"]
        assert usage["estimated"]
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
        assert bool(usage["output_tokens"]) == bool(text) or self.phase == "before the first token"

    def only_event_is_its_end(self, seen: Transcript) -> bool:
        """Whether nothing was told of the response but its end."""
        return [event["type"] for event in seen.events if event.get("response_id") == self.response] == [
            "response.done"
        ]

    async def nothing_left(self) -> None:
        """Wait until no session is in use, no response runs, no model call is open; once all clients are gone."""
        engine = self.server.engine
        async with asyncio.timeout(PATIENCE_S):
            while engine._running or self.server.busy_sessions or self.model.active:  # noqa: ASYNC110
                await asyncio.sleep(0.001)


@asynccontextmanager
async def cases(phase: str) -> AsyncIterator[Case]:
    """A case in its phase; after it nothing may be left."""
    async with AsyncExitStack() as stack:
        model = await stack.enter_async_context(ModelServer(default=answer("A new answer.")))
        responder = AnthropicResponder(base_url=model.url, api_key="test")
        server = await stack.enter_async_context(running_server(responder, ping_interval_s=PING_INTERVAL_S))
        proxy = await stack.enter_async_context(TcpProxy("127.0.0.1", server.port))
        async with asyncio.timeout(PATIENCE_S):
            async with attached(RunningServer(proxy.port, server.engine)) as client:
                case = Case(phase, server, model, proxy, client)
                await case.enter()
                yield case
                await proxy.reset()
            await case.nothing_left()


async def close_frame(case: Case) -> None:
    """Leave as a browser does when its page calls `close()`."""
    await case.client.socket.close()


async def going_away(case: Case) -> None:
    """Leave as a browser does when its tab is closed."""
    await case.client.socket.close(1001)


async def rst(case: Case) -> None:
    """Leave with a TCP reset."""
    case.client.socket.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_ON_CLOSE)
    case.client.socket.transport.abort()


async def fin(case: Case) -> None:
    """Send a FIN without a close frame, and do not close."""
    case.client.socket.transport.write_eof()


async def vanish(case: Case) -> None:
    """Leave without a trace."""
    await case.proxy.connections[0].blackhole()


@pytest.mark.parametrize("leave", [close_frame, going_away, rst, fin, vanish])
@pytest.mark.parametrize("phase", PHASES)
async def test_the_last_viewer_leaves(phase: str, leave: Callable[[Case], Awaitable[None]]) -> None:
    """However it goes, the model's stream is closed for it; who attaches later reads how it ended."""
    async with cases(phase) as case:
        case.gate.open()
        await leave(case)
        await case.upstream_closed()
        async with attached(case.server, case.client.session_id) as late:
            await late.until("response.done", response_id=case.response)
            if phase == "queued":
                if case.running not in late.transcript.done:
                    await late.until("response.done", response_id=case.running)
                assert late.transcript.texts[case.running] == "Hello there"
                assert case.only_event_is_its_end(late.transcript)
            await case.cancelled_end(late.transcript, "disconnected")


@pytest.mark.parametrize("phase", PHASES)
async def test_response_cancel(phase: str) -> None:
    """It stops that response and no other."""
    async with cases(phase) as case:
        case.gate.open()
        await case.client.send("response.cancel", response_id=case.response, event_id="evt_c")
        end = await case.client.until("response.done", response_id=case.response)
        assert case.client.transcript.done[case.response] is end
        await case.cancelled_end(case.client.transcript, "cancelled", "evt_c")
        if phase == "queued":
            assert case.only_event_is_its_end(case.client.transcript)
            assert case.running not in case.client.transcript.done
            assert case.request.ended == "open"
        else:
            await case.upstream_closed()
            await usable(case)


@pytest.mark.parametrize("phase", PHASES)
async def test_an_interrupting_response(phase: str) -> None:
    """It stops all of them, and then runs itself."""
    async with cases(phase) as case:
        case.gate.open()
        await case.client.send(
            "response.create",
            response_id="new",
            input="stop",
            model="other",
            multitask_strategy="interrupt",
            event_id="evt_i",
        )
        await case.client.until("response.done", response_id="new")
        seen = case.client.transcript
        await case.cancelled_end(seen, "interrupted", "evt_i")
        assert seen.texts["new"] == "A new answer."
        assert case.running in seen.done
        assert (await case.request.finished()) in {"peer_closed", "completed"}
        assert [request.body["model"] for request in case.model.received] == ["case", "other"]
        if phase == "queued":
            assert case.only_event_is_its_end(seen)


@pytest.mark.parametrize("phase", PHASES)
async def test_session_close(phase: str) -> None:
    """It stops all of them, then tells of itself, then closes with 1000; and so it does for who attaches later."""
    async with cases(phase) as case:
        case.gate.open()
        await case.client.send("session.close", event_id="evt_close")
        assert await case.client.until_closed() == 1000
        await case.upstream_closed()
        async with attached(case.server, case.client.session_id) as late:
            assert await late.until_closed() == 1000
            for seen in case.client.transcript, late.transcript:
                assert last(seen)["type"] == "session.closed"
                await case.cancelled_end(seen, "session_closed", "evt_close")
                assert case.running in seen.done


async def usable(case: Case) -> None:
    """The session goes on: another response runs."""
    assert await case.client.answer(model="other") == "A new answer."


def last(seen: Transcript) -> Event:
    """The last event of the session."""
    return [event for event in seen.events if "seq" in event][-1]


async def test_cancels_of_one_do_not_touch_the_model_calls_of_others() -> None:
    """Ten sessions share the client to the model; five are cancelled, five complete."""
    gate = Gate()
    async with ModelServer(default=Scenario([Text("Hello "), gate, Text("there"), Stop()])) as model:
        responder = AnthropicResponder(base_url=model.url, api_key="test")
        async with running_server(responder) as server, AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(attached(server)) for _ in range(10)]
            ids = [await client.respond(client.session_id) for client in clients]
            for client in clients:
                await client.until("response.output_text.delta")
            for client, response_id in list(zip(clients, ids, strict=True))[::2]:
                await client.send("response.cancel", response_id=response_id)
                await client.until("response.done")
            asked = {request.body["messages"][0]["content"]: request for request in model.received}
            for client in clients[::2]:
                assert await asked[client.session_id].finished() == "peer_closed"
            assert len(model.active) == 5
            gate.open()
            for client in clients[1::2]:
                assert (await client.until("response.done"))["status"] == "completed"
                assert await asked[client.session_id].finished() == "completed"
