"""Runs plain functions in other processes, so that the event loop stays free however long they compute.

A thread would not do: it takes the interpreter's lock from the loop for milliseconds at a time. Each process serves one
call at a time, through a pipe, and a thread waits for its answer. Whatever ends a call early kills its process; the
next call starts another one.
"""

from __future__ import annotations

import asyncio
import atexit
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, Self, TypeVar, TypeVarTuple
from weakref import WeakKeyDictionary

from realtime.errors import ServerError

NICE = 5
"""How much the processes give way to the server, and to others, where all want the same core."""
MAX_PLACES = 20

Args = TypeVarTuple("Args")
Result = TypeVar("Result")

_spawn = multiprocessing.get_context("spawn")
_bookkeeping = threading.Lock()
"""Held by threads that start or bury a process: `multiprocessing` keeps its list of them for one thread."""


class OffloadError(TypeError):
    """A function, its arguments, its result or its exception can't go from process to process. Its text has the
    function's name, and no values."""


class WorkerDied(ServerError):
    """The process ended before the function did: it was killed, it crashed, it exited, or its pool was closed."""

    def __init__(self) -> None:
        super().__init__("worker_died", "The process that worked on it has ended.")


class Elsewhere(Exception):
    """The cause of an exception that came out of another process: where there it was raised, the innermost place
    first, as `file:line function`."""

    def __init__(self, places: tuple[str, ...]) -> None:
        super().__init__("\n".join(places))
        self.places = places


class Offloader:
    """A pool of up to `processes` processes (default: one fewer than the cores that this process may use), which start
    when they are needed. While it is open, `offload()` on this event loop uses it; closing it kills its processes."""

    def __init__(self, processes: int | None = None) -> None:
        self.processes = processes or max(1, len(os.sched_getaffinity(0)) - 1)
        self._slots = asyncio.Semaphore(self.processes)
        self._threads = ThreadPoolExecutor(self.processes, thread_name_prefix="offload")
        self._workers: set[_Worker] = set()
        self._idle: list[_Worker] = []
        self._is_closed = False
        self.lifetime: object = None
        """What keeps one open that nobody has opened: a generator, which the loop closes when it ends."""

    async def __aenter__(self) -> Self:
        _opened_here().append(self)
        return self

    async def __aexit__(self, *_: object) -> None:
        _opened_here().remove(self)
        self._is_closed = True
        for worker in self._workers:
            worker.kill()
        await asyncio.to_thread(self._bury_all)

    async def run(
        self, fn: Callable[[*Args], Result], /, *args: *Args, on_start: Callable[[], None] | None = None
    ) -> Result:
        """`fn(*args)`, computed in another process. Whoever finds all of them busy waits its turn, and has `on_start`
        called when it has come.

        Raises what the function raises, `OffloadError` for what can't be pickled, and `WorkerDied`. Cancelling kills
        the process in which the function runs.
        """
        name = getattr(fn, "__qualname__", type(fn).__qualname__)
        outcome = await self._ask(_request(name, fn, args), on_start)
        if outcome.refusal:
            raise OffloadError(f"{name} can't be offloaded: {outcome.refusal}") from Elsewhere(outcome.places)
        if outcome.error is not None:
            raise outcome.error from Elsewhere(outcome.places)
        result: Result = outcome.result
        return result

    async def _ask(self, request: bytes, on_start: Callable[[], None] | None) -> _Outcome:
        async with self._slots:
            if self._is_closed:
                raise WorkerDied
            if on_start is not None:
                on_start()
            worker = self._idle.pop() if self._idle else _Worker()
            self._workers.add(worker)
            answer = asyncio.get_running_loop().run_in_executor(self._threads, worker.ask, request)
            try:
                outcome = await asyncio.shield(answer)  # the thread has to see the process end
            except BaseException:
                worker.kill()
                answer.add_done_callback(lambda _: self._bury(worker))
                raise
            if isinstance(outcome, Exception):
                self._workers.discard(worker)
                raise WorkerDied from outcome
            self._idle.append(worker)
            return outcome

    def _bury(self, worker: _Worker) -> None:
        if not self._is_closed:
            self._workers.discard(worker)
            self._threads.submit(worker.bury)

    def _bury_all(self) -> None:
        self._threads.shutdown()
        for worker in tuple(self._workers):
            worker.bury()


_opened: WeakKeyDictionary[asyncio.AbstractEventLoop, list[Offloader]] = WeakKeyDictionary()


