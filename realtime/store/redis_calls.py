"""Commands to Redis: all that wait go together in one round trip, and none waits for longer than it should.

A command alone costs six times what it costs among others. So there is no connection for each caller: callers queue,
and a few lanes take everything that waits, send it as one pipeline, and hand out the replies. A caller that is
cancelled leaves its command to its lane, so no connection is ever left with a reply that nobody has read.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextvars import Context
from typing import Any

import hiredis
import redis
from msgspec import Struct
from redis import DriverInfo
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.connection import Connection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ResponseError

from realtime.errors import StoreError
from realtime.observe import logs, metrics
from realtime.store.redis_health import Health
from realtime.store.redis_scripts import Script
from realtime.store.redis_tls import read_authorities, share_tls

TIMEOUT_S = 1.5
"""How long a caller waits for its reply."""
CONNECT_TIMEOUT_S = 1.0
LANES = 2
"""Pipelines under way at once, beside the one whose effects are told: one that reads much must not hold up the rest."""
MAX_TOGETHER = 500
"""Commands in one pipeline, but for those that belong together."""
REPLIES_PER_TIMER = 100
"""Replies that may take `TIMEOUT_S` together, once they come."""
AGAIN_S = 0.05
"""How long to wait before a read is sent again that met a closed connection."""

Command = Sequence[Any]
Replies = list[Any]
"""One for each command: what Redis said, or the exception."""
Client = Redis | RedisCluster


class _Group(Struct):
    """Commands that belong together, in their order."""

    commands: Sequence[Command]
    scripts: dict[str, Script]
    replies: asyncio.Future[Replies]
    then: Callable[[Replies], None] | None
    safe_until: float
    """Until when, in the loop's time, they may be sent again without harm."""


class _Lanes:
    """Groups that wait, and the tasks that send them: at most `limit`, and none while nothing waits."""

    def __init__(self, limit: int, send: Callable[[Sequence[Command], dict[str, Script]], Awaitable[Replies]]) -> None:
        self._limit = limit
        self._send = send
        self._waiting: deque[_Group] = deque()
        self._lanes: set[asyncio.Task[None]] = set()

    def put(self, group: _Group) -> None:
        """Have a group sent."""
        self._waiting.append(group)
        self._open_lane()

    async def aclose(self) -> None:
        """Give up what waits."""
        await end_tasks(self._lanes)

    def _open_lane(self) -> None:
        if len(self._lanes) < self._limit:
            self._lanes.add(asyncio.create_task(self._serve(), name="redis lane", context=Context()))

    async def _serve(self) -> None:
        """Send what waits until nothing does."""
        try:
            await self._send_waiting()
        finally:
            lane = asyncio.current_task()
            assert lane is not None
            self._lanes.discard(lane)  # at once: whatever is put from now on needs another lane

    async def _send_waiting(self) -> None:
        while groups := self._take():
            commands = [command for group in groups for command in group.commands]
            scripts = {digest: script for group in groups for digest, script in group.scripts.items()}
            try:
                replies = await self._send(commands, scripts)
            except Exception as error:  # whatever it is, those who wait have to be told
                await self._fail(groups, error)
            else:
                _hand_out(groups, replies)

    def _take(self) -> list[_Group]:
        groups: list[_Group] = []
        count = 0
        while self._waiting and count < MAX_TOGETHER:
            groups.append(self._waiting.popleft())
            count += len(groups[-1].commands)
        return groups

    async def _fail(self, groups: list[_Group], error: Exception) -> None:
        now = asyncio.get_running_loop().time()
        again = [group for group in groups if isinstance(error, RedisConnectionError) and group.safe_until > now]
        _hand_out([group for group in groups if group not in again], [error] * sum(len(g.commands) for g in groups))
        if again:
            await asyncio.sleep(AGAIN_S)
            self._waiting.extendleft(reversed(again))


