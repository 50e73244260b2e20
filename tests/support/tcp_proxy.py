"""A TCP proxy on 127.0.0.1 that passes everything on, until it is told to be a bad network.

async with TcpProxy("127.0.0.1", port) as proxy:
    ...  # connect to 127.0.0.1 at proxy.port
    await proxy.blackhole()
    await proxy.resume()
    await proxy.connections[0].reset()
"""

import asyncio
import contextlib
import math
import socket
from types import TracebackType
from typing import Any, Self

import msgspec

from tests.support.http_connection import RST_ON_CLOSE

READ_BYTES = 16 * 1024
LINE_CHUNKS = 256
"""So many reads may be under way in one direction while there is a delay, and one while there is none."""


class _Conditions(msgspec.Struct, frozen=True):
    delay_s: float = 0.0
    bytes_per_s: float | None = None
    blackholed: bool = False
    cut_after_bytes: int | None = None


class _CutOff(Exception):
    """The bytes that `cut_after` allowed have gone."""


class Network:
    """The conditions that can be set, of one connection or of all; they add up until `resume`."""

    async def delay(self, seconds: float) -> None:
        """Pass everything on so much later, in both directions."""
        self._change(delay_s=seconds)

    async def throttle(self, bytes_per_s: float) -> None:
        """Pass on at most so many bytes a second in each direction; less than one a second is possible."""
        self._change(bytes_per_s=bytes_per_s)

    async def blackhole(self) -> None:
        """Pass on nothing, not even that a side has closed, and stop reading, but keep both sockets open.

        A new connection is accepted, but the target hears of it after `resume` only.
        """
        self._change(blackholed=True)

    async def cut_after(self, count_bytes: int) -> None:
        """Send the client so many bytes from now on, and then close both sides with a FIN."""
        self._change(cut_after_bytes=count_bytes)

    async def resume(self) -> None:
        """Lift all conditions; what was held is passed on at once."""
        self._change(**msgspec.structs.asdict(_Conditions()))

    def _change(self, **changes: Any) -> None:
        raise NotImplementedError


class ProxyConnection(Network):
    """One client's connection, and the one to the target that was made for it."""

    def __init__(self, client: socket.socket, conditions: _Conditions) -> None:
        self.bytes_to_client = 0
        self.bytes_to_target = 0
        self._sockets = client, socket.socket(client.family)
        self._conditions = conditions
        self._cut_at = conditions.cut_after_bytes
        self._changed = asyncio.Event()
        self._resets = False
        self._closed = asyncio.Event()

    async def cut(self) -> None:
        """Close both sides with a FIN; return when they are closed. Idempotent."""
        await self._stop(resets=False)

    async def reset(self) -> None:
        """Close both sides with an RST; return when they are closed. Idempotent."""
        await self._stop(resets=True)

    async def closed(self) -> None:
        """Return once both sockets are closed, for whatever reason. Safe to cancel."""
        await self._closed.wait()

    def _start(self, tasks: asyncio.TaskGroup, target: tuple[str, int]) -> None:
        """Relay in a task of `tasks`; whatever becomes of that, the sockets get closed."""
        self._task = tasks.create_task(self._run(target))
        self._task.add_done_callback(lambda _: self._close())

    async def _stop(self, *, resets: bool) -> None:
        self._resets = resets
        self._task.cancel()
        await self.closed()

    def _change(self, **changes: Any) -> None:
        self._conditions = msgspec.structs.replace(self._conditions, **changes)
        if "cut_after_bytes" in changes:
            count_bytes = changes["cut_after_bytes"]
            self._cut_at = None if count_bytes is None else self.bytes_to_client + count_bytes
        self._changed.set()
        self._changed = asyncio.Event()

    async def _run(self, target: tuple[str, int]) -> None:
        client, server = self._sockets
        server.setblocking(False)
        try:
            await self._while_blackholed()
            await asyncio.get_running_loop().sock_connect(server, target)
            async with asyncio.TaskGroup() as ways:
                for way in _Way(self, client, server), _Way(self, server, client, to_client=True):
                    ways.create_task(way.read())
                    ways.create_task(way.write())
        except* OSError:  # one side is gone or was never there: the other is told in the same way
            self._resets = True
        except* _CutOff:
            pass

    def _close(self) -> None:
        for peer in self._sockets:
            with contextlib.suppress(OSError):
                if self._resets:
                    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_ON_CLOSE)
                else:
                    _finish(peer)
            peer.close()
        self._closed.set()

    async def _while_blackholed(self) -> None:
        while self._conditions.blackholed:
            await self._changed.wait()

    async def _hold(self, seconds: float) -> None:
        """Wait so long, or until the conditions change."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()


class _Way:
    """One direction of a connection: what is read waits in line until the conditions let it pass."""

    def __init__(
        self,
        connection: ProxyConnection,
        source: socket.socket,
        sink: socket.socket,
        *,
        to_client: bool = False,
    ) -> None:
        self._connection = connection
        self._source = source
        self._sink = sink
        self._to_client = to_client
        self._line: asyncio.Queue[tuple[float, bytes | OSError]] = asyncio.Queue(LINE_CHUNKS)
        self._free_at = -math.inf

    async def read(self) -> None:
        """Everything from the source into the line; last its end, which is empty, or its failure."""
        loop = asyncio.get_running_loop()
        chunk: bytes | OSError = b"-"
        while chunk and not isinstance(chunk, OSError):
            if not self._connection._conditions.delay_s:
                await self._line.join()
            await self._connection._while_blackholed()
            try:
                chunk = await loop.sock_recv(self._source, READ_BYTES)
            except OSError as error:
                chunk = error
            await self._line.put((loop.time(), chunk))

    async def write(self) -> None:
        """Everything from the line into the sink, when it may go."""
        while True:
            arrived_at, chunk = await self._line.get()
            await self._until_due(arrived_at)
            if isinstance(chunk, OSError):
                raise chunk
            if not chunk:
                self._sink.shutdown(socket.SHUT_WR)
                return
            await self._pass(arrived_at, chunk)
            self._line.task_done()

    async def _pass(self, arrived_at: float, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        while data:
            await self._until_due(arrived_at)
            piece = data[: self._allowance_bytes()]
            await loop.sock_sendall(self._sink, piece)
            self._account(len(piece))
            data = data[len(piece) :]

    async def _until_due(self, arrived_at: float) -> None:
        loop = asyncio.get_running_loop()
        connection = self._connection
        while True:
            await connection._while_blackholed()
            due = arrived_at + connection._conditions.delay_s
            if connection._conditions.bytes_per_s is not None:
                due = max(due, self._free_at)
            if (ahead_s := due - loop.time()) <= 0:
                return
            await connection._hold(ahead_s)

    def _allowance_bytes(self) -> int:
        """How much may go in one piece; at a limited rate, a twentieth of a second's worth."""
        allowances = [READ_BYTES]
        if self._connection._conditions.bytes_per_s is not None:
            allowances.append(max(1, int(self._connection._conditions.bytes_per_s / 20)))
        if self._to_client and self._connection._cut_at is not None:
            allowances.append(max(0, self._connection._cut_at - self._connection.bytes_to_client))
        return min(allowances)

    def _account(self, count_bytes: int) -> None:
        connection = self._connection
        if connection._conditions.bytes_per_s is not None:
            now = asyncio.get_running_loop().time()
            self._free_at = now + count_bytes / connection._conditions.bytes_per_s
        if not self._to_client:
            connection.bytes_to_target += count_bytes
            return
        connection.bytes_to_client += count_bytes
        if connection._cut_at is not None and connection.bytes_to_client >= connection._cut_at:
            raise _CutOff