async def offload(fn: Callable[[*Args], Result], /, *args: *Args, on_start: Callable[[], None] | None = None) -> Result:
    """`Offloader.run()` of the pool that was opened last on this event loop, or of one that ends with the loop."""
    opened = _opened_here()
    if not opened:
        lifetime = _until_the_loop_ends()
        (await anext(lifetime)).lifetime = lifetime
    return await opened[-1].run(fn, *args, on_start=on_start)


def _opened_here() -> list[Offloader]:
    return _opened.setdefault(asyncio.get_running_loop(), [])


async def _until_the_loop_ends() -> AsyncIterator[Offloader]:
    async with Offloader() as offloader:
        yield offloader


@dataclass
class _Outcome:
    """What has become of a call: a result, an error and where it came from, or why neither can be told."""

    result: Any = None
    error: Exception | None = None
    places: tuple[str, ...] = ()
    refusal: str = ""


class _Worker:
    """One process. `ask()` and `bury()` block and are for threads, one at a time; `kill()` is for the loop."""

    def __init__(self) -> None:
        self._process: SpawnProcess | None = None
        self._pipe: Connection | None = None
        self._is_killed = False

    def ask(self, request: bytes) -> _Outcome | Exception:
        """What the process answers; it is started if it does not run. An exception if it ends instead."""
        try:
            pipe = self._started()
            pipe.send_bytes(request)
            answer = pipe.recv_bytes()
        except Exception as error:
            self.bury()
            return error
        return _read(answer)

    def kill(self) -> None:
        """Kill the process, also one that is about to start."""
        self._is_killed = True
        if (process := self._process) is not None:
            with suppress(ValueError, AttributeError):  # it is buried at this moment
                process.kill()

    def bury(self) -> None:
        """Kill the process, and leave nothing of it."""
        with _bookkeeping:
            process, pipe = self._process, self._pipe
            self._process = self._pipe = None
            if process is not None and pipe is not None:
                atexit.unregister(process.kill)
                process.kill()
                process.join()
                process.close()
                pipe.close()

    def _started(self) -> Connection:
        with _bookkeeping:
            if self._process is not None and self._pipe is not None and self._process.is_alive():
                return self._pipe
        self.bury()
        ours, theirs = _spawn.Pipe()
        process = _spawn.Process(target=_work, args=(theirs,), name="offload", daemon=True)
        with _bookkeeping, theirs:
            process.start()
        atexit.register(process.kill)  # runs before multiprocessing's own, which asks, and waits
        self._process, self._pipe = process, ours
        if self._is_killed:
            process.kill()
        return ours


def _request(name: str, fn: Callable[..., object], args: tuple[object, ...]) -> bytes:
    at_fault = "the function"
    try:
        pickle.dumps(fn)
        at_fault = "its arguments"
        return pickle.dumps((fn, args), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        raise OffloadError(f"{name} can't be offloaded: {at_fault} can't be pickled") from error


def _read(answer: bytes) -> _Outcome:
    try:
        outcome: _Outcome = pickle.loads(answer)
    except Exception as error:
        return _Outcome(refusal=f"its result or exception can't be unpickled ({type(error).__qualname__})")
    return outcome


def _work(calls: Connection) -> None:
    """What a process does all its life: one call after the other, until it is killed or its server is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the server gets them too, and may need its results to end in order
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICE)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        while True:
            calls.send_bytes(_answer(calls.recv_bytes()))
    except BaseException:  # its text may be content, and multiprocessing would print it
        os._exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _answer(request: bytes) -> bytes:
    try:
        fn, args = pickle.loads(request)
    except Exception as error:
        return pickle.dumps(_Outcome(refusal=f"it or its arguments can't be unpickled ({type(error).__qualname__})"))
    outcome = _outcome(fn, args)
    try:
        answer = pickle.dumps(outcome, pickle.HIGHEST_PROTOCOL)
        if outcome.error is not None:
            pickle.loads(answer)  # which is where many an exception with arguments of its own fails
        return answer
    except Exception:
        kind = "result" if outcome.error is None else "exception"
        value = outcome.result if outcome.error is None else outcome.error
        refusal = f"its {kind} ({type(value).__qualname__}) can't be pickled"
        return pickle.dumps(_Outcome(refusal=refusal, places=outcome.places))


def _outcome(fn: Callable[..., object], args: tuple[object, ...]) -> _Outcome:
    try:
        return _Outcome(result=fn(*args))
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[1:]
        places = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames)]
        return _Outcome(error=error, places=tuple(places[:MAX_PLACES]))
