"""Workers of the task queue in Redis, in the test's own process and in processes that can be killed.

async with redis_server() as redis, worker_process(redis.url) as worker, SaqQueue(redis.url, …) as queue:
    await queue.submit(TaskRef("s", "t", "hold"))
    await worker.until("began", "t")
    worker.send(signal.SIGKILL)

Either way a task begins, and ends once it may: by `Work.may_end`, or after SIGUSR1; from then on at once.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import msgspec

from realtime.store.base import TaskRef
from realtime.tasks.registry import TaskDefinition
from realtime.tasks.saq_queue import SaqQueue
from tests.support.instance import ROOT
from tests.support.programs import bound
from tests.support.redis_server import RedisServer

PATIENCE_S = 30.0
"""How long what has to come may take, so that what never comes fails its own test."""
POLL_S = 0.01
TTL_S = 60.0
DRAIN_S = 0.2
"""How long a process lets its tasks go on after SIGTERM."""


class Told:
    """What became of tasks, as pairs of "began", "ended" or "cancelled" and the task's id."""

    def __init__(self) -> None:
        self.all: list[tuple[str, str]] = []
        self._changed = asyncio.Event()

    def tell(self, what: str, task_id: str) -> None:
        """Add one."""
        self.all.append((what, task_id))
        self._changed.set()

    def told(self, what: str) -> list[str]:
        """The tasks of which this was told, in that order."""
        return [task_id for told, task_id in self.all if told == what]

    async def until(self, what: str, *task_ids: str) -> None:
        """Return once that was told of each of these tasks."""
        await self._until(lambda: set(task_ids) <= set(self.told(what)))

    async def until_count(self, what: str, count: int) -> None:
        """Return once that was told so many times."""
        await self._until(lambda: len(self.told(what)) >= count)

    async def _until(self, enough: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not enough():
                self._changed.clear()
                await self._changed.wait()


class Work(Told):
    """A handler whose tasks end once `may_end` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.may_end = asyncio.Event()
        self.at_once = 0
        """The most that ran at the same time."""
        self._running = 0

    async def handle(self, task: TaskRef) -> None:
        """Run a task."""
        self.tell("began", task.task_id)
        self._running += 1
        self.at_once = max(self.at_once, self._running)
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.tell("cancelled", task.task_id)
            raise
        finally:
            self._running -= 1
        self.tell("ended", task.task_id)


class WorkerProcess(Told):
    """A worker that is a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        super().__init__()
        self._process = process

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    async def exit_status(self) -> int:
        """Its status, once it has ended."""
        async with asyncio.timeout(PATIENCE_S):
            return await self._process.wait()

    async def listen(self) -> None:
        """Read what it tells, until it has ended."""
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            what, _, task_id = line.decode().strip().partition(" ")
            self.tell(what, task_id)


def definition(name: str, **options: object) -> TaskDefinition:
    """A task as far as a queue needs to know it."""
    known = {"name": name, "function": Work.handle, "input_type": TaskRef, "is_async": True}
    return msgspec.convert({**known, **options}, TaskDefinition)


@asynccontextmanager
async def working(queue: SaqQueue, work: Work) -> AsyncIterator[asyncio.Task[None]]:
    """Have the queue run its tasks."""
    running = asyncio.create_task(queue.run(work.handle))
    try:
        yield running
    finally:
        running.cancel()
        await asyncio.wait([running])
        assert running.cancelled()


@asynccontextmanager
async def worker_process(url: str, *, lease_s: float) -> AsyncIterator[WorkerProcess]:
    """A process that runs the tasks named "hold", two at once."""
    command = bound([sys.executable, "-m", "tests.support.queue_worker", url, str(lease_s)])
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, cwd=ROOT)
    worker = WorkerProcess(process)
    listening = asyncio.create_task(worker.listen())
    try:
        yield worker
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await listening


async def forgotten(redis: RedisServer) -> None:
    """Return once the queue has forgotten every job: all are done."""
    async with asyncio.timeout(PATIENCE_S):
        while await redis.command("KEYS", "saq:job:*"):  # noqa: ASYNC110  # nothing tells of it
            await asyncio.sleep(POLL_S)


async def main(url: str, lease_s: str) -> None:
    """Work until SIGTERM."""
    work = Work()
    asked_to_end = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, asked_to_end.set)
    loop.add_signal_handler(signal.SIGUSR1, work.may_end.set)
    async with SaqQueue(url, [definition("hold")], slots=2, lease_s=float(lease_s), ttl_s=TTL_S) as queue:
        async with working(queue, work):
            await print_until(work, asked_to_end)
            with suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_S):
                    await queue.drain()


async def print_until(work: Work, asked_to_end: asyncio.Event) -> None:
    """Write what is told, until it is to end."""
    printed = 0
    while not asked_to_end.is_set():
        for what, task_id in work.all[printed:]:
            print(what, task_id, flush=True)
            printed += 1
        with suppress(TimeoutError):
            async with asyncio.timeout(POLL_S):
                await asked_to_end.wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
