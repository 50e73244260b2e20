"""Measure what floods by one hostile client cost another user who streams, with the limits that are shipped.

    python -m bench.floods [--quick] [--json FILE]

The hostile client comes from another address. Prints Markdown.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import msgspec

from bench import tools
from bench.client import Client
from bench.command import Benchmark, main, say
from bench.measure import Point, Watch, point, wait_quiet
from bench.processes import TOOLS_CORE, memory_of, pinned
from bench.servers import RESPOND, Kind, Server, free_port, serving
from bench.tools import Plan, Upstream, run_load

RATE_PER_S = 50.0
SESSIONS = 4
"""As many as a user may have responses at once."""
HOSTILE = "127.0.0.2"
PATH = "/v1/realtime"
BLOCK_BYTES = 250_000
LARGE_ITEMS, LARGE_TEXT = 100, "x" * 60_000
PAUSE_S = 0.025
"""Between messages that are to come within their rate."""
CROWD = 20
CHUNK = b"1\r\nx\r\n"
ALIVE = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
PIPELINED = 200
"""Requests in one go; their answers fit into what a socket holds."""
MASK = bytes(4)
PING, EMPTY_TEXT = b"\x89\x80" + MASK, b"\x81\x80" + MASK
MOST = 2.0
"""How many times the p99 without a flood the p99 with one may be, where it is above `HOLDS_MS`."""
HOLDS_MS = 20.0
"""Below that it holds: what is left is as much the machine's doing as the flood's."""
MOST_MIB = 16.0


class Row(msgspec.Struct, frozen=True):
    """The round with the middle p99 of a kind of flood, and that p99 in terms of the one without."""

    flood: str
    sent_per_s: float
    grown_mib: float
    times: float
    point: Point


def pings(port: int) -> Iterator[int]:
    """Pings of the WebSocket protocol."""
    return pour(port, PING)


def messages(port: int) -> Iterator[int]:
    """Messages that are none."""
    return pour(port, EMPTY_TEXT)


def pour(port: int, frame: bytes) -> Iterator[int]:
    """Send frames for as long as the connection lasts, and read nothing; each item is how many were sent."""
    count = BLOCK_BYTES // len(frame)
    with Client(port, PATH, HOSTILE) as client:
        while True:
            client.socket.sendall(frame * count)
            yield count


def generations(port: int) -> Iterator[int]:
    """Responses, in a session each ten."""
    with Client(port, PATH, HOSTILE) as client:
        for _ in range(10):
            client.send({"type": "response.create", "input": "go", "multitask_strategy": "enqueue"})
            yield 1


def prompts(port: int) -> Iterator[int]:
    """One-shot calls; whoever makes them does not wait for an answer that takes its time."""
    return post(port, "/v1/stream", b'{"prompt":"go"}')


def tasks(port: int) -> Iterator[int]:
    """Background tasks."""
    return post(port, "/v1/tasks/summarise", b'{"text":"go"}')


def post(port: int, path: str, body: bytes) -> Iterator[int]:
    """Post the same for as long as the connection lasts: where an answer streams, no longer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5, source_address=(HOSTILE, 0))
    try:
        while True:
            connection.request("POST", path, body)
            answer = connection.getresponse()
            yield 1
            if answer.status == 200:
                return
            answer.read()
    finally:
        connection.close()


def reads(port: int) -> Iterator[int]:
    """Reads of a session that is as large as one may be."""
    with Client(port, PATH, HOSTILE) as client:
        session_id = client.receive_until("session.created")["session"]["id"]
        for _ in range(LARGE_ITEMS):
            client.send({"type": "conversation.item.create", "item": {"role": "user", "content": LARGE_TEXT}})
            client.receive_until("conversation.item.created")
            time.sleep(PAUSE_S)
    return crowd(port, "GET", f"/v1/sessions/{session_id}")


