"""The result of a relay benchmark, as JSON's structure and as Markdown."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from bench.measure import P99_LIMIT_MS, TOOLS_FULL, Capacity, Idle, Point

BUSY_LOAD = 0.5


class Machine(msgspec.Struct, frozen=True):
    """What it was measured on. `load_average` is that of the last minute before the first measurement."""

    cpu: str
    cores: int
    kernel: str
    python: str
    load_average: float


class Result(msgspec.Struct):
    """All that one run measured."""

    machine: Machine
    rate_per_s: float
    window_s: float
    points: list[Point]
    capacities: list[Capacity]
    idle: list[Idle]
    notes: list[str]


def this_machine() -> Machine:
    """Return what this machine says of itself."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return Machine(
        cpu=model,
        cores=len(os.sched_getaffinity(0)),
        kernel=platform.release(),
        python=platform.python_version(),
        load_average=os.getloadavg()[0],
    )


def machine_notes(machine: Machine) -> list[str]:
    """Return what about the machine makes its figures less sure."""
    notes = []
    if machine.load_average > BUSY_LOAD:
        notes.append(
            f"The machine was busy before the run (load average {machine.load_average:.2f}):"
            " the figures are noisy, and worse than they could be."
        )
    if machine.cores < 2:
        notes.append("There is only one core: the server and the tools shared it, and no figure means much.")
    return notes


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose first column is text and whose others are numbers."""
    lines = [head, ["---", *("--:" for _ in head[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percentile(values: Sequence[int], share: float) -> float:
    """Return a percentile by nearest rank, in ms for values in µs; NaN without values."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] / 1000


def point_row(point: Point) -> list[str]:
    """Return one row of the table of points."""
    lost = point.load.refused + point.load.closed_early
    return [
        point.server,
        str(point.sessions),
        f"{point.tokens_per_s:,.0f}",
        f"{point.cpu_us_per_token:.1f}",
        f"{100 * point.server_core:.0f} % + {100 * point.interrupts_core:.0f} %",
        f"{100 * point.store_core:.0f} %" if point.store_core else "",
        f"{point.load.p50_ms:.1f}",
        f"{point.load.p99_ms:.1f}",
        f"{point.load.max_ms:.0f}",
        f"{point.tokens_per_frame:.1f}",
        f"{point.memory_rss / 1024:.0f} / {point.memory_pss / 1024:.0f}",
        f"{100 * point.others_core:.0f} %",
        str(lost),
        point.failed or "holds",
    ]


def capacity_row(capacity: Capacity) -> list[str]:
    """Return one row of the table of capacities."""
    at_least = "≥ " if capacity.fails is None or capacity.failed == TOOLS_FULL else ""
    fails = "not reached"
    if capacity.fails:
        fails = f"{capacity.fails} ({capacity.failed}; strangers {100 * capacity.others_core:.0f} %)"
    return [
        capacity.server,
        f"{at_least}{capacity.holds}",
        f"{capacity.tokens_per_s:,.0f}",
        f"{capacity.p99_ms:.0f}",
        fails,
    ]


def idle_row(idle: Idle) -> list[str]:
    """Return one row of the table of idle connections."""
    return [
        idle.server,
        str(idle.wanted),
        str(idle.open_at_end),
        str(idle.answered_ping),
        f"{idle.memory_rss / 1024:.1f} / {idle.memory_pss / 1024:.1f}",
        f"{100 * idle.server_core:.1f} %",
    ]


def markdown(result: Result) -> str:
    """Return the result as Markdown."""
    machine = result.machine
    parts = [
        f"## Relay, {result.rate_per_s:.0f} tokens/s per session",
        f"{machine.cpu}, {machine.cores} cores, Linux {machine.kernel}, Python {machine.python}, load average"
        f" before the run {machine.load_average:.2f}. The server has one core, model and clients another."
        f" Each figure counts {result.window_s:g} s.",
        *(f"Note: {note}" for note in result.notes),
    ]
    if result.points:
        head = [
            "server",
            "sessions",
            "tokens/s",
            "CPU µs/token",
            "core + interrupts",
            "Redis",
            "p50 ms",
            "p99 ms",
            "max ms",
        ]
        head += ["tokens/frame", "KiB/session RSS / PSS", "strangers", "lost", "verdict"]
        parts.append(table(head, map(point_row, result.points)))
    if result.capacities:
        head = [
            "server",
            f"most sessions with p99 < {P99_LIMIT_MS:.0f} ms",
            "tokens/s",
            "p99 ms",
            "failed at",
        ]
        parts.append(table(head, map(capacity_row, result.capacities)))
    if result.idle:
        head = [
            "server",
            "idle connections",
            "open at the end",
            "answered a ping",
            "KiB each RSS / PSS",
            "core",
        ]
        parts.append(table(head, map(idle_row, result.idle)))
    return "\n\n".join(parts) + "\n"
