"""A real instance: `python -m realtime serve` as a process of its own, which can be killed, paused and told to end.

async with ModelServer() as model, instance(model=model.url, redis_url=redis.url) as one:
    ...  # connect to one.ws_url
    one.kill()
    assert await one.exit_status() == -signal.SIGKILL
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from tests.support.limits import GENEROUS
from tests.support.nursery import Child, fork
from tests.support.programs import bound

ROOT = Path(__file__).resolve().parents[2]
START_S = 45.0
"""How long a start may take: with a model, seconds of imports, and several may start at once."""
LONGEST_LINE_BYTES = 1024 * 1024
PYTHON_MODULE = (sys.executable, "-m")
UP = re.compile(r"realtime \S+ on (http://\S+:(\d+))")
"""What an instance says once it is up."""


class Instance:
    """A running instance. `log` are the lines that it has written to standard error so far.

    What is done to it is done to its whole process group, as when a machine is lost; only `terminate` is said to the
    one process that was started, as an operator does.
    """

    def __init__(self, process: asyncio.subprocess.Process | Child) -> None:
        self.pid = process.pid
        self.port = 0
        self.url = ""
        self.log: list[str] = []
        self._process = process
        self._written = asyncio.Event()
        self._draining = asyncio.create_task(self._drain())

    @property
    def ws_url(self) -> str:
        """The WebSocket endpoint."""
        return f"ws://127.0.0.1:{self.port}/v1/realtime"

    @property
    def notes(self) -> list[str]:
        """What it has written beside where it listens and who came."""
        return [line for line in self.log[1:] if "realtime.audit" not in line]

    def kill(self) -> None:
        """SIGKILL, also to one that is paused. Idempotent."""
        self._signal(signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM: it is to drain and end."""
        self._process.terminate()

    def pause(self) -> None:
        """SIGSTOP: it hangs, with every connection open."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT: it goes on where it was."""
        self._signal(signal.SIGCONT)

    async def exit_status(self) -> int:
        """Its status, once it has ended; negative: the signal that ended it. `log` is whole then. Safe to cancel."""
        await asyncio.shield(self._draining)
        return await self._process.wait()

    async def logged(self, part: str) -> str:
        """The first line of the log that holds `part`, once there is one. Safe to cancel.

        Raises:
            RuntimeError: the instance ended without it; the text holds its log.
        """
        while not (found := next((line for line in self.log if part in line), "")):
            if self._draining.done():
                raise RuntimeError("the instance ended:\n" + "\n".join(self.log))
            await self._written.wait()
        return found

    async def up(self) -> None:
        """Return once it has said where it listens. Raises `RuntimeError` if it ends instead."""
        async with asyncio.timeout(START_S):
            found = UP.search(await self.logged(" on http://"))
        assert found is not None
        self.url, self.port = found[1], int(found[2])

    async def _drain(self) -> None:
        """Take every line, so that the pipe is never full."""
        assert self._process.stderr is not None
        while line := await self._process.stderr.readline():
            self.log.append(line.decode(errors="replace").rstrip("\n"))
            self._notify()
        self._notify()

    def _notify(self) -> None:
        self._written.set()
        self._written = asyncio.Event()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)


@asynccontextmanager
async def instance(
    *, model: str | None = None, port: int = 0, arguments: Sequence[str] = (), **settings: Any
) -> AsyncIterator[Instance]:
    """An instance that is up; several may start at once. It is killed at the end.

    `model` is the URL of a model server; without one the demo responder answers. `settings` are any of the server's:
    `redis_url=…` is `REALTIME_REDIS_URL`. `port` 0 is any free one. `arguments` are more of `realtime serve`.
    """
    variables = {f"REALTIME_{name.upper()}": str(value) for name, value in {**GENEROUS, **settings}.items()}
    variables = {"REALTIME_ALLOWED_MODELS": "*", **variables}
    if model is not None:
        variables |= {"ANTHROPIC_BASE_URL": model, "ANTHROPIC_API_KEY": "test"}
    command = (sys.executable, "-m", "realtime", "serve", "--port", str(port), *arguments)
    async with process(command, variables) as one:
        await one.up()
        yield one


@asynccontextmanager
async def process(command: Sequence[str], variables: Mapping[str, str]) -> AsyncIterator[Instance]:
    """Run a command that starts an instance, with `variables` and none of the settings around; don't wait for it.

    A module of this Python is forked from a process that has imported the most of it.
    """
    start = fork if tuple(command[:2]) == PYTHON_MODULE else _execute
    one = Instance(await start(command, environment(variables), limit=LONGEST_LINE_BYTES))
    try:
        yield one
    finally:
        one.kill()
        await one.exit_status()


async def _execute(command: Sequence[str], variables: Mapping[str, str], *, limit: int) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *bound(command),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=variables,
        cwd=ROOT,
        limit=limit,
        start_new_session=True,
    )


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without what a server would read, and without proxies, but with `variables`."""
    unwanted = ("REALTIME_", "ANTHROPIC_", "OPENAI_")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(unwanted) and not name.lower().endswith("_proxy")
    }
    return {**kept, **variables}
