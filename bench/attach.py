"""Measure how soon a client that attaches to a session has all of it, and is live.

    python -m bench.attach [--quick] [--json FILE]

Each session has 50 items and a running response of 1,000 tokens and more. Clients come at a steady rate, ask for the
whole history, and go once they have everything that the first frame says there is. Prints Markdown.
"""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path

import msgspec
import uvloop

from bench import tools
from bench.client import Client
from bench.command import Benchmark, main, say
from bench.measure import wait_quiet
from bench.processes import TOOLS_CORE, cpu_s_of, pinned
from bench.report import percentile
from bench.servers import Server, realtime, redis
from bench.tools import wait_for
from bench.visitor import visit

PATH = "/v1/realtime"
SESSIONS = 20
START_TIMEOUT_S = 30.0
ITEMS = 50
TOKENS = 1000
ITEM_TEXT = "A sentence of some forty characters, twice. " * 2
RATE_PER_S = 10.0
ATTACHES_PER_S = 100.0
SETTINGS = {"REALTIME_ON_DISCONNECT": "continue", "REALTIME_DRAIN_S": "0.5", "REALTIME_ALLOWED_MODELS": "*"}
STORES = ("memory", "Redis", "Redis, other instance")


class Row(msgspec.Struct, frozen=True):
    """What attaching took, in ms, and the CPU time of the instance that was attached to, by attaches."""

    store: str
    attaches: int
    failed: int
    per_s: float
    first_p50_ms: float
    first_p99_ms: float
    live_p50_ms: float
    live_p99_ms: float
    live_max_ms: float
    cpu_ms: float


def measure(quick: bool, directory: Path) -> list[Row]:
    """Measure each store, and with Redis also an instance that does not run the responses."""
    rows = []
    for store in STORES:
        wait_quiet()
        rows.append(measure_one(store, 200 if quick else 1500, directory))
        say(" ".join(row(rows[-1])))
    return rows


def measure_one(store: str, attaches: int, directory: Path) -> Row:
    """Measure one store."""
    with ExitStack() as stack:
        model = stack.enter_context(tools.upstream(directory / "upstream.log", rate_per_s=RATE_PER_S))
        settings = SETTINGS if store == "memory" else {**SETTINGS, **stack.enter_context(redis(directory)).settings}
        runner = server = stack.enter_context(realtime(model, directory, settings))
        if store.endswith("other instance"):
            server = stack.enter_context(realtime(model, directory, settings))
        with pinned(TOOLS_CORE):
            paths = [f"{PATH}?session_id={start(runner, number)}" for number in range(SESSIONS)]
            wait_for(lambda: model.stats().tokens >= SESSIONS * TOKENS, START_TIMEOUT_S)
            uvloop.run(attach(server.port, paths, SESSIONS))  # warm
            began, before = time.monotonic(), cpu_s_of(server.pids)
            found = uvloop.run(attach(server.port, paths, attaches))
            elapsed_s, cpu_s = time.monotonic() - began, cpu_s_of(server.pids) - before
    times = [each for each in found if each is not None]
    first, live = ([each[i] for each in times] for i in range(2))
    return Row(
        store=store,
        attaches=attaches,
        failed=attaches - len(times),
        per_s=attaches / elapsed_s,
        first_p50_ms=percentile(first, 0.5),
        first_p99_ms=percentile(first, 0.99),
        live_p50_ms=percentile(live, 0.5),
        live_p99_ms=percentile(live, 0.99),
        live_max_ms=percentile(live, 1.0),
        cpu_ms=cpu_s * 1000 / attaches,
    )


def start(server: Server, number: int) -> str:
    """Make a session with its items and its running response; return its id."""
    with Client(server.port, PATH) as client:
        session_id = str(client.receive_until("session.created")["session"]["id"])
        for _ in range(ITEMS):
            client.send({"type": "conversation.item.create", "item": {"role": "user", "content": ITEM_TEXT}})
        client.send({"type": "response.create", "input": f"go {number}", "model": "hasty"})
        client.receive_until("response.in_progress")
    return session_id


async def attach(port: int, paths: list[str], count: int) -> list[tuple[int, int] | None]:
    """Attach so often, at the rate; return when the first frame and everything came, in µs. None: refused, or a gap."""
    began, visits = time.perf_counter(), []
    async with asyncio.TaskGroup() as group:
        for number, path in zip(range(count), cycle(paths), strict=False):
            await asyncio.sleep(began + number / ATTACHES_PER_S - time.perf_counter())
            visits.append(group.create_task(attach_one(port, path)))
    return [each.result() for each in visits]


async def attach_one(port: int, path: str) -> tuple[int, int] | None:
    """Attach once."""
    try:
        async with asyncio.timeout(10):
            visitor = await visit(port, path)
    except (OSError, TimeoutError):
        return None
    visitor.hang_up()
    return None if visitor.gaps else (visitor.first_us, visitor.live_us)


def row(found: Row) -> list[str]:
    """Return a row of the table."""
    times = (found.first_p50_ms, found.first_p99_ms, found.live_p50_ms, found.live_p99_ms, found.live_max_ms)
    head = [found.store, str(found.attaches), str(found.failed), f"{found.per_s:.0f}"]
    return [*head, *(f"{value:.1f}" for value in times), f"{found.cpu_ms:.2f}"]


def broken(found: Row) -> str:
    """Return what must not be."""
    return f"{found.store}: {found.failed} of {found.attaches} failed" if found.failed else ""


BENCHMARK = Benchmark(
    name="attach",
    title=f"Attaching to a session with {ITEMS} items and a running response of {TOKENS:,} tokens and more",
    head=[
        "store",
        "attaches",
        "failed",
        "per s",
        "first frame p50 ms",
        "p99 ms",
        "live p50 ms",
        "p99 ms",
        "max ms",
        "CPU ms/attach",
    ],
    measure=measure,
    row=row,
    broken=broken,
)


if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
