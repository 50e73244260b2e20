"""A blocked loop is noticed, with the place that blocks it; one that turns is left alone."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import structlog
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from realtime.observe import loop_watch, metrics
from realtime.observe.loop_watch import BUSY_PERIOD, QUIET_PERIOD, LoopWatch, Patience

BLOCK_S = 0.05
WITHIN_S = 30
"""A block that is not noticed goes on for so long, and the test fails."""

Loops = Callable[[], asyncio.AbstractEventLoop]
on_each_loop = pytest.mark.parametrize("loops", [asyncio.new_event_loop, uvloop.new_event_loop])


@pytest.fixture(scope="module", autouse=True)
def uvloop_in_use() -> None:
    """Its first loop opens a pipe that stays open for as long as the process lives."""
    uvloop.new_event_loop().close()


def run(loops: Loops, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run it on such a loop."""
    with asyncio.Runner(loop_factory=loops) as runner:
        runner.run(main())


class Noticed:
    """What is told of blocks; set from the first one on."""

    def __init__(self) -> None:
        self.blocked_s: list[float] = []
        self.once = threading.Event()

    def __call__(self, blocked_s: float) -> None:
        self.blocked_s.append(blocked_s)
        self.once.set()


def wait_for(noticed: Noticed) -> None:
    """Blocks, in a library's call that waits without the GIL."""
    assert noticed.once.wait(WITHIN_S)


def doze_until(noticed: Noticed) -> None:
    """Blocks, in calls that wait."""
    while not noticed.once.is_set():
        time.sleep(0.01)


def compute_until(noticed: Noticed) -> None:
    """Blocks, in Python."""
    while not noticed.once.is_set():
        pass


def keep_the_gil(size: int) -> None:
    """Blocks, in one call of C that lets nobody else run."""
    sum(range(size))


async def turn(times: int = 3) -> None:
    """Let the loop turn, and whoever watches it see that."""
    for _ in range(times):
        await asyncio.sleep(BLOCK_S / 2)


async def block(blocking: Callable[[Noticed], None]) -> dict[str, Any]:
    """Block the loop in a callback until it is noticed; returns what is logged."""
    noticed = Noticed()
    with structlog.testing.capture_logs() as logged:
        async with LoopWatch(BLOCK_S, on_block=noticed):
            await turn()
            asyncio.get_running_loop().call_soon(blocking, noticed)
            await turn()
    assert noticed.blocked_s[0] >= BLOCK_S
    [record] = [dict(record) for record in logged]
    return record


@on_each_loop
@pytest.mark.parametrize("blocking", [doze_until, compute_until, wait_for])
def test_a_block_is_noticed_while_it_lasts(loops: Loops, blocking: Callable[[Noticed], None]) -> None:
    """Whether it waits or computes: the loop is blocked until then."""

    async def main() -> None:
        record = await block(blocking)
        file, line, function = record["place"].replace(":", " ").split()
        assert (file, function) == (__file__, blocking.__name__)
        assert int(line) in {number for _, _, number in blocking.__code__.co_lines()}
        assert record["at"][-1] == record["place"]

    run(loops, main)


@on_each_loop
def test_code_that_keeps_the_gil_is_noticed(loops: Loops) -> None:
    """When it lets go of it, while its caller is still at the call. Each time it computes for longer."""
    noticed = Noticed()

    async def main() -> None:
        async with LoopWatch(BLOCK_S, on_block=noticed):
            size = 1 << 18
            while not noticed.once.is_set() and size < 1 << 34:
                size *= 2
                keep_the_gil(size)
                await turn()

    with structlog.testing.capture_logs() as logged:
        run(loops, main)
    assert [record["place"].split()[-1] for record in logged] == ["keep_the_gil"]
    assert noticed.blocked_s[0] >= BLOCK_S


