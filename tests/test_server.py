"""The server as a process, as an operator starts it: it comes up, says what is wrong in one line, ends when told to."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from starlette.types import Receive, Scope, Send
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from realtime.connections import LOOKS_PER_TIMEOUT, MAX_LOOK_S
from realtime.errors import Unavailable
from realtime.http import refuse_upgrade
from realtime.responders.base import Request
from realtime.server import listen, make_server
from realtime.settings import Settings, variable
from realtime.transport import StallProofProtocol
from tests.end_to_end import until_closed
from tests.support.client import Client, attached
from tests.support.instance import instance, process
from tests.support.limits import GENEROUS
from tests.support.model_server import ModelServer
from tests.support.redis_server import redis_server
from tests.support.scenarios import HttpError, Paced, Scenario, Stall, Step, Stop, Text
from tests.support.sdk import turns
from tests.support.server import RunningServer, running_server

ROOT = Path(__file__).resolve().parents[1]
START_S = 45.0
END_S = 30.0
SLACK_S = 8.0
"""What an end may take beyond the time to drain: 2 s, and what a busy machine adds."""
CANARY = "canary-7f3a"
NO_LIMITS = {variable(name): str(value) for name, value in GENEROUS.items()}


class ServerProcess:
    """A `realtime serve` that is up; `lines` is what it has written to standard error, but for where it listens."""

    def __init__(self, process: asyncio.subprocess.Process, url: str, lines: list[str]) -> None:
        self.process = process
        self.url = url
        self.ws_url = url.replace("http", "ws", 1) + "/v1/realtime"
        self.lines = lines

    async def get(self, path: str) -> Any:
        """The JSON at a path."""
        return json.loads(await asyncio.to_thread(lambda: urlopen(self.url + path, timeout=10).read()))

    async def end(self, with_signal: int = signal.SIGTERM) -> int:
        """Send it a signal; returns its status once it has ended by that."""
        self.process.send_signal(with_signal)
        return await self.ended()

    async def ended(self) -> int:
        """Its status, once it has ended; what it wrote is in `lines` then."""
        assert self.process.stderr is not None
        async with asyncio.timeout(END_S):
            self.lines += (await self.process.stderr.read()).decode().splitlines()
            return await self.process.wait()


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without anything that the server would read, and with `variables`."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("REALTIME_", "ANTHROPIC_", "OPENAI_"))
    }
    return {**kept, **variables}


async def launch(arguments: Sequence[str], variables: dict[str, str]) -> asyncio.subprocess.Process:
    """Start `python -m realtime serve`."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "realtime", "serve", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(**variables),
        cwd=ROOT,
    )


@asynccontextmanager
async def serving(*arguments: str, **variables: str) -> AsyncIterator[ServerProcess]:
    """A server that has said where it listens, and answers there."""
    process = await launch(["--port", "0", *arguments], variables)
    assert process.stderr is not None
    try:
        async with asyncio.timeout(START_S):
            lines = [(await process.stderr.readline()).decode()]
            while not (found := re.search(r"http://\S+:\d+", lines[-1])):
                assert lines[-1], lines
                lines.append((await process.stderr.readline()).decode())
            server = ServerProcess(process, found[0], lines[:-1])
            while True:
                try:
                    await server.get("/healthz")
                    break
                except OSError:
                    await asyncio.sleep(0.01)
        yield server
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def refused(*arguments: str, **variables: str) -> str:
    """The one line with which the server refuses to start."""
    process = await launch(arguments, variables)
    try:
        async with asyncio.timeout(START_S):
            out, err = await process.communicate()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
    lines = err.decode().splitlines()
    assert process.returncode not in (0, None), err
    assert out == b""
    assert len(lines) == 1, err.decode()
    assert "Traceback" not in lines[0]
    return lines[0]


async def ask(server: ServerProcess, text: str, **fields: Any) -> list[dict[str, Any]]:
    """Everything that one response tells, up to its end."""
    events: list[dict[str, Any]] = []
    async with connect(server.ws_url, proxy=None) as client:
        await client.send(json.dumps({"type": "response.create", "input": text, **fields}))
        async with asyncio.timeout(START_S):
            while not events or events[-1]["type"] != "response.done":
                events.append(json.loads(await client.recv()))
    return events


