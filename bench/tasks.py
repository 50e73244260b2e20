"""Measure what it takes to accept background tasks while many wait, to keep them, and to work them off.

    python -m bench.tasks [--quick] [--json FILE]

An instance on the server's core accepts tasks over HTTP while no worker is up: at a steady rate, then from clients that
each send the next one when the last is accepted. Then a worker comes, on the same core, and does them all; they do
nothing. Then they expire. Both rounds are of the same instance and the same Redis. Prints Markdown.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import redis as client
import uvloop

from bench.client import Client
from bench.command import Benchmark, main, say
from bench.measure import wait_quiet
from bench.processes import SERVER_CORE, TOOLS_CORE, memory_of, pinned, running
from bench.report import percentile
from bench.servers import NO_LIMITS, Redis, Server, free_port, redis, serving
from bench.tools import wait_for
from realtime.tasks.context import Context
from realtime.tasks.registry import task

TASKS = 10_000
QUICK_TASKS = 3_000
WARM_UP = 300
RATE_PER_S = 200.0
CLIENTS = 10
CONNECTIONS = 50
"""How many requests of the steady rate may be under way."""
TTL_S = 90.0
"""Three times the longest time between two looks at a task that waits, so that they are as often as by default."""
QUICK_TTL_S = 20.0
PICKUPS = 100
QUICK_PICKUPS = 30
FULL = 0.9
"""From this share of the tasks on, the queue counts as full."""
MOST_MS = 20.0
DONE_TIMEOUT_S = 300.0
INDEX = "rt:tasks"
OF_TASKS = ("rt:{task_*", "saq:job:*")
"""The keys that belong to single tasks."""


class Nothing(msgspec.Struct, frozen=True):
    """A task's input."""

    number: int = 0


@task()
async def idle(ctx: Context, given: Nothing) -> int:  # noqa: ARG001  # what a task takes
    """The task: it does nothing."""
    return given.number


class Row(msgspec.Struct, frozen=True):
    """One round. Latencies are from when a task was to be sent to when it was accepted; `full_p99_ms` is of those that
    were accepted last. Memory is what one waiting task adds, and what is left when all have expired."""

    way: str
    tasks: int
    per_s: float
    p50_ms: float
    p99_ms: float
    full_p99_ms: float
    server_kib: float
    redis_kib: float
    done_per_s: float
    pickup_p50_ms: float
    keys_left: int
    server_left_mib: float
    redis_left_mib: float


