"""Log records hold no content, whatever a library hands over."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Iterator

import pytest

from realtime.observe import logs

CANARY = "canary-5c1e"


@pytest.fixture
def restored() -> Iterator[None]:
    """The root logger as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_librarys_exception_is_logged_without_its_text(
    log_format: str, restored: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its kind and its places are there, in one line; what it says may be what a user said."""
    logs.configure(log_format, "info")
    try:
        raise ValueError(CANARY)
    except ValueError:
        logging.getLogger("uvicorn.error").exception("it failed")
    written = capsys.readouterr().err
    assert "ValueError" in written
    assert "test_logs.py" in written
    assert CANARY not in written


@pytest.mark.parametrize("log_format", ["json", "console"])
async def test_what_nobody_asked_for_is_logged_without_its_text(
    log_format: str, restored: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """asyncio tells of a task whose exception is lost, and of a callback that fails, with all that they hold."""
    logs.configure(log_format, "debug")

    async def fail(text: str) -> None:
        raise ValueError(text)

    def fall(text: str) -> None:
        raise ValueError(text)

    lost = asyncio.create_task(fail(CANARY))
    asyncio.get_running_loop().call_soon(fall, CANARY)
    await asyncio.wait([lost])
    del lost
    gc.collect()
    written = capsys.readouterr().err
    assert "Task exception was never retrieved" in written
    assert "Exception in callback" in written
    assert written.count("ValueError") == 2
    assert len(written.splitlines()) == 2
    assert CANARY not in written


async def test_a_slow_callback_is_logged_without_what_it_was_called_with(
    restored: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """asyncio's debug mode tells of it with its arguments."""
    logs.configure("json", "debug")
    loop, called = asyncio.get_running_loop(), asyncio.Event()
    loop.set_debug(True)
    loop.slow_callback_duration = 0.0
    try:
        loop.call_soon(lambda _text: called.set(), CANARY)
        await called.wait()
        await asyncio.sleep(0)
    finally:
        loop.set_debug(False)
    written = capsys.readouterr().err
    assert "Executing <" in written
    assert CANARY not in written


@pytest.mark.parametrize("name", ["asyncio", "uvicorn.error", "websockets.server", "httpx", "httpcore", "redis", "saq"])
def test_the_least_that_is_logged_does_not_open_the_libraries(
    name: str, restored: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """What they tell of at lower levels than warnings are frames, requests, and commands."""
    logs.configure("json", "debug")
    logging.getLogger(name).info(CANARY)
    logging.getLogger(name).debug(CANARY)
    assert capsys.readouterr().err == ""
    logging.getLogger("realtime").debug("ours")
    assert "ours" in capsys.readouterr().err
