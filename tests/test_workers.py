"""The parent of several server processes: all on one port, none missing for long, none left behind.

Most of these run small stand-ins for workers, which answer every connection with their process id; the last ones run
the real thing.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
import structlog

from realtime.workers import MAX_PAUSE_S, Workers, pause_s
from tests.support.client import Client, attached
from tests.support.instance import Instance, instance
from tests.support.redis_server import redis_server
from tests.support.sdk import turns

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 30.0
WORKER = """
import os, select, signal, socket, sys
listener = socket.socket(fileno=int(sys.argv[-1]))
listener.setblocking(False)
listener.listen()
{first}
print("up", flush=True)
while True:
    ready, _, _ = select.select([listener, 0], [], [])
    if 0 in ready:
        sys.exit(0)
    try:
        connection, _ = listener.accept()
    except BlockingIOError:
        continue
    connection.setblocking(True)
    connection.sendall(b"%d" % os.getpid())
    connection.close()
"""


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """The socket that all share."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        yield listener


class Fleet:
    """Stand-ins that run; `result` is the parent's status."""

    def __init__(self, parent: Workers, port: int) -> None:
        self.parent = parent
        self.ups = 0
        self.result = asyncio.create_task(parent.run(self._up))
        self._came_up = asyncio.Event()
        self._port = port

    async def up(self) -> None:
        """Return once all are up."""
        await self._came_up.wait()

    async def answering(self, *, wanted: int, besides: Iterable[int] = ()) -> set[int]:
        """The process ids that answer."""
        return await answering(self._port, wanted=wanted, besides=besides)

    def _up(self) -> None:
        self.ups += 1
        self._came_up.set()


async def answering(port: int, *, wanted: int, besides: Iterable[int] = ()) -> set[int]:
    """The process ids that answer on a port, once there are so many, leaving out some."""
    found: set[int] = set()
    async with asyncio.timeout(PATIENCE_S):
        while len(found) < wanted:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with suppress(ConnectionResetError):  # killed in the middle of its answer
                found |= {int(await reader.read() or 0)} - {0, *besides}
            writer.close()
    return found


def command(first: str = "", program: str = sys.executable) -> list[str]:
    """What starts a stand-in that does `first` before it is up."""
    return [program, "-I", "-S", "-c", WORKER.format(first=first)]


@asynccontextmanager
async def fleet(
    listener: socket.socket,
    first: str = "",
    *,
    program: str = sys.executable,
    count: int = 2,
    patience_s: float = PATIENCE_S,
) -> AsyncIterator[Fleet]:
    """Stand-ins on a socket; those that still live are killed at the end."""
    parent = Workers(command(first, program), listener, count=count, patience_s=patience_s)
    started = Fleet(parent, listener.getsockname()[1])
    try:
        yield started
    finally:
        parent.stop()
        parent.hurry()
        await started.result


def lives(pid: int) -> bool:
    """Whether there is a process of that id, be it a zombie."""
    return Path(f"/proc/{pid}").exists()


async def ended(pids: set[int]) -> None:
    """Return once none of these processes runs. Who was orphaned may stay a zombie for as long as init lets it."""
    async with asyncio.timeout(PATIENCE_S):
        for pid in pids:
            with suppress(OSError):
                while (Path("/proc") / str(pid) / "stat").read_text().rpartition(") ")[2][0] != "Z":  # noqa: ASYNC110  # nothing tells
                    await asyncio.sleep(0.01)


async def test_all_serve_on_one_socket_until_they_are_told_to_end(listener: socket.socket) -> None:
    """It says once that they are up; a clean end is status 0, and leaves nobody."""
    async with fleet(listener, count=3) as started:
        await started.up()
        pids = await started.answering(wanted=3)
        started.parent.stop()
        assert await started.result == 0
        assert started.ups == 1
        assert not any(map(lives, pids))


