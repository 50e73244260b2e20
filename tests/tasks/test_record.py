"""A task as its log tells it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from realtime.log import Deltas, Entry
from realtime.protocol import Failure, TaskDone, TaskOutputTextDelta, TaskProgress, TaskStarted
from realtime.session import task_created
from realtime.store.base import Write
from realtime.store.memory import MemoryStore
from realtime.tasks.record import TaskRecord, read_record
from tests.contract import NOW, session

CREATED = task_created("t", "work", '{"secret": 1}', user="ann", payer=None, now=NOW, response_id="resp_1")


def started(attempt: int, instance: str = "inst_1") -> TaskStarted:
    """An attempt begins."""
    return TaskStarted(task_id="t", attempt=attempt, instance=instance, at=f"s{attempt}")


def progress(attempt: int, done: int) -> TaskProgress:
    """It is so far."""
    return TaskProgress(task_id="t", attempt=attempt, progress=done, total=10, message=f"page {done}", at=f"p{done}")


def wrote(attempt: int, *texts: str) -> Deltas:
    """It writes."""
    return Deltas(TaskOutputTextDelta(task_id="t", attempt=attempt, delta=""), list(texts))


def done(**fields: Any) -> TaskDone:
    """It ends."""
    return TaskDone(**{"task_id": "t", "status": "complete", "at": "d", **fields})


def record_of(*entries: Entry) -> TaskRecord:
    """The fold of a log."""
    record = TaskRecord()
    for entry in entries:
        record.apply(entry)
    return record


def shown(*entries: Entry) -> dict[str, Any]:
    """What a client reads of a task whose log that is."""
    found: dict[str, Any] = msgspec.to_builtins(record_of(*entries).snapshot(CREATED))
    for field, value in {"task_id": "t", "name": "work", "created_at": NOW, "response_id": "resp_1"}.items():
        assert found.pop(field) == value
    return found


CASES: dict[str, tuple[list[Entry], dict[str, Any]]] = {
    "pending": ([], {"status": "pending", "attempt": 0, "updated_at": NOW}),
    "running": ([started(1)], {"status": "running", "attempt": 1, "updated_at": "s1"}),
    "told": (
        [started(1), progress(1, 2), wrote(1, "a", "b"), progress(1, 3)],
        {
            "status": "running",
            "attempt": 1,
            "updated_at": "p3",
            "progress": 3,
            "total": 10,
            "message": "page 3",
            "output_text": "ab",
        },
    ),
    "void": (
        [started(1), progress(1, 2), wrote(1, "a"), started(2)],
        {"status": "running", "attempt": 2, "updated_at": "s2"},
    ),
    "complete": (
        [started(1), done(result_json='{"n": [1, null]}')],
        {"status": "complete", "attempt": 1, "updated_at": "d", "result": {"n": [1, None]}},
    ),
    "nothing": (
        [started(1), done(result_json="null")],
        {"status": "complete", "attempt": 1, "updated_at": "d", "result": None},
    ),
    "large": (
        [started(1), done(result_json='"x"', result_url="/there")],
        {"status": "complete", "attempt": 1, "updated_at": "d", "result_url": "/there"},
    ),
    "failed": (
        [started(1), done(status="failed", error=Failure(type="server_error", code="c", message="m"))],
        {
            "status": "failed",
            "attempt": 1,
            "updated_at": "d",
            "error": {"type": "server_error", "code": "c", "message": "m"},
        },
    ),
    "cancelled": ([done(status="cancelled")], {"status": "cancelled", "attempt": 0, "updated_at": "d"}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_clients_are_told(name: str) -> None:
    """What is not known is left out, and so is all that is the server's own."""
    entries, expected = CASES[name]
    assert shown(*entries) == expected


def test_attempts_that_were_given_up_with_their_worker_are_counted() -> None:
    """One that the same worker has followed by another has failed."""
    record = record_of(started(1, "a"), started(2, "a"), started(3, "b"), started(4, "c"), started(5, "c"))
    assert (record.attempt, record.instance, record.lost) == (5, "c", 2)


async def test_it_is_read_whole_however_long_it_is() -> None:
    """And stands where its log stands."""
    store = MemoryStore()
    await store.create(session("sess_1"))
    pieces = [f"{number} " for number in range(50_000)]
    await store.append("sess_1", [Write("t", [started(1), wrote(1, *pieces), done()])])
    record = await read_record(store, "sess_1", "t")
    assert record.position == len(pieces) + 2
    assert "".join(record.texts) == "".join(pieces)
    assert record.done == done()


async def test_task_without_a_log_is_one_that_has_not_begun() -> None:
    """There is nothing to fold."""
    store = MemoryStore()
    await store.create(session("sess_1"))
    record = await read_record(store, "sess_1", "t")
    assert (record.position, record.attempt, record.done) == (0, 0, None)