async def close_code(client: ClientConnection) -> int | None:
    """Receive until the connection is closed; returns the code."""
    with suppress(ConnectionClosed):
        async with asyncio.timeout(END_S):
            while True:
                await client.recv()
    return client.close_code


async def test_comes_up_without_a_key_and_answers() -> None:
    """The demo answers; there is nothing else to set up."""
    async with serving() as server:
        assert await server.get("/readyz") == {"status": "ready"}
        events = await ask(server, "hello", max_output_tokens=5)
        assert [event["status"] for event in events if event["type"] == "response.done"] == ["incomplete"]
        said = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
        assert said.split() == ["This", "is", "the", "demo", "responder:"]


@pytest.mark.parametrize(("name", "statuses"), [("SIGTERM", {0}), ("SIGINT", {0, 1, 130})])
async def test_a_signal_ends_it_while_a_stream_runs(name: str, statuses: set[int]) -> None:
    """Within a bound and without a traceback; its clients are told that it restarts."""
    async with serving(REALTIME_DRAIN_S="1") as server:
        async with connect(server.ws_url, proxy=None) as client:
            await client.send(json.dumps({"type": "response.create", "input": "hello"}))
            async with asyncio.timeout(START_S):
                while json.loads(await client.recv())["type"] != "response.output_text.delta":
                    pass
            status = await server.end(getattr(signal, name))
            assert await close_code(client) in {1001, 1012}
        assert not any("Traceback" in line for line in server.lines), server.lines
        assert status in statuses


@pytest.mark.timeout(120)  # importing the model's client takes seconds where nothing is cached
async def test_a_signal_under_streams_loses_none_of_them() -> None:
    """What can finish in time is whole; what can't, because it is long or never says anything, fails by name."""
    words = [f"{number} " for number in range(40)]
    steps: dict[str, list[Step]] = {
        "finishes": [Paced(words, 50), Stop()],
        "endless": [Text("half"), Stall()],
        "silent": [Stall()],
    }
    texts = {"finishes": "".join(words), "endless": "half", "silent": ""}
    async with ModelServer() as model, AsyncExitStack() as stack:
        model.scenarios.update({name: Scenario(played) for name, played in steps.items()})
        server = await stack.enter_async_context(instance(model=model.url, drain_s=3, loop_block_ms=20_000))
        asked = list(texts) * 17
        clients = [await stack.enter_async_context(attached(server)) for _ in asked]
        for client, name in zip(clients, asked, strict=True):
            await client.respond(model=name)
        for _ in clients:
            await model.next_request()
        server.terminate()
        async with asyncio.timeout(3 + SLACK_S):
            codes = await asyncio.gather(*(until_closed(client) for client in clients))
            assert await server.exit_status() == 0
        assert set(codes) == {1012}
        assert model.active == []
    for client, name in zip(clients, asked, strict=True):
        [(response_id, done)] = client.transcript.done.items()
        assert client.transcript.texts[response_id] == texts[name]
        assert done["status"] == ("completed" if name == "finishes" else "failed")
        assert name == "finishes" or done["error"]["code"] == "instance_shutdown"
        assert client.transcript.events[-1]["type"] == "session.going_away"
    assert server.notes == []


async def test_a_signal_ends_an_idle_server_at_once() -> None:
    """However long it might drain."""
    async with instance(drain_s=60, loop_block_ms=20_000) as server, attached(server) as client:
        server.terminate()
        assert await until_closed(client) == 1012
        async with asyncio.timeout(END_S):
            assert await server.exit_status() == 0
    assert server.notes == []


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
async def test_ctrl_c_ends_a_drain_at_once(first: signal.Signals) -> None:
    """Who presses it a second time does not want to wait; another SIGTERM is only the first one from somebody else."""
    async with instance(drain_s=60, loop_block_ms=20_000) as server, attached(server) as client:
        await client.respond("hello")
        await client.until("response.output_text.delta")
        os.kill(server.pid, first)
        while (await refused_to_respond(client)) != "draining":
            await client.until("response.output_text.delta")
        server.terminate()
        await client.until("response.output_text.delta")
        os.kill(server.pid, signal.SIGINT)
        assert await until_closed(client) == 1012
        async with asyncio.timeout(END_S):
            assert await server.exit_status() == 0
    assert client.transcript.done == {}
    assert server.notes == []


