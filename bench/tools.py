"""The two C tools from Python: building them, the stand-in for the model's API, and the load generator."""

from __future__ import annotations

import http.client
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bench.processes import TOOLS_CORE, running

HERE = Path(__file__).parent
BUILD = HERE / "build"
SOURCES = {"upstream": ["upstream.c"], "load": ["load.c", "decode.c"]}
COMPILE = ["gcc", "-O2", "-Wall", "-Wextra"]
ENDLESS_TOKENS = 1_000_000
HTTP_TIMEOUT_S = 5.0


class Stats(msgspec.Struct, frozen=True):
    """What the upstream saw so far. `active` counts the requests that neither ended nor were hung up on."""

    active: int
    started: int
    completed: int
    aborted: int
    tokens: int
    last_abort_us: int


class Abort(msgspec.Struct, frozen=True):
    """A stream that the server under test hung up on: when (µs since 1970), and how far it had come."""

    tag: str
    at_us: int
    phase: str
    tokens: int


class Load(msgspec.Struct, frozen=True):
    """What the load generator saw. Tokens, frames and latencies are those of the window only.

    `refused` counts connections that never got through; `closed_early` those that the server ended.
    `slowest_tokens` is the count of the connection with the fewest. `backwards` counts tokens that came after
    a younger one. `cpu_s` is the CPU time in the window of each process asked for, `own_cpu_s` the load
    generator's own.
    """

    connections: int
    established: int
    refused: int
    closed_early: int
    active: int
    first_status: int
    first_close_code: int
    window_s: float
    tokens: int
    frames: int
    bytes: int
    slowest_tokens: int
    fastest_tokens: int
    backwards: int
    answered: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    own_cpu_s: float
    cpu_s: list[float]


@dataclass(frozen=True)
class Traffic:
    """What each connection of a load does: a WebSocket's path and frames to send, or a raw HTTP request.

    `queries` is a file with a line for each connection, which follows the path.
    """

    path: str = ""
    queries: Path | None = None
    frames: tuple[str, ...] = ()
    request: str = ""

    def arguments(self) -> list[str]:
        """Return the load generator's options for it."""
        if self.request:
            return ["--request", self.request]
        queries = ["--queries", str(self.queries)] if self.queries else []
        return ["--path", self.path, *queries, *(part for frame in self.frames for part in ("--frame", frame))]


@dataclass(frozen=True)
class Plan:
    """How a load is applied: connections, connects per second, seconds to settle, seconds to count."""

    connections: int
    ramp_per_s: float = 200.0
    settle_s: float = 4.0
    window_s: float = 6.0
    last_frame: str = ""
    last_answer: str = ""

    def arguments(self) -> list[str]:
        """Return the load generator's options for it."""
        options = ["--connections", str(self.connections), "--ramp", str(self.ramp_per_s)]
        options += ["--settle", str(self.settle_s), "--window", str(self.window_s)]
        if self.last_frame:
            options += ["--last-frame", self.last_frame, "--last-answer", self.last_answer]
        return options

    def longest_s(self) -> float:
        """Return a bound on how long it takes, waiting for missing connections and answers included."""
        return self.connections / self.ramp_per_s + self.settle_s + self.window_s + 60.0


@dataclass(frozen=True)
class Upstream:
    """A running stand-in for the model's API."""

    port: int
    pid: int
    rate_per_s: float

    @property
    def url(self) -> str:
        """Return its base URL, as the SDK takes it."""
        return f"http://127.0.0.1:{self.port}"

    def stats(self) -> Stats:
        """Return what it saw so far."""
        return msgspec.json.decode(get(self.port, "/stats"), type=Stats)

    def aborts(self, start: int = 0) -> list[Abort]:
        """Return the streams that were hung up on, from the one numbered `start`."""
        return msgspec.json.decode(get(self.port, f"/aborts?from={start}"), type=list[Abort])

    def wait_idle(self, timeout_s: float = 10.0) -> int:
        """Wait until no stream is left, or the time is over; return how many are left."""
        wait_for(lambda: self.stats().active == 0, timeout_s)
        return self.stats().active


def build() -> None:
    """Compile the tools into bench/build/. Raises SystemExit with the compiler's words if that fails."""
    BUILD.mkdir(exist_ok=True)
    for name, sources in SOURCES.items():
        command = [*COMPILE, "-o", str(BUILD / name), *(str(HERE / source) for source in sources)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except FileNotFoundError:
            raise SystemExit("bench: gcc is needed to build the load tools (Debian: apt-get install gcc)") from None
        if done.returncode:
            raise SystemExit(f"bench: {' '.join(command)}\n{done.stderr}")


def get(port: int, path: str) -> bytes:
    """GET from 127.0.0.1. Raises OSError or http.client.HTTPException unless the answer's status is 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HTTP_TIMEOUT_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        raise http.client.HTTPException(f"GET {path}: {answer.status}")
    return body


def wait_for(condition: Callable[[], bool], timeout_s: float, *, interval_s: float = 0.05) -> bool:
    """Wait until a condition holds; return whether it did within the time."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(interval_s)
    return True


@contextmanager
def upstream(log: Path, *, rate_per_s: float, tokens: int = ENDLESS_TOKENS, ttft_ms: int = 0) -> Iterator[Upstream]:
    """Run the stand-in for the model's API on the tools' core while the body runs."""
    command = [str(BUILD / "upstream"), "0", str(rate_per_s), str(tokens), str(ttft_ms)]
    with running(command, core=TOOLS_CORE, log=log, pipe=True) as process:
        assert process.stdout
        yield Upstream(int(process.stdout.readline()), process.pid, rate_per_s)


def run_load(
    port: int,
    traffic: Traffic,
    plan: Plan,
    *,
    log: Path,
    cpu_of: Sequence[int] = (),
    on_window: Callable[[], None] = lambda: None,
) -> Load:
    """Apply a load and return what it saw. `on_window` is called when the window begins.

    It must return before the window ends.

    Raises RuntimeError if the load generator fails or takes longer than its plan can.
    """
    command = [str(BUILD / "load"), "--port", str(port), *traffic.arguments(), *plan.arguments()]
    command += [option for pid in cpu_of for option in ("--cpu-of", str(pid))]
    with running(command, core=TOOLS_CORE, log=log, pipe=True) as process:
        watchdog = threading.Timer(plan.longest_s(), process.kill)
        watchdog.start()
        try:
            assert process.stdout
            if process.stdout.readline():
                on_window()
            output = process.stdout.read()
            failed = process.wait()
        finally:
            watchdog.cancel()
    if failed:
        raise RuntimeError(f"the load generator failed ({failed}), see {log}")
    return msgspec.json.decode(output, type=Load)
