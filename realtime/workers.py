"""Several server processes on one port: a parent that serves nobody itself, and the workers that it keeps running.

All of them take their connections from one listening socket, which the parent has bound. With `SO_REUSEPORT` each
would have a queue of its own: what waits in the queue of a worker that dies or leaves would be reset, and one that
hangs would still be given its share. From a common queue whoever is awake takes the next one, and none is lost.

A worker is this same command with the socket's number added, and a pipe on its standard input. When that ends, because
the parent wants it to go or is gone itself, it leaves: it takes no more connections, and drains.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from starlette.types import ASGIApp

from realtime.observe import logs, metrics
from realtime.server import OnlyServer, make_server
from realtime.settings import Settings

MARGIN_S = 3.0
"""How much longer than its drain a worker may take to end, until it is killed."""
STEADY_S = 10.0
"""A worker that has lived for so long did not fail at its start."""
FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 10.0
"""How long it takes at most until a worker that ends again and again is started anew."""
UP = b"up\n"
TOLD_TO_END = {0, -signal.SIGTERM}
"""The statuses of a worker that has ended as it was told to, the second one before it could serve."""


class Worker:
    """A server process, from the parent's side. `failures` is how many before it have ended at their start."""

    def __init__(self, process: asyncio.subprocess.Process, *, failures: int) -> None:
        self.failures = failures
        self._process = process
        self._started_at = asyncio.get_running_loop().time()

    @classmethod
    async def start(cls, command: Sequence[str], listener: socket.socket, *, failures: int = 0) -> Worker:
        """Start `command` as a worker on a listening socket."""
        process = await asyncio.create_subprocess_exec(
            *command,
            *("--fd", str(listener.fileno())),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=[listener.fileno()],
            process_group=0,  # a terminal's Ctrl-C goes to the parent alone: twice would mean to be in a hurry
        )
        return cls(process, failures=failures)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def up(self) -> bool:
        """Returns once it serves, or has ended: then `False`. To be called once."""
        assert self._process.stdout is not None
        return await self._process.stdout.readline() == UP

    async def ended(self) -> int:
        """Its exit status, once it has ended; below 0 for a signal."""
        return await self._process.wait()

    def leave(self) -> None:
        """Have it take no more connections, and drain."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def stop(self) -> None:
        """Have it drain, refusing connections meanwhile."""
        with suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        """End it at once. Does nothing if it has ended."""
        with suppress(ProcessLookupError):
            self._process.kill()

    def failures_with_it(self) -> int:
        """Asked when it has ended: how many in a row have ended at their start, up to this one."""
        lived_s = asyncio.get_running_loop().time() - self._started_at
        return 0 if lived_s >= STEADY_S else self.failures + 1


def _nothing(_pid: int) -> None:
    return


def pause_s(failures: int) -> float:
    """How long to wait before a worker is started in place of one, after so many failures in a row."""
    return min(FIRST_PAUSE_S * 2 ** (failures - 1), MAX_PAUSE_S) if failures else 0


class Workers:
    """`count` workers, kept running by `run` until `stop`. Each has `patience_s` to end when it is told to. `ended` is
    called with the process id of each that has ended."""

    def __init__(
        self,
        command: Sequence[str],
        listener: socket.socket,
        *,
        count: int,
        patience_s: float,
        ended: Callable[[int], None] = _nothing,
    ) -> None:
        self._command = command
        self._listener = listener
        self._count = count
        self._patience_s = patience_s
        self._ended = ended
        self._serving: set[Worker] = set()
        """Those that are replaced when they end."""
        self._alive: dict[Worker, asyncio.Task[None]] = {}
        self._asked = asyncio.Event()
        self._rolling: asyncio.Task[None] | None = None
        self._clean = True

    async def run(self, up: Callable[[], None]) -> int:
        """Calls `up` when all workers serve. Returns the exit status once all have ended: 0 if that went well.

        Where one does not come up at the start, nor do the others: what is wrong is wrong for all.
        """
        workers = [await self._start(serving=True) for _ in range(self._count)]
        coming = asyncio.create_task(self._come(workers, up))
        await self._asked.wait()
        coming.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._patience_s):
                await self._all_ended()
        for worker in self._alive:
            worker.kill()
        await self._all_ended()
        return 0 if self._clean else 1

    def stop(self) -> None:
        """Have all workers drain, and `run` return."""
        self._asked.set()
        for worker in self._alive:
            worker.stop()

    def hurry(self) -> None:
        """End all that still lives at once."""
        self._clean = False
        for worker in self._alive:
            worker.kill()

    def roll(self) -> None:
        """Replace the workers one after the other. Does nothing while that is under way."""
        if self._rolling is None or self._rolling.done():
            self._rolling = asyncio.create_task(self._roll())

    async def _come(self, workers: Sequence[Worker], up: Callable[[], None]) -> None:
        for coming in asyncio.as_completed([worker.up() for worker in workers]):
            if not await coming:
                self._clean = self._clean and self._asked.is_set()
                self.stop()
                return
        up()

    async def _start(self, *, serving: bool, failures: int = 0) -> Worker:
        worker = await Worker.start(self._command, self._listener, failures=failures)
        self._alive[worker] = asyncio.create_task(self._watch(worker))
        if serving:
            self._serving.add(worker)
        if self._asked.is_set():
            worker.stop()
        return worker

    async def _watch(self, worker: Worker) -> None:
        status = await worker.ended()
        self._ended(worker.pid)
        if worker in self._serving and not self._asked.is_set():
            self._serving.discard(worker)
            logs.warning("worker lost", pid=worker.pid, status=status)
            await self._replace(worker)
        elif status not in TOLD_TO_END:
            self._clean = False
        del self._alive[worker]

    async def _replace(self, lost: Worker) -> None:
        failures = lost.failures_with_it()
        while not await self._asked_within(pause_s(failures)):
            try:
                await self._start(serving=True, failures=failures)
                return
            except OSError as error:  # no room for a process: there may be some later
                logs.report(error)
                failures += 1

    async def _asked_within(self, seconds: float) -> bool:
        """Whether it was told to end by the end of so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._asked.wait()
        return self._asked.is_set()

    async def _roll(self) -> None:
        for old in list(self._serving):
            new = await self._start_one_more()
            if new is None:
                logs.warning("worker not replaced", pid=old.pid)
                return
            self._serving.add(new)
            self._dismiss(old if old in self._serving else new)  # it may have been lost, and replaced, meanwhile
        logs.info("workers replaced")

    async def _start_one_more(self) -> Worker | None:
        """A worker that has come up."""
        try:
            worker = await self._start(serving=False)
        except OSError as error:
            logs.report(error)
            return None
        return worker if await worker.up() else None

    def _dismiss(self, worker: Worker) -> None:
        self._serving.discard(worker)
        worker.leave()
        asyncio.get_running_loop().call_later(self._patience_s, worker.kill)

    async def _all_ended(self) -> None:
        while self._alive:
            await asyncio.wait(self._alive.values())


