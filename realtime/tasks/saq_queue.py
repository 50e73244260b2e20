"""The queue in Redis, by SAQ: any number of processes submit, any number of workers run what is submitted.

Each name has a queue of its own, so that no worker takes a task that it does not know. SAQ keeps the jobs, runs them,
and hands back what is cancelled. What an outage of Redis would turn into harm is overridden: whether a worker still
holds a job Redis judges by its own clock, what nobody holds is handed out again, and nothing that runs is aborted. A
job whose end Redis could not be told is handed out again too, and its log says then that it is done.

Every key has a time to live. That of a job begins anew with each submission, and again and again while it runs; that of
the lists about once a second while a worker runs. A list that Redis makes anew has one by then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from math import ceil
from types import TracebackType
from typing import Any, Self

import redis
from redis import DriverInfo
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from saq import Job, Status, Worker
from saq.queue.redis import RedisQueue

from realtime.lease import BEATS_PER_LEASE
from realtime.live import RETRY_S
from realtime.observe import logs
from realtime.store.base import TaskRef
from realtime.store.redis_calls import CONNECT_TIMEOUT_S, TIMEOUT_S, unavailable
from realtime.store.redis_health import reason_of
from realtime.store.redis_tls import share_tls
from realtime.tasks.queue import Handler
from realtime.tasks.registry import PRIORITIES, TaskDefinition
from realtime.tasks.room import Line, Room
from realtime.tasks.saq_scripts import HAND_BACK, SUBMIT, TEND

PREFIX = "rt:"
TEND_S = 1.0
"""How often workers look after their queues, at the least."""
WAIT_S = 0.5
"""How long Redis is asked to wait for a job before it is asked again: so long a drain takes when nothing runs."""
GLANCE_S = 0.001
"""The same where a job is likely to be there already. 0 would be for ever."""
CANCEL_S = 10.0
"""A handler that has not ended so long after it was cancelled is left behind."""
CONNECTIONS = 8
"""For all but waiting, which takes one for each name."""


def _without_ids(record: logging.LogRecord) -> bool:
    """SAQ's records name jobs, and so sessions, whose ids are credentials. What is no error is not for operators."""
    record.args = ()
    return record.levelno >= logging.ERROR


logging.getLogger("saq").addFilter(_without_ids)


