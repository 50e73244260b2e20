"""What the commands of the smaller benchmarks share: their options, their files, their exit status."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bench import tools
from bench.processes import end_in_order, raise_file_limit
from bench.report import machine_notes, table, this_machine
from bench.servers import KINDS, missing


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. `measure(quick, directory)` returns rows, structs; `row` writes one, a cell for each of `head`.

    `broken` says what about a row must not be, and is empty if all is well: otherwise the exit status is 1.
    """

    name: str
    title: str
    head: Sequence[str]
    measure: Callable[[bool, Path], Sequence[msgspec.Struct]]
    row: Callable[..., list[str]]
    broken: Callable[..., str]


def say(text: str) -> None:
    """Tell about the progress."""
    print(text, file=sys.stderr, flush=True)


def main(benchmark: Benchmark, arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark; return the exit status: 1 if something went wrong, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{benchmark.name}", description=benchmark.title)
    parser.add_argument("--quick", action="store_true", help="shorter: to see whether it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    options = parser.parse_args(arguments)
    why = next(filter(None, (missing(kind) for kind in KINDS if kind.name.startswith("realtime"))), None)
    if why:
        say(f"bench: {why}")
        return 1
    end_in_order()
    raise_file_limit()
    tools.build()
    machine = this_machine()
    try:
        with tempfile.TemporaryDirectory(prefix="realtime-bench-") as directory:
            rows = benchmark.measure(options.quick, Path(directory))
    except KeyboardInterrupt:
        return 130
    except (OSError, RuntimeError) as error:
        say(f"bench: {error}")
        return 1
    notes = [f"Note: {note}" for note in machine_notes(machine)]
    print("\n\n".join([f"## {benchmark.title}", *notes, table(benchmark.head, map(benchmark.row, rows))]) + "\n")
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode({"machine": machine, "rows": rows})))
    broken = [why for row in rows if (why := benchmark.broken(row))]
    for why in broken:
        say(f"bench: {why}")
    return 1 if broken else 0
