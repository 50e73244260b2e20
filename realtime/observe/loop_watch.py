"""Notices when the event loop is blocked, and by what code.

A loop that turns keeps putting off an alarm of the kernel's, and a thread waits for that alarm: it sleeps for as long
as the loop turns. To look at the loop every few milliseconds would cost far more under load, where each look fights for
the GIL.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from types import FrameType, TracebackType
from typing import NamedTuple, Self

from realtime.observe import logs, metrics

BUSY_PERIOD = 0.75
"""How often a busy loop shows that it turns, as a part of `block_s`; it is awake anyhow, which makes that cheap."""
QUIET_PERIOD = 2.0
"""The same for a loop that mostly waits, and has to be woken for it."""
BUSY_SHARE = 0.1
"""The part of its time that a busy loop computes."""
GRACE = 0.25
"""How long a loop may take to turn after the process itself has stood still, as a part of `block_s`."""

MAX_PLACES = 100
"""How many places are logged and remembered; blocks elsewhere are still counted."""
MAX_STACK = 20
"""How many frames are logged with a place."""

_POLL_S = 0.001
_HANDLE = asyncio.Handle._run.__code__
"""What calls callbacks in asyncio's own loop; elsewhere it is whoever runs the loop."""
_STDLIB = os.path.dirname(asyncio.__path__[0]) + os.sep
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")


def _count(_blocked_s: float) -> None:
    metrics.LOOP_BLOCKS.inc()


class LoopWatch:
    """Within its `async with`, each block of the loop is logged once per place, and counted by `on_block`.

    The loop is blocked when it has not turned for `block_s`, whether its thread computes or waits. A shorter block is
    never reported. One of 1.75 times that is always noticed in a busy loop, and one of 3 times in a loop that mostly
    waits; in between it depends on the moment. It is noticed while it lasts or, if the code keeps the GIL, as soon as
    that lets go. Not reported, because no code in the loop is to blame: that the process stood still as a whole, and
    that another thread kept the GIL from the loop. Nor is a C function that uvloop calls directly, which can't be told
    from waiting.

    A place is a function: the innermost one that is neither installed nor of the standard library. The line in it and
    its callers are logged as they were at the first block there. `on_block` is called in a thread of its own, after the
    log, with the seconds that the loop was blocked until then. Leaving takes milliseconds and leaves no thread; if it
    is cancelled, the thread ends on its own.
    """

    def __init__(self, block_s: float, *, on_block: Callable[[float], object] = _count) -> None:
        self._block_s = block_s
        self._on_block = on_block
        self._patience = Patience(block_s)
        self._places: set[tuple[str, str, int]] = set()
        self._thread = threading.Thread(target=self._watch, name="loop-watch", daemon=True)
        self._stopping = False

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._loop.call_soon(self._see_caller)
        await asyncio.sleep(0)  # and it has been called
        self._loop_thread = threading.get_ident()
        self._cpu_clock = time.pthread_getcpuclockid(self._loop_thread)
        self._alarm = _Alarm()
        self._expect(time.monotonic(), time.thread_time(), 0)
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        self._stopping = True
        self._alarm.set(time.monotonic())
        while self._thread.is_alive():  # noqa: ASYNC110  # no event tells of a thread's end
            await asyncio.sleep(_POLL_S)

    def _see_caller(self) -> None:
        """Learn what calls the loop's callbacks: below it, the stack is the same for all of them."""
        self._below = sys._getframe(1).f_code

    def _turned(self) -> None:
        """Called by the loop itself, which shows that it turns."""
        now, computed_s = time.monotonic(), time.thread_time()
        metrics.LOOP_LAG_SECONDS.observe(max(0.0, now - self._due))
        is_busy = computed_s - self._computed_s > BUSY_SHARE * (now - self._turned_at)
        self._expect(now, computed_s, self._block_s * (BUSY_PERIOD if is_busy else QUIET_PERIOD))

    def _expect(self, now: float, computed_s: float, period_s: float) -> None:
        self._turned_at, self._computed_s = now, computed_s
        self._due = now + period_s
        self._alarm.set(self._patience.ends(self._due))
        self._timer = self._loop.call_later(period_s, self._turned)

    def _watch(self) -> None:
        with closing(self._alarm):
            while not self._stopping:
                self._alarm.wait()
                if not self._stopping:
                    self._alarm.set(self._look(time.monotonic()))

    def _look(self, now: float) -> float:
        """See whether the loop is blocked; returns when to look again if it does not turn until then."""
        if not self._loop.is_running():
            return now + self._block_s
        turned_at, due = self._turned_at, self._due
        computed_s = time.clock_gettime(self._cpu_clock) - self._computed_s
        if self._patience.is_over(now, turned_at=turned_at, due=due, computed_s=computed_s):
            stack = self._stack()
            if stack:
                self._report(now - due, stack)
        return self._patience.look_at

    def _report(self, blocked_s: float, stack: list[_Called]) -> None:
        found = min(stack, key=_distance)
        if found.place not in self._places and len(self._places) < MAX_PLACES:
            self._places.add(found.place)
            at = [str(called) for called in stack[:MAX_STACK]]
            logs.warning("event loop blocked", place=str(found), at=at, blocked_ms=round(blocked_s * 1000))
        self._on_block(blocked_s)

    def _stack(self) -> list[_Called]:
        """What the loop has called, the innermost call first; empty if it waits for something to do.

        Keeps no frame: its locals would live on with it.
        """
        frame = sys._current_frames().get(self._loop_thread)
        stack: list[_Called] = []
        while frame is not None and frame.f_code is not self._below:
            stack.append(_Called.of(frame))
            frame = frame.f_back
        if self._below is not _HANDLE:
            return stack
        if frame is None:
            return []  # it waits, or is between two calls
        return stack or [_Called.of(frame)]  # it has called a function of C, which has no frame


