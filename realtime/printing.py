"""Where the terminal client writes: a terminal, or a pipe, which gets what was said and no remarks on it."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Literal, Protocol, TextIO

CLEAR = "\r\x1b[K"
"""Goes back to the start of the line, and empties it."""


class Paper(Protocol):
    """What can be written. Raises `OSError` where nobody takes it."""

    def text(self, text: str) -> None:
        """A piece of an answer, behind the one before."""

    def restart(self) -> None:
        """What was written of an answer is void."""

    def end(self, note: str = "") -> None:
        """The answer has ended; the note says why it is not whole."""

    def line(self, text: str) -> None:
        """What begins on a line of its own, and ends it."""

    def note(self, text: str) -> None:
        """A remark on what happens."""

    def progress(self, text: str) -> None:
        """A remark that the next one replaces. Not in the middle of an answer."""


class TerminalPaper:
    """For a person: all in one place. Knows what stands on the line that has not ended."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._open: Literal["", "text", "progress"] = ""

    def text(self, text: str) -> None:
        """See `Paper`."""
        self._write(CLEAR if self._open == "progress" else "", text, then="text")

    def restart(self) -> None:
        """See `Paper`."""
        if self._open == "text":
            self.end("a part of this was lost; the answer once more:")

    def end(self, note: str = "") -> None:
        """See `Paper`."""
        self._write(CLEAR if self._open == "progress" else "", f" [{note}]\n" if note else "\n")

    def line(self, text: str) -> None:
        """See `Paper`."""
        self._write({"": "", "progress": CLEAR, "text": "\n"}[self._open], f"{text}\n")

    def note(self, text: str) -> None:
        """See `Paper`."""
        self.line(f"[{text}]")

    def progress(self, text: str) -> None:
        """See `Paper`."""
        if self._open != "text":
            self._write(CLEAR, f"[{text}]", then="progress")

    def _write(self, *texts: str, then: Literal["", "text", "progress"] = "") -> None:
        self._open = then
        _write(self._out, "".join(texts))


class PipePaper:
    """For a program, or a file: remarks go to another place, and progress nowhere."""

    def __init__(self, out: TextIO, notes: TextIO) -> None:
        self._out = out
        self._notes = notes
        self._in_text = False

    def text(self, text: str) -> None:
        """See `Paper`."""
        self._in_text = True
        _write(self._out, text)

    def restart(self) -> None:
        """See `Paper`."""
        if self._in_text:
            self.end("a part of the answer was lost; it comes once more")

    def end(self, note: str = "") -> None:
        """See `Paper`."""
        self._finish()
        if note:
            self.note(note)

    def line(self, text: str) -> None:
        """See `Paper`."""
        self._finish()
        _write(self._out, f"{text}\n")

    def note(self, text: str) -> None:
        """See `Paper`."""
        _write(self._notes, f"[{text}]\n")

    def progress(self, text: str) -> None:
        """See `Paper`."""

    def _finish(self) -> None:
        if self._in_text:
            _write(self._out, "\n")
        self._in_text = False


def _write(file: TextIO, text: str) -> None:
    file.write(text)
    file.flush()


def standard_paper() -> Paper:
    """What standard output is."""
    return TerminalPaper(sys.stdout) if sys.stdout.isatty() else PipePaper(sys.stdout, sys.stderr)


def prepare_streams() -> None:
    """Make the standard streams such that they can be used: what is closed is empty, or takes all; what can't be
    encoded is replaced."""
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def last_words(text: str) -> None:
    """Say why it ends, if anybody listens."""
    with suppress(OSError):
        _write(sys.stderr, f"{text}\n")


def discard_output() -> None:
    """What could not be written is not tried again when the process ends."""
    with open(os.devnull, "w") as nowhere:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere.fileno(), stream.fileno())