class Connection:
    """A connection for one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    async def submit(self, number: int) -> None:
        """Make a task. Raises `RuntimeError` if it is not accepted."""
        body = b'{"number":%d}' % number
        head = b"POST /v1/tasks/idle HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        self.writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        length = int(answer.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        body = await self._reader.readexactly(length)
        if not answer.startswith(b"HTTP/1.1 202"):
            raise RuntimeError(f"a task was not accepted: {body[:200]!r}")


async def submit(port: int, tasks: int, way: str) -> list[int]:
    """Submit tasks in one of the ways; returns how long each took, in µs, in the order of their ends."""
    count = CLIENTS if way == "clients" else CONNECTIONS
    connections = [Connection(*await asyncio.open_connection("127.0.0.1", port)) for _ in range(count)]
    try:
        return await WAYS[way](connections, tasks)
    finally:
        for connection in connections:
            connection.writer.close()


async def at_a_rate(connections: Sequence[Connection], tasks: int) -> list[int]:
    """Submit at a steady rate, whatever the server does; what waits for a connection counts."""
    took_us: list[int] = []
    free: asyncio.Queue[Connection] = asyncio.Queue()
    for connection in connections:
        free.put_nowait(connection)
    started = time.perf_counter()

    async def one(number: int) -> None:
        connection = await free.get()
        await connection.submit(number)
        free.put_nowait(connection)
        took_us.append(round((time.perf_counter() - started - number / RATE_PER_S) * 1e6))

    async with asyncio.TaskGroup() as group:
        for number in range(tasks):
            await asyncio.sleep(started + number / RATE_PER_S - time.perf_counter())
            group.create_task(one(number))
    return took_us


async def one_after_the_other(connections: Sequence[Connection], tasks: int) -> list[int]:
    """Submit on each connection as fast as the server accepts."""
    took_us: list[int] = []

    async def some(connection: Connection) -> None:
        for number in range(tasks // len(connections)):
            before = time.perf_counter()
            await connection.submit(number)
            took_us.append(round((time.perf_counter() - before) * 1e6))

    async with asyncio.TaskGroup() as group:
        for connection in connections:
            group.create_task(some(connection))
    return took_us


WAYS: dict[str, Callable[[Sequence[Connection], int], Awaitable[list[int]]]] = {
    "rate": at_a_rate,
    "clients": one_after_the_other,
}
TITLES = {"rate": f"{RATE_PER_S:g} a second", "clients": f"{CLIENTS} clients"}


class Site:
    """An instance and its Redis, which a worker may be added to."""

    def __init__(self, server: Server, store: Redis, settings: dict[str, str], directory: Path) -> None:
        self.server = server
        self._store = store
        self._settings = settings
        self._directory = directory
        self._redis: Any = client.Redis.from_url(store.url)

    def memory(self) -> tuple[int, int]:
        """What the instance and Redis hold, in bytes: resident, and used."""
        return memory_of(self.server.pids).rss, int(self._redis.info("memory")["used_memory"])

    def unfinished(self) -> int:
        """How many tasks are unfinished."""
        return int(self._redis.zcard(INDEX))

    def keys(self) -> int:
        """How many keys tasks have."""
        return sum(1 for pattern in OF_TASKS for _ in self._redis.scan_iter(pattern, count=1000))

    @contextmanager
    def worker(self) -> Iterator[None]:
        """Run a worker on the server's core."""
        command = [sys.executable, "-m", "realtime", "worker"]
        with running(command, core=SERVER_CORE, log=self._directory / "worker.log", environment=self._settings):
            yield


def measure(quick: bool, directory: Path) -> list[Row]:
    """Measure both ways, one after the other."""
    tasks, ttl_s, pickups = (QUICK_TASKS, QUICK_TTL_S, QUICK_PICKUPS) if quick else (TASKS, TTL_S, PICKUPS)
    with ExitStack() as stack:
        store = stack.enter_context(redis(directory))
        settings = {
            **store.settings,
            **NO_LIMITS,
            "REALTIME_RESPONDER": "demo",
            "REALTIME_TASKS": "bench.tasks",
            "REALTIME_TASK_TTL_S": f"{ttl_s:g}",
            "REALTIME_SESSION_TTL_S": f"{ttl_s:g}",
        }
        port = free_port()
        command = [sys.executable, "-m", "realtime", "serve", "--port", str(port)]
        server = stack.enter_context(serving(command, port, directory / "realtime.log", settings))
        site = Site(server, store, settings, directory)
        warm_up(site, ttl_s)
        rows = []
        for way in WAYS:
            wait_quiet()
            rows.append(measure_one(site, way, tasks, pickups, ttl_s))
            say(" ".join(row(rows[-1])))
    return rows


def warm_up(site: Site, ttl_s: float) -> None:
    """Have everything done once that is going to be measured."""
    with pinned(TOOLS_CORE):
        uvloop.run(submit(site.server.port, WARM_UP, "clients"))
    with site.worker():
        work_off(site)
    wait_for(lambda: site.keys() == 0, 2 * ttl_s)