class Calls:
    """Sends commands. `aclose` when done. Those of the store, if it `is_store`, say what is wrong with the server."""

    def __init__(self, url: str, *, is_store: bool = False) -> None:
        self._url = url
        self._is_store = is_store
        self._client: Client | None = None
        self._connecting = asyncio.Lock()
        self._health = Health()
        self._told = _Lanes(1, self._send)  # in one lane, so that watchers are told in the order of the effects
        self._others = _Lanes(LANES, self._send)

    async def call(self, *command: Any, again: bool = False) -> Any:
        """The reply to a command. Raises `StoreError`. `again`: it does no harm to send it twice."""
        [reply] = await self.call_all([command], again=again)
        return checked(reply)

    async def run(self, script: Script, *arguments: Any, then: Callable[[Any], None] | None = None) -> Any:
        """The reply to a script, whose first argument is its key; `then` is called with it first, even if the caller
        was cancelled. Raises `StoreError`."""
        notify = None if then is None else lambda replies: then(replies[0])
        [reply] = await self.run_all(script, [arguments], then=notify)
        return checked(reply)

    async def run_all(
        self, script: Script, arguments: Sequence[Command], then: Callable[[Replies], None] | None = None
    ) -> Replies:
        """The replies to many runs of a script, or their errors."""
        commands = [("EVALSHA", script.digest, 1, *some) for some in arguments]
        return await self.call_all(commands, scripts={script.digest: script}, then=then)

    async def call_all(
        self,
        commands: Sequence[Command],
        *,
        again: bool = False,
        scripts: dict[str, Script] | None = None,
        then: Callable[[Replies], None] | None = None,
    ) -> Replies:
        """The replies to commands that are sent together, each a value or the exception that it came to."""
        loop = asyncio.get_running_loop()
        safe_until = loop.time() + TIMEOUT_S if again else 0.0
        group = _Group(commands, scripts or {}, loop.create_future(), then, safe_until)
        (self._others if then is None else self._told).put(group)
        with metrics.STORE_SECONDS.time():
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    return await asyncio.shield(group.replies)
            except TimeoutError as error:
                metrics.STORE_ERRORS.labels("timeout").inc()
                return [error] * len(commands)

    async def connection(self) -> Connection:
        """A connection of its own, not connected yet. Raises `RedisError` or `OSError`."""
        client = await self._connected()
        if isinstance(client, RedisCluster):
            node = client.get_random_node()
            return node.connection_class(**node.connection_kwargs)
        made: Connection = client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
        return made

    async def aclose(self) -> None:
        """Close every connection."""
        await self._told.aclose()
        await self._others.aclose()
        if self._client is not None:
            await self._client.aclose()

    async def _send(self, commands: Sequence[Command], scripts: dict[str, Script]) -> Replies:
        try:
            replies = await self._exchange(commands, scripts)
        except Exception as error:
            self._health.failed(error)
            raise
        self._health.replied(replies)
        return replies

    async def _exchange(self, commands: Sequence[Command], scripts: dict[str, Script]) -> Replies:
        client = await self._connected()
        replies = await _pipelined(client, commands)
        unknown = [at for at, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if unknown:  # a server that has restarted: with its text a script is known again
            texts = [("EVAL", scripts[commands[at][1]].text, *commands[at][2:]) for at in unknown]
            for at, reply in zip(unknown, await _pipelined(client, texts), strict=True):
                replies[at] = reply
        return replies

    async def _connected(self) -> Client:
        async with self._connecting:
            if self._client is None:
                async with asyncio.timeout(TIMEOUT_S):
                    self._client = await _connect(self._url, is_store=self._is_store)
            return self._client


async def end_tasks(tasks: Collection[asyncio.Task[None]]) -> None:
    """Cancel tasks until they have ended: on Python 3.11 `asyncio.wait_for`, by which redis-py sends, loses a
    cancellation that comes together with its result."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=AGAIN_S)


def checked(reply: Any) -> Any:
    """A reply that is no error. Raises `StoreError` for one that is."""
    if isinstance(reply, Exception):
        raise unavailable() from reply
    return reply


def unavailable() -> StoreError:
    """The store has not answered, or not with what was asked for."""
    return StoreError("store_unavailable", "The store does not answer; try again.", retry_after_ms=1000)


def _hand_out(groups: Sequence[_Group], replies: Replies) -> None:
    at = 0
    for group in groups:
        own = replies[at : at + len(group.commands)]
        at += len(group.commands)
        if group.then is not None:
            _notify(group.then, own)
        if not group.replies.done():
            group.replies.set_result(own)


def _notify(then: Callable[[Replies], None], replies: Replies) -> None:
    try:
        then(replies)
    except Exception as error:  # a fault of one watcher must not stop the lane for everybody
        logs.report(error)


async def _pipelined(client: Client, commands: Sequence[Command]) -> Replies:
    if isinstance(client, Redis):
        return await _exchanged(client, commands)
    pipeline: Any = client.pipeline()
    async with pipeline:
        for command in commands:
            pipeline.execute_command(*command)
        replies: Replies = await pipeline.execute(raise_on_error=False)
        return replies


async def _exchanged(client: Redis, commands: Sequence[Command]) -> Replies:
    """What redis-py's own pipeline does, for a fifth of its cost: that packs in Python, and sets a timer a reply."""
    async with asyncio.timeout(TIMEOUT_S):
        connection = await client.connection_pool.get_connection()  # type: ignore[no-untyped-call]
    replies: Replies = []
    packed = b"".join([hiredis.pack_command(tuple(command)) for command in commands])
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await connection.send_packed_command(packed)
        while len(replies) < len(commands):
            async with asyncio.timeout(TIMEOUT_S):
                for _ in range(min(REPLIES_PER_TIMER, len(commands) - len(replies))):
                    replies.append(await _reply(connection))
    finally:
        await client.connection_pool.release(connection)
    names = [command[0] for command in commands]
    return [_understood(client, name, reply) for name, reply in zip(names, replies, strict=True)]


async def _reply(connection: Connection) -> Any:
    try:
        return await connection.read_response()
    except ResponseError as error:
        return error


def _understood(client: Redis, name: str, reply: Any) -> Any:
    """A reply as redis-py would give it."""
    convert = client.response_callbacks.get(name)
    return reply if convert is None or isinstance(reply, Exception) else convert(reply)


async def _connect(url: str, *, is_store: bool) -> Client:
    """A client of the server at `url`, or of the cluster that it is a node of. If it `is_store` it says so in the log
    where the server is set to throw away what it should keep."""
    options: dict[str, Any] = {
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),  # what is sent twice is decided here, and not below
        "protocol": 2,
        "driver_info": DriverInfo(lib_version=redis.__version__),  # by itself it looks for the version on the disk
    }
    # No timeouts of its own: what waits for a reply here is bounded, and redis-py takes its own for no reply at all.
    client = Redis.from_url(url, max_connections=LANES + 3, socket_timeout=None, **options)
    share_tls(client.connection_pool)
    try:
        await read_authorities(client.connection_pool)
        is_cluster = await _looks_at(client, warns=is_store)
    except BaseException:
        await client.aclose()
        raise
    if not is_cluster:
        return client
    await client.aclose()
    cluster = RedisCluster.from_url(url, socket_timeout=TIMEOUT_S, **options)
    try:
        return await cluster.initialize()
    except BaseException:
        await cluster.aclose()
        raise


async def _looks_at(client: Redis, *, warns: bool) -> bool:
    """Whether the server belongs to a cluster."""
    try:
        info = await client.info()
    except ResponseError:  # this user may not ask that; what a cluster's client needs it may ask of a cluster
        return await _has_slots(client)
    policy = info.get("maxmemory_policy", "noeviction")
    if warns and policy != "noeviction":
        logs.warning("redis may evict sessions: set maxmemory-policy to noeviction", policy=policy)
    return bool(info.get("cluster_enabled"))


async def _has_slots(client: Redis) -> bool:
    try:
        await client.execute_command("CLUSTER SLOTS")  # type: ignore[no-untyped-call]
    except ResponseError:
        return False
    return True
