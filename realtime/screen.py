"""What the terminal client shows of a session: text for each of its messages."""

from __future__ import annotations

import unicodedata
from typing import Literal

import msgspec

from realtime.client import Event
from realtime.protocol import (
    ErrorMessage,
    ItemCreated,
    OutputTextDelta,
    ResponseDone,
    SessionClosed,
    SessionCreated,
    SessionResumed,
    TaskCreated,
    TaskDone,
    TaskProgress,
)

PROGRESS_CHARS = 78
"""The longest progress line: one that wraps could not be written over."""
CLEAR = "\r\x1b[K"
"""Goes back to the start of the line, and empties it."""


class Screen:
    """Knows what stands on the line that has not ended, and writes nothing itself.

    Where it `shows_progress`, it is a terminal, in which the line that says how far a task is can be written over.
    """

    def __init__(self, *, shows_progress: bool = False) -> None:
        self._shows_progress = shows_progress
        self._session_id: str | None = None
        self._names: dict[str, str] = {}
        """What the tasks are called that have not ended."""
        self._open: Literal["", "text", "progress"] = ""

    def shown(self, event: Event) -> str:
        """What a message shows."""
        match event:
            case SessionCreated() | SessionResumed() if self._session_id is None:
                self._session_id = event.session.id
                return self.line(f"[session {self._session_id}; Ctrl-C stops an answer, Ctrl-D leaves]")
            case ItemCreated(replay=True):
                return self.line(f"{event.item.user}> {event.item.content}")
            case OutputTextDelta():
                return self._text(event)
            case ResponseDone():
                return self.line(_end_of(event), fresh=False)
            case TaskCreated():
                self._names[event.task.id] = event.task.name
            case TaskProgress():
                return self._progress(event)
            case TaskDone():
                return self.line(_result_of(self._names.pop(event.task_id, "task"), event))
            case ErrorMessage():
                return self.line(f"[{event.error.message}]")
            case SessionClosed():
                return self.line(f"[the session was {event.reason}]")
            case _:
                pass
        return ""

    def line(self, text: str, *, fresh: bool = True) -> str:
        """A whole line, which begins anew where it is `fresh`."""
        start = {"": "", "progress": CLEAR, "text": "\n" if fresh else ""}[self._open]
        self._open = ""
        return f"{start}{_printable(text)}\n"

    def _text(self, event: OutputTextDelta) -> str:
        start = CLEAR if self._open == "progress" else ""
        if event.reset and self._open == "text":
            start = self.line(" [a part of this was lost; the answer once more:]", fresh=False)
        self._open = "text"
        return start + _printable(event.delta)

    def _progress(self, event: TaskProgress) -> str:
        """How far a task is, in one line over the one before; not in the middle of an answer."""
        if not self._shows_progress or self._open == "text":
            return ""
        far = f"{event.progress}" if event.total is None else f"{event.progress}/{event.total}"
        told = " ".join([self._names.get(event.task_id, "task"), far, *(event.message or "").split()])
        self._open = "progress"
        return f"{CLEAR}[{_printable(told)[:PROGRESS_CHARS]}]"


def _end_of(done: ResponseDone) -> str:
    if done.error is not None:
        return f" [{done.error.message}]"
    return "" if done.status == "completed" else f" [{done.status}]"


def _result_of(name: str, done: TaskDone) -> str:
    end = f"[{name} {done.status}]"
    if done.error is not None:
        end += f" [{done.error.message}]"
    if done.result is not msgspec.UNSET:
        end += f"\n{msgspec.json.format(msgspec.json.encode(done.result)).decode()}"
    if done.result_url is not None:
        end += f" {done.result_url}"
    return end


def _printable(text: str) -> str:
    """Text without control characters: a model's words must not steer the terminal."""
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")
