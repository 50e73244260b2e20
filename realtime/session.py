"""A session's rules: its state as the fold of its log, and what each command comes to. Pure: no I/O, no clock.

`SessionState.apply` folds one event; `decide` turns a command into the events to append, or raises the error that the
client is told. Who carries a decision out appends it with the position that the state stands at, and on a conflict
folds on and decides again, so two commands at once are decided one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_never

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from realtime.control import CancelResponse, CancelTask
from realtime.errors import ConflictError, InvalidRequest, NotFound, task_not_found
from realtime.protocol import (
    MAX_FRAME_BYTES,
    MAX_UNFINISHED_CHANNELS,
    RESERVED_IDS,
    Bill,
    ChannelEvent,
    Command,
    Item,
    ItemCreate,
    ItemCreated,
    ItemTruncate,
    ItemTruncated,
    Overrides,
    Response,
    ResponseCancel,
    ResponseCreate,
    ResponseCreated,
    ResponseDone,
    ResponseInProgress,
    Scalar,
    Session,
    SessionClose,
    SessionClosed,
    SessionUpdate,
    SessionUpdated,
    Task,
    TaskCancel,
    TaskCreate,
    TaskCreated,
    TaskDone,
    TaskStarted,
    Truncation,
    cut_utf16,
    given,
    new_id,
    utf16_length,
)

FRAME_MARGIN_BYTES = 1024
"""What `seq`, `replay` and their like may add to an event when it is sent."""
MAX_SESSION_BYTES = 96 * 1024
"""The most that a session's settings may take: positions and participants share the first frame with them."""


class ResponseState(Struct):
    """What the fold knows of one response."""

    id: str
    model: str
    user: str
    overrides: Overrides
    bill: Bill | None
    traceparent: str | None = None
    queued: bool = False
    running: bool = False
    done: bool = False
    stopping: bool = False
    """Its end was asked for; it may still run for a moment."""
    instance: str | None = None
    """Which instance runs it."""


class TaskState(Struct):
    """What the fold knows of one task. `position` is the one of its creation, in the session's channel."""

    id: str
    name: str
    position: int
    running: bool = False
    attempt: int = 0
    instance: str | None = None
    """Which instance was heard to run its newest attempt."""
    done: bool = False
    stopping: bool = False
    """Its end was asked for."""

    def begin(self, attempt: int, instance: str | None) -> None:
        """An attempt runs; who has claimed a newer one already may hear of it later than of that."""
        self.running = True
        if attempt >= self.attempt:
            self.attempt, self.instance = attempt, instance


class Limits(Struct, frozen=True):
    """What a server allows: models by name (`*` for any), and the most output tokens of a response."""

    models: frozenset[str]
    max_output_tokens: int

    def check(
        self, model: str | None, max_output_tokens: int | None, *, tokens_param: str = "max_output_tokens"
    ) -> None:
        """Raise `InvalidRequest` for what is asked for (`None`: nothing) and not allowed."""
        if model is not None and not self.models & {model, "*"}:
            raise InvalidRequest("model_not_found", "This server does not offer that model.", param="model")
        if (max_output_tokens or 0) > self.max_output_tokens:
            most = f"A response may have at most {self.max_output_tokens} output tokens."
            raise InvalidRequest("max_output_tokens_too_large", most, param=tokens_param)


class Decision(Struct, frozen=True):
    """What a command comes to: events for the session's channel, and responses and tasks whose end it asks for."""

    events: list[ChannelEvent]
    cancels: list[CancelResponse | CancelTask]