async def test_worker_that_dies_is_replaced_and_logged(listener: socket.socket) -> None:
    """Whatever it died of; the others do not notice."""
    async with fleet(listener) as started:
        await started.up()
        first, second = await started.answering(wanted=2)
        with structlog.testing.capture_logs() as logs:
            os.kill(first, signal.SIGKILL)
            [third] = await started.answering(wanted=1, besides={first, second})
            assert await started.answering(wanted=2) == {second, third}
        assert logs == [{"log_level": "warning", "event": "worker lost", "pid": first, "status": -signal.SIGKILL}]
        started.parent.stop()
        assert await started.result == 0, "what one died of in between is no fault of the end"


async def test_replacement_that_can_not_be_started_is_tried_again(listener: socket.socket, tmp_path: Path) -> None:
    """There may be no room for a process just then."""
    program = tmp_path / "worker"
    program.symlink_to(sys.executable)
    async with fleet(listener, program=str(program)) as started:
        await started.up()
        first, second = await started.answering(wanted=2)
        with structlog.testing.capture_logs() as logs:
            program.unlink()
            os.kill(first, signal.SIGKILL)
            async with asyncio.timeout(PATIENCE_S):
                while not any(record["event"] == "error" for record in logs):
                    await turns(1)
        program.symlink_to(sys.executable)
        await started.answering(wanted=1, besides={first, second})


async def test_workers_that_never_come_up_are_given_up(listener: socket.socket) -> None:
    """What is wrong at the start is wrong for all, and they have said what it is."""
    async with fleet(listener, "sys.exit(3)") as started:
        assert await started.result == 1
        assert started.ups == 0


async def test_one_that_does_not_come_up_takes_the_others_with_it(listener: socket.socket, tmp_path: Path) -> None:
    """Half a service is none."""
    first = f"try: os.mkdir({str(tmp_path / 'one')!r})\nexcept FileExistsError: sys.exit(3)"
    async with fleet(listener, first) as started:
        assert await started.result == 1
        assert started.ups == 0


async def test_told_to_end_while_it_starts(listener: socket.socket) -> None:
    """It does not wait for workers to come up only to end them."""
    async with fleet(listener, "signal.pause()") as started:
        await asyncio.sleep(0.05)
        started.parent.stop()
        assert await started.result == 0
        assert started.ups == 0


async def test_worker_that_does_not_end_is_killed(listener: socket.socket) -> None:
    """After its patience; that is no clean end."""
    async with fleet(listener, "signal.signal(signal.SIGTERM, signal.SIG_IGN)", patience_s=0.1) as started:
        await started.up()
        pids = await started.answering(wanted=2)
        started.parent.stop()
        assert await started.result == 1
        assert not any(map(lives, pids))


async def test_hurry_does_not_wait(listener: socket.socket) -> None:
    """All are gone at once."""
    async with fleet(listener, "signal.signal(signal.SIGTERM, signal.SIG_IGN)", patience_s=60) as started:
        await started.up()
        started.parent.stop()
        started.parent.hurry()
        async with asyncio.timeout(PATIENCE_S):
            assert await started.result == 1


async def test_rolling_replaces_them_all(listener: socket.socket) -> None:
    """By those that are up already: there is somebody to answer at every moment."""
    async with fleet(listener, count=2) as started:
        await started.up()
        old = await started.answering(wanted=2)
        started.parent.roll()
        new = await started.answering(wanted=2, besides=old)
        await ended(old)
        assert await started.answering(wanted=2) == new
        started.parent.stop()
        assert await started.result == 0


async def test_rolling_stops_where_a_new_one_does_not_come_up(listener: socket.socket, tmp_path: Path) -> None:
    """The old ones go on as if nothing had been asked."""
    mark = tmp_path / "broken"
    async with fleet(listener, f"os.path.exists({str(mark)!r}) and sys.exit(3)") as started:
        await started.up()
        old = await started.answering(wanted=2)
        mark.touch()
        with structlog.testing.capture_logs() as logs:
            started.parent.roll()
            async with asyncio.timeout(PATIENCE_S):
                while not logs:
                    await turns(1)
        assert [record["event"] for record in logs] == ["worker not replaced"]
        assert await started.answering(wanted=2) == old


