"""Measure what a handler that computes costs the sessions that stream beside it.

    python -m bench.offload [--quick] [--json FILE]

The server has one more route, whose handler uses the processor for 200 ms, in pure Python: in the event loop, in a
thread, or by `offload()`. One client calls it over and over while 200 others read tokens. Prints Markdown.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from bench import tools
from bench.command import Benchmark, main, say
from bench.measure import WARM_UP, Point, Watch, point, wait_quiet
from bench.processes import TOOLS_CORE, pinned
from bench.servers import NO_LIMITS, RESPOND, Kind, Server, free_port, serving
from bench.tools import Plan, Upstream, run_load
from realtime.app import create_app
from realtime.offload import offload
from realtime.server import run
from realtime.settings import load_settings

RATE_PER_S = 50.0
SESSIONS = 200
BURN_S = 0.2
CALL_TIMEOUT_S = 60.0
WAYS = ("none", "inline", "thread", "offload")
MOST = 1.5
"""How many times the p99 without the handler the p99 with `offload` may be."""


class Row(msgspec.Struct, frozen=True):
    """The round with the middle p99 of a way: what the sessions got, how many calls a second were answered, the median
    of how long they took, and the p99 in terms of the one without calls."""

    way: str
    calls_per_s: float
    call_ms: float
    times: float
    point: Point


class Caller:
    """The client of the handler, in a thread: each call follows the answer to the one before. None: it calls nothing.

    Raises from `stop()` what a call has raised."""

    def __init__(self, port: int, way: str) -> None:
        self._port = port
        self._way = way
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._error: Exception | None = None
        self.took_s: list[float] = []

    def call(self) -> None:
        """Call once. Raises `OSError` or `http.client.HTTPException`."""
        began = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=CALL_TIMEOUT_S)
        try:
            connection.request("GET", f"/burn/{self._way}")
            if (status := connection.getresponse().status) != 200:
                raise http.client.HTTPException(f"GET /burn/{self._way}: {status}")
        finally:
            connection.close()
        self.took_s.append(time.monotonic() - began)

    def start(self) -> None:
        """Begin."""
        with pinned(TOOLS_CORE):
            self._thread.start()

    def stop(self) -> None:
        """Wait for the last answer."""
        self._over.set()
        self._thread.join()
        if self._error:
            raise RuntimeError(f"a call failed: {self._error}") from self._error

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                self.call()
        except (OSError, http.client.HTTPException) as error:
            self._error = error


def measure(quick: bool, directory: Path) -> list[Row]:
    """Measure each way, in rounds, so that a machine that changes meanwhile changes for all of them."""
    rounds: dict[str, list[Row]] = {way: [] for way in WAYS}
    for _ in range(1 if quick else 3):
        for way in WAYS:
            wait_quiet()
            rounds[way].append(measure_one(way, quick, directory))
            say(" ".join(row(rounds[way][-1])))
    middle = {way: sorted(found, key=p99)[len(found) // 2] for way, found in rounds.items()}
    return [msgspec.structs.replace(middle[way], times=p99(middle[way]) / p99(middle["none"])) for way in WAYS]


def measure_one(way: str, quick: bool, directory: Path) -> Row:
    """Measure the sessions of a fresh server whose handler computes this way."""
    plan = Plan(SESSIONS, settle_s=2.0 if quick else 4.0, window_s=4.0 if quick else 10.0)
    log = directory / "load.log"
    with tools.upstream(directory / "upstream.log", rate_per_s=RATE_PER_S) as model:
        with KIND.start(model, directory) as server:
            run_load(server.port, RESPOND, WARM_UP, log=log)
            model.wait_idle()
            watch, caller = Watch(server, plan.window_s), Caller(server.port, way)
            if way != "none":
                caller.call()
                caller.took_s.clear()

            def in_window() -> None:
                if way != "none":
                    caller.start()
                watch.sample()

            load = run_load(server.port, RESPOND, plan, log=log, cpu_of=[*server.pids, model.pid], on_window=in_window)
            if way != "none":
                caller.stop()
            left = model.wait_idle()
    return Row(
        way=way,
        calls_per_s=len(caller.took_s) / plan.window_s,
        call_ms=median(caller.took_s or [0.0]) * 1000,
        times=0.0,
        point=point(KIND, load, RATE_PER_S, watch, left),
    )


@contextmanager
def start(upstream: Upstream, directory: Path) -> Iterator[Server]:
    """Run this project's server with the handler."""
    port = free_port()
    environment = {
        "REALTIME_RESPONDER": "anthropic",
        "REALTIME_PORT": str(port),
        "ANTHROPIC_API_KEY": "bench",
        "ANTHROPIC_BASE_URL": upstream.url,
        **NO_LIMITS,
    }
    command = [sys.executable, "-c", "from bench.offload import serve; serve()"]
    with serving(command, port, directory / "realtime.log", environment) as server:
        yield server


def serve() -> None:
    """Be that server."""
    settings = load_settings()
    app = create_app(settings=settings)
    app.routes.insert(0, Route("/burn/{way}", handle))
    run(app, settings)


async def handle(request: Request) -> PlainTextResponse:
    """The handler that computes."""
    match request.path_params["way"]:
        case "inline":
            burn()
        case "thread":
            await asyncio.to_thread(burn)
        case "offload":
            await offload(burn_elsewhere)
    return PlainTextResponse("done")


def burn() -> int:
    """Use the processor for BURN_S, however long that takes."""
    end, count = time.thread_time() + BURN_S, 0
    while time.thread_time() < end:
        for _ in range(1000):
            count += 1
    return count


def burn_elsewhere() -> int:
    """The same off the server's core, to which the benchmark has bound the server with all that it starts."""
    os.sched_setaffinity(0, {TOOLS_CORE})
    return burn()


def p99(found: Row) -> float:
    """Return the p99 of a token's latency, in ms."""
    return found.point.load.p99_ms


def row(found: Row) -> list[str]:
    """Return a row of the table."""
    load = found.point.load
    return [
        found.way,
        f"{found.calls_per_s:.1f}",
        f"{found.call_ms:.0f}",
        f"{found.point.tokens_per_s:,.0f}",
        *(f"{value:.1f}" for value in (load.p50_ms, load.p99_ms, load.max_ms)),
        f"{found.times:.2f}",
        f"{found.point.server_core:.0%}",
        f"{found.point.others_core:.0%}",
    ]


def broken(found: Row) -> str:
    """Return what must not be."""
    load = found.point.load
    lost = load.refused + load.closed_early + load.connections - load.active + load.backwards
    if lost:
        return f"{found.way}: {lost} connections lost, without a token, or with tokens out of order"
    if found.way == "offload" and found.times > MOST:
        return f"{found.way}: p99 is {found.times:.2f} times the one without calls"
    return ""


KIND = Kind("realtime", "realtime (WebSocket)", RESPOND, start)

BENCHMARK = Benchmark(
    name="offload",
    title=f"A handler of {BURN_S * 1000:.0f} ms CPU time beside {SESSIONS} streaming sessions: latency of a token",
    head=["handler", "calls/s", "call ms", "tokens/s", "p50 ms", "p99 ms", "max ms", "× p99", "server", "strangers"],
    measure=measure,
    row=row,
    broken=broken,
)


if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