class SessionState:
    """The fold of a session's log: settings, the conversation in its order, the responses, and the tasks."""

    __slots__ = (
        "closed",
        "closed_by",
        "heard",
        "position",
        "responses",
        "session",
        "tasks",
        "timeline",
        "unfinished",
        "unfinished_tasks",
    )

    def __init__(self, session: Session) -> None:
        self.session = session
        self.position = 0
        self.closed = False
        self.closed_by: str | None = None
        """The `event_id` of the command that closed it."""
        self.timeline: list[Item | ResponseState] = []
        """The conversation's order: an answer stands where its response was created."""
        self.responses: dict[str, ResponseState] = {}
        self.unfinished: dict[str, ResponseState] = {}
        """Those of `responses` that have no end yet, in the order of their creation."""
        self.tasks: dict[str, TaskState] = {}
        self.unfinished_tasks: dict[str, TaskState] = {}
        """Those of `tasks` that have no end yet."""
        self.heard: dict[str, int] = {}
        """UTF-16 code units that were heard of an answer, where a client said so."""

    def apply(self, event: ChannelEvent) -> None:
        """Fold one event of the session's channel, a response's first or last, or a task's."""
        match event:
            case ItemCreated(item=item):
                self.timeline.append(item)
            case ItemTruncated(item=truncation):
                self.heard[truncation.response_id] = truncation.heard_chars
            case ResponseCreated():
                self._add_response(event)
            case ResponseInProgress(response_id=response_id, instance=instance):
                response = self.responses[response_id]
                response.running = True
                response.instance = instance
            case TaskCreated(task=task):
                state = TaskState(task.id, task.name, position=self.position + 1)
                self.tasks[task.id] = self.unfinished_tasks[task.id] = state
            case TaskStarted(task_id=task_id, attempt=attempt, instance=instance):
                self.tasks[task_id].begin(attempt, instance)
            case ResponseDone(response_id=channel) | TaskDone(task_id=channel):
                self.end(channel)
            case SessionUpdated(session=session):
                self.session = session
            case SessionClosed(for_event_id=event_id):
                self.closed = True
                self.closed_by = event_id

    def end(self, channel: str) -> None:
        """Fold the end of a response or a task, whichever it was."""
        (self.responses.get(channel) or self.tasks[channel]).done = True
        self.unfinished.pop(channel, None)
        self.unfinished_tasks.pop(channel, None)

    def knows(self, channel: str) -> bool:
        """Whether the session has a response or a task of that id."""
        return channel in self.responses or channel in self.tasks

    def is_over(self, channel: str) -> bool:
        """Whether that response or task has ended."""
        return channel not in self.unfinished and channel not in self.unfinished_tasks

    def settings_of(self, response: ResponseState) -> Session:
        """The session's settings with the response's own on top."""
        return self.session.updated(response.overrides)

    def runnable(self) -> ResponseState | None:
        """The response that may run now: the first unfinished one, unless it runs already or is being stopped."""
        first = next(iter(self.unfinished.values()), None)
        return first if first and not (first.running or first.stopping) else None

    def _add_response(self, event: ResponseCreated) -> None:
        response = event.response
        state = ResponseState(
            id=response.id,
            model=response.model,
            user=response.user,
            overrides=event.overrides or Overrides(),
            bill=event.bill,
            traceparent=event.traceparent,
            queued=response.status == "queued",
        )
        self.responses[response.id] = self.unfinished[response.id] = state
        self.timeline.append(state)


def settings_update(session: Session, overrides: Overrides, limits: Limits) -> Session:
    """A session with other settings. Raises `InvalidRequest` for what is not allowed."""
    limits.check(overrides.model, overrides.max_output_tokens)
    updated = session.updated(overrides)
    if len(msgspec.json.encode(updated)) > MAX_SESSION_BYTES:
        raise InvalidRequest("too_large", "The settings are larger than settings may be.")
    return updated


def decide(
    state: SessionState,
    command: Command,
    *,
    user: str,
    now: str,
    limits: Limits,
    payer: str | None = None,
    heard: str = "",
    task_input: str = "",
    expires_at: str = "",
) -> Decision:
    """What `command` of `user` comes to at time `now` (RFC 3339), or the error that refuses it.

    `payer` is whose limits and budget count for a task. `heard` is the answer's text so far, where the command
    truncates one, `task_input` a task's checked input, as JSON, where it creates one; `expires_at` is told where the
    session is. Events carry the command's `event_id`.
    """
    if state.closed:
        raise ConflictError("session_closed", "The session is closed.")
    match command:
        case SessionUpdate():
            decision = _update(state, command, limits, expires_at)
        case ItemCreate():
            decision = _create_item(state, command, user, now)
        case ItemTruncate():
            decision = _truncate(state, command, heard)
        case ResponseCreate():
            decision = _create_response(state, command, user, now, limits)
        case ResponseCancel():
            decision = _cancel(state, command, heard)
        case TaskCreate():
            decision = _create_task(state, command, user, payer, now, task_input)
        case TaskCancel():
            decision = _cancel_task(state, command)
        case SessionClose():
            decision = Decision([SessionClosed(reason="closed by client", for_event_id=command.event_id)], [])
        case _:
            assert_never(command)
    _check_sizes(decision)
    return decision


def truncated_response(command: Command) -> str | None:
    """The response whose text `decide` needs as `heard` for this command, if any."""
    match command:
        case ItemTruncate(response_id=response_id):
            return response_id
        case ResponseCancel(response_id=response_id, heard_chars=int()):
            return response_id
        case _:
            return None


def _update(state: SessionState, command: SessionUpdate, limits: Limits, expires_at: str) -> Decision:
    updated = replace(settings_update(state.session, command.session, limits), expires_at=expires_at)
    return Decision([SessionUpdated(session=updated, for_event_id=command.event_id)], [])


def _create_item(state: SessionState, command: ItemCreate, user: str, now: str) -> Decision:
    item_id = command.item.id or new_id("item")
    taken = any(isinstance(entry, Item) and entry.id == item_id for entry in state.timeline)
    _check_id(item_id, taken=taken, param="item.id")
    item = Item(id=item_id, role=command.item.role, content=command.item.content, user=user, created_at=now)
    return Decision([ItemCreated(item=item, for_event_id=command.event_id)], [])