def test_pauses_grow_up_to_a_bound() -> None:
    """A worker that has lived for a while is replaced at once; one that can't start does not keep the machine busy."""
    pauses = [pause_s(failures) for failures in range(12)]
    assert pauses[0] == 0
    assert pauses == sorted(pauses)
    assert 0 < pauses[1] <= 0.5
    assert pauses[-1] == pauses[-2] == MAX_PAUSE_S


# --- the parent as a process -----------------------------------------------------------------------------------------

PARENT = """
import json, socket, sys
from realtime.workers import Workers, keep
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("127.0.0.1", 0))
workers = Workers(json.loads(sys.argv[1]), listener, count=2, patience_s=60)
sys.exit(keep(workers, lambda: print(listener.getsockname()[1], flush=True)))
"""


class Parent:
    """A parent in a process of its own, whose stand-ins are up: `workers` are their ids."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.port = port
        self.workers: set[int] = set()

    async def status(self) -> int:
        """What it ended with."""
        async with asyncio.timeout(PATIENCE_S):
            return await self.process.wait()


@asynccontextmanager
async def parent(first: str = "") -> AsyncIterator[Parent]:
    """A parent with two stand-ins."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PARENT, json.dumps(command(first))),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        cwd=ROOT,
        start_new_session=True,
    )
    assert process.stdout is not None
    found = Parent(process, int(await process.stdout.readline()))
    try:
        found.workers = await answering(found.port, wanted=2)
        yield found
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        for pid in found.workers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_ends_parent_and_workers(number: signal.Signals) -> None:
    """With status 0, once all are gone."""
    async with parent() as started:
        started.process.send_signal(number)
        assert await started.status() == 0
        assert not any(map(lives, started.workers))


async def test_ctrl_c_in_a_terminal_reaches_the_parent_alone() -> None:
    """It is sent to the whole group: workers that heard it, and SIGTERM from their parent, would be in a hurry."""
    async with parent() as started:
        assert os.getpgid(started.process.pid) == started.process.pid
        assert all(os.getpgid(pid) != started.process.pid for pid in started.workers)
        os.killpg(started.process.pid, signal.SIGINT)
        assert await started.status() == 0


async def test_second_ctrl_c_ends_all_at_once() -> None:
    """Also workers that do not listen."""
    async with parent("signal.signal(signal.SIGTERM, signal.SIG_IGN)") as started:
        started.process.send_signal(signal.SIGTERM)
        started.process.send_signal(signal.SIGTERM)  # nobody's patience has ended by this
        await answering(started.port, wanted=2)
        started.process.send_signal(signal.SIGINT)
        assert await started.status() == 1
        assert not any(map(lives, started.workers))


async def test_workers_end_with_their_parent() -> None:
    """Even if it could not tell them: nobody is left on the port."""
    async with parent() as started:
        started.process.kill()
        await started.status()
        await ended(started.workers)
        with socket.socket() as successor:
            successor.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            successor.bind(("127.0.0.1", started.port))
            successor.listen()


async def test_sighup_replaces_the_workers() -> None:
    """One after the other."""
    async with parent() as started:
        old, started.workers = started.workers, set()
        started.process.send_signal(signal.SIGHUP)
        started.workers = await answering(started.port, wanted=2, besides=old)
        await ended(old)
        started.process.send_signal(signal.SIGTERM)
        assert await started.status() == 0


# --- the real thing --------------------------------------------------------------------------------------------------


