"""The server as a process, as an operator starts it: it comes up, says what is wrong in one line, ends when told to."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from realtime.server import listen
from realtime.settings import Settings
from realtime.websocket import LOOKS_PER_TIMEOUT, MAX_LOOK_S
from tests.support.model_server import ModelServer
from tests.support.scenarios import HttpError, Scenario, Stall, Text

ROOT = Path(__file__).resolve().parents[1]
START_S = 20.0
END_S = 10.0
CANARY = "canary-7f3a"


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
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("REALTIME_", "ANTHROPIC_"))}
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
    async with asyncio.timeout(START_S):
        out, err = await process.communicate()
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


async def test_a_signal_ends_it_although_a_client_takes_nothing() -> None:
    """Nobody can keep it from ending, within its drain and two seconds."""
    async with serving(REALTIME_DRAIN_S="1", REALTIME_SEND_TIMEOUT_S="60") as server:
        port = int(server.url.rpartition(":")[2])
        with socket.socket() as stalled:
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stalled.connect(("127.0.0.1", port))
            stalled.sendall(
                b"GET /v1/realtime HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
            )
            stalled.setblocking(False)
            loop = asyncio.get_running_loop()
            ping = json.dumps({"type": "ping", "event_id": "e" * 60}).encode()
            frame = bytes([0x81, 0x80 | len(ping), 0, 0, 0, 0]) + ping
            try:
                async with asyncio.timeout(3):
                    while True:  # until the server reads no more, because nobody takes its answers
                        async with asyncio.timeout(0.5):
                            await loop.sock_sendall(stalled, frame * 500)
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
        ("REALTIME_REDIS_URL", "redis://127.0.0.1"),
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
