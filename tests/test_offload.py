"""Plain functions in processes of their own: what comes back, what is cancelled, what dies, what is left."""

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from realtime.errors import InvalidRequest, ServerError
from realtime.observe.logs import places
from realtime.offload import NICE, Elsewhere, Offloader, OffloadError, WorkerDied, offload

SECRET = "a patient's name"


class Picky(Exception):
    """An exception that can't be made of its words alone."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)


class Locked(Exception):
    """An exception that can't be pickled."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


def fail(kind: type[Exception], *args: object) -> None:
    raise kind(*args)


def count_up(text: str) -> Any:
    return (text for _ in range(3))


def double(text: str) -> str:
    return text * 2


def process_of(_number: int) -> int:
    return os.getpid()


def tell_and_wait(told: Path, awaited: Path) -> int:
    """Write the process's id to a file, and use the processor until the other file is there."""
    tell(told)
    while not awaited.exists():
        sum(range(1000))
    return os.getpid()


def tell(told: Path) -> None:
    new = told.with_suffix(".new")
    new.write_text(str(os.getpid()))
    new.rename(told)


def append_line(file: Path, line: str) -> None:
    with file.open("a") as lines:
        print(line, file=lines)


def survive(*numbers: int) -> int:
    for number in numbers:
        os.kill(os.getpid(), number)
    return os.getpid()


async def until(condition: Callable[[], bool]) -> None:
    """Return once the condition holds."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  # no event tells of it
            await asyncio.sleep(0.005)


def is_gone(pid: int) -> bool:
    """Whether the process has ended; one that nobody but `init` can bury may still be listed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


async def told_by(file: Path) -> int:
    """The process that has written the file."""
    await until(file.exists)
    return int(file.read_text())


async def test_a_function_runs_in_another_process() -> None:
    async with Offloader(1):
        assert await offload(double, "ab") == "abab"
        assert await offload(partial(double, "cd")) == "cdcd"
        pid = await offload(process_of, 0)
        assert pid != os.getpid()
        assert await offload(process_of, 0) == pid


async def test_documents_go_there_and_back() -> None:
    """Of any size."""
    async with Offloader(1):
        document = "ä" * (2 << 20)
        assert await offload(double, document) == document * 2


async def test_a_functions_exception_comes_back_as_it_is() -> None:
    """With the place that raised it, which its own traceback does not have."""
    async with Offloader(1):
        with pytest.raises(KeyError) as caught:
            await offload(fail, KeyError, "key")
        assert caught.value.args == ("key",)
        cause = caught.value.__cause__
        assert isinstance(cause, Elsewhere)
        [place] = cause.places
        assert place.startswith(f"{__file__}:")
        assert place.endswith(" fail")
        assert await offload(double, "a") == "aa"


def local() -> Callable[[], None]:
    def inner() -> None: ...

    return inner


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (partial(lambda text: text, SECRET), "partial can't be offloaded: the function can't be pickled"),
        (lambda: SECRET, "<lambda> can't be offloaded: the function can't be pickled"),
        (local(), "inner can't be offloaded: the function can't be pickled"),
        (double, "double can't be offloaded: its arguments can't be pickled"),
        (partial(count_up, SECRET), r"its result \(generator\) can't be pickled"),
        (partial(fail, Locked, SECRET), r"its exception \(Locked\) can't be pickled"),
        (partial(fail, Picky, 1, SECRET), r"its exception \(Picky\) can't be pickled"),
    ],
    ids=["partial", "lambda", "local", "arguments", "result", "exception", "picky exception"],
)
async def test_what_cannot_be_pickled_is_said(call: Callable[..., object], words: str) -> None:
    """With the function's name, and no values; the process lives."""
    async with Offloader(1):
        pid = await offload(process_of, 0)
        args = (threading.Lock(), SECRET) if call is double else ()
        with pytest.raises(OffloadError, match=words) as caught:
            await offload(call, *args)
        assert SECRET not in str(caught.value)
        assert await offload(process_of, 0) == pid


async def test_the_pool_is_bounded() -> None:
    """However many call at once."""
    async with Offloader(2):
        assert len(set(await asyncio.gather(*(offload(process_of, number) for number in range(8))))) == 2