async def test_the_innermost_place_is_logged_too() -> None:
    """What blocks in the end may be a library's, and who called it is of use."""
    record = await block(wait_for)
    assert "site-packages" in record["at"][0]  # here calls that block go through what looks for them in tests
    assert [called.split()[-1] for called in record["at"]][-3:] == ["wait", "wait", "wait_for"]
    assert record["place"] == record["at"][-1]


async def test_a_coroutine_is_told_from_who_awaits_it() -> None:
    """The one that blocks is the innermost."""
    noticed = Noticed()

    async def blocking() -> None:
        doze_until(noticed)

    with structlog.testing.capture_logs() as logged:
        async with LoopWatch(BLOCK_S, on_block=noticed):
            await asyncio.create_task(blocking())
    [record] = logged
    assert [called.split()[-1] for called in record["at"]][-2:] == ["doze_until", "blocking"]
    assert record["place"].endswith(" doze_until")


def test_a_function_of_c_that_the_loop_calls_itself_is_noticed() -> None:
    """By asyncio; it has no place of its own."""
    noticed = Noticed()

    async def main() -> None:
        async with LoopWatch(BLOCK_S, on_block=noticed):
            asyncio.get_running_loop().call_soon(time.sleep, BLOCK_S * 10)
            await turn()

    with structlog.testing.capture_logs() as logged:
        run(asyncio.new_event_loop, main)
    assert [record["place"].split()[-1] for record in logged] == ["_run"]
    assert len(noticed.blocked_s) == 1


async def test_nothing_but_places_is_logged() -> None:
    """No argument, no local, no line of the source."""
    canary = "canary-77aa"

    def holding(noticed: Noticed, argument: str = canary) -> None:
        held = argument * 2
        while not noticed.once.is_set():
            time.sleep(0.01)
        assert held

    record = await block(holding)
    assert record.keys() == {"event", "log_level", "place", "at", "blocked_ms"}
    assert canary not in str(record)
    assert "time.sleep" not in str(record)


async def test_a_place_is_logged_once_and_counted_each_time() -> None:
    """Whichever line of it is met."""
    blocks = 0

    def other_lines(noticed: Noticed) -> None:
        if blocks % 2:
            assert noticed.once.wait(WITHIN_S)
        else:
            while not noticed.once.is_set():
                pass

    told: list[Noticed] = []
    with structlog.testing.capture_logs() as logged:
        async with LoopWatch(BLOCK_S, on_block=lambda blocked_s: told[-1](blocked_s)):
            for blocks in range(4):  # noqa: B007  # the callback reads it
                for blocking in (doze_until, compute_until, other_lines):
                    told.append(Noticed())
                    blocking(told[-1])
                    await turn()
    assert [len(noticed.blocked_s) for noticed in told] == [1] * 12
    assert sorted(record["place"].split()[-1] for record in logged) == ["compute_until", "doze_until", "other_lines"]


async def test_a_block_that_goes_on_is_one() -> None:
    """However long it takes."""
    noticed = Noticed()
    async with LoopWatch(BLOCK_S, on_block=noticed):
        doze_until(noticed)
        until = time.monotonic() + BLOCK_S * 5
        while time.monotonic() < until:
            pass
        await turn()
    assert len(noticed.blocked_s) == 1


