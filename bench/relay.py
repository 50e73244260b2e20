"""Compare relays of one model stream per session: this server, without and with Redis, the usual pattern, nginx.

    python -m bench.relay [--quick] [--servers realtime,realtime+redis,baseline,nginx]
        [--sessions 100,400] [--json FILE]

Prints Markdown; progress goes to standard error. See README.md beside this file for how to read it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from bench import tools
from bench.measure import Bench, Point, capacity, measure_fairly, measure_idle, search
from bench.processes import end_in_order, raise_file_limit
from bench.report import Result, machine_notes, markdown, this_machine
from bench.servers import KINDS, Kind, missing

RATE_PER_S = 50.0
FILES_TO_SPARE = 500
IDLE_SERVERS = ("realtime",)


class Options(argparse.Namespace):
    """The command line, parsed."""

    quick: bool
    servers: list[str]
    sessions: list[int]
    idle: int | None
    max_sessions: int
    precision: float
    time_limit_s: float
    json: Path | None

    def idle_connections(self) -> int:
        """Return how many idle connections to hold."""
        if self.idle is None:
            return 2_000 if self.quick else 10_000
        return self.idle


def numbers(text: str) -> list[int]:
    """Parse positive numbers joined by commas."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise ValueError(text)
    return values


def names(text: str) -> list[str]:
    """Parse names of servers joined by commas."""
    chosen = text.split(",")
    if not set(chosen) <= {kind.name for kind in KINDS}:
        raise ValueError(text)
    return chosen


def parse(arguments: Sequence[str]) -> Options:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.relay", description="Compare relays of model streams.")
    parser.add_argument("--quick", action="store_true", help="short windows, a coarse search: to see whether it works")
    parser.add_argument("--servers", type=names, default=[kind.name for kind in KINDS], metavar="NAME,…")
    parser.add_argument("--sessions", type=numbers, default=[100, 400], metavar="N,…", help="default: 100,400")
    parser.add_argument("--idle", type=int, metavar="N", help="idle connections, 0: none (default: 10000; quick: 2000)")
    parser.add_argument(
        "--max-sessions", type=int, default=3200, metavar="N", help="where the search ends at the latest"
    )
    parser.add_argument(
        "--precision", type=float, default=0.0, metavar="SHARE", help="of the search (default: 0.1; quick: 0.5)"
    )
    parser.add_argument("--time-limit-s", type=float, default=1500.0, metavar="S", help="begin nothing new after it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    return parser.parse_args(arguments, namespace=Options())


def say(text: str) -> None:
    """Tell about the progress."""
    print(text, file=sys.stderr, flush=True)


class Run:
    """One run over all servers, collecting its result."""

    def __init__(self, bench: Bench, options: Options, result: Result) -> None:
        self.bench = bench
        self.options = options
        self.result = result
        self.seen: dict[tuple[str, int], Point] = {}

    def server(self, kind: Kind) -> None:
        """Measure all of one server, or note why not."""
        why = missing(kind)
        if why:
            self.note(f"{kind.name} is left out: {why}.")
            return
        for sessions in self.options.sessions:
            if not self.bench.out_of_time():
                self.result.points.append(self.look(kind, sessions))
        self.find_capacity(kind)
        if kind.name in IDLE_SERVERS and self.options.idle_connections():
            self.hold_idle(kind)

    def look(self, kind: Kind, sessions: int) -> Point:
        """Measure a point, or return it if it is known already."""
        known = self.seen.get((kind.name, sessions))
        if known:
            return known
        point = measure_fairly(self.bench, kind, sessions)
        self.seen[kind.name, sessions] = point
        say(
            f"{kind.name}: {sessions} sessions, {point.tokens_per_s:.0f} tokens/s,"
            f" {point.cpu_us_per_token:.1f} µs/token, p99 {point.load.p99_ms:.1f} ms,"
            f" {point.failed or 'holds'}"
        )
        if point.left_upstream:
            self.note(f"{kind.name} at {sessions} sessions left {point.left_upstream} model streams open for 10 s.")
        return point

    def find_capacity(self, kind: Kind) -> None:
        """Search for the largest number of sessions that holds."""
        good, bad = search(
            lambda sessions: self.look(kind, sessions),
            start=max(self.options.sessions),
            largest=self.options.max_sessions,
            precision=self.options.precision or (0.5 if self.options.quick else 0.1),
            out_of_time=self.bench.out_of_time,
        )
        self.result.capacities.append(capacity(kind, good, bad))

    def hold_idle(self, kind: Kind) -> None:
        """Measure idle connections, as many as the limit on open files allows."""
        wanted = self.options.idle_connections()
        possible = min(wanted, raise_file_limit() - FILES_TO_SPARE)
        if possible < wanted:
            self.note(f"Only {possible} idle connections: the limit on open files allows no more (ulimit -Hn).")
        if self.bench.out_of_time():
            self.note("No time was left for idle connections.")
            return
        idle = measure_idle(self.bench, kind, possible)
        say(f"{kind.name}: {idle.open_at_end} of {idle.wanted} idle connections open, {idle.memory_rss:.0f} bytes each")
        self.result.idle.append(idle)

    def note(self, text: str) -> None:
        """Keep a note for the report, and say it now."""
        self.result.notes.append(text)
        say(text)


def run(options: Options, directory: Path) -> Result:
    """Measure all that the options ask for."""
    machine = this_machine()
    window_s = 3.0 if options.quick else 6.0
    result = Result(machine, RATE_PER_S, window_s, [], [], [], machine_notes(machine))
    deadline = time.monotonic() + options.time_limit_s
    with tools.upstream(directory / "upstream.log", rate_per_s=RATE_PER_S) as upstream:
        bench = Bench(upstream, directory, deadline, settle_s=2.0 if options.quick else 4.0, window_s=window_s)
        everything = Run(bench, options, result)
        for kind in KINDS:
            if kind.name in options.servers:
                everything.server(kind)
        if bench.out_of_time():
            everything.note(f"The time limit of {options.time_limit_s:g} s was reached: not all was measured.")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status: 1 if a server did not start, 130 after Ctrl-C."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    end_in_order()
    raise_file_limit()
    tools.build()
    try:
        with tempfile.TemporaryDirectory(prefix="realtime-bench-") as directory:
            result = run(options, Path(directory))
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        say(f"bench: {error}")
        return 1
    print(markdown(result))
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(result)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
