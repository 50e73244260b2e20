"""What the TCP proxy does to connections, seen from both of their ends."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeAlias

import pytest

from tests.support.clock import advancing_clock
from tests.support.http_connection import RST_ON_CLOSE
from tests.support.tcp_proxy import ProxyConnection, TcpProxy

End: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]
HOUR_S = 3600.0


class Target:
    """A server that hands its ends of the connections to the test."""

    def __init__(self) -> None:
        self.accepted: asyncio.Queue[End] = asyncio.Queue()
        self.port = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Target"]:
        """Listen; close every connection in the end."""
        ends: list[End] = []

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            ends.append((reader, writer))
            self.accepted.put_nowait((reader, writer))

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for end in ends:
                await hang_up(end)
            await server.wait_closed()


@asynccontextmanager
async def dialled(proxy: TcpProxy) -> AsyncIterator[End]:
    """The client's end of a new connection through the proxy."""
    end = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        yield end
    finally:
        await hang_up(end)


async def hang_up(end: End) -> None:
    """Close one end, whatever state it is in."""
    end[1].close()
    with contextlib.suppress(OSError):  # the proxy reset it, as told
        await end[1].wait_closed()


def abort(end: End) -> None:
    """Close one end with an RST."""
    end[1].get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_ON_CLOSE)
    end[1].transport.abort()


@pytest.fixture
async def target() -> AsyncIterator[Target]:
    """A server for the proxy to connect to."""
    async with Target().running() as target:
        yield target


@pytest.fixture
async def proxy(target: Target) -> AsyncIterator[TcpProxy]:
    """A proxy to it."""
    async with TcpProxy("127.0.0.1", target.port) as proxy:
        yield proxy


@pytest.fixture
async def client(proxy: TcpProxy) -> AsyncIterator[End]:
    """The client's end of a connection through the proxy."""
    async with dialled(proxy) as client:
        yield client


@pytest.fixture
async def server(target: Target, client: End) -> End:
    """The target's end of the same."""
    return await target.accepted.get()


@pytest.fixture
async def connection(proxy: TcpProxy, server: End) -> ProxyConnection:
    """What the proxy knows of it."""
    return await proxy.next_connection()


async def turns(count: int = 50) -> None:
    """Let the loop turn, for what might but shouldn't happen."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_passes_on_in_both_directions(client: End, server: End, connection: ProxyConnection) -> None:
    """What one side writes the other reads."""
    client[1].write(b"question")
    assert await server[0].readexactly(8) == b"question"
    server[1].write(b"answer")
    assert await client[0].readexactly(6) == b"answer"
    assert (connection.bytes_to_target, connection.bytes_to_client) == (8, 6)


async def test_passes_on_more_than_buffers_hold(client: End, server: End) -> None:
    """Eight megabytes come through whole, with the reader setting the pace."""
    sent = bytes(range(256)) * 32 * 1024
    async with asyncio.TaskGroup() as tasks:
        received = tasks.create_task(client[0].readexactly(len(sent)))
        server[1].write(sent)
        await server[1].drain()
    assert received.result() == sent


async def test_a_fin_leaves_the_other_direction_open(client: End, server: End) -> None:
    """A client that has said all can still hear the answer."""
    client[1].write(b"question")
    client[1].write_eof()
    assert await server[0].read() == b"question"
    server[1].write(b"answer")
    server[1].write_eof()
    assert await client[0].read() == b"answer"


async def test_is_closed_when_both_ends_are(
    proxy: TcpProxy, client: End, server: End, connection: ProxyConnection
) -> None:
    """A connection that is over is no longer listed."""
    assert proxy.connections == [connection]
    client[1].close()
    assert await server[0].read() == b""
    server[1].close()
    await connection.closed()
    assert proxy.connections == []


async def test_an_rst_is_passed_on_as_one(client: End, server: End) -> None:
    """A client's reset resets the server's end."""
    abort(client)
    with pytest.raises(ConnectionResetError):
        await server[0].read()


async def test_a_target_that_is_not_there_resets_the_client() -> None:
    """Nobody listens: the client is accepted, then reset."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    async with TcpProxy("127.0.0.1", port) as proxy, dialled(proxy) as client:
        with pytest.raises(ConnectionResetError):
            await client[0].read()