async def test_places_are_not_remembered_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that is made up as it runs has ever new ones."""
    monkeypatch.setattr(loop_watch, "MAX_PLACES", 2)
    source = "def made_up(noticed):\n    while not noticed.once.is_set(): pass"
    told: list[Noticed] = []
    with structlog.testing.capture_logs() as logged:
        async with LoopWatch(BLOCK_S, on_block=lambda blocked_s: told[-1](blocked_s)):
            for number in range(4):
                namespace: dict[str, Any] = {}
                exec(compile(source, f"<made up {number}>", "exec"), namespace)
                told.append(Noticed())
                namespace["made_up"](told[-1])
                await turn()
    assert [len(noticed.blocked_s) for noticed in told] == [1] * 4
    assert [record["place"] for record in logged] == [f"<made up {number}>:2 made_up" for number in range(2)]


async def test_blocks_are_counted_in_the_metric() -> None:
    """Unless somebody else counts."""

    def counted() -> float:
        return metrics.REGISTRY.get_sample_value("realtime_loop_blocks_total") or 0

    before, until = counted(), time.monotonic() + WITHIN_S
    async with LoopWatch(BLOCK_S):
        while counted() == before and time.monotonic() < until:
            pass
    assert counted() == before + 1


class Counting(LoopWatch):
    """Counts how often it costs the loop something."""

    turns = 0

    def _turned(self) -> None:
        self.turns += 1
        super()._turned()


def wakes_of_the_thread() -> int:
    """How often the watching thread was woken."""
    [thread] = [thread for thread in threading.enumerate() if thread.name == "loop-watch"]
    lines = Path(f"/proc/self/task/{thread.native_id}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("voluntary")).split()[1])


async def rest(until: float) -> None:
    """The loop is idle."""
    await asyncio.sleep(until - asyncio.get_running_loop().time())


async def hurry(until: float) -> None:
    """The loop is as busy as it gets, with short callbacks."""
    while asyncio.get_running_loop().time() < until:  # noqa: ASYNC110  # to turn is all that it does
        await asyncio.sleep(0)


@on_each_loop
@pytest.mark.parametrize(("work", "period"), [(rest, QUIET_PERIOD), (hurry, BUSY_PERIOD)])
def test_a_loop_that_turns_is_left_alone(
    loops: Loops, work: Callable[[float], Coroutine[Any, Any, None]], period: float
) -> None:
    """It is not reported, the thread sleeps on, and the loop is bothered a few times in a second."""
    noticed = Noticed()
    block_s = 0.2

    async def main() -> None:
        async with Counting(block_s, on_block=noticed) as watch:
            await turn()
            loop = asyncio.get_running_loop()
            turns, wakes, since = watch.turns, wakes_of_the_thread(), loop.time()
            await work(since + 5 * block_s)
            took = (loop.time() - since) / block_s
            assert 1 <= watch.turns - turns <= took / period + 2
            assert wakes_of_the_thread() - wakes <= 2  # that the machine is busy with something else it may see

    run(loops, main)
    assert noticed.blocked_s == []


@on_each_loop
def test_nothing_is_left_running(loops: Loops) -> None:
    """No thread, however early or late it is left, and no timer."""

    async def main() -> None:
        for _ in range(20):
            async with LoopWatch(BLOCK_S):
                pass
            assert alive() == []
        noticed = Noticed()
        async with LoopWatch(BLOCK_S, on_block=noticed):
            await turn()
            doze_until(noticed)
        assert alive() == []

    def alive() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "loop-watch"]

    run(loops, main)


@on_each_loop
def test_a_loop_that_does_not_run_is_not_blocked(loops: Loops) -> None:
    """Between two runs of it, whoever called does something else."""
    noticed = Noticed()
    with asyncio.Runner(loop_factory=loops) as runner:
        watch = LoopWatch(BLOCK_S, on_block=noticed)
        runner.run(watch.__aenter__())
        runner.run(turn())
        time.sleep(BLOCK_S * 6)
        runner.run(turn())
        runner.run(watch.__aexit__(None, None, None))
    assert noticed.blocked_s == []


STOPPED_BLOCK_S = 0.2
STOPS = 6
STOPPED = f"""
import asyncio, sys, time
from realtime.observe.loop_watch import LoopWatch

blocks = []

async def main():
    async with LoopWatch({STOPPED_BLOCK_S}, on_block=blocks.append):
        reading = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
        while not reading.done():
            until = time.thread_time() + 0.015
            while time.thread_time() < until:
                pass
            await asyncio.sleep(0)
        print(len(blocks), flush=True)

