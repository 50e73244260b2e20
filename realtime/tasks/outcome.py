"""How a task ends, in the words that clients are told."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec.structs import replace

from realtime.errors import ConflictError, InvalidRequest, RealtimeError, ServerError
from realtime.observe import logs
from realtime.offload import OffloadError
from realtime.protocol import TaskDone, TaskEnd, timestamp
from realtime.store.base import TaskRef
from realtime.tasks.registry import TaskDefinition

MAX_INLINE_BYTES = 128 * 1024
"""The largest result that is told in `task.done` itself."""
MAX_RESULT_BYTES = 1024 * 1024
MAX_MESSAGE_CHARS = 2000
"""The longest message of an error that is told whole."""


def ended(task: TaskRef, status: TaskEnd, **fields: Any) -> TaskDone:
    """The end of a task."""
    return TaskDone(task_id=task.task_id, status=status, at=timestamp(), **fields)


def failed(task: TaskRef, error: RealtimeError) -> TaskDone:
    """The end of a task that `error` has ended."""
    told = error.as_failure()
    return ended(task, "failed", error=replace(told, message=told.message[:MAX_MESSAGE_CHARS]))


def completed(task: TaskRef, result: Any) -> TaskDone:
    """The end of a task that has come to `result`; a failure where that is too large, or not every client could read
    it."""
    try:
        encoded = msgspec.json.encode(result)
        if len(encoded) > MAX_RESULT_BYTES:
            return failed(task, ServerError("result_too_large", f"A result may have {MAX_RESULT_BYTES} bytes at most."))
        msgspec.msgpack.encode(msgspec.json.decode(encoded))
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError):
        return failed(task, ServerError("invalid_result", "The task's result can't be written as JSON."))
    url = result_url(task) if len(encoded) > MAX_INLINE_BYTES else None
    return ended(task, "complete", result_json=encoded.decode(), result_url=url)


def result_url(task: TaskRef) -> str:
    """Where a task's result can be read whole."""
    if task.session_id == task.task_id:
        return f"/v1/tasks/{task.task_id}/result"
    return f"/v1/sessions/{task.session_id}/tasks/{task.task_id}/result"


def failure(error: BaseException) -> RealtimeError:
    """What clients are told of what a task raised: its own words only where it means them to be told. The rest goes to
    the log, without what it worked on."""
    match error:
        case RealtimeError(code=str(code), message=str(message)) if _is_text(code + message):
            return error
        case OffloadError():
            message = str(error)
        case _:
            message = f"The task raised {type(error).__name__}."
    logs.report(error)
    return ServerError("task_failed", message)


def out_of_time(definition: TaskDefinition) -> RealtimeError:
    """What clients are told of an attempt that was stopped for its time."""
    return ServerError("task_timeout", f"The task took longer than {definition.timeout_s:g} s.")


def is_final(error: RealtimeError) -> bool:
    """Whether another attempt would come to the same."""
    return isinstance(error, InvalidRequest | ConflictError)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates
        return False
    return True
