"""`realtime worker`: a process that runs tasks and nothing else."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import uvloop
from prometheus_client import start_http_server

from realtime.background import Background
from realtime.observe import logs, metrics, traces
from realtime.parts import Parts, entered, make_parts, make_worker
from realtime.settings import Settings, SettingsError
from realtime.tasks.worker import Worker


def run(settings: Settings) -> None:
    """Run tasks until SIGTERM or SIGINT: then none is begun any more, and what has not ended after `drain_s` is left to
    another worker. Raises `SettingsError`."""
    if not settings.redis_url:
        raise SettingsError("realtime worker needs REALTIME_REDIS_URL: without it the server runs its tasks itself")
    traces.check(settings.traces)
    parts = make_parts(settings, None, ())
    with _showing_metrics(settings.worker_metrics_port), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_work(parts, settings))


@contextmanager
def _showing_metrics(port: int) -> Iterator[None]:
    """Show them on that port of this machine, in a thread, for as long as the block lasts; on 0 nowhere.

    Raises `SettingsError`.
    """
    if not port:
        yield
        return
    try:
        server, thread = start_http_server(port, "127.0.0.1", metrics.REGISTRY)
    except OSError as error:
        raise SettingsError(f"REALTIME_WORKER_METRICS_PORT={port}: can't listen there: {error.strerror}") from None
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


async def _work(parts: Parts, settings: Settings) -> None:
    loop = asyncio.get_running_loop()
    told, hurried = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: hurried.set() if told.is_set() else told.set())
    worker = make_worker(parts, settings)
    async with entered(parts, settings), Background() as background:
        for work in (parts.lease.sign(), parts.journal.run(), parts.sweeper.run()):
            background.spawn(work)
        async with worker:
            logs.info("worker started", instance=parts.lease.instance, tasks=sorted(parts.registry.definitions))
            await told.wait()
            logs.info("worker drains")
            background.spawn(_drain(worker, hurried))
            with suppress(TimeoutError):
                async with asyncio.timeout(settings.drain_s):
                    await hurried.wait()


async def _drain(worker: Worker, drained: asyncio.Event) -> None:
    await worker.finish_turns()
    drained.set()
