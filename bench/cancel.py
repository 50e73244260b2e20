"""Measure how fast the model's stream is closed when a client goes, in every phase and in every way of going.

    python -m bench.cancel [--cycles N] [--quick] [--json FILE]

Each cycle opens a connection, brings a response into a phase, hangs up, and waits until the stand-in for the
model's API sees its stream closed. Both instants are read from the same clock. Prints Markdown. The exit
status is 1 if a stream was not closed in time, or in another phase than meant, or if anything is left.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from bench import tools
from bench.client import Client
from bench.processes import TOOLS_CORE, end_in_order, pinned, raise_file_limit
from bench.report import Machine, machine_notes, percentile, table, this_machine
from bench.servers import KINDS, Server, missing, realtime
from bench.tools import Abort, Upstream, wait_for

RATE_PER_S = 50.0
ABORT_TIMEOUT_S = 10.0
POLL_S = 0.002
JITTER_S = 0.02
PATH = "/v1/realtime"
SETTINGS = {"REALTIME_ALLOWED_MODELS": "*"}

WAYS: dict[str, Callable[[Client], int]] = {
    "close frame": Client.send_close,
    "RST": Client.reset,
    "FIN": Client.half_close,
}
"""How a client goes: does it, and returns when (µs since 1970)."""

CUT_PHASES = {
    "queued": "middle",
    "before headers": "headers",
    "before the first token": "first",
    "mid-stream": "middle",
}
"""In which phase the upstream must see the running stream cut, for each phase of a cycle."""

MODELS = {"before headers": "no-headers", "before the first token": "slow-first"}
"""The model that stays in a phase; any other one streams."""


class Cycle(msgspec.Struct, frozen=True):
    """One hang-up: from the client's closing to the upstream's seeing it, in µs; None if it never did."""

    number: int
    phase: str
    way: str
    took_us: int | None
    cut_phase: str


class Spread(msgspec.Struct, frozen=True):
    """Percentiles of some cycles, in milliseconds."""

    phase: str
    way: str
    cycles: int
    missed: int
    p50_ms: float
    p99_ms: float
    max_ms: float


class Result(msgspec.Struct):
    """All that one run measured. `files_*` counts the server's open files before and after all cycles."""

    machine: Machine
    spreads: list[Spread]
    started: int
    aborted: int
    completed: int
    left_upstream: int
    queued_reached_upstream: int
    wrong_phase: int
    files_before: int
    files_after: int
    notes: list[str]

    def failed(self) -> bool:
        """Return whether anything went wrong."""
        missed = sum(spread.missed for spread in self.spreads)
        return bool(missed or self.left_upstream or self.queued_reached_upstream or self.wrong_phase)


class Cycles:
    """Runs cycles one after the other against one server."""

    def __init__(self, server: Server, upstream: Upstream) -> None:
        self.server = server
        self.upstream = upstream
        self.random = random.Random(1)
        self.done: list[Cycle] = []

    def run(self, number: int, phase: str, way: str) -> None:
        """Run one cycle."""
        seen = self.upstream.stats()
        with Client(self.server.port, PATH) as client:
            self.enter(client, phase, f"cycle-{number}")
            self.upstream_started(seen.started)
            time.sleep(self.random.random() * JITTER_S)
            closed_us = WAYS[way](client)
            abort = self.wait_for_abort(seen.aborted, f"cycle-{number}-running")
        took_us = abort.at_us - closed_us if abort else None
        self.done.append(Cycle(number, phase, way, took_us, abort.phase if abort else "none"))

    def enter(self, client: Client, phase: str, tag: str) -> None:
        """Bring a response into a phase."""
        model = MODELS.get(phase, "bench")
        client.send({"type": "response.create", "input": f"{tag}-running", "model": model})
        client.receive_until("response.in_progress")
        if CUT_PHASES[phase] == "middle":
            client.receive_until("response.output_text.delta")
        if phase == "queued":
            more = {"type": "response.create", "input": f"{tag}-queued", "multitask_strategy": "enqueue"}
            client.send({**more, "model": model})
            created = client.receive_until("response.created")["response"]
            if created["status"] != "queued":
                raise RuntimeError(f"the second response is not queued: {created}")

    def upstream_started(self, before: int) -> None:
        """Wait until the upstream has one more request than before."""
        if not wait_for(lambda: self.upstream.stats().started > before, ABORT_TIMEOUT_S, interval_s=POLL_S):
            raise RuntimeError("the request never reached the upstream")

    def wait_for_abort(self, start: int, tag: str) -> Abort | None:
        """Return the abort of a stream, `start` being how many there were before; None if none comes."""
        found: list[Abort] = []

        def look() -> bool:
            found[:] = [abort for abort in self.upstream.aborts(start) if abort.tag == tag]
            return bool(found)

        wait_for(look, ABORT_TIMEOUT_S, interval_s=POLL_S)
        return found[0] if found else None


