"""A real Redis for a test: a process on a port of 127.0.0.1, with a folder of its own, ended by its id.

async with redis_server() as redis:
    ...  # connect to redis.url
    await redis.kill()
    await redis.start()
    assert await redis.command("DBSIZE") == 0
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from itertools import permutations
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import quote

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from realtime.store import redis_bus, redis_calls
from realtime.tasks import saq_queue
from tests.support.ports import free_port
from tests.support.programs import bound, program

START_S = 30.0
"""How long a start may take; on an idle machine it is some hundredths of a second, for a cluster two seconds."""
POLL_S = 0.005
COMMAND_S = 20.0
SLOTS = 16384
BUS_OFFSET = 10_000
"""A node of a cluster listens on its port and, for the other nodes, so much above it."""


class RedisServer:
    """One `redis-server`. `url` and `port` stay the same however often it is stopped and started."""

    def __init__(self, folder: Path, port: int, options: dict[str, str], password: str | None = None) -> None:
        self.port = port
        self.password = password
        login = f":{quote(password, safe='')}@" if password else ""
        self.url = f"redis://{login}127.0.0.1:{port}/0"
        self._folder = folder
        self._log = folder / "redis.log"
        self._options = options
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """The id of the process. Raises `RuntimeError` while there is none."""
        if self._process is None:
            raise RuntimeError("this Redis is not running")
        return self._process.pid

    async def start(self) -> None:
        """Start it with the data that its folder holds; return once it answers.

        Raises:
            RuntimeError: it already runs, or it does not come up; the text holds its log.
        """
        if self._process is not None:
            raise RuntimeError("this Redis is running already")
        flags = _flags({**self._options, "port": str(self.port), "dir": str(self._folder)})
        command = bound([program("redis-server"), *flags])
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            async with asyncio.timeout(START_S):
                while not await self._answers():  # noqa: ASYNC110  # nothing tells of it
                    await asyncio.sleep(POLL_S)
        except (TimeoutError, ChildProcessError):
            await self.kill()
            raise RuntimeError(f"redis-server did not come up on port {self.port}:\n{self.log}") from None

    async def kill(self) -> None:
        """SIGKILL, also to one that is paused; return once it is gone. Idempotent."""
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def terminate(self) -> None:
        """SIGTERM, as an operator or a container's end does; return once it is gone."""
        process, self._process = self._process, None
        assert process is not None
        process.terminate()
        await process.wait()

    def pause(self) -> None:
        """SIGSTOP: it hangs, with every connection open."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT: it goes on where it was."""
        self._signal(signal.SIGCONT)

    async def wipe(self) -> None:
        """Start it anew without the data that it had."""
        await self.kill()
        shutil.rmtree(self._folder)
        self._folder.mkdir()
        await self.start()

    async def command(self, *words: str | bytes | int | float) -> Any:
        """The answer to one command, over a connection of its own; bytes are decoded. Raises `RedisError`."""
        async with _client(self.url) as client, asyncio.timeout(COMMAND_S):
            return await client.execute_command(*words)  # type: ignore[no-untyped-call]

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return self._log.read_text()

    async def _answers(self) -> bool:
        """Whether this process answers, no other on its port; not yet while it loads its data."""
        assert self._process is not None
        if self._process.returncode is not None:
            raise ChildProcessError(self._process.returncode)
        try:
            await self.command("PING")
            info = await self.command("INFO", "server")
        except (RedisError, OSError, TimeoutError):
            return False
        return bool(info["process_id"] == self._process.pid)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)


class RedisCluster:
    """Three masters that share all slots. `url` is the first one's; `nodes` may be killed and started one by one."""

    def __init__(self, nodes: list[RedisServer]) -> None:
        self.nodes = nodes
        self.url = nodes[0].url
        self.ports = [node.port for node in nodes]

    async def ready(self) -> None:
        """Return once every node says that the cluster is complete. Raises `TimeoutError` after a while."""
        async with asyncio.timeout(START_S):
            for node in self.nodes:
                while not await self._is_complete(node):  # noqa: ASYNC110  # nothing tells of it
                    await asyncio.sleep(POLL_S)

    async def _join(self) -> None:
        """Give out the slots and have all nodes meet."""
        for number, node in enumerate(self.nodes):
            first, end = (SLOTS * edge // len(self.nodes) for edge in (number, number + 1))
            await node.command("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
            await node.command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node, other in permutations(self.nodes, 2):
            await node.command("CLUSTER", "MEET", "127.0.0.1", other.port)

    async def _is_complete(self, node: RedisServer) -> bool:
        lines = str(await node.command("CLUSTER", "INFO")).splitlines()
        return {"cluster_state:ok", f"cluster_slots_ok:{SLOTS}", f"cluster_known_nodes:{len(self.nodes)}"} <= set(lines)


@asynccontextmanager
async def redis_server(
    *,
    append_only: bool = False,
    appendfsync: str = "everysec",
    maxmemory: str | None = None,
    password: str | None = None,
    port: int | None = None,
    **options: str,
) -> AsyncIterator[RedisServer]:
    """A Redis that answers, without data. It never evicts anything and writes no snapshots.

    With `append_only` the data outlives `kill`. `maxmemory` is as in its configuration ("10mb"); so are `options`,
    whose names have underscores for dashes.
    """
    chosen = {
        "bind": "127.0.0.1",
        "save": "",
        "appendonly": "yes" if append_only else "no",
        "appendfsync": appendfsync,
        "maxmemory-policy": "noeviction",
        **({"maxmemory": maxmemory} if maxmemory else {}),
        **({"requirepass": password} if password else {}),
        **{name.replace("_", "-"): value for name, value in options.items()},
    }
    with _folder() as folder:
        server = RedisServer(folder, port or free_port(), chosen, password)
        try:
            await server.start()
            yield server
        finally:
            await server.kill()


@asynccontextmanager
async def redis_cluster(**options: Any) -> AsyncIterator[RedisCluster]:
    """A cluster of three masters that is complete; `options` are each node's, as those of `redis_server`."""
    async with AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(redis_server(port=free_port(BUS_OFFSET), cluster_enabled="yes", **options))
            for _ in range(3)
        ]
        cluster = RedisCluster(nodes)
        await cluster._join()
        await cluster.ready()
        yield cluster


@contextmanager
def patient_calls() -> Iterator[None]:
    """Calls of stores and queues that begin within the block wait for as long as a busy machine takes: else 1.5 s.

    For tests that ask for much at once, of a Redis that lives.
    """
    with ExitStack() as stack:
        for module in (redis_bus, redis_calls, saq_queue):
            stack.enter_context(mock.patch.object(module, "TIMEOUT_S", COMMAND_S))
        yield


def _flags(options: dict[str, str]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def _client(url: str) -> Redis:
    """A client that tries once."""
    return Redis.from_url(url, decode_responses=True, socket_timeout=COMMAND_S, retry=Retry(NoBackoff(), 0))


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="redis-", ignore_cleanup_errors=True) as name:
        folder = Path(name, "data")
        folder.mkdir()
        yield folder