async def refused_to_respond(client: Client) -> str:
    """The code with which the next response is refused."""
    await client.send("response.create", input="more")
    return str((await client.until("error"))["error"]["code"])


STUBBORN = """
import asyncio
from realtime.app import create_app
from realtime.server import run
from realtime.settings import load_settings

async def stubborn(request):
    yield "one"
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            continue

settings = load_settings()
run(create_app(stubborn, settings), settings)
"""


async def test_responder_that_will_not_stop_does_not_keep_it_from_ending() -> None:
    """It is somebody else's code. Its response is ended without it."""
    variables = {"REALTIME_PORT": "0", "REALTIME_DRAIN_S": "6"}
    async with process([sys.executable, "-c", STUBBORN], variables) as server:
        await server.up()
        async with attached(server) as client:
            await client.respond()
            await client.until("response.output_text.delta")
            server.terminate()
            async with asyncio.timeout(6 + SLACK_S):
                assert (await client.until("response.done"))["error"]["code"] == "instance_shutdown"
                assert await until_closed(client) == 1012
                assert await server.exit_status() == 0


BROKEN = f"""
from realtime.app import create_app
from realtime.server import run
from realtime.settings import load_settings

class Broken:
    async def __call__(self, request):
        yield "never"

    async def __aenter__(self):
        raise ValueError("{CANARY}")

    async def __aexit__(self, kind, error, trace):
        pass

settings = load_settings()
run(create_app(Broken(), settings), settings)
"""


async def test_a_responder_that_cant_start_is_logged_by_its_kind_and_place() -> None:
    """Without its text, and the process fails."""
    variables = {"REALTIME_PORT": "0", "REALTIME_LOG_FORMAT": "json"}
    async with process([sys.executable, "-c", BROKEN], variables) as server:
        async with asyncio.timeout(START_S):
            assert await server.exit_status() not in (0, None)
        [told, ended] = [json.loads(line) for line in server.log]
    assert (told["event"], told["error"]) == ("error", "ValueError")
    assert told["at"][0].endswith("__aenter__")
    assert "startup failed" in ended["event"]
    assert CANARY not in "".join(server.log)


async def test_store_that_hangs_does_not_keep_it_from_ending() -> None:
    """Whoever finds the session later ends what it has left behind."""
    async with (
        redis_server() as redis,
        instance(redis_url=redis.url, drain_s=1, loop_block_ms=20_000) as server,
        attached(server) as client,
    ):
        await client.respond("hello")
        await client.until("response.output_text.delta")
        redis.pause()
        try:
            server.terminate()
            async with asyncio.timeout(1 + SLACK_S):
                assert await until_closed(client) == 1012
                assert await server.exit_status() == 0
        finally:
            redis.resume()
    assert [json.loads(line)["event"] for line in server.notes] == ["redis does not answer"]


async def test_client_that_has_left_but_takes_nothing_holds_up_nobody() -> None:
    """Its close came, the answer to it waits behind what it does not read: the server ends without a fault."""

    async def floods(request: Request) -> AsyncIterator[str]:
        while True:
            yield "x" * 10_000

    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(running_server(floods, send_timeout_s=60))
        with stalling_client(server.port) as client:
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(END_S):
                assert await loop.sock_recv(client, 12) == b"HTTP/1.1 101"
                await loop.sock_sendall(client, frame(0x1, b'{"type": "response.create", "input": "go"}'))
                while not (full := [one for one in websockets_of(server) if not one.writable.is_set()]):
                    await turns(1)
                await loop.sock_sendall(client, frame(0x8, (1000).to_bytes(2)))
                while not full[0].transport.is_closing():
                    await turns(1)
                await stack.aclose()


