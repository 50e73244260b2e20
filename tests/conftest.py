"""What every test is held to: it leaves nothing running or open, and the package never blocks the loop."""

import asyncio
import gc
import os
import traceback
from collections.abc import AsyncIterator, Iterator
from multiprocessing import forkserver, resource_tracker
from unittest import mock

import blockbuster.blockbuster
import pytest
import structlog
from blockbuster import BlockBuster, BlockingError
from pytest_asyncio import is_async_test

import realtime
from tests.support.nursery import kept_open

SETTLE_S = 5.0
"""How long what was closed may take to be gone: a transport needs turns of the loop, a thread its time."""

POLL_S = 0.005
"""How often to look meanwhile; only what looks like a leak is waited for at all."""

MAY_BLOCK = {
    # Read once, before the first connection is served.
    "realtime/app.py": {"create_app", "lifespan"},
    # Lines for a terminal, a file or a pipe: what reads them is trusted to keep up.
    "structlog/_output.py": {"msg"},
    "logging/__init__.py": {"emit", "flush"},
}
"""Functions in whose calls the loop may be blocked, by the end of their file's path."""


gc.disable()  # while tests are collected: what that makes lives to the end


def pytest_collection_finish() -> None:
    """Collect garbage again, but for the tests themselves: hundreds of thousands of objects, walked again and again."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse tests that share a loop: what one leaves on it, another would be blamed for."""
    for item in items:
        marker = item.get_closest_marker("asyncio")
        if marker is not None and marker.kwargs.get("loop_scope", "function") != "function":
            raise pytest.UsageError(f"{item.nodeid}: each test has a loop of its own; drop loop_scope")


@pytest.fixture(autouse=True)
def leaves_logging_as_it_was() -> Iterator[None]:
    """Undo what a test says of log records: another's may be passed over for it."""
    yield
    if structlog.is_configured():
        structlog.reset_defaults()


@pytest.fixture(autouse=True)
def leaves_nothing_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test after which a task still runs, or a socket, pipe or file is still open."""
    if is_async_test(request.node):
        request.getfixturevalue("leaves_nothing_on_the_loop")
        yield
        return
    before = open_descriptors()
    yield
    if open_descriptors() - before:
        asyncio.run(settled_descriptors(before))
    refuse_leaks([], open_descriptors() - before)


@pytest.fixture
async def leaves_nothing_on_the_loop() -> AsyncIterator[None]:
    """The same from within the test's loop, which must turn for what was closed to be gone."""
    before = open_descriptors()
    yield
    leftover = await settled_tasks()
    names = [repr(task) for task in leftover]
    await cancel(leftover)
    await settled_descriptors(before)
    refuse_leaks(names, open_descriptors() - before)


@pytest.fixture(autouse=True)
def keeps_the_loop_free(request: pytest.FixtureRequest, blocking_calls: BlockBuster) -> Iterator[None]:
    """Fail an async test in which the package blocks the loop, even if it swallows the error."""
    if not is_async_test(request.node):
        yield
        return
    seen: list[str] = []

    class Recorded(BlockingError):
        def __init__(self, func: str) -> None:
            super().__init__(func)
            seen.append(f"{self}\n{''.join(traceback.format_stack(limit=12)[:-2])}")

    with mock.patch.object(blockbuster.blockbuster, "BlockingError", Recorded):
        blocking_calls.activate()
        try:
            yield
        finally:
            blocking_calls.deactivate()
    if seen:
        pytest.fail("the loop was blocked: " + "\n".join(seen), pytrace=False)


@pytest.fixture(scope="session")
def blocking_calls() -> BlockBuster:
    """What counts as blocking: only calls that come from the package, outside the functions that may."""
    found = BlockBuster(scanned_modules=realtime)
    for function in found.functions.values():
        for path, names in MAY_BLOCK.items():
            function.can_block_in(path, names)
    return found


def open_descriptors() -> set[str]:
    """Return the sockets, pipes and files that this process has open, each by what it leads to."""
    # Once a process pool or the nursery was used, these stay open for as long as the process lives.
    kept = (
        *kept_open(),
        getattr(resource_tracker._resource_tracker, "_fd", None),
        getattr(forkserver._forkserver, "_forkserver_alive_fd", None),
    )
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except OSError:  # closed since it was listed, as is the listing's own
            continue
        if int(number) not in kept and not target.startswith(("anon_inode:", "/dev/", "/proc/")):
            found.add(target)
    return found


async def settled_tasks() -> set[asyncio.Task[object]]:
    """Give the tasks that are left time to end; return those that don't."""
    leftover = asyncio.all_tasks() - {asyncio.current_task()}
    if not leftover:
        return set()
    _, pending = await asyncio.wait(leftover, timeout=SETTLE_S)
    return pending


async def settled_descriptors(before: set[str]) -> None:
    """Return once nothing is open that wasn't before, or after a while."""
    loop = asyncio.get_running_loop()
    until = loop.time() + SETTLE_S
    while open_descriptors() - before and loop.time() < until:  # noqa: ASYNC110  # no event tells of a close
        await asyncio.sleep(POLL_S)


async def cancel(tasks: set[asyncio.Task[object]]) -> None:
    """Cancel the tasks and wait for them, so that a leaked task's sockets aren't reported as well."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=SETTLE_S)


def refuse_leaks(tasks: list[str], descriptors: set[str]) -> None:
    """Fail the test if anything is left."""
    left = [f"a task: {task}" for task in sorted(tasks)] + [f"open: {target}" for target in sorted(descriptors)]
    if left:
        pytest.fail("the test left behind\n  " + "\n  ".join(left), pytrace=False)
