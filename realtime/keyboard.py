"""What is typed: lines of standard input, and Ctrl-C."""

from __future__ import annotations

import asyncio
import codecs
import os
import signal
import sys
import threading

INTERRUPT = "\x03"
"""A Ctrl-C among the lines."""


class Keyboard:
    """Lines from standard input, and Ctrl-C, in the order in which they came. To be used by `with`, in a loop."""

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
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        rest = ""
        while data := os.read(sys.stdin.fileno(), 65536):
            *lines, rest = (rest + decode(data)).split("\n")
            for line in lines:
                self._put(line)
        if rest:
            self._put(rest)
        self._put(None)

    def _put(self, line: str | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._lines.put_nowait, line)
        except RuntimeError:  # the loop has ended: nobody reads any more
            return
