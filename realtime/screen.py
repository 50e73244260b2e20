"""What the terminal client shows of a session: what to write for each of its messages."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from typing import Any

import msgspec

from realtime.client import Event
from realtime.printing import Paper
from realtime.protocol import (
    ErrorMessage,
    ItemCreated,
    OutputTextDelta,
    ResponseDone,
    SessionCreated,
    SessionResumed,
    TaskCreated,
    TaskDone,
    TaskProgress,
)

PROGRESS_CHARS = 76
"""The longest progress line: one that wraps could not be written over."""
JOINERS = frozenset(
    "\u200c\u200d"  # join and part letters, and emoji
    "\u061c\u200e\u200f"  # a direction's mark, which turns nothing but its neighbours
    "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"  # signs around numbers
) | frozenset(map(chr, (*range(0x13430, 0x13440), *range(0xE0020, 0xE0080))))  # hieroglyphs; flags of regions
"""Format characters that writing needs. Those that turn the direction of what follows are none of them."""


class Screen:
    """Shows a session on paper."""

    def __init__(self, paper: Paper) -> None:
        self._paper = paper
        self._session_id: str | None = None
        self._names: dict[str, str] = {}
        """What the tasks are called that have not ended."""

    def show(self, event: Event) -> None:
        """Write what a message shows. Raises `OSError`."""
        match event:
            case SessionCreated() | SessionResumed() if self._session_id is None:
                self._session_id = event.session.id
                self.note(f"session {self._session_id}; Ctrl-C stops an answer, Ctrl-D leaves")
            case ItemCreated():
                self._paper.line(printable(f"{event.item.user}> {event.item.content}"))
            case OutputTextDelta():
                if event.reset:
                    self._paper.restart()
                self._paper.text(printable(event.delta))
            case ResponseDone():
                self._paper.end(printable(_shortfall(event)))
            case TaskCreated():
                self._names[event.task.id] = event.task.name
            case TaskProgress():
                self._progress(event)
            case TaskDone():
                self._result(event)
            case ErrorMessage():
                self.note(event.error.message)
            case _:
                pass

    def note(self, text: str) -> None:
        """Write a remark on what happens. Raises `OSError`."""
        self._paper.note(printable(text))

    def _progress(self, event: TaskProgress) -> None:
        far = f"{event.progress}" if event.total is None else f"{event.progress}/{event.total}"
        told = " ".join([self._names.get(event.task_id, "task"), far, *(event.message or "").split()])
        self._paper.progress(printable(told)[:PROGRESS_CHARS])

    def _result(self, done: TaskDone) -> None:
        end = f"{self._names.pop(done.task_id, 'task')} {done.status}"
        self.note(end if done.error is None else f"{end}: {done.error.message}")
        if done.result is not msgspec.UNSET:
            self._paper.line(printable("\n".join(_readable(done.result))))
        if done.result_url is not None:
            self._paper.line(printable(done.result_url))


def _shortfall(done: ResponseDone) -> str:
    """Why an answer is not whole."""
    if done.error is not None:
        return done.error.message
    return "" if done.status == "completed" else done.status


def _readable(value: Any) -> Iterator[str]:
    """The lines of a result: its texts as they are, the rest as JSON."""
    match value:
        case str():
            yield from value.splitlines() or [""]
        case dict():
            for name, one in value.items():
                yield from _named(f"{name}:", one)
        case list():
            for one in value:
                yield from _named("-", one)
        case _:
            yield msgspec.json.encode(value).decode()


def _named(name: str, value: Any) -> Iterator[str]:
    """A part of a result: behind its name where it is short, else below it."""
    lines = list(_readable(value))
    if len(lines) == 1 and not isinstance(value, dict | list):
        yield f"{name} {lines[0]}"
        return
    yield name
    yield from (f"  {line}" for line in lines)


def printable(text: str) -> str:
    """Text without what steers the terminal, or turns the direction of what follows: a model's words must not."""
    return "".join(char for char in text if char in "\n\t" or char in JOINERS or _is_shown(char))


def _is_shown(char: str) -> bool:
    return unicodedata.category(char) not in {"Cc", "Cf"}
