"""Measure what a viewer waits for a token of a response that another instance runs.

    python -m bench.remote [--quick] [--json FILE]

Two instances share the server's core, and a Redis. One runs every response; the clients are attached to it, or to the
other one, which hears of the tokens through Redis. Prints Markdown.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import msgspec

from bench import tools
from bench.client import Client
from bench.command import Benchmark, main, say
from bench.measure import wait_quiet
from bench.processes import TOOLS_CORE, pinned
from bench.servers import Server, realtime, redis
from bench.tools import Load, Plan, Traffic, run_load

RATE_PER_S = 50.0
SESSIONS = (50, 200)
PATH = "/v1/realtime"
SETTINGS = {"REALTIME_ON_DISCONNECT": "continue", "REALTIME_DRAIN_S": "0.5"}


class Row(msgspec.Struct, frozen=True):
    """What viewers of some sessions got. `*_us_per_token` is the CPU time of an instance, divided by their tokens."""

    viewers: str
    sessions: int
    tokens_per_s: float
    runner_us_per_token: float
    relay_us_per_token: float
    load: Load


def measure(quick: bool, directory: Path) -> list[Row]:
    """Measure each number of sessions, with the viewers here and there."""
    rows = []
    for sessions in SESSIONS:
        for is_remote in (False, True):
            wait_quiet()
            rows.append(measure_one(quick, directory, sessions, is_remote=is_remote))
            say(" ".join(row(rows[-1])))
    return rows


def measure_one(quick: bool, directory: Path, sessions: int, *, is_remote: bool) -> Row:
    """Run responses on one instance, and look at them on that one or on another."""
    with ExitStack() as stack:
        model = stack.enter_context(tools.upstream(directory / "upstream.log", rate_per_s=RATE_PER_S))
        settings = {**SETTINGS, **stack.enter_context(redis(directory)).settings}
        runner, relay = (stack.enter_context(realtime(model, directory, settings)) for _ in range(2))
        traffic = Traffic(path=PATH, queries=start(runner, sessions, directory))
        plan = Plan(sessions, settle_s=1.0 if quick else 3.0, window_s=3.0 if quick else 6.0)
        viewed = relay if is_remote else runner
        pids = [runner.pids[0], relay.pids[0]]
        load = run_load(viewed.port, traffic, plan, log=directory / "load.log", cpu_of=pids)
    tokens = max(1, load.tokens)
    return Row(
        viewers="other instance" if is_remote else "same instance",
        sessions=sessions,
        tokens_per_s=load.tokens / load.window_s,
        runner_us_per_token=load.cpu_s[0] * 1e6 / tokens,
        relay_us_per_token=load.cpu_s[1] * 1e6 / tokens,
        load=load,
    )


def start(runner: Server, sessions: int, directory: Path) -> Path:
    """Start a response in each of some new sessions; return a file with what a viewer of each asks for."""
    queries = directory / "queries"
    with pinned(TOOLS_CORE), queries.open("w") as file:
        for _ in range(sessions):
            with Client(runner.port, PATH) as client:
                session = client.receive_until("session.created")["session"]
                client.send({"type": "response.create", "input": "go"})
                client.receive_until("response.in_progress")
            print(f"?session_id={session['id']}", file=file)
    return queries


def row(found: Row) -> list[str]:
    """Return a row of the table."""
    load = found.load
    return [
        found.viewers,
        str(found.sessions),
        f"{found.tokens_per_s:,.0f}",
        *(f"{value:.1f}" for value in (load.p50_ms, load.p99_ms, load.max_ms)),
        f"{found.runner_us_per_token:.1f}",
        f"{found.relay_us_per_token:.1f}",
    ]


def broken(found: Row) -> str:
    """Return what must not be."""
    load = found.load
    lost = load.refused + load.closed_early + load.connections - load.active + load.backwards
    return f"{found.viewers}: {lost} connections lost, without a token, or with tokens out of order" if lost else ""


BENCHMARK = Benchmark(
    name="remote",
    title="Viewers on another instance than the one that runs the response: latency of a token",
    head=["viewers on", "sessions", "tokens/s", "p50 ms", "p99 ms", "max ms", "runner µs/token", "other µs/token"],
    measure=measure,
    row=row,
    broken=broken,
)


if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
