"""What is typed: lines of standard input, and Ctrl-C."""

from __future__ import annotations

import asyncio
import codecs
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator

INTERRUPT = "\x03"
"""A Ctrl-C among the lines."""
PASTE_S = 0.03
"""Lines of a terminal that come so close to one another were pasted."""


class Keyboard:
    """Lines from standard input, and Ctrl-C, in the order in which they came. To be used by `with`, in a loop.

    What is pasted into a terminal is one of them, however many lines it has.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lines: asyncio.Queue[str | None] = asyncio.Queue()

    def __enter__(self) -> Keyboard:
        if sys.stdin.isatty():  # else Ctrl-C ends the script
            self._loop.add_signal_handler(signal.SIGINT, self._lines.put_nowait, INTERRUPT)
        # A daemon that reads the descriptor itself: it can't be cancelled, and must not hold sys.stdin's lock at exit.
        threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.remove_signal_handler(signal.SIGINT)

    async def line(self) -> str | None:
        """The next line that is not empty, `INTERRUPT` for a Ctrl-C, `None` at the end of the input."""
        while (line := await self._lines.get()) is not None and not line.strip():
            pass
        return line

    def _read(self) -> None:
        file = sys.stdin.fileno()
        for line in _messages(file) if os.isatty(file) else _lines(file):
            self._put(line)
        self._put(None)

    def _put(self, line: str | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._lines.put_nowait, line)
        except RuntimeError:  # the loop has ended: nobody reads any more
            return


def _lines(file: int) -> Iterator[str]:
    rest = ""
    for text in _texts(file):
        *lines, rest = (rest + text).split("\n")
        yield from lines
    yield rest


def _messages(terminal: int) -> Iterator[str]:
    """Lines of a terminal, which gives one at a time; those that were pasted together stay so."""
    message = ""
    for text in _texts(terminal):
        message += text
        if text.endswith("\n") and not select.select([terminal], [], [], PASTE_S)[0]:
            yield message.strip("\n")
            message = ""
    yield message.strip("\n")


def _texts(file: int) -> Iterator[str]:
    """What can be read, until the end, or until it can't be read any more."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    try:
        while data := os.read(file, 65536):
            yield decode(data)
    except OSError:  # a terminal that has hung up
        return
