"""The guards in conftest.py catch what they are there for."""

import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from tests.conftest import pytest_collection_modifyitems

ROOT = Path(__file__).resolve().parent.parent

CASES = """
import asyncio, socket, time
from pathlib import Path
import pytest
import tests.conftest

tests.conftest.SETTLE_S = 0.2
kept = []
source = "def call(function, *arguments): return function(*arguments)"
namespace = {}
exec(compile(source, str(Path(__import__("realtime").__file__).parent / "made_up.py"), "exec"), namespace)
from_the_package = namespace["call"]


async def test_ok_task_that_ends():
    kept.append(asyncio.create_task(asyncio.sleep(0.05)))


async def test_ok_socket_closed_by_the_loop():
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    assert await reader.read() == b""
    writer.close()
    server.close()


async def test_ok_blocking_call_of_the_test():
    time.sleep(0.001)


async def test_ok_blocking_call_in_a_thread():
    await asyncio.to_thread(from_the_package, time.sleep, 0.001)


async def test_ok_printing():
    from_the_package(print, "a line")


def test_ok_without_a_loop():
    from_the_package(time.sleep, 0.001)
    asyncio.run(asyncio.sleep(0))


async def test_bad_task():
    kept.append(asyncio.create_task(asyncio.sleep(3600)))


async def test_bad_socket():
    kept.append(socket.socket())


def test_bad_socket_without_a_loop():
    kept.append(socket.socket())


def test_bad_file(tmp_path):
    kept.append((tmp_path / "a").open("w"))


async def test_bad_blocking_call():
    from_the_package(time.sleep, 0.001)


async def test_bad_blocking_call_swallowed():
    try:
        from_the_package(time.sleep, 0.001)
    except Exception:
        pass
"""


def test_guards_fail_what_leaks_or_blocks_and_nothing_else(tmp_path: Path) -> None:
    """Each case whose name says bad fails, with the reason; each that says ok passes."""
    (tmp_path / "test_cases.py").write_text(CASES)
    options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), "-p", "tests.conftest", "-v"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-p", "no:cacheprovider", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    results = [line.split() for line in run.stdout.split("short test summary")[0].splitlines() if "::" in line]
    failed = {words[0].split("::")[1] for words in results if words[1] in {"FAILED", "ERROR"}}
    seen = {words[0].split("::")[1] for words in results}
    assert len(seen) == CASES.count("def test_"), run.stdout
    assert failed == {name for name in seen if "_bad_" in name}, run.stdout
    for reason in ("a task: <Task", "open: socket:", "the loop was blocked: Blocking call to time.sleep"):
        assert reason in run.stdout


def test_a_shared_loop_is_refused() -> None:
    """A test that asks for a loop of a wider scope is not collected: its leaks could not be told apart."""
    item = mock.Mock(spec=pytest.Item, nodeid="test_x.py::test_x")
    item.get_closest_marker.return_value = pytest.mark.asyncio(loop_scope="module").mark
    with pytest.raises(pytest.UsageError, match="loop of its own"):
        pytest_collection_modifyitems([item])
