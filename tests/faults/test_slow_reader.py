"""A client that stops reading: dropped in time, cheap while it stalls, and nobody else's business.

Run as a program this file is the server of the memory test: it floods, and prints its port.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import uvicorn
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from realtime import server as server_module
from realtime import transport
from realtime.app import create_app
from realtime.observe import logs
from realtime.responders.base import Request, ResponderEvent
from realtime.server import listen, make_server
from realtime.settings import Settings
from tests.support.client import attached
from tests.support.limits import GENEROUS
from tests.support.memory import resident_bytes
from tests.support.server import RunningServer, running_server

ROOT = Path(__file__).resolve().parents[2]
SEND_TIMEOUT_S = 1.0
PATIENCE_S = 20.0
PIECE_CHARS = 100
PIECES = 20_000
"""Together more than the kernel's buffers and the server's hold for one client."""
STALLED = 20
CLOSE_4408 = b"\x88\x02" + (4408).to_bytes(2, "big")


class Flood:
    """A responder that says a lot at once, waits for its gate, and says one thing more."""

    def __init__(self, letter: str = "x") -> None:
        self.gate = asyncio.Event()
        self.closed = asyncio.Event()
        self.piece = letter * PIECE_CHARS

    async def __call__(self, request: Request) -> AsyncIterator[ResponderEvent]:
        """Answer."""
        try:
            for number in range(PIECES):
                yield self.piece
                if number % 50 == 0:
                    await asyncio.sleep(0)
            await self.gate.wait()
            yield "end"
        finally:
            self.closed.set()

    @property
    def answer(self) -> str:
        """All that it says."""
        return self.piece * PIECES + "end"


class StalledClient:
    """A WebSocket by hand, whose small buffer nobody reads."""

    def __init__(self, port: int, query: str = "") -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.connect(("127.0.0.1", port))
        self.socket.sendall(
            f"GET /v1/realtime?{query} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\n"
            "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
        )
        self.socket.setblocking(False)

    async def receive(self) -> bytes:
        """What is there, b"" at the end; raises where the connection was reset."""
        return await asyncio.get_running_loop().sock_recv(self.socket, 1_000_000)

    async def session_id(self) -> str:
        """The session's id, from the first frame; nothing is read after that."""
        data = b""
        while b'"connection_id"' not in data:
            data += await self.receive()
        payload = data[data.index(b'{"type"') :]
        return str(json.JSONDecoder().raw_decode(payload.decode())[0]["session"]["id"])

    async def send(self, **message: Any) -> None:
        """Send one message of at most 125 bytes."""
        text = json.dumps(message).encode()
        assert len(text) <= 125
        await asyncio.get_running_loop().sock_sendall(self.socket, bytes([0x81, 0x80 | len(text), 0, 0, 0, 0]) + text)

    async def rest(self) -> tuple[bytes, bool]:
        """Read on until the end: the last bytes, and whether it was an orderly one."""
        tail = b""
        try:
            while data := await self.receive():
                tail = (tail + data)[-1000:]
        except ConnectionError:
            return tail, False
        return tail, True


@contextmanager
def stalled_client(port: int, **query: str) -> Iterator[StalledClient]:
    """A client that stalls from its first byte on."""
    client = StalledClient(port, "&".join(f"{name}={value}" for name, value in query.items()))
    try:
        yield client
    finally:
        client.socket.close()


async def no_reader_left(server: RunningServer) -> None:
    """Wait until the server has let go of all who look."""
    async with asyncio.timeout(PATIENCE_S):
        for live in server.engine.hub.sessions():
            while live.readers or live.audience.participants:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


@pytest.fixture
def impatient() -> Iterator[None]:
    """A closed connection, whose client does not close, does not linger for long."""
    with mock.patch.object(transport, "ABORT_S", 0.4):
        yield


@pytest.mark.usefixtures("impatient")
async def test_it_is_dropped_and_others_are_unharmed() -> None:
    """After `send_timeout_s`, although its socket stays open; the others get every character."""
    flood = Flood()
    async with running_server(flood, send_timeout_s=SEND_TIMEOUT_S) as server, attached(server) as good:
        with stalled_client(server.port, session_id=good.session_id):
            await good.until("participant.joined")
            began_at = time.monotonic()
            response_id = await good.respond()
            async with asyncio.timeout(PATIENCE_S):
                await good.until("participant.left")
            assert time.monotonic() - began_at >= SEND_TIMEOUT_S
            flood.gate.set()
            async with asyncio.timeout(PATIENCE_S):
                assert (await good.until("response.done"))["status"] == "completed"
        assert good.transcript.texts[response_id] == flood.answer


@pytest.mark.usefixtures("impatient")
async def test_it_is_told_why_if_it_reads_on() -> None:
    """4408 comes behind what had been sent before."""
    async with running_server(Flood(), send_timeout_s=SEND_TIMEOUT_S) as server, attached(server) as good:
        with stalled_client(server.port, session_id=good.session_id) as stalled:
            await good.until("participant.joined")
            await good.respond()
            async with asyncio.timeout(PATIENCE_S):
                await good.until("participant.left")
                tail, _ = await stalled.rest()
        assert tail.endswith(CLOSE_4408)


