"""Measurements of one server: a point at some number of sessions, the largest number that holds, idle memory.

Every measurement starts a fresh server, so that none inherits what an overloaded one before it left behind.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bench.processes import SERVER_CORE, TOOLS_CORE, Memory, core_use, memory_of
from bench.servers import Kind, Server
from bench.tools import Load, Plan, Traffic, Upstream, run_load

P99_LIMIT_MS = 100.0
RATE_SHARE = 0.98
NEAR = 3.0
QUIET = 0.1
QUIET_SAMPLE_S = 1.0
QUIET_TIMEOUT_S = 20.0
TOOLS_LIMIT = 0.9
TOOLS_FULL = "the tools' core is full: says nothing about the server"
SMALLEST = 10
WARM_UP = Plan(connections=5, settle_s=0.5, window_s=1.0)
PING = '{"type":"ping"}'


class Point(msgspec.Struct, frozen=True):
    """What one server did with a number of sessions.

    `server_core`, `store_core` and `tools_core` are shares of a core (0 to 1) that the server, its Redis and the
    tools (with Redis) used, `interrupts_core` and `others_core` what interrupts and strangers took of the
    server's core.
    `memory_*` is bytes per session, the growth from the warm server to the end of the window. `failed` says
    why the point does not hold, and is empty if it does. `left_upstream` counts the streams that were still
    open 10 s after the clients had gone.
    """

    server: str
    sessions: int
    tokens_per_s: float
    tokens_per_frame: float
    cpu_us_per_token: float
    server_core: float
    store_core: float
    tools_core: float
    interrupts_core: float
    others_core: float
    memory_rss: float
    memory_pss: float
    failed: str
    left_upstream: int
    load: Load


class Capacity(msgspec.Struct, frozen=True):
    """The most sessions that were seen to hold, and the fewest that were seen to fail (None: none did).

    `others_core` is what strangers took of the server's core where it failed.
    """

    server: str
    holds: int
    fails: int | None
    failed: str
    others_core: float
    tokens_per_s: float
    p99_ms: float


class Idle(msgspec.Struct, frozen=True):
    """What idle connections cost: bytes for each, and the share of a core that all of them take together."""

    server: str
    wanted: int
    open_at_end: int
    answered_ping: int
    memory_rss: float
    memory_pss: float
    server_core: float


@dataclass(frozen=True)
class Bench:
    """What the measurements share. `deadline` is the time.monotonic() after which no new one begins."""

    upstream: Upstream
    directory: Path
    deadline: float
    settle_s: float
    window_s: float

    def out_of_time(self) -> bool:
        """Return whether the time for all measurements is over."""
        return time.monotonic() > self.deadline


class Watch:
    """A server's memory before and near the end of a window, and the use of its core meanwhile (0 to 1)."""

    def __init__(self, server: Server, window_s: float) -> None:
        self.server = server
        self.wait_s = max(0.1, window_s - 0.5)
        self.before = self.after = memory_of(server.pids)
        self.core_processes = self.core_interrupts = 0.0

    def sample(self) -> None:
        """From the window's beginning wait until its end is near, and look."""
        start, before = time.monotonic(), core_use(SERVER_CORE)
        time.sleep(self.wait_s)
        elapsed_s, after = time.monotonic() - start, core_use(SERVER_CORE)
        self.core_processes = (after.processes_s - before.processes_s) / elapsed_s
        self.core_interrupts = (after.interrupts_s - before.interrupts_s) / elapsed_s
        self.after = memory_of(self.server.pids)

    def memory_per(self, count: int) -> Memory:
        """Return the growth divided by a count."""
        share = max(1, count)
        return Memory((self.after.rss - self.before.rss) // share, (self.after.pss - self.before.pss) // share)


def measure(bench: Bench, kind: Kind, sessions: int) -> Point:
    """Measure one server at a number of streaming sessions."""
    with kind.start(bench.upstream, bench.directory) as server:
        log = bench.directory / "load.log"
        run_load(server.port, kind.traffic, WARM_UP, log=log)
        bench.upstream.wait_idle()
        watch = Watch(server, bench.window_s)
        plan = Plan(sessions, settle_s=bench.settle_s, window_s=bench.window_s)
        pids = [*server.pids, *server.store_pids, bench.upstream.pid]
        load = run_load(server.port, kind.traffic, plan, log=log, cpu_of=pids, on_window=watch.sample)
        left = bench.upstream.wait_idle()
    bench.upstream.wait_idle()
    return point(kind, load, bench.upstream.rate_per_s, watch, left)


def point(kind: Kind, load: Load, rate_per_s: float, watch: Watch, left: int) -> Point:
    """Turn what the load generator saw into a point. Of its `cpu_s` the server's come first, the upstream's last."""
    count = len(watch.server.pids)
    cpu_s, store_s = sum(load.cpu_s[:count]), sum(load.cpu_s[count:-1])
    tools_core = (store_s + load.cpu_s[-1] + load.own_cpu_s) / load.window_s
    memory = watch.memory_per(load.active)
    return Point(
        server=kind.name,
        sessions=load.connections,
        tokens_per_s=load.tokens / load.window_s,
        tokens_per_frame=load.tokens / max(1, load.frames),
        cpu_us_per_token=cpu_s * 1e6 / max(1, load.tokens),
        server_core=cpu_s / load.window_s,
        store_core=store_s / load.window_s,
        tools_core=tools_core,
        interrupts_core=watch.core_interrupts,
        others_core=max(0.0, watch.core_processes - cpu_s / load.window_s),
        memory_rss=memory.rss,
        memory_pss=memory.pss,
        failed=TOOLS_FULL if tools_core > TOOLS_LIMIT else failure(load, rate_per_s),
        left_upstream=left,
        load=load,
    )


def failure(load: Load, rate_per_s: float) -> str:
    """Return why a load did not hold, or an empty string."""
    expected = load.connections * rate_per_s * load.window_s
    if load.refused or load.closed_early:
        return f"{load.refused + load.closed_early} of {load.connections} connections lost"
    if load.active < load.connections:
        return f"{load.connections - load.active} of {load.connections} sessions without a token"
    if load.backwards:
        return f"{load.backwards} tokens out of order"
    if load.tokens < RATE_SHARE * expected:
        return f"{100 * load.tokens / expected:.1f} % of the tokens"
    if load.p99_ms >= P99_LIMIT_MS:
        return f"p99 {load.p99_ms:.0f} ms"
    return ""


def measure_fairly(bench: Bench, kind: Kind, sessions: int) -> Point:
    """Measure; and once more if the point failed, but not by much, or while strangers used the core."""
    wait_quiet()
    first = measure(bench, kind, sessions)
    if not doubtful(first) or bench.out_of_time():
        return first
    wait_quiet()
    second = measure(bench, kind, sessions)
    return second if not second.failed or second.others_core < first.others_core else first


def doubtful(point: Point) -> bool:
    """Return whether a point failed, but might not on a quiet machine."""
    if not point.failed or point.failed == TOOLS_FULL:
        return False
    whole = point.load.active == point.sessions and not point.load.closed_early
    return point.others_core > QUIET or (whole and point.load.p99_ms < NEAR * P99_LIMIT_MS)


def wait_quiet() -> None:
    """Wait until both cores are idle, or QUIET_TIMEOUT_S is over."""
    end = time.monotonic() + QUIET_TIMEOUT_S
    cores = (SERVER_CORE, TOOLS_CORE)
    while time.monotonic() < end:
        before = [core_use(core).processes_s for core in cores]
        time.sleep(QUIET_SAMPLE_S)
        after = [core_use(core).processes_s for core in cores]
        if max(after[i] - before[i] for i in range(len(cores))) < QUIET * QUIET_SAMPLE_S:
            return


def search(
    look: Callable[[int], Point],
    start: int,
    largest: int,
    *,
    precision: float,
    out_of_time: Callable[[], bool],
) -> tuple[Point | None, Point | None]:
    """Find the largest number of sessions that holds: by doubling (or halving) from `start`, then bisection.

    Returns the largest point that held and the smallest that failed above it; None for one that was not seen.
    It ends when the two are within the share `precision` of each other, at `largest`, or when time is over.
    """
    good: Point | None = None
    bad: Point | None = None
    sessions = start
    while not out_of_time():
        found = look(sessions)
        good, bad = (good, found) if found.failed else (found, bad)
        step = next_step(good.sessions if good else 0, bad.sessions if bad else 0, largest, precision)
        if step is None:
            break
        sessions = step
    return good, bad


def next_step(good: int, bad: int, largest: int, precision: float) -> int | None:
    """Return how many sessions to look at next, given the most that held and the fewest that failed."""
    if not bad:
        return min(2 * good, largest) if good < largest else None
    if not good:
        return bad // 2 if bad // 2 >= SMALLEST else None
    if bad <= good * (1 + precision):
        return None
    middle = (good + bad) // 2
    return middle - middle % 5 if middle - middle % 5 > good else middle


def capacity(kind: Kind, good: Point | None, bad: Point | None) -> Capacity:
    """Turn the end of a search into its result."""
    return Capacity(
        server=kind.name,
        holds=good.sessions if good else 0,
        fails=bad.sessions if bad else None,
        failed=bad.failed if bad else "",
        others_core=bad.others_core if bad else 0.0,
        tokens_per_s=good.tokens_per_s if good else 0.0,
        p99_ms=good.load.p99_ms if good else 0.0,
    )


def measure_idle(bench: Bench, kind: Kind, connections: int) -> Idle:
    """Hold idle WebSockets open; at the end ping each, count the open ones and those that answer."""
    wait_quiet()
    with kind.start(bench.upstream, bench.directory) as server:
        log = bench.directory / "load.log"
        run_load(server.port, kind.traffic, WARM_UP, log=log)
        bench.upstream.wait_idle()
        watch = Watch(server, bench.window_s)
        plan = Plan(
            connections,
            ramp_per_s=500.0,
            settle_s=bench.settle_s,
            window_s=bench.window_s,
            last_frame=PING,
            last_answer="pong",
        )
        idle = Traffic(path=kind.traffic.path)
        load = run_load(server.port, idle, plan, log=log, cpu_of=server.pids, on_window=watch.sample)
    memory = watch.memory_per(load.established)
    return Idle(
        server=kind.name,
        wanted=connections,
        open_at_end=load.established - load.closed_early,
        answered_ping=load.answered,
        memory_rss=memory.rss,
        memory_pss=memory.pss,
        server_core=sum(load.cpu_s) / load.window_s,
    )
