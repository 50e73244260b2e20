"""What a client knows of its session: the fold of the messages that it has applied. No I/O."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from realtime.client.events import Fields, channel_of
from realtime.protocol import SESSION_CHANNEL

History = Literal["all", "none"]


class Answer(Struct, kw_only=True):
    """An answer so far. Of one that is voiced the listener has heard `heard_chars`, in UTF-16 code units."""

    id: str
    status: str = "in_progress"
    text: str = ""
    reasoning: str = ""
    heard_chars: int | None = None


class Task(Struct, kw_only=True):
    """A background task so far; what it has and tells is of its newest attempt. `text` is what it has written."""

    id: str
    name: str = ""
    status: str = "running"
    attempt: int = 1
    progress: float | None = None
    total: float | None = None
    message: str | None = None
    text: str = ""
    result: Any = None
    result_url: str | None = None
    error: Fields | None = None

    def begin(self, attempt: int) -> None:
        """What earlier attempts told is void."""
        self.attempt = attempt
        self.progress = self.total = self.message = None
        self.text = ""


class State:
    """`positions` are those of the session and of every channel that has not ended; the rest is by id."""

    def __init__(self, session_id: str | None, history: History) -> None:
        self.session_id = session_id
        self.positions: dict[str, int] = {}
        self.responses: dict[str, Answer] = {}
        self.tasks: dict[str, Task] = {}
        self.participants: dict[str, Fields] = {}
        self._history = history

    def resumption(self) -> dict[str, str]:
        """The query parameters that say where to go on, without the session."""
        if self.positions:
            return {"after": ",".join(f"{channel}:{position}" for channel, position in self.positions.items())}
        return {"history": self._history} if self._history != "all" else {}

    def advance(self, event: Fields) -> bool:
        """Move the position of the message's channel; `False` where messages are missing."""
        if "seq" not in event:
            return True
        channel = channel_of(event)
        if event.get("reset"):
            self._reset(channel)
        if event["seq"] - event.get("merged", 1) != self.positions.get(channel, 0):
            return False
        self.positions[channel] = event["seq"]
        return True

    def fold(self, event: Fields) -> None:
        """Take a message in; of kinds that it does not know, nothing."""
        match event["type"]:
            case "session.created" | "session.resumed":
                self._attached(event)
            case "participant.joined":
                self.participants[event["participant"]["connection_id"]] = event["participant"]
            case "participant.left":
                self.participants.pop(event["participant"]["connection_id"], None)
            case str(kind) if kind.startswith("response."):
                self._fold_response(event)
            case str(kind) if kind.startswith("task."):
                self._fold_task(event)
            case _:
                pass

    def _fold_response(self, event: Fields) -> None:
        match event["type"]:
            case "response.created":
                self.positions.setdefault(event["response"]["id"], 0)
                self._answer(event["response"]["id"]).status = event["response"]["status"]
            case "response.in_progress":
                self._answer(event["response_id"]).status = "in_progress"
            case "response.output_text.delta":
                self._answer(event["response_id"]).text += event["delta"]
            case "response.reasoning.delta":
                self._answer(event["response_id"]).reasoning += event["delta"]
            case "response.done":
                self._answer(event["response_id"]).status = event["status"]
                self.positions.pop(event["response_id"], None)  # nothing comes after it: no need to name it
            case _:
                pass

    def _fold_task(self, event: Fields) -> None:
        task = self._task(event["task"]["id"] if event["type"] == "task.created" else event["task_id"])
        match event["type"]:
            case "task.created":
                self.positions.setdefault(task.id, 0)
                task.name, task.status = event["task"]["name"], event["task"]["status"]
            case "task.started":
                task.begin(event["attempt"])
                task.status = "running"
            case "task.progress":
                task.progress, task.total, task.message = event["progress"], event["total"], event["message"]
            case "task.output_text.delta":
                task.text += event["delta"]
            case "task.done":
                task.status = event["status"]
                task.result, task.result_url = event.get("result"), event.get("result_url")
                task.error = event.get("error")
                self.positions.pop(task.id, None)
            case _:
                pass

    def _attached(self, first: Fields) -> None:
        self.session_id = first["session"]["id"]
        self.participants = {one["connection_id"]: one for one in first["participants"]}
        if self.positions:
            return
        if self._history == "none":
            self.positions = dict(first["positions"])
        self.positions.setdefault(SESSION_CHANNEL, 0)

    def _reset(self, channel: str) -> None:
        """What was shown of the channel was lost with its instance: it starts anew."""
        self.positions[channel] = 0
        if answer := self.responses.get(channel):
            answer.text = answer.reasoning = ""
        if task := self.tasks.get(channel):
            task.begin(task.attempt)

    def _answer(self, response_id: str) -> Answer:
        """Without the history an answer may be met in its middle."""
        return self.responses.setdefault(response_id, Answer(id=response_id))

    def _task(self, task_id: str) -> Task:
        return self.tasks.setdefault(task_id, Task(id=task_id))
