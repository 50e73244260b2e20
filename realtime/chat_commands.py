"""What a line means that is typed into the terminal client."""

from __future__ import annotations

from typing import Any

import msgspec

from realtime.client import Event, ResponseStream, Session, TaskStream
from realtime.protocol import ErrorMessage, ItemCreated

GRACE_MS = 15_000
"""How long an answer waits for this client to come back from a lost connection."""
HELP = "/task NAME {…} starts a task, /cancel stops it; a line that begins with // says one that begins with /"


class NotACommand(ValueError):
    """A line that begins with a slash and means nothing; the text says what would, for a person."""


class Chat:
    """What was typed, as commands, and what of it there is to stop."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._answer: ResponseStream | None = None
        """The newest answer that was asked for here, unless that was refused."""
        self._task: TaskStream | None = None
        """The same of a task."""
        self._stopped: str | None = None
        self._said: set[str] = set()
        """The `event_id`s of what was said here."""
        self._unanswered: dict[str, str] = {}
        """The lines that the server has not answered to, by `event_id`."""

    @property
    def unanswered(self) -> list[str]:
        """The lines of which is not known that the server has them."""
        return list(self._unanswered.values())

    def typed(self, line: str) -> ResponseStream | TaskStream | None:
        """Do what a line means: `/task NAME {…}`, `/cancel`, or something to say. Returns what will come of it. Raises
        `NotACommand`, `QueueFull`, `MessageTooLarge` and `SessionClosed`."""
        match line.split(maxsplit=2):
            case ["/task", name, *rest]:
                coming: ResponseStream | TaskStream = self._start(name, "".join(rest) or "{}")
            case ["/cancel"]:
                if not self.cancel_task():
                    raise NotACommand("there is no task to cancel")
                return None
            case [word, *_] if word.startswith("//"):
                coming = self._say(line.replace("/", "", 1))
            case [word, *_] if word.startswith("/"):
                raise NotACommand(HELP)
            case _:
                coming = self._say(line)
        self._unanswered[coming.event_id] = line
        return coming

    def stop(self) -> bool:
        """Stop the answer that is coming or was asked for; `False` if there is none, or it was told to already, or the
        server can't be told."""
        coming = self._coming()
        if coming is None or coming == self._stopped or self._session.state != "open":
            return False
        self._stopped = coming
        self._session.cancel(coming)
        return True

    def leave(self) -> None:
        """Stop the answer that was asked for here, of which nobody will see more. A task goes on: its end can be seen
        when the session is gone on with."""
        if self._answer is not None and self._answer.response_id != self._stopped and self._session.state == "open":
            self._answer.cancel()

    def cancel_task(self) -> bool:
        """Stop the task that was started last; `False` if it has ended, or the server can't be told."""
        if self._task is None or self._has_ended(self._task) or self._session.state == "closed":
            return False
        self._task.cancel()
        return True

    def heed(self, event: Event) -> None:
        """Take a message in: what was typed may have come to be, or to nothing."""
        refused = event.error.event_id if isinstance(event, ErrorMessage) else None
        self._unanswered.pop(refused or getattr(event, "for_event_id", None) or "", None)
        if self._answer is not None and self._answer.event_id == refused:
            self._answer = None
        if self._task is not None and self._task.event_id == refused:
            self._task = None

    def shows(self, event: Event) -> bool:
        """Whether the screen lacks it: what was typed here stands there, also where a replay tells it."""
        return not (isinstance(event, ItemCreated) and event.for_event_id in self._said)

    def _say(self, text: str) -> ResponseStream:
        self._answer = self._session.respond(text, multitask_strategy="interrupt", disconnect_grace_ms=GRACE_MS)
        self._said.add(self._answer.event_id)
        return self._answer

    def _start(self, name: str, text: str) -> TaskStream:
        self._task = self._session.create_task(name, _input(text))
        return self._task

    def _coming(self) -> str | None:
        if self._answer is not None and self._answer.response_id not in self._session.responses:
            return self._answer.response_id
        unfinished = self._session.unfinished
        return unfinished[-1].id if unfinished else None

    def _has_ended(self, task: TaskStream) -> bool:
        return task.task_id in self._session.tasks and task.task_id not in self._session.positions


def _input(text: str) -> Any:
    """A task's input. What is no JSON is its input as it is: the server says what is wrong."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text