def _create_response(state: SessionState, command: ResponseCreate, user: str, now: str, limits: Limits) -> Decision:
    response_id = command.response_id or new_id("resp")
    _check_id(response_id, taken=state.knows(response_id), param="response_id")
    overrides = Overrides(**given(command))
    limits.check(overrides.model, overrides.max_output_tokens)
    settings = state.session.updated(overrides)
    _check_metadata(command.metadata or {})
    _check_room(state, settings)
    if command.input is None and not state.timeline:
        raise InvalidRequest("empty_conversation", "There is nothing to respond to yet.", param="input")
    events = list(_input(command, user, now))
    response = Response(
        id=response_id,
        status="queued" if state.unfinished else "in_progress",
        model=settings.model,
        created_at=now,
        metadata=command.metadata or {},
        user=user,
    )
    events.append(ResponseCreated(response=response, overrides=overrides, for_event_id=command.event_id))
    interrupts = settings.multitask_strategy == "interrupt"
    return Decision(events, list(_cancel_all(state, command.event_id)) if interrupts else [])


def _input(command: ResponseCreate, user: str, now: str) -> Iterator[ChannelEvent]:
    if command.input is not None:
        item = Item(id=new_id("item"), role="user", content=command.input, user=user, created_at=now)
        yield ItemCreated(item=item, for_event_id=command.event_id)


def _truncate(state: SessionState, command: ItemTruncate, heard: str) -> Decision:
    if command.response_id not in state.responses:
        raise NotFound("response_not_found", "The session has no such response.", param="response_id")
    return Decision([_truncated(command.response_id, command.heard_chars, heard, command.event_id)], [])


def _cancel(state: SessionState, command: ResponseCancel, heard: str) -> Decision:
    response = state.responses.get(command.response_id)
    if response is None:
        raise NotFound("response_not_found", "The session has no such response.", param="response_id")
    events: list[ChannelEvent] = []
    cancels: list[CancelResponse | CancelTask] = []
    if command.heard_chars is not None:
        events.append(_truncated(response.id, command.heard_chars, heard, command.event_id))
    if not response.done:
        cancels.append(CancelResponse(response_id=response.id, reason="cancelled", for_event_id=command.event_id))
    return Decision(events, cancels)


def task_created(
    task_id: str, name: str, task_input: str, *, user: str, payer: str | None, now: str, response_id: str | None = None
) -> TaskCreated:
    """The event that makes a task of a checked input."""
    made = Task(id=task_id, name=name, status="pending", created_at=now, response_id=response_id)
    return TaskCreated(task=made, input=task_input, user=user, payer=payer)


def _create_task(
    state: SessionState, command: TaskCreate, user: str, payer: str | None, now: str, task_input: str
) -> Decision:
    task_id = command.task_id or new_id("task")
    _check_id(task_id, taken=state.knows(task_id), param="task_id")
    if _unfinished_channels(state) >= MAX_UNFINISHED_CHANNELS:
        raise ConflictError("too_many_tasks", "Too many responses and tasks of the session are unfinished.")
    created = task_created(task_id, command.name, task_input, user=user, payer=payer, now=now)
    return Decision([replace(created, for_event_id=command.event_id)], [])


def _cancel_task(state: SessionState, command: TaskCancel) -> Decision:
    task = state.tasks.get(command.task_id)
    if task is None:
        raise task_not_found()
    return Decision([], [] if task.done else [CancelTask(task_id=task.id, for_event_id=command.event_id)])


def _unfinished_channels(state: SessionState) -> int:
    return len(state.unfinished) + len(state.unfinished_tasks)


def _truncated(response_id: str, heard_chars: int, text: str, event_id: str | None) -> ItemTruncated:
    kept = utf16_length(cut_utf16(text, heard_chars))
    return ItemTruncated(item=Truncation(response_id=response_id, heard_chars=kept), for_event_id=event_id)


def _cancel_all(state: SessionState, event_id: str | None) -> Iterator[CancelResponse]:
    for response_id in state.unfinished:
        yield CancelResponse(response_id=response_id, reason="interrupted", for_event_id=event_id)


def _check_room(state: SessionState, settings: Session) -> None:
    if state.unfinished and settings.multitask_strategy == "reject":
        raise ConflictError("response_in_progress", "Another response of the session runs or waits.")
    if _unfinished_channels(state) >= MAX_UNFINISHED_CHANNELS:
        raise ConflictError("too_many_responses", "Too many responses of the session wait already.")


def _check_id(given_id: str, *, taken: bool, param: str) -> None:
    if given_id in RESERVED_IDS:
        raise InvalidRequest("reserved_id", "That id is reserved.", param=param)
    if taken:
        raise ConflictError("already_exists", "The session already has something with that id.", param=param)


def _check_metadata(metadata: dict[str, Scalar]) -> None:
    """Refuse numbers that one of the two encodings can't carry."""
    for value in metadata.values():
        if isinstance(value, int | float) and not abs(value) < 2**63:
            raise InvalidRequest("invalid_message", "A number in metadata is out of range.", param="metadata")


def _check_sizes(decision: Decision) -> None:
    for event in decision.events:
        if len(msgspec.json.encode(event)) > MAX_FRAME_BYTES - FRAME_MARGIN_BYTES:
            raise InvalidRequest("too_large", "The message makes an event larger than a frame may be.")