async def test_reset_is_felt_by_both_ends(client: End, server: End, connection: ProxyConnection) -> None:
    """Both ends see an RST, and the connection is closed when the call returns."""
    await connection.reset()
    for end in client, server:
        with pytest.raises(ConnectionResetError):
            await end[0].read()


async def test_cut_is_a_fin_to_both_ends(client: End, server: End, connection: ProxyConnection) -> None:
    """Both ends see a clean end after what had come through."""
    server[1].write(b"answer")
    assert await client[0].readexactly(6) == b"answer"
    await connection.cut()
    assert await client[0].read() == b""
    assert await server[0].read() == b""


async def test_cut_is_a_fin_even_with_bytes_unread(client: End, server: End, connection: ProxyConnection) -> None:
    """What a black hole left unread does not turn the FIN into an RST."""
    await connection.blackhole()
    for _ in range(8):
        client[1].write(b"x" * 1024)
        await turns(5)
    await connection.cut()
    assert await client[0].read() == b""
    assert await server[0].read() == b""


@pytest.mark.parametrize("count_bytes", [1, 5, 11])
async def test_cut_after_counts_bytes_to_the_client(
    client: End, server: End, connection: ProxyConnection, count_bytes: int
) -> None:
    """So many bytes arrive from then on, then a FIN."""
    server[1].write(b"before")
    assert await client[0].readexactly(6) == b"before"
    await connection.cut_after(count_bytes)
    client[1].write(b"not counted")
    assert await server[0].readexactly(11) == b"not counted"
    server[1].write(b"hello world, and more")
    assert await client[0].read() == b"hello world"[:count_bytes]
    assert await server[0].read() == b""


async def test_blackhole_holds_both_directions(client: End, server: End, connection: ProxyConnection) -> None:
    """Nothing comes through until `resume`, then all of it in order."""
    await connection.blackhole()
    client[1].write(b"question")
    server[1].write(b"answer")
    await turns()
    assert (connection.bytes_to_target, connection.bytes_to_client) == (0, 0)
    await connection.resume()
    assert await server[0].readexactly(8) == b"question"
    assert await client[0].readexactly(6) == b"answer"


@pytest.mark.parametrize("leave", [abort, lambda end: end[1].close()], ids=["rst", "fin"])
async def test_blackhole_hides_that_an_end_has_left(
    client: End, server: End, connection: ProxyConnection, leave: Callable[[End], None]
) -> None:
    """A client that goes is not seen to go until `resume`."""
    await connection.blackhole()
    leave(client)
    seen = asyncio.ensure_future(server[0].read())
    await turns()
    assert not seen.done()
    await connection.resume()
    await asyncio.wait([seen])
    assert isinstance(seen.exception(), ConnectionResetError) or seen.result() == b""


async def test_blackhole_stops_reading(target: Target) -> None:
    """A sender's buffers fill up, as they do when nobody acknowledges."""
    async with TcpProxy("127.0.0.1", target.port, buffer_bytes=4096) as proxy, dialled(proxy) as client:
        await proxy.blackhole()
        client[1].transport.set_write_buffer_limits(high=0)
        while client[1].transport.get_write_buffer_size() == 0:
            client[1].write(bytes(64 * 1024))
        drained = asyncio.ensure_future(client[1].drain())
        await turns()
        assert not drained.done()
        client[1].transport.abort()
        await asyncio.wait([drained])
        drained.exception()


async def test_blackhole_of_the_proxy_keeps_new_connections_from_the_target(proxy: TcpProxy, target: Target) -> None:
    """A client gets in, the target hears of it after `resume`."""
    await proxy.blackhole()
    async with dialled(proxy) as client:
        client[1].write(b"hello")
        await proxy.next_connection()
        await turns()
        assert target.accepted.empty()
        await proxy.resume()
        reader, _ = await target.accepted.get()
        assert await reader.readexactly(5) == b"hello"