class TcpProxy(Network):
    """Forwards every connection to 127.0.0.1 at `port` to `target`.

    Conditions that are set on the proxy hold for the open connections and for those to come. `target` may be
    changed, for those to come. `connections` are the open ones, oldest first. `buffer_bytes` asks for small
    socket buffers, so that one side soon feels the other's slowness.
    """

    def __init__(self, host: str, port: int, *, buffer_bytes: int | None = None) -> None:
        self.target = host, port
        self.port = 0
        self.connections: list[ProxyConnection] = []
        self._buffer_bytes = buffer_bytes
        self._conditions = _Conditions()
        self._unseen: asyncio.Queue[ProxyConnection] = asyncio.Queue()
        self._tasks = asyncio.TaskGroup()

    async def next_connection(self) -> ProxyConnection:
        """The next connection that no call of this has returned yet; waits for one. Safe to cancel."""
        return await self._unseen.get()

    async def cut(self) -> None:
        """`ProxyConnection.cut` for all that are open."""
        for connection in list(self.connections):
            await connection.cut()

    async def reset(self) -> None:
        """`ProxyConnection.reset` for all that are open."""
        for connection in list(self.connections):
            await connection.reset()

    async def __aenter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self._listener.setblocking(False)
        self._limit_buffers(self._listener)
        self.port = self._listener.getsockname()[1]
        await self._tasks.__aenter__()
        asyncio.get_running_loop().add_reader(self._listener, self._accept)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()
        try:
            await self.cut()
        finally:
            await self._tasks.__aexit__(exc_type, exc, traceback)

    def _change(self, **changes: Any) -> None:
        self._conditions = msgspec.structs.replace(self._conditions, **changes)
        for connection in self.connections:
            connection._change(**changes)

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        client.setblocking(False)
        connection = ProxyConnection(client, self._conditions)
        for peer in connection._sockets:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._limit_buffers(connection._sockets[1])
        self.connections.append(connection)
        self._unseen.put_nowait(connection)
        connection._start(self._tasks, self.target)
        connection._task.add_done_callback(lambda _: self.connections.remove(connection))

    def _limit_buffers(self, peer: socket.socket) -> None:
        if self._buffer_bytes is not None:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._buffer_bytes)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._buffer_bytes)


def _finish(peer: socket.socket) -> None:
    """Make sure that closing sends a FIN: with something left unread it would be an RST."""
    peer.shutdown(socket.SHUT_WR)
    while peer.recv(READ_BYTES):
        pass