@asynccontextmanager
async def server(*, drain_s: float = 1) -> AsyncIterator[tuple[Instance, set[int]]]:
    """`realtime serve --workers 2`, and the ids of its workers."""
    async with (
        redis_server() as redis,
        instance(arguments=("--workers", "2"), redis_url=redis.url, drain_s=drain_s) as one,
    ):
        assert one.log[-1].endswith(" (2 workers)")
        yield one, workers_of(one)


def workers_of(one: Instance) -> set[int]:
    """The workers that have said that they are up."""
    records = (json.loads(line) for line in one.log if line.startswith("{"))
    return {record["pid"] for record in records if record["event"] == "worker up"}


def worker_of(one: Instance, client: Client, pids: Iterable[int]) -> int:
    """Which worker has a client's connection: the one that holds the other end of its socket."""
    port = client.socket.local_address[1]
    ends = f"0100007F:{one.port:04X} 0100007F:{port:04X}"
    rows = Path("/proc/net/tcp").read_text().splitlines()
    inode = next(row.split()[9] for row in rows if ends in row)
    return next(pid for pid in pids if f"socket:[{inode}]" in open_files(pid))


def open_files(pid: int) -> set[str]:
    """What the descriptors of a process lead to."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            found.add(os.readlink(link))
    return found


async def test_clients_of_different_workers_share_a_session() -> None:
    """Whichever worker has the connection."""
    async with server() as (one, pids), AsyncExitStack() as stack:
        assert len(pids) == 2
        clients = {pid: client async for pid, client in on_each(one, pids, stack)}
        writer, reader = clients.values()
        response_id = await writer.respond("hello", max_output_tokens=10)
        for client in (writer, reader):
            await client.until("response.done")
        assert writer.transcript.texts[response_id] == reader.transcript.texts[response_id] != ""


async def on_each(one: Instance, pids: set[int], stack: AsyncExitStack) -> AsyncIterator[tuple[int, Client]]:
    """A client on each worker, all of one session."""
    session_id, left = None, set(pids)
    async with asyncio.timeout(PATIENCE_S):
        while left:
            client = await stack.enter_async_context(attached(one, session_id))
            session_id = client.session_id
            if (pid := worker_of(one, client, pids)) in left:
                left.discard(pid)
                yield pid, client


async def test_worker_that_is_killed_is_back_while_the_other_goes_on() -> None:
    """The clients of the other one notice nothing; those that it had come back."""
    async with server() as (one, pids), AsyncExitStack() as stack:
        clients = {pid: client async for pid, client in on_each(one, pids, stack)}
        (lost, gone), (_, kept) = clients.items()
        os.kill(lost, signal.SIGKILL)
        assert await gone.until_closed() == 1006
        await one.logged("worker lost")
        async with attached(one, kept.session_id) as back:
            await back.answer("hello", max_output_tokens=5)
            await kept.until("response.done")
        async with asyncio.timeout(PATIENCE_S):
            while len(workers_of(one)) < 3:
                await turns(1)


async def test_workers_drain_before_they_end() -> None:
    """What runs in any of them is whole; status 0, and nobody is left."""
    async with server(drain_s=20) as (one, pids), AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(attached(one)) for _ in range(8)]
        for client in clients:
            await client.respond("hello", max_output_tokens=30)
        one.terminate()
        for client in clients:
            assert (await client.until("response.done"))["status"] == "incomplete"
            await client.socket.close()
        assert await one.exit_status() == 0
        assert not any(map(lives, {one.pid, *pids}))


async def test_workers_without_a_parent_drain_and_end() -> None:
    """And take no more connections meanwhile: the port is free for a successor."""
    async with server(drain_s=20) as (one, pids), attached(one) as client:
        await client.respond("hello", max_output_tokens=30)
        await client.until("response.output_text.delta")
        os.kill(one.pid, signal.SIGKILL)
        await client.until("session.going_away")
        with socket.socket() as successor:
            successor.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            successor.bind(("127.0.0.1", one.port))
            successor.listen()
        assert (await client.until("response.done"))["status"] == "incomplete"
        await client.socket.close()
        await ended(pids)
