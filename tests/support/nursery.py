"""A process that has imported what an instance imports, and forks one wherever one is to start: in no time.

To import the model's SDK takes seconds of processor time, and the tests start more than a hundred instances. A child
runs its module as `python -m` does, in a session of its own, with the variables and the standard error that it is
given; only its imports are there already. That a server comes up from nothing is seen in tests/test_server.py.
"""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import functools
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.programs import bound

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = (
    "aiohttp",
    "anthropic",
    "httpx2",
    "realtime.app",
    "realtime.cli",
    "realtime.responders.pool",
    "realtime.server",
    "realtime.store.redis",
    "realtime.tasks.process",
    "realtime.workers",
    "uvicorn.protocols.http.httptools_impl",
)
MAX_REQUEST_BYTES = 1024 * 1024
MAX_DESCRIPTORS = 1024
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


# ------------------------------------------------------------------------------------------------------ for the tests


class Child:
    """A process that was forked: as much of `asyncio.subprocess.Process` as an instance needs."""

    def __init__(self, pid: int, stderr: asyncio.StreamReader, status: asyncio.StreamReader) -> None:
        self.pid = pid
        self.stderr = stderr
        self._ended = asyncio.create_task(status.read())

    def terminate(self) -> None:
        """SIGTERM."""
        os.kill(self.pid, signal.SIGTERM)

    async def wait(self) -> int:
        """Its status, once it has ended; negative: the signal that ended it. Safe to cancel."""
        return int(await asyncio.shield(self._ended))


async def fork(command: Sequence[str], variables: Mapping[str, str], *, limit: int) -> Child:
    """Run `python -m module …`, with no other variables than `variables`; a line of its standard error is at most
    `limit` bytes long. It is killed when this process ends."""
    told, heard = zip(*(os.pipe() for _ in range(2)), strict=True)
    request = json.dumps({"command": list(command), "variables": dict(variables)})
    socket.send_fds(_door(), [request.encode()], heard)
    for descriptor in heard:
        os.close(descriptor)
    stderr, status = [await _reader(descriptor, limit) for descriptor in told]
    return Child(int(await status.readline()), stderr, status)


async def _reader(descriptor: int, limit: int) -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit)
    pipe = os.fdopen(descriptor, "rb", buffering=0)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    return reader


@functools.cache
def _door() -> socket.socket:
    """The way to the process, which is started at the first call and ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = bound([sys.executable, "-m", "tests.support.nursery", str(theirs.fileno())])
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, cwd=ROOT, pass_fds=[theirs.fileno()], start_new_session=True
    )
    theirs.close()
    atexit.register(_end, ours, process)
    return ours


def _end(ours: socket.socket, process: subprocess.Popen[bytes]) -> None:
    ours.close()
    process.wait()


def kept_open() -> set[int]:
    """The descriptors that stay open once something was forked."""
    return {_door().fileno()} if _door.cache_info().currsize else set()


# ---------------------------------------------------------------------------------------------------- in the process


def main(descriptor: int) -> None:
    """Fork a child for each request, until nobody can ask any more."""
    for name in IMPORTED:
        importlib.import_module(name)
    assert threading.active_count() == 1, "a fork would lose its threads"
    with socket.socket(fileno=descriptor) as door:
        born = _nurse(door)
    if born is not None:
        _live(*born)


def _nurse(door: socket.socket) -> tuple[dict[str, Any], int, int] | None:
    """Returns in each child, with what was asked for, its standard error and its status; in the parent at the end."""
    children: dict[int, tuple[int, int]] = {}
    poll = select.poll()
    poll.register(door, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor in children:
                poll.unregister(descriptor)
                _bury(descriptor, *children.pop(descriptor))
                continue
            request, given, *_ = socket.recv_fds(door, MAX_REQUEST_BYTES, 2)
            if not request:
                return None
            stderr, status = given
            if (pid := os.fork()) == 0:
                return json.loads(request), stderr, status
            os.close(stderr)
            process = os.pidfd_open(pid)
            children[process] = (pid, status)
            poll.register(process, select.POLLIN)


def _bury(process: int, pid: int, status: int) -> None:
    """Tell how a child has ended."""
    _, ended = os.waitpid(pid, 0)
    os.write(status, str(os.waitstatus_to_exitcode(ended)).encode())
    os.close(status)
    os.close(process)


def _live(request: dict[str, Any], stderr: int, status: int) -> None:
    """Be what was asked for."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    os.write(status, f"{os.getpid()}\n".encode())
    null = os.open(os.devnull, os.O_RDWR)
    for wanted, given in enumerate((null, null, stderr)):
        os.dup2(given, wanted)
    os.closerange(3, MAX_DESCRIPTORS)
    os.environ.clear()
    os.environ.update(request["variables"])
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    _, _, module, *arguments = sys.orig_argv[:] = request["command"]
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
