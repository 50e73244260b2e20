"""Measure how long it takes until all clients are back that lost their connections at once.

    python -m bench.storm [--quick] [--json FILE]

Each client has a session of its own with a running response. All sockets are closed at one instant, and all clients
come back at once, with their positions; or their instance is killed, and they come back to another one. A client is
back when it has all that the first frame says there is. Prints Markdown.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
import uvloop

from bench import tools
from bench.command import Benchmark, main, say
from bench.measure import wait_quiet
from bench.processes import TOOLS_CORE, kill_tree, pinned
from bench.report import percentile
from bench.servers import Server, realtime, redis
from bench.visitor import Visitor, again, visit

PATH = "/v1/realtime"
RATE_PER_S = 5.0
CLIENTS = 1000
ARRIVALS_PER_S = 100.0
ARRIVAL_S = 60.0
SETTLE_S = 3.0
RETRY_S = 0.5
TIMEOUT_S = 30.0
SETTINGS = {"REALTIME_DISCONNECT_GRACE_MS": "30000", "REALTIME_DRAIN_S": "0.5"}
STORMS = ("memory, all sockets closed", "Redis, all sockets closed", "Redis, instance killed")


class Row(msgspec.Struct, frozen=True):
    """How long coming back took, in ms from the drop. `retries` counts attempts that were refused or hung up on."""

    storm: str
    clients: int
    missing: int
    retries: int
    gaps: int
    p50_ms: float
    p99_ms: float
    all_ms: float


class Storm:
    """Clients of one server, and their coming back to it or to another."""

    def __init__(self, server: Server, refuge: Server) -> None:
        self.server = server
        self.refuge = refuge
        self.retries = 0

    async def run(self, clients: int) -> tuple[list[Visitor], list[int]]:
        """Bring the clients there, drop them, and return those that are back, and when they were (µs)."""
        arriving = []
        for _ in range(clients):
            arriving.append(asyncio.create_task(self.arrive()))
            await asyncio.sleep(1 / ARRIVALS_PER_S)
        try:
            async with asyncio.timeout(ARRIVAL_S):
                visitors = await asyncio.gather(*arriving)
        except TimeoutError:
            raise RuntimeError(f"not all clients were there after {ARRIVAL_S:g} s") from None
        await asyncio.sleep(SETTLE_S)
        dropped = time.perf_counter()
        if self.refuge is not self.server:
            kill_tree(self.server.pids[0])
        for visitor in visitors:
            visitor.hang_up()
        back = [asyncio.create_task(self.come_back(visitor, dropped)) for visitor in visitors]
        done, late = await asyncio.wait(back, timeout=TIMEOUT_S)
        for task in late:
            task.cancel()
        return [task.result()[0] for task in done], [task.result()[1] for task in done]

    async def arrive(self) -> Visitor:
        """Make a session and start its response."""
        visitor = await visit(self.server.port, PATH)
        visitor.send({"type": "response.create", "input": "go"})
        return visitor

    async def come_back(self, visitor: Visitor, dropped: float) -> tuple[Visitor, int]:
        """Come back, however often it takes."""
        while True:
            try:
                found = await visit(self.refuge.port, again(visitor), visitor.positions)
            except OSError:
                self.retries += 1
                await asyncio.sleep(RETRY_S)
            else:
                return found, round((time.perf_counter() - dropped) * 1e6)


def measure(quick: bool, directory: Path) -> list[Row]:
    """Measure each storm."""
    rows = []
    for storm in STORMS:
        wait_quiet()
        rows.append(measure_one(storm, 100 if quick else CLIENTS, directory))
        say(" ".join(row(rows[-1])))
    return rows


def measure_one(storm: str, clients: int, directory: Path) -> Row:
    """Measure one storm."""
    with ExitStack() as stack:
        model = stack.enter_context(tools.upstream(directory / "upstream.log", rate_per_s=RATE_PER_S))
        in_memory = storm.startswith("memory")
        settings = SETTINGS if in_memory else {**SETTINGS, **stack.enter_context(redis(directory)).settings}
        server = refuge = stack.enter_context(realtime(model, directory, settings))
        if storm.endswith("killed"):
            refuge = stack.enter_context(realtime(model, directory, settings))
        with pinned(TOOLS_CORE):
            run = Storm(server, refuge)
            back, took_us = uvloop.run(run.run(clients))
    return summary(storm, clients, run, back, took_us)


def summary(storm: str, clients: int, run: Storm, back: Sequence[Visitor], took_us: Sequence[int]) -> Row:
    """Put together what was seen."""
    return Row(
        storm=storm,
        clients=clients,
        missing=clients - len(back),
        retries=run.retries,
        gaps=sum(visitor.gaps for visitor in back),
        p50_ms=percentile(took_us, 0.5),
        p99_ms=percentile(took_us, 0.99),
        all_ms=percentile(took_us, 1.0),
    )


def row(found: Row) -> list[str]:
    """Return a row of the table."""
    counts = (found.clients, found.missing, found.retries, found.gaps)
    times = (found.p50_ms, found.p99_ms, found.all_ms)
    return [found.storm, *map(str, counts), *(f"{value:.0f}" for value in times)]


def broken(found: Row) -> str:
    """Return what must not be."""
    wrong = found.missing or found.gaps
    return f"{found.storm}: {found.missing} did not come back, {found.gaps} events did not follow" if wrong else ""


BENCHMARK = Benchmark(
    name="storm",
    title="Clients that lose their connections at once: until they are back and have everything",
    head=["storm", "clients", "missing", "retries", "gaps", "p50 ms", "p99 ms", "all back ms"],
    measure=measure,
    row=row,
    broken=broken,
)


if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