def websockets_of(server: RunningServer) -> list[StallProofProtocol]:
    """The server's sides of its WebSockets."""
    assert server._server is not None
    return [one for one in server._server.server_state.connections if isinstance(one, StallProofProtocol)]


async def test_upgrade_that_comes_with_the_end_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """By a 503, which lets a proxy try the next instance, even if the application has not got to it yet."""
    asked, go = asyncio.Event(), asyncio.Event()

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            asked.set()
            await go.wait()
            await refuse_upgrade(send, Unavailable("draining", "Too late."))
            return
        for phase in "startup", "shutdown":
            await receive()
            await send({"type": f"lifespan.{phase}.complete"})

    settings = Settings(port=0, drain_s=1)
    with listen(settings) as listener:
        server = make_server(application, settings)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await turns(1)
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(UPGRADE)
        await asked.wait()
        server.should_exit = True
        answer = await reader.read()
        go.set()
        writer.close()
        await serving
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nRetry-After: 1\r\n" in answer
    assert caplog.records == []


UPGRADE = (
    b"GET /v1/realtime HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


@contextmanager
def stalling_client(port: int) -> Iterator[socket.socket]:
    """A connection that asks for a WebSocket and takes nothing."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.sendall(UPGRADE)
        client.setblocking(False)
        yield client


def frame(opcode: int, payload: bytes) -> bytes:
    """A client's frame, its mask all zeros."""
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else bytes([0x80 | 126]) + size.to_bytes(2, "big")
    return bytes([0x80 | opcode]) + length + bytes(4) + payload


async def test_a_signal_ends_it_although_a_client_takes_nothing() -> None:
    """Nobody can keep it from ending, within its drain and two seconds."""
    async with serving(REALTIME_DRAIN_S="1", REALTIME_SEND_TIMEOUT_S="60", **NO_LIMITS) as server:
        with stalling_client(int(server.url.rpartition(":")[2])) as client:
            loop = asyncio.get_running_loop()
            ping = json.dumps({"type": "ping", "event_id": "e" * 60}).encode()
            pings = frame(0x1, ping + b" " * 1000) * 50  # not too many at once, which would be cut off
            try:
                async with asyncio.timeout(3):
                    while True:  # until the server reads no more, because nobody takes its answers
                        async with asyncio.timeout(0.5):
                            await loop.sock_sendall(client, pings)
            except TimeoutError:
                pass
            await server.end()
        faults = {json.loads(line).get("error") for line in server.lines}
        assert faults <= {None, "CancelledError"}, server.lines


async def test_a_port_in_use_is_one_line() -> None:
    """As it is where another server listens there."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        line = await refused("--port", str(taken.getsockname()[1]))
    assert "in use" in line


LATE = """
from realtime.app import create_app
from realtime.responders.demo import demo
from realtime.server import OnlyServer, listen, make_server
from realtime.settings import Settings, SettingsError

settings = Settings(port=0)
loser = listen(settings)
winner = listen(Settings(port=loser.getsockname()[1]))
winner.listen()
try:
    make_server(create_app(demo, settings), settings, OnlyServer).run(sockets=[loser])
except SettingsError as error:
    print(error)
"""


async def test_a_port_that_another_server_takes_meanwhile_is_one_line() -> None:
    """Two that start at once may both get the address, and only one of them may listen."""
    late = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", LATE), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, cwd=ROOT
    )
    async with asyncio.timeout(START_S):
        out, _ = await late.communicate()
    [line] = out.decode().splitlines()
    assert "in use" in line


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com"])
async def test_a_public_address_is_refused(host: str) -> None:
    """There is no authentication yet."""
    assert "REALTIME_HOST" in await refused("--host", host)


async def test_two_workers_are_refused() -> None:
    """They would not share their sessions."""
    assert "--workers 2" in await refused("--workers", "2")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("REALTIME_PORT", "web"),
        ("REALTIME_PORT", "70000"),
        ("REALTIME_ON_DISCONNECT", "never"),
        ("REALTIME_DISCONNECT_GRACE_MS", "-1"),
        ("REALTIME_SEND_TIMEOUT_S", "0"),
        ("REALTIME_SEND_TIMEOUT_S", "3e9"),
        ("REALTIME_LEASE_S", "nan"),
        ("REALTIME_MAX_CONNECTIONS", "many"),
        ("REALTIME_LOG_LEVEL", "loud"),
        ("REALTIME_RESPONDER", "anthropic"),
        ("REALTIME_AUTH_SECRET", CANARY),
        ("REALTIME_REDIS_URL", f"http://:{CANARY}@127.0.0.1"),
    ],
)
async def test_a_wrong_setting_is_one_line_that_names_it(name: str, value: str) -> None:
    """It says what is wrong, and shows no secret."""
    line = await refused("--port", "0", **{name: value}) if name != "REALTIME_PORT" else await refused(**{name: value})
    assert name in line
    assert CANARY not in line


async def test_a_host_that_is_no_name_is_one_line() -> None:
    """Whatever the resolver makes of it."""
    assert "Error" in await refused("--insecure-no-auth", "--host", "..", "--port", "0")


async def test_logs_are_json_lines_without_content_or_session_ids() -> None:
    """At the most talkative level, with a model that fails, clients that break the protocol, and unknown paths."""
    scenarios = {
        "refuses": Scenario([HttpError(400, body=json.dumps({"error": {"message": CANARY}}).encode())]),
        "breaks": Scenario([Text(CANARY)]),
        "stalls": Scenario([Text(CANARY), Stall()]),
    }
    async with ModelServer() as model:
        model.scenarios.update(scenarios)
        variables = {
            "ANTHROPIC_API_KEY": f"{CANARY}-key",
            "ANTHROPIC_BASE_URL": model.url,
            "REALTIME_LOG_LEVEL": "debug",
            "REALTIME_ALLOWED_MODELS": "*",
            "REALTIME_LOG_FORMAT": "json",
            "REALTIME_NO_SUCH_SETTING": CANARY,
            "REALTIME_DRAIN_S": "1",
        }
        async with serving(**variables) as server:
            session_ids = []
            for name in "refuses", "breaks":
                events = await ask(server, CANARY, model=name)
                session_ids.append(events[0]["session"]["id"])
                assert events[-1]["status"] == "failed"
            async with connect(f"{server.ws_url}?session_id={session_ids[0]}&after=session:1", proxy=None) as client:
                await client.send(CANARY)
                await client.send(b"\xff" + CANARY.encode())
                assert await close_code(client) == 1003
            with pytest.raises(OSError, match="404"):
                await server.get(f"/v1/sessions/{CANARY}")
            async with connect(server.ws_url, proxy=None) as client:
                await client.send(json.dumps({"type": "response.create", "input": CANARY, "model": "stalls"}))
                await (await model.next_request()).sent(0)
                await client.send("{" * 2000)
                client.transport.abort()
            await server.end()
        records = [json.loads(line) for line in server.lines]
        assert all(isinstance(record, dict) and record["level"] and record["event"] for record in records)
        assert any(record["event"] == "unknown setting" for record in records)
        written = "\n".join(server.lines)
        assert CANARY not in written
        assert not any(session_id in written for session_id in session_ids)


def test_any_timeout_that_the_settings_allow_can_be_listened_with() -> None:
    """The kernel counts in milliseconds, and not as far."""
    listen(Settings(port=0, send_timeout_s=999_999_999.0)).close()


def test_the_kernel_leaves_the_verdict_on_a_slow_reader_to_the_server() -> None:
    """Its own timeout comes after `send_timeout_s` was looked at: who it cuts off counts as gone by itself."""
    settings = Settings(port=0, send_timeout_s=30)
    with listen(settings) as listener:
        kernel_s = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) / 1000
    looks_every_s = min(MAX_LOOK_S, settings.send_timeout_s / LOOKS_PER_TIMEOUT)
    assert kernel_s > settings.send_timeout_s + looks_every_s