def spread(phase: str, way: str, cycles: Sequence[Cycle]) -> Spread:
    """Summarise cycles."""
    took = [cycle.took_us for cycle in cycles if cycle.took_us is not None]
    return Spread(
        phase=phase,
        way=way,
        cycles=len(cycles),
        missed=len(cycles) - len(took),
        p50_ms=percentile(took, 0.5),
        p99_ms=percentile(took, 0.99),
        max_ms=percentile(took, 1.0),
    )


def spreads(cycles: Sequence[Cycle]) -> list[Spread]:
    """Summarise cycles by phase, by way, and as a whole."""
    by_phase = [spread(name, "all", [each for each in cycles if each.phase == name]) for name in CUT_PHASES]
    by_way = [spread("all", name, [each for each in cycles if each.way == name]) for name in WAYS]
    return [*by_phase, *by_way, spread("all", "all", cycles)]


def open_files(pids: Sequence[int]) -> int:
    """Return how many files some processes have open."""
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)


def combinations(count: int) -> list[tuple[str, str]]:
    """Return `count` pairs of a phase and a way, all of them in turn."""
    every = [(phase, way) for way in WAYS for phase in CUT_PHASES]
    return [every[number % len(every)] for number in range(count)]


def run(count: int, directory: Path) -> Result:
    """Run the cycles and look at what is left."""
    machine = this_machine()
    with (
        tools.upstream(directory / "upstream.log", rate_per_s=RATE_PER_S) as upstream,
        realtime(upstream, directory, SETTINGS) as server,
        pinned(TOOLS_CORE),
    ):
        cycles = Cycles(server, upstream)
        files_before = open_files(server.pids)
        for number, (phase, way) in enumerate(combinations(count)):
            cycles.run(number, phase, way)
        left = upstream.wait_idle()
        time.sleep(1.0)  # a queued response that was forgotten would start now
        return result(machine, cycles.done, upstream, left, (files_before, open_files(server.pids)))


def result(machine: Machine, cycles: Sequence[Cycle], upstream: Upstream, left: int, files: tuple[int, int]) -> Result:
    """Put together what was measured and what the upstream says at the end."""
    stats = upstream.stats()
    return Result(
        machine=machine,
        spreads=spreads(cycles),
        started=stats.started,
        aborted=stats.aborted,
        completed=stats.completed,
        left_upstream=max(left, stats.active),
        queued_reached_upstream=stats.started - len(cycles),
        wrong_phase=sum(cycle.cut_phase not in (CUT_PHASES[cycle.phase], "none") for cycle in cycles),
        files_before=files[0],
        files_after=files[1],
        notes=machine_notes(machine),
    )


def markdown(found: Result) -> str:
    """Return the result as Markdown."""
    head = ["phase", "way", "cycles", "missed", "p50 ms", "p99 ms", "max ms"]
    rows = [
        [each.phase, each.way, str(each.cycles), str(each.missed)]
        + [f"{value:.1f}" for value in (each.p50_ms, each.p99_ms, each.max_ms)]
        for each in found.spreads
    ]
    parts = [
        "## Cancellation: from the client's hanging up to the model's stream being closed",
        *(f"Note: {note}" for note in found.notes),
        table(head, rows),
        f"Streams at the model: {found.started} started, {found.aborted} cut, {found.completed} completed,"
        f" {found.left_upstream} left. Queued responses that reached it: {found.queued_reached_upstream}."
        f" Cut in another phase than meant: {found.wrong_phase}. Open files of the server:"
        f" {found.files_before} before, {found.files_after} after.",
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status: 1 if something went wrong, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m bench.cancel", description="Time the way of a hang-up.")
    parser.add_argument("--cycles", type=int, metavar="N", help="default: 1000; quick: 120")
    parser.add_argument("--quick", action="store_true", help="fewer cycles: to see whether it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    options = parser.parse_args(arguments)
    why = missing(KINDS[0])
    if why:
        print(f"bench: {why}", file=sys.stderr)
        return 1
    end_in_order()
    raise_file_limit()
    tools.build()
    try:
        with tempfile.TemporaryDirectory(prefix="realtime-bench-") as directory:
            found = run(options.cycles or (120 if options.quick else 1000), Path(directory))
    except KeyboardInterrupt:
        return 130
    except (OSError, RuntimeError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(markdown(found))
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(found)))
    return 1 if found.failed() else 0


if __name__ == "__main__":
    raise SystemExit(main())
