"""A task's log as the store has it, checked."""

from __future__ import annotations

import msgspec

from realtime.log import Deltas, Entry, length
from realtime.protocol import MAX_FRAME_CHARS, TaskDone, TaskOutputTextDelta, TaskProgress, TaskStarted
from realtime.store.base import Store
from tests.support.sample_tasks import Outcome


class TaskLog:
    """A task's channel, from its start. Applying an entry checks that attempts are numbered without gaps, that none
    speaks after the next has begun, that progress never goes backwards within one, and that nothing follows the end.
    """

    def __init__(self) -> None:
        self.position = 0
        self.attempts = 0
        self.instances: list[str | None] = []
        """Who has claimed each attempt."""
        self.progress: float | None = None
        """What the last attempt has told last."""
        self.text = ""
        """What the last attempt has written."""
        self.done: TaskDone | None = None

    def apply(self, entry: Entry) -> None:
        """Take the next entry."""
        assert self.done is None, "an entry after the end"
        self.position += length(entry)
        match entry:
            case TaskStarted(attempt=attempt, instance=instance):
                assert attempt == self.attempts + 1, "an attempt is missing, or told twice"
                self.attempts, self.progress, self.text = attempt, None, ""
                self.instances.append(instance)
            case TaskProgress(attempt=attempt, progress=progress):
                assert attempt == self.attempts, "an attempt that is over makes progress"
                assert self.progress is None or progress >= self.progress, "progress goes backwards"
                self.progress = progress
            case Deltas(template=TaskOutputTextDelta(attempt=attempt), texts=texts):
                assert attempt == self.attempts, "an attempt that is over writes"
                self.text += "".join(texts)
            case TaskDone():
                self.done = entry
            case _:
                raise AssertionError(f"what has no place in a task's log: {entry}")

    @property
    def outcome(self) -> Outcome:
        """What has come of it."""
        assert self.done is not None
        result = msgspec.json.decode(self.done.result_json) if self.done.result_json else None
        return Outcome(self.done.status, result, self.text, self.done.error.code if self.done.error else None)


async def read_log(store: Store, session_id: str, task_id: str) -> TaskLog:
    """A task's log; it has to be as long as the store says that it is at least, and without gaps."""
    head = (await store.load(session_id)).heads.get(task_id)
    log = TaskLog()
    while entries := await store.read(session_id, task_id, log.position, MAX_FRAME_CHARS):
        for entry in entries:
            log.apply(entry)
    if head is not None:
        assert log.position >= head.position, "the log has a gap"
        assert log.position == head.position or not head.finished, "entries after the end"
        assert log.done is not None or not head.finished
    return log