def test_one_core_is_left_to_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless there is only one."""
    for cores, processes in ((8, 7), (2, 1), (1, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid, cores=cores: set(range(cores)))
        assert Offloader().processes == processes


async def test_callers_have_their_turns_in_order(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    async with Offloader(1):
        async with asyncio.TaskGroup() as group:
            for number in range(20):
                group.create_task(offload(append_line, file, str(number)))
    assert file.read_text().split() == [str(number) for number in range(20)]


async def test_the_loop_is_free_while_a_function_computes(tmp_path: Path) -> None:
    """The function ends when the loop has turned a hundred times."""
    enough = tmp_path / "enough"
    async with Offloader(1):
        call = asyncio.create_task(offload(tell_and_wait, tmp_path / "told", enough))
        await told_by(tmp_path / "told")
        for _ in range(100):
            await asyncio.sleep(0)
        assert not call.done()
        enough.touch()
        assert await call != os.getpid()


async def test_cancelling_kills_the_process(tmp_path: Path) -> None:
    """And the next call has another one."""
    async with Offloader(1):
        call = asyncio.create_task(offload(tell_and_wait, tmp_path / "told", tmp_path / "never"))
        pid = await told_by(tmp_path / "told")
        waiting = asyncio.create_task(offload(process_of, 0))
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await waiting != pid
        await until(partial(is_gone, pid))


async def test_cancelling_one_that_waits_harms_nobody(tmp_path: Path) -> None:
    """It has no process yet."""
    async with Offloader(1):
        call = asyncio.create_task(offload(tell_and_wait, tmp_path / "told", tmp_path / "enough"))
        pid = await told_by(tmp_path / "told")
        waiting = asyncio.create_task(offload(process_of, 0))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        (tmp_path / "enough").touch()
        assert await call == pid
        assert await offload(process_of, 0) == pid


@pytest.mark.parametrize("turns", [0, 1, 2, 10, 100])
async def test_cancelling_while_the_process_starts_leaves_none(turns: int, tmp_path: Path) -> None:
    """At whichever moment."""
    async with Offloader(1):
        call = asyncio.create_task(offload(tell_and_wait, tmp_path / "told", tmp_path / "never"))
        for _ in range(turns):
            await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: multiprocessing.active_children() == [])
        assert await offload(double, "a") == "aa"
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    "end",
    [partial(os._exit, 3), partial(sys.exit, 3), partial(signal.raise_signal, signal.SIGKILL)],
    ids=["_exit", "exit", "kill"],
)
async def test_a_process_that_ends_is_replaced(end: Callable[[], object]) -> None:
    """Whoever called is told so."""
    async with Offloader(1):
        pid = await offload(process_of, 0)
        with pytest.raises(WorkerDied) as caught:
            await offload(end)
        assert isinstance(caught.value, ServerError)
        assert caught.value.code == "worker_died"
        assert await offload(process_of, 0) != pid


async def test_a_process_that_is_killed_is_replaced(tmp_path: Path) -> None:
    """While it computes."""
    async with Offloader(1):
        call = asyncio.create_task(offload(tell_and_wait, tmp_path / "told", tmp_path / "never"))
        pid = await told_by(tmp_path / "told")
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerDied):
            await call
        assert await offload(process_of, 0) != pid


async def test_a_process_that_is_killed_while_idle_fails_nobody() -> None:
    """The next call has another one."""
    async with Offloader(1):
        pid = await offload(process_of, 0)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: multiprocessing.active_children() == [])
        assert await offload(process_of, 0) != pid


async def test_the_servers_signals_end_no_process() -> None:
    """A terminal or a service manager sends them to all processes; whether one is needed the server says."""
    async with Offloader(1):
        pid = await offload(process_of, 0)
        assert await offload(survive, signal.SIGINT, signal.SIGTERM) == pid


async def test_processes_give_way() -> None:
    """To the server, where both want one core."""
    async with Offloader(1):
        assert await offload(os.nice, 0) == min(19, os.nice(0) + NICE)


async def test_closing_leaves_no_process(tmp_path: Path) -> None:
    """Neither idle nor busy; and nobody waits for ever."""
    async with Offloader(2) as offloader:
        pids = set(await asyncio.gather(*(offload(process_of, number) for number in range(4))))
        told = tmp_path / "told"
        call = asyncio.create_task(offload(tell_and_wait, told, tmp_path / "never"))
        await told_by(told)
    with pytest.raises(WorkerDied):
        await call
    assert len(pids) == 2
    assert all(map(is_gone, pids))
    with pytest.raises(WorkerDied):
        await offloader.run(double, "a")


async def test_whoever_waits_when_the_pool_is_closed_is_told(tmp_path: Path) -> None:
    async with Offloader(1):
        calls = [
            asyncio.create_task(offload(tell_and_wait, tmp_path / f"told{number}", tmp_path / "never"))
            for number in range(3)
        ]
        await told_by(tmp_path / "told0")
    assert [type(found) for found in await asyncio.gather(*calls, return_exceptions=True)] == [WorkerDied] * 3


async def test_the_pool_that_was_opened_last_is_used() -> None:
    async with Offloader(1) as outer:
        pid = await outer.run(process_of, 0)
        async with Offloader(1) as inner:
            assert await offload(process_of, 0) == await inner.run(process_of, 0) != pid
        assert await offload(process_of, 0) == pid


def test_a_pool_that_nobody_has_opened_ends_with_the_loop() -> None:
    async def twice() -> set[int]:
        return {await offload(process_of, 0), await offload(process_of, 0)}

    [pid] = asyncio.run(twice())
    assert is_gone(pid)


def test_a_process_ends_with_its_server(tmp_path: Path) -> None:
    """However busy it is, and however the server ended."""
    told, enough = tmp_path / "told", tmp_path / "enough"
    program = f"""
import asyncio
from pathlib import Path
from realtime.offload import offload
from tests.test_offload import tell_and_wait
asyncio.run(offload(tell_and_wait, Path({str(told)!r}), Path({str(enough)!r})))
"""
    with subprocess.Popen([sys.executable, "-c", program]) as server:
        try:
            wait_for(told.exists)
        finally:
            server.kill()
    try:
        wait_for(partial(is_gone, int(told.read_text())))
    finally:
        enough.touch()


def test_a_program_that_ends_does_not_wait(tmp_path: Path) -> None:
    """Also one that has closed nothing."""
    program = """
import asyncio
from realtime.offload import Offloader
from tests.test_offload import process_of
loop = asyncio.new_event_loop()
offloader = Offloader(1)
print(loop.run_until_complete(offloader.run(process_of, 0)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    wait_for(partial(is_gone, int(done.stdout)))


def wait_for(condition: Callable[[], bool]) -> None:
    """The same without a loop."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def refuses(code: str) -> None:
    raise InvalidRequest(code, "No.", param="input.x")


async def test_a_typed_error_comes_out_as_it_is() -> None:
    """With everything that clients are told of it."""
    async with Offloader(1) as pool:
        with pytest.raises(InvalidRequest) as refusal:
            await pool.run(refuses, "bad")
    assert (refusal.value.code, refusal.value.message, refusal.value.param) == ("bad", "No.", "input.x")
    assert any("refuses" in place for place in places(refusal.value))