def measure_one(site: Site, way: str, tasks: int, pickups: int, ttl_s: float) -> Row:
    """Measure one round."""
    server_before, redis_before = site.memory()
    started = time.perf_counter()
    with pinned(TOOLS_CORE):
        took_us = uvloop.run(submit(site.server.port, tasks, way))
    took_s = time.perf_counter() - started
    if (waiting := site.unfinished()) != tasks:
        raise RuntimeError(f"{waiting} of {tasks} tasks wait")
    server_full, redis_full = site.memory()
    with site.worker():
        done_per_s = work_off(site)
        picked_up_us = pick_up(site.server.port, pickups)
    wait_for(lambda: site.keys() == 0, ttl_s * 1.5)
    server_after, redis_after = site.memory()
    return Row(
        way=TITLES[way],
        tasks=tasks,
        per_s=tasks / took_s,
        p50_ms=percentile(took_us, 0.5),
        p99_ms=percentile(took_us, 0.99),
        full_p99_ms=percentile(took_us[int(tasks * FULL) :], 0.99),
        server_kib=(server_full - server_before) / tasks / 1024,
        redis_kib=(redis_full - redis_before) / tasks / 1024,
        done_per_s=done_per_s,
        pickup_p50_ms=percentile(picked_up_us, 0.5),
        keys_left=site.keys(),
        server_left_mib=(server_after - server_before) / 2**20,
        redis_left_mib=(redis_after - redis_before) / 2**20,
    )


def work_off(site: Site) -> float:
    """Return how many tasks are done in a second, from the first one's end to the last one's."""
    tasks = site.unfinished()
    wait_for(lambda: site.unfinished() < tasks, DONE_TIMEOUT_S, interval_s=0.005)
    first, left = time.perf_counter(), site.unfinished()
    if not wait_for(lambda: site.unfinished() == 0, DONE_TIMEOUT_S):
        raise RuntimeError(f"{site.unfinished()} of {tasks} tasks are not done after {DONE_TIMEOUT_S:g} s")
    return left / (time.perf_counter() - first)


def pick_up(port: int, times: int) -> list[int]:
    """Return how long it takes until a viewer sees that a worker that was idle has begun a task, in µs."""
    took_us = []
    with pinned(TOOLS_CORE), Client(port, "/v1/realtime") as viewer:
        viewer.receive_until("session.created")
        for number in range(times):
            before = time.perf_counter()
            viewer.send({"type": "task.create", "name": "idle", "input": {"number": number}})
            viewer.receive_until("task.started")
            took_us.append(round((time.perf_counter() - before) * 1e6))
            viewer.receive_until("task.done")
    return took_us


def row(found: Row) -> list[str]:
    """Return a row of the table."""
    latencies = (found.p50_ms, found.p99_ms, found.full_p99_ms)
    return [
        found.way,
        f"{found.tasks:,}",
        f"{found.per_s:.0f}",
        *(f"{value:.1f}" for value in latencies),
        f"{found.server_kib:.2f}",
        f"{found.redis_kib:.2f}",
        f"{found.done_per_s:.0f}",
        f"{found.pickup_p50_ms:.1f}",
        str(found.keys_left),
        f"{found.server_left_mib:.1f}",
        f"{found.redis_left_mib:.1f}",
    ]


def broken(found: Row) -> str:
    """Return what must not be."""
    if found.keys_left:
        return f"{found.way}: {found.keys_left} keys are left of tasks that have expired"
    if found.way == TITLES["rate"] and found.full_p99_ms > MOST_MS:
        return f"{found.way}: the p99 of a submission is {found.full_p99_ms:.1f} ms where many tasks wait"
    return ""


BENCHMARK = Benchmark(
    name="tasks",
    title="Background tasks: accepting them while none is worked on, and working them off",
    head=[
        "submitted",
        "tasks",
        "accepted/s",
        "p50 ms",
        "p99 ms",
        "p99 full ms",
        "server KiB/task",
        "Redis KiB/task",
        "done/s",
        "pickup p50 ms",
        "keys left",
        "server left MiB",
        "Redis left MiB",
    ],
    measure=measure,
    row=row,
    broken=broken,
)


if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