class _JobQueue(RedisQueue):
    """The tasks of one name. What `dequeue` returns has a slot in the room, and is held until it ends or is retried."""

    def __init__(self, client: Redis, name: str, room: Room, line: Line, *, lease_s: float, ttl_s: float) -> None:
        super().__init__(client, name=PREFIX + name)
        self._room = room
        self._line = line
        self._lease_ms = ceil(lease_s * 1000)
        self._ttl_s = ceil(ttl_s)
        self._held: dict[int, Job] = {}
        """By identity: one job may be handed out to this process twice."""
        self._dequeuing = asyncio.Lock()
        self._may_have_more = True
        self._beats = self.namespace("beats")
        self._submit = client.register_script(SUBMIT)
        self._hand_back = client.register_script(HAND_BACK)
        self._tend = client.register_script(TEND)

    async def dequeue(self, timeout: float = 0.0, poll_interval: float = 0.0) -> Job:  # noqa: ARG002  # SAQ's
        """The next job, once there is one and room for it. However many ask, one connection waits.

        While there is no room nothing is asked for, and what comes all the same is handed back: others may have room.
        """
        async with self._dequeuing:
            while True:
                if self._may_have_more or self._room.is_closed:
                    await self._room.take(self._line)
                    if job := await self._fetch(GLANCE_S):
                        return self._hold(job)
                    self._room.release(self._line)
                    self._may_have_more = False
                elif job := await self._fetch(WAIT_S):
                    self._may_have_more = True
                    if self._room.try_take(self._line):
                        return self._hold(job)
                    await self._tell(self._back(job))

    async def update(self, job: Job, **kwargs: Any) -> None:
        """Nothing: `tend` says that a job lives, and its log how it stands."""

    async def notify(self, job: Job) -> None:
        """Nothing: nobody listens."""

    async def finish(self, job: Job, status: Status, **kwargs: Any) -> None:
        """Forget a job. Raises nothing: if Redis can't be told, the job is handed out again."""
        if id(job) in self._held:
            await self._let_go(job, super().finish(job, status, **kwargs))

    async def retry(self, job: Job, error: str | None) -> None:  # noqa: ARG002  # SAQ's
        """Hand a job back, as the first of those that wait. As `finish`."""
        if id(job) in self._held:
            await self._let_go(job, self._back(job))

    async def tend(self) -> None:
        """Say that what is held here lives, hand out again what nobody holds any more, renew what may expire.

        Raises `RedisError` or `OSError`.
        """
        keys = [self._beats, self._sweep, self._queued, self._active, self._incomplete]
        held = [job.id for job in self._held.values()]
        async with asyncio.timeout(TIMEOUT_S):
            lost = await self._tend(keys=keys, args=[self._lease_ms, self._ttl_s, *held])
        if lost:
            logs.info("tasks of lost workers are handed out again", count=lost)

    async def unattended(self) -> int:
        """How many wait, if nobody has tended the queue for two leases. Raises `RedisError` or `OSError`."""
        pipe = self.redis.pipeline(transaction=False)
        pipe.llen(self._queued)
        pipe.get(self._sweep)
        pipe.time()
        async with asyncio.timeout(TIMEOUT_S):
            waiting, swept, (seconds, _) = await pipe.execute()
        return waiting if seconds * 1000 - int(swept or 0) > 2 * self._lease_ms else 0

    async def _enqueue(self, job: Job) -> None:
        keys = [job.id, self._incomplete, self._queued]
        await self._submit(keys=keys, args=[self.serialize(job), self._ttl_s])

    async def _fetch(self, wait_s: float) -> Job | None:
        """The first of those that wait, if there is one within `wait_s`. While Redis doesn't answer there is none."""
        if self._room.is_closed:
            return None
        job: Job | None = None
        self._room.begin()
        try:
            async with asyncio.timeout(wait_s + TIMEOUT_S):
                job = await super().dequeue(wait_s)
        except Exception as error:  # whatever it is, the worker has to go on
            _note(error)
            await asyncio.sleep(RETRY_S)
        finally:
            if job is None:
                self._room.end()
        return job

    def _hold(self, job: Job) -> Job:
        self._held[id(job)] = job
        return job

    def _back(self, job: Job) -> Awaitable[Any]:
        keys = [job.id, self._queued, self._active, self._beats]
        return self._hand_back(keys=keys, args=[self._ttl_s])

    async def _let_go(self, job: Job, telling: Awaitable[Any]) -> None:
        del self._held[id(job)]
        try:
            await self._tell(telling)
        finally:
            self._room.release(self._line)

    async def _tell(self, telling: Awaitable[Any]) -> None:
        """Tell Redis what becomes of a job; then it is no longer under way."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await telling
        except Exception as error:  # it is handed out again, once nobody says any more that it lives
            _note(error)
        finally:
            self._room.end()


class _Worker(Worker[Any]):
    """SAQ's worker, without what belongs to the process, and without an upkeep that aborts what runs."""

    SIGNALS = []  # noqa: RUF012

    async def upkeep(self) -> list[asyncio.Task[None]]:
        return []


