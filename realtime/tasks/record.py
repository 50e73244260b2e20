"""A task as its log tells it: what clients read over HTTP, and what a worker goes on from."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import msgspec
from msgspec import Struct

from realtime.log import Deltas, Entry, length
from realtime.protocol import (
    MAX_FRAME_CHARS,
    SESSION_CHANNEL,
    Failure,
    TaskCreated,
    TaskDone,
    TaskEnd,
    TaskProgress,
    TaskStarted,
)
from realtime.store.base import Store, TaskRef


class TaskSnapshot(Struct, kw_only=True, frozen=True, omit_defaults=True):
    """A task as far as it has come. `output_text` is what it has written, in this attempt."""

    task_id: str
    name: str
    status: Literal["pending", "running"] | TaskEnd
    attempt: int
    created_at: str
    updated_at: str
    progress: int | float | None = None
    total: int | float | None = None
    message: str | None = None
    output_text: str | None = None
    result: Any = msgspec.UNSET
    result_url: str | None = None
    error: Failure | None = None
    response_id: str | None = None


class TaskRecord:
    """The fold of a task's own channel. `position` is where it stands; a new attempt voids what was told before."""

    __slots__ = ("attempt", "done", "instance", "lost", "position", "progress", "texts", "updated_at")

    def __init__(self) -> None:
        self.position = 0
        self.attempt = 0
        self.instance: str | None = None
        """Who has claimed the newest attempt."""
        self.lost = 0
        """How many attempts were given up with whoever had claimed them."""
        self.progress: TaskProgress | None = None
        self.texts: list[str] = []
        self.done: TaskDone | None = None
        self.updated_at: str | None = None

    def apply(self, entry: Entry) -> None:
        """Fold one entry."""
        self.position += length(entry)
        match entry:
            case Deltas(texts=texts):
                self.texts.extend(texts)
            case TaskStarted(attempt=attempt, instance=instance, at=at):
                self.lost += self.instance not in {None, instance}
                self.attempt, self.instance = attempt, instance
                self.progress, self.texts = None, []
                self.updated_at = at
            case TaskProgress(at=at):
                self.progress = entry
                self.updated_at = at
            case TaskDone(at=at):
                self.done = entry
                self.updated_at = at

    def snapshot(self, created: TaskCreated) -> TaskSnapshot:
        """What clients are told."""
        task, told = created.task, self.progress
        done = self.done.for_clients() if self.done else None
        return TaskSnapshot(
            task_id=task.id,
            name=task.name,
            status=done.status if done else ("running" if self.attempt else "pending"),
            attempt=self.attempt,
            created_at=task.created_at,
            updated_at=self.updated_at or task.created_at,
            progress=told.progress if told else None,
            total=told.total if told else None,
            message=told.message if told else None,
            output_text="".join(self.texts) or None,
            result=done.result if done else msgspec.UNSET,
            result_url=done.result_url if done else None,
            error=done.error if done else None,
            response_id=task.response_id,
        )


async def read_created(store: Store, session_id: str, position: int) -> TaskCreated:
    """The event that made a task, at its position in the session's channel; raises the store's errors."""
    [created, *_] = await store.read(session_id, SESSION_CHANNEL, position - 1, 1)
    assert isinstance(created, TaskCreated)
    return created


async def read_recorded(store: Store, session_id: str, wanted: Collection[TaskRef]) -> set[TaskRef]:
    """Those of the tasks that the session's channel tells of; raises the store's errors. It is no use of a session."""
    missing, position = set(wanted), 0
    while missing and (entries := await store.read(session_id, SESSION_CHANNEL, position, MAX_FRAME_CHARS)):
        created = [entry.task for entry in entries if isinstance(entry, TaskCreated)]
        missing.difference_update(TaskRef(session_id, task.id, task.name) for task in created)
        position += sum(map(length, entries))
    return set(wanted) - missing


async def read_record(store: Store, session_id: str, task_id: str) -> TaskRecord:
    """A task as the store has it; raises the store's errors."""
    record = TaskRecord()
    while entries := await store.read(session_id, task_id, record.position, MAX_FRAME_CHARS):
        for entry in entries:
            record.apply(entry)
    return record
