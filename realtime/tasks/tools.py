"""Tasks as a model's tools: a tool call becomes a task of its session, whose result goes back to the model."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

from msgspec.structs import replace

from realtime.control import CancelTask
from realtime.conversation import ToolCall, ToolResult
from realtime.doorbell import Doorbell
from realtime.errors import ConflictError, NotFound, RateLimited, RealtimeError, StoreError, session_not_found
from realtime.live import RETRY_S, LiveSession
from realtime.observe import traces
from realtime.protocol import (
    CONTROL_CHANNEL,
    MAX_UNFINISHED_CHANNELS,
    SESSION_CHANNEL,
    TaskCreated,
    TaskDone,
    new_id,
    timestamp,
)
from realtime.session import ResponseState, SessionState, task_created
from realtime.store.base import CommandRecord, CommandSeen, PositionConflict, TaskRef, Write
from realtime.tasks.desk import Desk
from realtime.tasks.record import read_record

MAX_RESULT_CHARS = 100_000
"""The longest result that a model is told."""


class TaskTools:
    """The tasks that are offered to the model. `definitions` is what it is told of them; `admit` raises the error that
    refuses a payer one more task, and has it announced."""

    def __init__(self, desk: Desk, admit: Callable[[str, Callable[[], Awaitable[None]]], Awaitable[object]]) -> None:
        self._admit = admit
        self.definitions = desk.registry.tools()
        self._desk = desk

    async def call(self, live: LiveSession, response: ResponseState, call: ToolCall) -> ToolResult:
        """Carry a tool call out: as a task of the session, made for that response. What goes wrong with it is for the
        model to read. Cancelled, the task is cancelled as well. Raises `NotFound` where the session is gone."""
        task = TaskRef(live.id, new_id("task"), call.name)
        try:
            task_input = self._check(call)
            if (bill := response.bill) is not None:
                await self._admit(bill.payer, partial(self._desk.announce, task, bill.payer))
        except RealtimeError as error:
            return ToolResult(call.id, error.message, is_error=True)
        created = task_created(
            task.task_id,
            call.name,
            task_input,
            user=response.user,
            payer=response.bill.payer if response.bill else None,
            now=timestamp(),
            response_id=response.id,
        )
        created = replace(created, traceparent=traces.current())
        creating = asyncio.create_task(self._create(live, task, created, response.user))
        try:
            await asyncio.shield(creating)
            done = await self._done(live, task.task_id)
        except asyncio.CancelledError:
            live.spawn(_cancel(live, task.task_id, creating))
            raise
        except (ConflictError, RateLimited) as error:
            return ToolResult(call.id, error.message, is_error=True)
        return _result(call, done)

    def _check(self, call: ToolCall) -> str:
        """The input of a tool that was offered. Raises `NotFound` for any other, `InvalidRequest`."""
        if all(tool.name != call.name for tool in self.definitions):
            raise NotFound("unknown_task", "There is no tool of that name.")
        return self._desk.registry.check(call.name, call.input)

    async def _create(self, live: LiveSession, task: TaskRef, created: TaskCreated, user: str) -> None:
        """Record the task, and have it run. Raises `ConflictError` where the session takes no more, `RateLimited` where
        its payer may have no more, and `NotFound`; then its place is free again."""
        try:
            await self._record(live, task, created, user)
        except RealtimeError:
            await self._desk.withdraw(task)
            raise
        live.spawn(self._desk.submit(task))

    async def _record(self, live: LiveSession, task: TaskRef, created: TaskCreated, user: str) -> None:
        record = CommandRecord(user, task.task_id, b"")  # whether a call that was not answered had its effect
        while not live.state.knows(task.task_id):
            _check_room(live.state)
            write = Write(SESSION_CHANNEL, [created], expect=live.state.position)
            try:
                await self._desk.announce(task, created.payer)
                await live.store.append(live.id, [write], record, keep_s=self._desk.ttl_s)
                break
            except CommandSeen:
                break
            except PositionConflict:
                with suppress(StoreError):
                    await live.refresh()
            except StoreError:
                await asyncio.sleep(RETRY_S)

    async def _done(self, live: LiveSession, task_id: str) -> TaskDone:
        bell = Doorbell()
        live.bells.add(bell)
        try:
            while not live.gone and not ((task := live.state.tasks.get(task_id)) and task.done):
                await bell.wait()
        finally:
            live.bells.discard(bell)
        while not live.gone:
            try:
                record = await read_record(live.store, live.id, task_id)
            except StoreError:
                await asyncio.sleep(RETRY_S)
            else:
                assert record.done is not None
                return record.done
        raise session_not_found()


async def _cancel(live: LiveSession, task_id: str, creating: asyncio.Task[None]) -> None:
    await asyncio.wait([creating])
    if creating.exception() is not None:
        return
    while not live.gone:
        try:
            await live.store.append(live.id, [Write(CONTROL_CHANNEL, [CancelTask(task_id=task_id)])])
            return
        except NotFound:
            return
        except StoreError:
            await asyncio.sleep(RETRY_S)


def _check_room(state: SessionState) -> None:
    if state.closed:
        raise ConflictError("session_closed", "The session is closed.")
    if len(state.unfinished) + len(state.unfinished_tasks) >= MAX_UNFINISHED_CHANNELS:
        raise ConflictError("too_many_tasks", "Too many responses and tasks of the session are unfinished.")


def _result(call: ToolCall, done: TaskDone) -> ToolResult:
    if done.status == "cancelled":
        return ToolResult(call.id, "The task was cancelled.", is_error=True)
    if done.error is not None:
        return ToolResult(call.id, done.error.message, is_error=True)
    content = done.result_json or "null"
    if len(content) > MAX_RESULT_CHARS:
        return ToolResult(call.id, "The task's result is too long to be read here.", is_error=True)
    return ToolResult(call.id, content)
