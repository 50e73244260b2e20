"""Processes that a benchmark starts: pinned to a core, watched through /proc, and ended by their ids."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

STOP_TIMEOUT_S = 10.0
SERVER_CORE = 0
TOOLS_CORE = 1


@dataclass(frozen=True)
class Memory:
    """Memory of some processes, in bytes. PSS divides a shared page among those that share it."""

    rss: int
    pss: int


@dataclass(frozen=True)
class CoreUse:
    """Seconds that a core ran processes (or the host had taken it away), and served interrupts."""

    processes_s: float
    interrupts_s: float


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Run the body, and what it starts, on one core. On a machine with one core it changes nothing."""
    before = os.sched_getaffinity(0)
    if core in before and len(before) > 1:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def clean_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Return our environment without the proxies, keys and settings a server would read, plus `extra`."""
    unwanted = ("REALTIME_", "ANTHROPIC_", "OPENAI_")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(unwanted) and not name.lower().endswith("_proxy")
    }
    return {**kept, "PYTHONUNBUFFERED": "1", **extra}


@contextmanager
def running(
    command: Sequence[str],
    *,
    core: int,
    log: Path,
    environment: Mapping[str, str] | None = None,
    pipe: bool = False,
) -> Iterator[subprocess.Popen[str]]:
    """Run a command on a core while the body runs; then end it.

    Its output goes to the file `log`; with `pipe` its standard output is a pipe instead. It has a session of
    its own, so that Ctrl-C in the terminal reaches only the benchmark, which then ends it in order.
    """
    with log.open("a") as output, pinned(core):
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if pipe else output,
            stderr=output,
            env=clean_environment(environment or {}),
            text=True,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        stop(process)


def stop(process: subprocess.Popen[str]) -> None:
    """End a process of ours: ask, and after STOP_TIMEOUT_S kill it and its descendants. Idempotent."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            kill_tree(process.pid)
            process.wait(STOP_TIMEOUT_S)
    if process.stdout:
        process.stdout.close()


def kill_tree(pid: int) -> None:
    """Kill a process of ours and its descendants, by their ids."""
    for each in process_tree(pid):
        try:
            os.kill(each, signal.SIGKILL)
        except ProcessLookupError:
            continue


def process_tree(pid: int) -> list[int]:
    """Return the ids of a process and of all its descendants; empty if it is gone."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(each for child in children for each in process_tree(int(child)))]


def memory_of(pids: Sequence[int]) -> Memory:
    """Return what some processes hold together; one that is gone counts nothing."""
    each = [memory_of_one(pid) for pid in pids]
    return Memory(rss=sum(one.rss for one in each), pss=sum(one.pss for one in each))


def memory_of_one(pid: int) -> Memory:
    """Return what one process holds; nothing if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return Memory(0, 0)
    sizes = {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":") for line in lines)}
    return Memory(rss=sizes["Rss"], pss=sizes["Pss"])


def cpu_s_of(pids: Sequence[int]) -> float:
    """Return the seconds that some processes have run, for themselves and in the kernel; one that is gone, nothing."""
    total = 0.0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def core_use(core: int) -> CoreUse:
    """Return what a core was used for since the machine started; nothing if there is no such core."""
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name == f"cpu{core}":
            second = os.sysconf("SC_CLK_TCK")
            user, nice, system, _idle, _waiting, irq, softirq, stolen = (int(each) / second for each in fields[:8])
            return CoreUse(user + nice + system + stolen, irq + softirq)
    return CoreUse(0.0, 0.0)


def raise_file_limit() -> int:
    """Allow as many open files as the hard limit does, for us and what we start; return how many."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def end_in_order() -> None:
    """Let SIGTERM end the benchmark as Ctrl-C does: through the `finally` blocks that end what it started.

    A second signal is ignored, so that it does not interrupt those. They are bounded by STOP_TIMEOUT_S each.
    """

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