print("up", flush=True)
asyncio.run(main())
"""


def test_a_process_that_was_stopped_was_not_blocked() -> None:
    """Its loop was busy, and could not turn because nothing of it ran."""
    child = subprocess.Popen(
        [sys.executable, "-c", STOPPED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == "up\n"
            for _ in range(STOPS):
                os.kill(child.pid, signal.SIGSTOP)
                while state_of(child.pid) != "T":
                    time.sleep(0.005)
                time.sleep(STOPPED_BLOCK_S * 2)
                os.kill(child.pid, signal.SIGCONT)
                time.sleep(STOPPED_BLOCK_S)
            child.stdin.close()
            *_, reports = child.stdout
            assert int(reports) < STOPS - 1  # that it was kept from its processor besides, nobody can tell
        finally:
            child.kill()


def state_of(pid: int) -> str:
    """What the process does, as one letter."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


Span = tuple[float, float]


def shared(one: Span, other: Span) -> float:
    """How long both are."""
    return max(0.0, min(one[1], other[1]) - max(one[0], other[0]))


class Simulated:
    """A loop that is blocked once, in a process that is stopped once, in virtual time; `block_s` is 1."""

    def __init__(self, period: float, *, blocked: Span, stopped: Span, kind: str, busy: bool) -> None:
        self.period = period
        self.blocked = blocked
        self.stopped = stopped
        self.kind = kind
        self.busy = busy

    def after(self, at: float, *spans: Span) -> float:
        """When what is due then happens at the earliest."""
        for start, end in sorted(spans) * 2:
            at = end if start <= at < end else at
        return at

    def computed(self, turned: float, due: float, now: float) -> float:
        """How long the loop's thread has computed since it turned."""
        spans = []
        if self.busy:
            spans.append((turned, min(due, now)))
        if self.kind != "waits":
            start, end = self.blocked
            spans.append((max(start, due if self.busy else turned), min(end, now)))
        return sum(max(0, end - start) - shared((start, end), self.stopped) for start, end in spans)

    def reports(self) -> list[float]:
        """For how long the loop is said to have been blocked, each time."""
        patience = Patience(1)
        found = []
        turned, due, alarm = 0.0, self.period, patience.ends(self.period)
        while turned < 30:
            turns = self.after(due, self.blocked, self.stopped)
            looks = self.after(alarm, *([self.blocked] if self.kind == "keeps" else []), self.stopped)
            if turns < looks:
                turned, due, alarm = turns, turns + self.period, patience.ends(turns + self.period)
                continue
            computed_s = self.computed(turned, due, looks)
            if patience.is_over(looks, turned_at=turned, due=due, computed_s=computed_s):
                found.append(looks - due)
            assert patience.look_at > looks
            alarm = patience.look_at
        return found


PERIODS = st.sampled_from([BUSY_PERIOD, QUIET_PERIOD])
KINDS = st.sampled_from(["waits", "computes", "keeps"])
NEVER = (99.0, 99.0)


@given(period=PERIODS, start=st.floats(5, 10), length=st.floats(0, 9), kind=KINDS, busy=st.booleans())
def test_a_long_block_is_reported_and_a_short_one_never(
    period: float, start: float, length: float, kind: str, busy: bool
) -> None:
    """Once, whenever it begins and whatever it does."""
    blocked = (start, start + length)
    reports = Simulated(period, blocked=blocked, stopped=NEVER, kind=kind, busy=busy).reports()
    assert len(reports) <= 1
    assert not reports or length + 1e-9 >= reports[0] >= 1
    assert reports or length <= 1.001 + period


@given(period=PERIODS, start=st.floats(5, 10), length=st.floats(0, 9), before=st.floats(0, 0.7), busy=st.booleans())
def test_a_process_that_stood_still_is_never_reported(
    period: float, start: float, length: float, before: float, busy: bool
) -> None:
    """Also one that stopped in the middle of something short."""
    blocked = (start - before, start + length)
    simulated = Simulated(period, blocked=blocked, stopped=(start, start + length), kind="computes", busy=busy)
    assert simulated.reports() == []
