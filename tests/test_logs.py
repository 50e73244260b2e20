"""Log records hold no content, whatever a library hands over."""

from __future__ import annotations

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