async def test_delay_holds_each_chunk_for_its_time(client: End, server: End, connection: ProxyConnection) -> None:
    """Nothing arrives before its time, several chunks may be under way, and the FIN comes as late."""
    with advancing_clock() as advance:
        await connection.delay(2 * HOUR_S)
        server[1].write(b"first")
        await turns()
        advance(HOUR_S)
        server[1].write(b"second")
        server[1].write_eof()
        await turns()
        assert connection.bytes_to_client == 0
        advance(HOUR_S)
        assert await client[0].readexactly(5) == b"first"
        await turns()
        assert connection.bytes_to_client == 5
        advance(HOUR_S)
        assert await client[0].read() == b"second"


async def test_resume_ends_a_delay_at_once(client: End, server: End, connection: ProxyConnection) -> None:
    """What was being held arrives without its time having come."""
    await connection.delay(HOUR_S)
    server[1].write(b"late")
    await turns()
    await connection.resume()
    assert await client[0].readexactly(4) == b"late"


async def test_throttle_lets_through_so_much_a_second(client: End, server: End, connection: ProxyConnection) -> None:
    """At a byte an hour, an hour brings a byte."""
    with advancing_clock() as advance:
        await connection.throttle(1 / HOUR_S)
        server[1].write(b"slowly")
        for expected in b"slow":
            assert await client[0].readexactly(1) == bytes([expected])
            await turns()
            advance(HOUR_S)
        assert connection.bytes_to_client <= 5
        await connection.resume()
        assert await client[0].readexactly(2) == b"ly"


async def test_conditions_of_the_proxy_hold_for_all(proxy: TcpProxy, target: Target) -> None:
    """What is set on the proxy goes for connections that are open and for later ones."""
    async with dialled(proxy) as early:
        early_server = await target.accepted.get()
        await proxy.cut_after(3)
        async with dialled(proxy) as late:
            late_server = await target.accepted.get()
            for client, server in (early, early_server), (late, late_server):
                server[1].write(b"hello")
                assert await client[0].read() == b"hel"


async def test_conditions_of_a_connection_are_its_own(proxy: TcpProxy, target: Target) -> None:
    """Another connection of the same proxy goes on."""
    async with dialled(proxy) as first, dialled(proxy) as second:
        servers = [await target.accepted.get() for _ in range(2)]
        await proxy.connections[0].reset()
        with pytest.raises(ConnectionResetError):
            await first[0].read()
        second[1].write(b"still here")
        served = [asyncio.ensure_future(server[0].read(10)) for server in servers]
        await asyncio.wait(served)
        assert b"still here" in [task.result() for task in served if task.exception() is None]


async def test_reset_of_the_proxy_resets_all(proxy: TcpProxy, target: Target) -> None:
    """Every open connection is gone when the call returns; a new one may be made."""
    async with dialled(proxy) as first, dialled(proxy) as second:
        for _ in range(2):
            await target.accepted.get()
        await proxy.reset()
        assert proxy.connections == []
        for client in first, second:
            with pytest.raises(ConnectionResetError):
                await client[0].read()
    async with dialled(proxy) as third:
        third[1].write(b"again")
        reader, _ = await target.accepted.get()
        assert await reader.readexactly(5) == b"again"


async def test_target_may_change(proxy: TcpProxy) -> None:
    """A later connection goes to the new target."""
    async with Target().running() as other:
        proxy.target = "127.0.0.1", other.port
        async with dialled(proxy) as client:
            client[1].write(b"hello")
            reader, _ = await other.accepted.get()
            assert await reader.readexactly(5) == b"hello"


async def test_leaving_closes_what_is_open(target: Target) -> None:
    """The end of the context is a FIN to every client, held bytes or not."""
    async with TcpProxy("127.0.0.1", target.port) as proxy:
        client = await asyncio.open_connection("127.0.0.1", proxy.port)
        await target.accepted.get()
        await proxy.blackhole()
    assert await client[0].read() == b""
    await hang_up(client)