class Patience:
    """Decides when a loop that is due to turn, and does not, is blocked. Pure: times are arguments, on one clock."""

    def __init__(self, block_s: float) -> None:
        self.look_at = 0.0
        """When to ask again, unless the loop turns before."""
        self._block_s = block_s
        self._grace_s = block_s * GRACE
        self._doubted = self._told = -1.0

    def ends(self, due: float) -> float:
        """When to ask first about a loop that should turn at `due`."""
        return due + self._block_s - self._grace_s

    def is_over(self, now: float, *, turned_at: float, due: float, computed_s: float) -> bool:
        """Whether there is a new block to report, in a loop that last turned at `turned_at` and should have at `due`.

        `computed_s` is what its thread has computed since it turned. Who asks may have stood still together with the
        loop. So one that has not computed since `due` for long enough is blocked only if it still does not turn while
        it is watched.
        """
        if now < self.ends(due):
            self.look_at = self.ends(due)
            return False
        if self._told == due:
            self.look_at = now + self._block_s
            return False
        is_sure = self._doubted == due or computed_s - (due - turned_at) >= self._block_s
        if is_sure and now >= due + self._block_s:
            self._told = due
            self.look_at = now + self._block_s
            return True
        self._doubted = due
        self.look_at = max(now + self._grace_s, due + self._block_s)
        return False


class _Called(NamedTuple):
    """A function that was called, and the line that it is at."""

    file: str
    name: str
    first_line: int
    line: int | None

    @classmethod
    def of(cls, frame: FrameType) -> Self:
        """The one that the frame is of."""
        code = frame.f_code
        return cls(code.co_filename, code.co_name, code.co_firstlineno, frame.f_lineno)

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.name}"

    @property
    def place(self) -> tuple[str, str, int]:
        """The same on whichever line it is."""
        return self.file, self.name, self.first_line


def _distance(called: _Called) -> int:
    """How far the code is from those who run this: theirs or ours, installed, of the standard library."""
    if any(folder in called.file for folder in _INSTALLED):
        return 1
    return 2 if called.file.startswith((_STDLIB, "<frozen ")) else 0


class _TimerSpec(ctypes.Structure):
    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("s", ctypes.c_long),
        ("ns", ctypes.c_long),
    )


class _Alarm:
    """Wakes the one thread that waits for it; to put it off wakes nobody. Python has this timer itself from 3.13 on."""

    _CLOEXEC, _ABSOLUTE = 0o2000000, 1

    def __init__(self) -> None:
        self._libc = ctypes.PyDLL(None, use_errno=True)  # its calls are too short to let go of the GIL for
        self._fd: int = self._libc.timerfd_create(time.CLOCK_MONOTONIC, self._CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "no timer for the loop's watch")

    def set(self, at: float) -> None:
        """Let it go off at this `time.monotonic()`, and not before. Does nothing once it is closed."""
        spec = _TimerSpec(0, 0, int(at), int(at % 1 * 1e9))
        self._libc.timerfd_settime(self._fd, self._ABSOLUTE, ctypes.byref(spec), None)

    def wait(self) -> None:
        """Return when it goes off, once for each time that it was set."""
        os.read(self._fd, 8)

    def close(self) -> None:
        """Give it back; nobody may wait for it."""
        fd, self._fd = self._fd, -1
        os.close(fd)
