"""Real workers of background tasks: `realtime worker` as a process of its own, beside real instances.

async with redis_server() as redis, site(redis, workers=2) as here:
    task = await here.submit("count", steps=10)
    here.workers[0].kill()
    await here.ended([task])
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
from msgspec import Struct

from realtime.store.base import Store
from realtime.store.redis import RedisStore
from tests.support import sample_tasks
from tests.support.instance import START_S, Instance, instance, process
from tests.support.redis_server import RedisServer
from tests.support.task_log import TaskLog, read_log

PATIENCE_S = 30.0
"""How long tasks may take to end, whatever happens to their workers; on a calm machine it is a few seconds."""
POLL_S = 0.05
AT_ONCE = 20
"""Requests, and calls of the store, at once."""


class Submitted(Struct, frozen=True):
    """A task that was accepted, and what it was given. Alone, its session has its id."""

    id: str
    name: str
    given: dict[str, Any]
    session_id: str

    @property
    def path(self) -> str:
        """Where it is over HTTP."""
        alone = f"/v1/tasks/{self.id}"
        return alone if self.session_id == self.id else f"/v1/sessions/{self.session_id}/tasks/{self.id}"


class Site:
    """Instances and workers at one Redis, all with the sample tasks. `store` is the test's own way to the logs."""

    def __init__(self, redis: RedisServer, store: Store, settings: dict[str, Any], stack: AsyncExitStack) -> None:
        self.store = store
        self._redis = redis
        self.instances: list[Instance] = []
        self.workers: list[Instance] = []
        """All that were started, also those that have ended."""
        self._settings = settings
        self._stack = stack
        self._clients: list[httpx.AsyncClient] = []
        self._free = asyncio.Semaphore(AT_ONCE)

    async def start_instance(self) -> None:
        """Start one; returns once it is up."""
        one = await self._stack.enter_async_context(instance(**self._settings))
        client = httpx.AsyncClient(base_url=one.url, trust_env=False, timeout=20)
        self.instances.append(one)
        self._clients.append(await self._stack.enter_async_context(client))

    async def start_worker(self) -> Instance:
        """Start one; returns once it works."""
        one = await self._stack.enter_async_context(worker(**self._settings))
        self.workers.append(one)
        return one

    async def ask(self, method: str, path: str, *, at: int = 0, **options: Any) -> httpx.Response:
        """What an instance answers."""
        async with self._free:
            return await self._clients[at].request(method, path, **options)

    def streaming(self, path: str, *, at: int = 0) -> AbstractAsyncContextManager[httpx.Response]:
        """An instance's answer, to be read as it comes."""
        return self._clients[at].stream("GET", path)

    async def submit(self, name: str, *, at: int = 0, **given: Any) -> Submitted:
        """Make a task over HTTP."""
        answer = await self.ask("POST", f"/v1/tasks/{name}", at=at, json=given)
        assert answer.status_code == 202, answer.text
        task_id = answer.json()["task_id"]
        return Submitted(task_id, name, given, task_id)

    async def show(self, task: Submitted, *, at: int = 0) -> dict[str, Any]:
        """A task as HTTP has it."""
        answer = await self.ask("GET", task.path, at=at)
        assert answer.status_code == 200, answer.text
        shown: dict[str, Any] = answer.json()
        return shown

    async def cancel(self, task: Submitted, *, at: int = 0) -> None:
        """Ask for a task's end."""
        answer = await self.ask("DELETE", task.path, at=at)
        assert answer.status_code == 202, answer.text

    async def log(self, task: Submitted) -> TaskLog:
        """A task's log, checked."""
        async with self._free:
            return await read_log(self.store, task.session_id, task.id)

    async def begun(self, task: Submitted, attempt: int = 1) -> TaskLog:
        """A task's log, once so many attempts have begun."""
        async with asyncio.timeout(PATIENCE_S):
            while (log := await self.log(task)).attempts < attempt:
                assert log.done is None, "it ends before"
                await asyncio.sleep(POLL_S)
        return log

    async def ended(self, tasks: Sequence[Submitted]) -> list[TaskLog]:
        """The logs of tasks, once all have ended."""
        left = list(tasks)
        try:
            async with asyncio.timeout(PATIENCE_S):
                while left := await self._unfinished(left):  # noqa: ASYNC110  # as below
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            logs = [await self.log(task) for task in left]
            begun = sum(log.attempts > 0 for log in logs)
            raise AssertionError(f"{len(left)} tasks do not end, {begun} of them have begun") from None
        return await asyncio.gather(*map(self.log, tasks))

    async def come_to_what_they_must(self, tasks: Sequence[Submitted]) -> list[TaskLog]:
        """The logs of tasks, once all have ended, after seeing that each has come to what it must."""
        logs = await self.ended(tasks)
        for task, log in zip(tasks, logs, strict=True):
            assert log.outcome == sample_tasks.expected(task.name, task.given), (task.name, log.outcome)
        return logs

    async def forgotten(self) -> None:
        """Return once neither the queue nor the index of unfinished tasks has any task left."""
        async with asyncio.timeout(PATIENCE_S):
            while await self.store.tracked() or await self._redis.command("KEYS", "saq:job:*"):  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)

    async def _unfinished(self, tasks: Sequence[Submitted]) -> list[Submitted]:
        finished = await asyncio.gather(*map(self._is_finished, tasks))
        return [task for task, is_finished in zip(tasks, finished, strict=True) if not is_finished]

    async def _is_finished(self, task: Submitted) -> bool:
        async with self._free:  # a call of the store waits 1.5 s at most, which a thousand at once may take
            head = (await self.store.load(task.session_id)).heads.get(task.id)
        return head is not None and head.finished


@asynccontextmanager
async def site(redis: RedisServer, *, instances: int = 1, workers: int = 0, **settings: Any) -> AsyncIterator[Site]:
    """Instances and workers that are up, killed at the end. `settings` are any of the server's."""
    given = {"redis_url": redis.url, "tasks": sample_tasks.MODULE, **settings}
    async with RedisStore(redis.url) as store, AsyncExitStack() as stack:
        here = Site(redis, store, given, stack)
        for _ in range(instances):
            await here.start_instance()
        for _ in range(workers):
            await here.start_worker()
        yield here


@asynccontextmanager
async def worker(**settings: Any) -> AsyncIterator[Instance]:
    """A worker that has said that it works. It is killed at the end, with what it has started."""
    variables = {f"REALTIME_{name.upper()}": str(value) for name, value in settings.items()}
    async with process((sys.executable, "-m", "realtime", "worker"), variables) as one:
        async with asyncio.timeout(START_S):
            await one.logged("worker started")
        yield one