class SaqQueue:
    """A `Queue` in the Redis at `url`. Runs the tasks of `definitions`, at most `slots` at once; submits any. A task
    whose worker has not been heard of for `lease_s` is handed out again; one that nobody takes is forgotten `ttl_s`
    after it was last submitted. `run` is called at most once.
    """

    def __init__(
        self, url: str, definitions: Collection[TaskDefinition], *, slots: int, lease_s: float, ttl_s: float
    ) -> None:
        self._lines = {one.name: _line(one, slots) for one in definitions}
        self._lease_s = lease_s
        self._ttl_s = ttl_s
        self._room = Room(slots)
        self._client = _client(url, CONNECTIONS + len(self._lines))
        self._queues: dict[str, _JobQueue] = {}

    async def submit(self, task: TaskRef) -> None:
        """Have a task handed out, once: one that waits or runs already is left as it is. Raises `StoreError`."""
        ids = {"session_id": task.session_id, "task_id": task.task_id}
        job = Job(task.name, kwargs=ids, key=":".join(ids.values()), timeout=0, ttl=-1)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._queue(task.name).enqueue(job)
        except (RedisError, OSError) as error:
            _note(error)
            raise unavailable() from error

    async def unattended(self) -> int:
        """As `Queue.unattended`, of the tasks of `definitions`."""
        try:
            return sum([await self._queue(name).unattended() for name in self._lines])
        except (RedisError, OSError) as error:
            _note(error)
            raise unavailable() from error

    async def run(self, handle: Handler) -> None:
        """Hand tasks out to `handle` for ever. Cancelled, it hands back what runs."""
        try:
            async with asyncio.TaskGroup() as group:
                for name in self._lines:
                    group.create_task(self._worker(name, handle).start())
                group.create_task(self._tend())
        finally:
            self._room.still.set()

    async def drain(self) -> None:
        """Take no more, and hand back what comes all the same; returns once nothing runs."""
        self._room.is_closed = True
        await self._room.still.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.connection_pool.disconnect()

    def _queue(self, name: str) -> _JobQueue:
        if name not in self._queues:
            line = self._lines.get(name) or Line(urgency=len(PRIORITIES), limit=0)
            times = {"lease_s": self._lease_s, "ttl_s": self._ttl_s}
            self._queues[name] = _JobQueue(self._client, name, self._room, line, **times)
        return self._queues[name]

    def _worker(self, name: str, handle: Handler) -> _Worker:
        queue = self._queue(name)
        return _Worker(
            queue,
            [(name, _performing(queue, handle))],
            concurrency=self._lines[name].limit + 1,  # one asks for the next
            cancellation_hard_deadline_s=CANCEL_S,
        )

    async def _tend(self) -> None:
        """Look after the queues of `definitions`, for ever."""
        answers = True
        while True:
            try:
                for name in self._lines:
                    await self._queue(name).tend()
            except Exception as error:  # whatever it is, what runs here has to be said to live
                _note(error)
                if answers:
                    logs.warning("the task queue's redis does not answer")
                answers = False
                await asyncio.sleep(RETRY_S)
            else:
                answers = True
                await asyncio.sleep(min(TEND_S, self._lease_s / BEATS_PER_LEASE))


def _performing(queue: _JobQueue, handle: Handler) -> Callable[..., Awaitable[None]]:
    """What SAQ calls with a job."""

    async def perform(context: dict[str, Any], *, session_id: str, task_id: str) -> None:
        job: Job = context["job"]
        try:
            await handle(TaskRef(session_id, task_id, job.function))
        except asyncio.CancelledError:
            await queue.retry(job, None)
            raise
        except Exception as error:  # SAQ would log whose task it was
            logs.report(error)

    return perform


def _line(definition: TaskDefinition, slots: int) -> Line:
    limit = min(definition.concurrency or slots, slots)
    return Line(urgency=PRIORITIES.index(definition.priority), limit=limit)


def _note(error: Exception) -> None:
    if isinstance(error, ResponseError):
        logs.warning("redis refuses", reason=reason_of(error))
    elif not isinstance(error, RedisError | OSError):
        logs.report(error)


def _client(url: str, connections: int) -> Redis:
    """A client that tries once and waits for replies as long as it is let; whoever finds no connection free waits."""
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=connections,
        timeout=None,
        socket_timeout=None,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
        protocol=2,
        driver_info=DriverInfo(lib_version=redis.__version__),
    )
    share_tls(pool)
    return Redis(connection_pool=pool)