def oneshots(port: int) -> Iterator[int]:
    """One-shot calls with bodies as large as they may be, of messages as short as they may be."""
    messages = [{"role": "user", "content": ""}] * (2_000_000 // 30)
    return crowd(port, "POST", "/v1/complete", json.dumps({"messages": messages}, separators=(",", ":")).encode())


def crowd(port: int, method: str, path: str, body: bytes = b"") -> Iterator[int]:
    """Ask the same over as many connections as a user may have, whatever is answered."""
    with ExitStack() as stack:
        connections = [
            stack.enter_context(closing(http.client.HTTPConnection("127.0.0.1", port, 5, source_address=(HOSTILE, 0))))
            for _ in range(CROWD)
        ]
        while True:
            for connection in connections:
                connection.request(method, path, body)
            for connection in connections:
                connection.getresponse().read()
                yield 1


def bodies(port: int) -> Iterator[int]:
    """Chunks of one byte, as the body of a request for a stream, which has none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5, source_address=(HOSTILE, 0))
    with closing(connection):
        connection.request("POST", "/v1/sessions")
        session_id = json.loads(connection.getresponse().read())["session"]["id"]
    head = f"GET /v1/sessions/{session_id}/events HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), 5, (HOSTILE, 0)) as chunks:
        chunks.sendall(head.encode())
        while True:
            chunks.sendall(CHUNK * (BLOCK_BYTES // len(CHUNK)))
            yield BLOCK_BYTES // len(CHUNK)


def pipelined(port: int) -> Iterator[int]:
    """Requests over one connection that do not wait for answers."""
    with socket.create_connection(("127.0.0.1", port), 5, (HOSTILE, 0)) as requests:
        while True:
            requests.sendall(ALIVE * PIPELINED)
            if not requests.recv(BLOCK_BYTES):
                return
            yield PIPELINED


def connects(port: int) -> Iterator[int]:
    """Connections that come and go."""
    with Client(port, PATH, HOSTILE):
        yield 1


FLOODS: dict[str, Callable[[int], Iterator[int]]] = {
    "pings": pings,
    "messages": messages,
    "generations": generations,
    "prompts": prompts,
    "tasks": tasks,
    "connects": connects,
    "reads": reads,
    "oneshots": oneshots,
    "bodies": bodies,
    "pipelined": pipelined,
}
WAYS = ("none", *FLOODS)


class Flooder:
    """The hostile client, in a thread that gives way to all others: it begins again whatever ends it."""

    def __init__(self, port: int, way: str) -> None:
        self._port = port
        self._flood = FLOODS.get(way)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.sent = 0

    def start(self) -> None:
        """Begin."""
        with pinned(TOOLS_CORE):
            self._thread.start()

    def stop(self) -> None:
        """End."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while self._flood is not None and not self._over.is_set():
            with suppress(OSError, http.client.HTTPException, socket.timeout):
                for count in self._flood(self._port):
                    self.sent += count
                    if self._over.is_set():
                        return


def measure(quick: bool, directory: Path) -> list[Row]:
    """Measure each kind, in rounds, so that a machine that changes meanwhile changes for all of them."""
    rounds: dict[str, list[Row]] = {way: [] for way in WAYS}
    for _ in range(1 if quick else 3):
        for way in WAYS:
            wait_quiet()
            rounds[way].append(measure_one(way, quick, directory))
            say(" ".join(row(rounds[way][-1])))
    middle = {way: sorted(found, key=p99)[len(found) // 2] for way, found in rounds.items()}
    return [msgspec.structs.replace(middle[way], times=p99(middle[way]) / p99(middle["none"])) for way in WAYS]


def measure_one(way: str, quick: bool, directory: Path) -> Row:
    """Measure the sessions of a fresh server that is flooded."""
    plan = Plan(SESSIONS, settle_s=2.0, window_s=5.0 if quick else 10.0)
    log = directory / "load.log"
    with tools.upstream(directory / "upstream.log", rate_per_s=RATE_PER_S) as model:
        with KIND.start(model, directory) as server:
            run_load(server.port, RESPOND, Plan(2, settle_s=0.5, window_s=1.0), log=log)
            model.wait_idle()
            watch, flooder = Watch(server, plan.window_s), Flooder(server.port, way)
            before = memory_of(server.pids).rss

            def in_window() -> None:
                flooder.start()
                watch.sample()

            load = run_load(server.port, RESPOND, plan, log=log, cpu_of=[*server.pids, model.pid], on_window=in_window)
            flooder.stop()
            grown = memory_of(server.pids).rss - before
            left = model.wait_idle()
    return Row(
        flood=way,
        sent_per_s=flooder.sent / plan.window_s,
        grown_mib=grown / 2**20,
        times=0.0,
        point=point(KIND, load, RATE_PER_S, watch, left),
    )


@contextmanager
def start(upstream: Upstream, directory: Path) -> Iterator[Server]:
    """Run this project's server as it is shipped."""
    port = free_port()
    environment = {
        "REALTIME_RESPONDER": "anthropic",
        "ANTHROPIC_API_KEY": "bench",
        "ANTHROPIC_BASE_URL": upstream.url,
    }
    command = [sys.executable, "-m", "realtime", "serve", "--port", str(port)]
    with serving(command, port, directory / "realtime.log", environment) as server:
        yield server


def p99(found: Row) -> float:
    """Return the p99 of a token's latency, in ms."""
    return found.point.load.p99_ms


def row(found: Row) -> list[str]:
    """Return a row of the table."""
    load = found.point.load
    return [
        found.flood,
        f"{found.sent_per_s:,.0f}",
        f"{found.point.tokens_per_s:,.0f}",
        *(f"{value:.1f}" for value in (load.p50_ms, load.p99_ms, load.max_ms)),
        f"{found.times:.2f}",
        f"{found.grown_mib:.1f}",
        f"{found.point.server_core:.0%}",
        f"{found.point.others_core:.0%}",
    ]


def broken(found: Row) -> str:
    """Return what must not be."""
    load = found.point.load
    lost = load.refused + load.closed_early + load.connections - load.active + load.backwards
    if lost:
        return f"{found.flood}: {lost} connections lost, without a token, or with tokens out of order"
    if found.times > MOST and p99(found) > HOLDS_MS:
        return f"{found.flood}: p99 is {found.times:.2f} times the one without a flood"
    return f"{found.flood}: {found.grown_mib:.0f} MiB grown" if found.grown_mib > MOST_MIB else ""


KIND = Kind("realtime", "realtime (WebSocket)", RESPOND, start)

BENCHMARK = Benchmark(
    name="floods",
    title=f"Floods by one client beside {SESSIONS} streaming sessions of another user: latency of a token",
    head=["flood", "sent/s", "tokens/s", "p50 ms", "p99 ms", "max ms", "× p99", "MiB", "server", "strangers"],
    measure=measure,
    row=row,
    broken=broken,
)


if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