@pytest.mark.parametrize(
    ("send_timeout_s", "ping_interval_s"),
    [(SEND_TIMEOUT_S, 10.0), (5.0, 0.6)],
    ids=["before its pings", "after its pings"],
)
async def test_its_response_is_not_cancelled_by_that_at_once(send_timeout_s: float, ping_interval_s: float) -> None:
    """Not where its pings fail first either, as by default: they wait behind what it does not read.

    Whoever returns finds the response running, and everything that was said.
    """
    flood = Flood()
    settings = {"send_timeout_s": send_timeout_s, "ping_interval_s": ping_interval_s}
    async with running_server(flood, **settings) as server:
        with stalled_client(server.port) as stalled:
            session_id = await stalled.session_id()
            await stalled.send(type="response.create", input="go", response_id="r")
            async with asyncio.timeout(PATIENCE_S):
                while not list(server.engine.hub.sessions()):  # noqa: ASYNC110
                    await asyncio.sleep(0)
            await no_reader_left(server)
            for _ in range(100):
                await asyncio.sleep(0)
            assert not flood.closed.is_set()
            async with asyncio.timeout(PATIENCE_S), attached(server, session_id) as returned:
                await returned.until("response.output_text.delta")
                flood.gate.set()
                assert (await returned.until("response.done"))["status"] == "completed"
            assert returned.transcript.texts["r"] == flood.answer


@asynccontextmanager
async def serving(flood: Flood, *, plain: bool) -> AsyncIterator[tuple[RunningServer, uvicorn.Server]]:
    """The application under our server, or (`plain`) under uvicorn as it is."""
    settings = Settings(port=0, send_timeout_s=SEND_TIMEOUT_S, drain_s=1, **GENEROUS)
    app = create_app(flood, settings)
    if plain:
        config = uvicorn.Config(app, ws=WebSocketsSansIOProtocol, log_config=None, timeout_graceful_shutdown=1)
        listener, server = socket.create_server(("127.0.0.1", 0)), uvicorn.Server(config)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, server_module.SEND_BUFFER_BYTES)
    else:
        listener, server = listen(settings), make_server(app, settings)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started:  # noqa: ASYNC110
            await asyncio.sleep(0)
        yield RunningServer(listener.getsockname()[1], app.state.engine), server
    finally:
        server.should_exit = True
        await running


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("plain", [True, False], ids=["plain uvicorn", "here"])
async def test_the_control_plain_uvicorn_never_lets_go(plain: bool) -> None:
    """The same application on uvicorn's own protocol keeps the connection after it has given it up."""
    flood = Flood()
    async with serving(flood, plain=plain) as (server, process), attached(server) as good:
        with stalled_client(server.port, session_id=good.session_id):
            await good.until("participant.joined")
            await good.respond()
            async with asyncio.timeout(PATIENCE_S):
                await good.until("participant.left")
            let_go = True
            try:
                async with asyncio.timeout(1.0 if plain else PATIENCE_S):
                    while len(process.server_state.connections) > 1:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
            except TimeoutError:
                let_go = False
            assert let_go != plain


@pytest.mark.parametrize("letter", ["x", "好", "👋"], ids=["ASCII", "two bytes a character", "four"])
async def test_many_that_stall_cost_less_than_a_megabyte_each(letter: str) -> None:
    """Measured as the peak of the server's resident memory, whatever alphabet they are sent."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.faults.test_slow_reader", letter),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        async with asyncio.timeout(4 * PATIENCE_S):
            port = int(await process.stdout.readline())
            await listening(port)
            server = mock.Mock(spec=RunningServer, ws_url=f"ws://127.0.0.1:{port}/v1/realtime")
            async with attached(server) as good:
                response_id = await good.respond()
                while len(good.transcript.texts[response_id]) < PIECE_CHARS * PIECES:
                    await good.receive()
                before = resident_bytes(process.pid, "VmRSS")
                Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak begins anew
                with ExitStack() as stack:
                    for _ in range(STALLED):
                        stack.enter_context(stalled_client(port, session_id=good.session_id))
                        await good.until("participant.joined")
                    for _ in range(STALLED):
                        while b"slow reader dropped" not in await process.stderr.readline():
                            pass
                    peak = resident_bytes(process.pid, "VmHWM")
                await good.send("ping")
                await good.until("pong")
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.communicate()
    assert (peak - before) / STALLED < 1_000_000


async def listening(port: int) -> None:
    """Wait until somebody answers there."""
    while True:
        with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        await asyncio.sleep(0.01)


def main(letter: str) -> None:
    """Serve a flood of one letter."""
    settings = Settings(port=0, send_timeout_s=SEND_TIMEOUT_S, max_session_bytes=100_000_000, drain_s=1, **GENEROUS)
    logs.configure("json", "info")
    listener = listen(settings)
    print(listener.getsockname()[1], flush=True)

    async def flood(request: Request) -> AsyncIterator[ResponderEvent]:
        async for event in Flood(letter)(request):
            yield event

    make_server(create_app(flood, settings), settings).run(sockets=[listener])


if __name__ == "__main__":
    main(sys.argv[1])