@contextmanager
def counting_together() -> Iterator[Callable[[int], None]]:
    """Have the processes that are started within the block count together, so that each tells what all have counted.

    What to call with the process id of each that has ended: what holds only of a process that lives is forgotten then,
    and what it has counted stays.
    """
    with tempfile.TemporaryDirectory(prefix="realtime-metrics-") as folder:
        os.environ[metrics.SHARED_DIR] = folder
        try:
            yield lambda pid: metrics.forget(pid, folder)
        finally:
            del os.environ[metrics.SHARED_DIR]


def keep(workers: Workers, up: Callable[[], None]) -> int:
    """Run workers until a signal ends them; returns the exit status. SIGHUP replaces them one after the other."""
    return asyncio.run(_keep(workers, up))


async def _keep(workers: Workers, up: Callable[[], None]) -> int:
    asked: list[int] = []

    def stop(number: int) -> None:
        if asked and number == signal.SIGINT:
            workers.hurry()
        asked.append(number)
        workers.stop()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    loop.add_signal_handler(signal.SIGHUP, workers.roll)
    return await workers.run(up)


class WorkerServer(OnlyServer):
    """A server beside others on one socket, which it is not the owner of: see `Worker`, its other side."""

    def announce(self, _listener: socket.socket) -> None:
        """Say so to the parent."""
        logs.info("worker up", pid=os.getpid())
        sys.stdout.buffer.write(UP)
        sys.stdout.flush()
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), self.leave)

    def leave(self) -> None:
        """Take no more connections, so that the others get them, and drain. Called when the parent's pipe ends."""
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        for server in self.servers:
            server.close()
        self.should_exit = True


def work(app: ASGIApp, settings: Settings, fd: int) -> None:
    """Be a worker on the listening socket of that number, until told to end."""
    make_server(app, settings, WorkerServer).run(sockets=[socket.socket(fileno=fd)])
