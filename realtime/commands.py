"""Carries commands out: looks whether they were before, decides them, admits them, and appends what they come to."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Protocol

import msgspec
from msgspec import Struct

from realtime.access.admission import Admission, Ticket
from realtime.access.audit import tag_of
from realtime.access.names import joined
from realtime.access.principal import Principal
from realtime.access.rules import permit
from realtime.access.till import Purse
from realtime.control import CancelResponse
from realtime.conversation import Message, messages
from realtime.errors import ConflictError, NotFound, RealtimeError, StoreError, Unavailable
from realtime.live import RETRY_S, LiveSession
from realtime.observe import metrics, traces
from realtime.protocol import (
    CONTROL_CHANNEL,
    SESSION_CHANNEL,
    ChannelEvent,
    Command,
    ItemCreated,
    Overrides,
    RateLimit,
    ResponseCreate,
    ResponseCreated,
    Session,
    TaskCreate,
    TaskCreated,
    new_id,
    timestamp,
)
from realtime.session import Decision, Limits, SessionState, decide, settings_update, task_created, truncated_response
from realtime.store.base import CommandRecord, CommandSeen, Made, PositionConflict, Store, TaskRef, Write
from realtime.tasks.desk import Desk
from realtime.turn import Turns, answer_text, answers, request_of


class Outcome(Struct, frozen=True):
    """What a command came to: the ids of what it made, and whether that was before, under the same `event_id`."""

    made: Made
    duplicate: bool = False
    limits: Sequence[RateLimit] = ()
    """How much is left of what was used of the client's limits."""


class Works(Protocol):
    """Where what was appended is put to work. Nothing of it may raise."""

    draining: bool
    """Whether nothing is started any more."""

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Have `work` run until it ends or the process does."""

    def whole(self, live: LiveSession, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do `work` to its end, even if whoever waits for it is cancelled; the session is kept open meanwhile."""

    async def look_after(self, live: LiveSession, *, is_sure: bool = False) -> None:
        """Start what may run. Unless that `is_sure`, see first whether something came from elsewhere meanwhile."""

    def keep(self, live: LiveSession, response_id: str, purse: Purse) -> None:
        """A response was created here: keep what it may cost until it runs."""


class _Asked(Struct, frozen=True):
    """A command of a principal's, checked as far as it can be without the session's state."""

    live: LiveSession
    command: Command
    principal: Principal
    digest: bytes
    task_input: str


class Commands:
    """What clients ask for, carried out. `defaults` is the template of a new session's settings; its identity and times
    are filled in."""

    def __init__(
        self,
        store: Store,
        works: Works,
        desk: Desk,
        admission: Admission,
        turns: Turns,
        *,
        defaults: Session,
        limits: Limits,
        ttl_s: float,
    ) -> None:
        self._store = store
        self._works = works
        self._desk = desk
        self._admission = admission
        self._turns = turns
        self._begins_here = ResponseCreate if store.shared else ResponseCreate | TaskCreate
        self._defaults = defaults
        self._limits = limits
        self._ttl_s = ttl_s
        self._under_way: dict[tuple[str, str, str], asyncio.Future[StoreError | None]] = {}
        """By session, user and `event_id`: the command that is being carried out, done with what its like fail with."""

    async def create(self, principal: Principal, overrides: Overrides | None = None) -> str:
        """Make a session of the principal's; returns its id. Raises `InvalidRequest` for settings that are not
        allowed, `RateLimited` and `StoreError`."""
        await self._admission.session(principal)
        session_id = new_id("sess")
        session = msgspec.structs.replace(
            settings_update(self._defaults, overrides or Overrides(), self._limits),
            id=session_id,
            owner=principal.user,
            created_at=timestamp(),
            expires_at="",
        )
        await self._store.create(session)
        metrics.SESSIONS_CREATED.inc()
        return session_id

    async def create_task(self, principal: Principal, name: str, given: object) -> tuple[str, RateLimit]:
        """Make a task of the principal's that belongs to no session; returns its id, and what is left of their limit.

        It has a session of its own, which nobody can look at. Raises `NotFound` for a name that there is not,
        `InvalidRequest`, `RateLimited` and `StoreError`.
        """
        task_input = self._desk.registry.check(name, given)
        task_id = new_id("task")
        task = TaskRef(task_id, task_id, name)
        announce = partial(self._desk.announce, task, principal.payer)
        left = await self._admission.task(principal.payer, announce)
        user = principal.user
        session = msgspec.structs.replace(self._defaults, id=task_id, owner=user, created_at=timestamp())
        created = task_created(task_id, name, task_input, user=user, payer=principal.payer, now=session.created_at)
        created = msgspec.structs.replace(created, traceparent=traces.current())
        await self._store.create(session, ttl_s=self._desk.ttl_s)
        try:
            await self._store.append(task_id, [Write(SESSION_CHANNEL, [created], expect=0)])
        except RealtimeError:
            self._works.spawn(self._unmake(task))  # it may be there, and nobody knows its id
            raise
        self._works.spawn(self._desk.submit(task))
        return task_id, left

    async def execute(self, live: LiveSession, command: Command, principal: Principal) -> Outcome:
        """Carry out a principal's command: append what it comes to. Raises the `RealtimeError` that refuses it.

        A command whose `event_id` was carried out before does nothing; while it is being carried out here, it is waited
        for, and where the store does not answer that one, both fail. Cancelled, it was carried out whole or not at all.
        """
        if self._works.draining and isinstance(command, self._begins_here):
            raise Unavailable("draining", "This instance is shutting down; another one takes it.", retry_after_ms=1000)
        asked = self._checked(live, command, principal)
        ticket = self._admission.ticket(principal)
        try:
            with traces.span(tag_of(command), kind="SERVER"):
                async with self._alone(asked):
                    return await self._carry_out(asked, ticket)
        finally:
            ticket.give_back()

    @asynccontextmanager
    async def _alone(self, asked: _Asked) -> AsyncIterator[None]:
        """Has the same command wait meanwhile: what it takes is not taken twice, nor refused to one. Where the store
        does not answer, they do not find that out one after the other."""
        if asked.command.event_id is None:
            yield
            return
        key = asked.live.id, asked.principal.user, asked.command.event_id
        while (before := self._under_way.get(key)) is not None:
            if (error := await asyncio.shield(before)) is not None:
                raise error
        over = self._under_way[key] = asyncio.get_running_loop().create_future()
        failed: StoreError | None = None
        try:
            yield
        except StoreError as error:
            failed = error
            raise
        finally:
            del self._under_way[key]
            over.set_result(failed)

    def _checked(self, live: LiveSession, command: Command, principal: Principal) -> _Asked:
        task_input = ""
        if isinstance(command, TaskCreate):
            permit(live.state, command, principal)  # who may make none is not told which there are
            task_input = self._desk.registry.check(command.name, command.input)
            command = msgspec.structs.replace(command, input=task_input)
        digest = hashlib.blake2b(msgspec.json.encode(command), digest_size=16).digest()
        if isinstance(command, TaskCreate):
            command = msgspec.structs.replace(command, task_id=command.task_id or _task_id(live, command, principal))
        return _Asked(live, command, principal, digest, task_input)

    async def _carry_out(self, asked: _Asked, ticket: Ticket) -> Outcome:
        live, command = asked.live, asked.command
        while (seen := await self._seen(asked)) is None:
            try:
                permit(live.state, command, asked.principal)
                decision = await self._decide(asked)
            except RealtimeError:
                seen = await self._seen(asked)
                if seen is not None:
                    break  # the same command was carried out meanwhile, and is what this one clashed with
                if await self._was_behind(live):
                    continue
                raise
            position = live.state.position  # now: it is the one that was decided on
            try:
                decision = await self._admit(asked, decision, ticket)
            except StoreError:
                raise
            except RealtimeError:
                seen = await self._seen(asked)
                if seen is not None:
                    break  # as above: what it would take was taken by the same command
                raise
            try:
                made = await self._append(asked, decision, position)
            except PositionConflict:
                await live.refresh()
            except CommandSeen:
                continue
            except (NotFound, ConflictError):
                raise  # it was refused
            except BaseException:
                ticket.drop()  # it may have been carried out
                raise
            else:
                if (purse := ticket.keep()) is not None and made.response_id:
                    self._works.keep(live, made.response_id, purse)
                return Outcome(made, limits=ticket.limits)
        live.doubt()  # whoever sends it again may have had no answer, and this instance may not know what it did
        return Outcome(seen.made, duplicate=True)

    async def _seen(self, asked: _Asked) -> CommandRecord | None:
        event_id = asked.command.event_id
        if event_id is None:
            return None
        seen = await self._store.find_command(asked.live.id, asked.principal.user, event_id)
        if seen is not None and seen.digest != asked.digest:
            raise ConflictError("event_id_reused", "Another command was sent under that event_id.", param="event_id")
        return seen

    async def _was_behind(self, live: LiveSession) -> bool:
        """Learn what others have done that was not told here yet; returns whether there was something.

        Nothing is appended that was decided on old news. Nor should it be refused: who has been told by one instance
        that a response was made, or is done, may ask the next one at once.
        """
        stood = live.state.position, set(live.state.unfinished)
        if self._store.shared:
            await live.refresh()
        return stood != (live.state.position, set(live.state.unfinished))

    async def _decide(self, asked: _Asked) -> Decision:
        answer = truncated_response(asked.command)
        heard = await answer_text(asked.live, answer) if answer else ""
        return decide(
            asked.live.state,
            asked.command,
            user=asked.principal.user,
            payer=asked.principal.payer,
            now=timestamp(),
            limits=self._limits,
            heard=heard,
            task_input=asked.task_input,
            expires_at=timestamp(in_s=self._ttl_s),
        )

    async def _admit(self, asked: _Asked, decision: Decision, ticket: Ticket) -> Decision:
        """The decision with the bill of the response that it makes. Raises the error that refuses it."""
        live, payer = asked.live, asked.principal.payer
        events: list[ChannelEvent] = []
        for event in decision.events:
            if isinstance(event, ResponseCreated):
                tokens = partial(self._most_tokens, live, decision.events)
                bill = await ticket.response(tokens, live.id, _ending(live.state, decision, payer))
                event = msgspec.structs.replace(event, bill=bill, traceparent=traces.current())
            elif isinstance(event, TaskCreated):
                await ticket.task(_Place(self._works, self._desk, live, event, payer))
                event = msgspec.structs.replace(event, traceparent=traces.current())
            events.append(event)
        return msgspec.structs.replace(decision, events=events)

    async def _most_tokens(self, live: LiveSession, events: Sequence[ChannelEvent]) -> int:
        """The most tokens that the response may use which `events` make."""
        items = [event.item for event in events if isinstance(event, ItemCreated)]
        [overrides] = [event.overrides or Overrides() for event in events if isinstance(event, ResponseCreated)]
        settings = live.state.session.updated(overrides)
        conversation = messages(live.state, await answers(live))
        conversation += [Message(item.role, item.content) for item in items]
        return request_of(settings, conversation, self._turns.tools).most_tokens(self._turns.context_tokens)

    async def _append(self, asked: _Asked, decision: Decision, position: int) -> Made:
        made = _made(decision)
        event_id, user = asked.command.event_id, asked.principal.user
        record = CommandRecord(user, event_id, asked.digest, made) if event_id else None
        commit = self._commit(asked.live, _writes(decision, position), record)
        await asyncio.shield(self._works.whole(asked.live, commit))
        return made

    async def _commit(self, live: LiveSession, writes: Sequence[Write], record: CommandRecord | None) -> None:
        """Append what was decided, and start what may start."""
        events = [entry for write in writes for entry in write.entries]
        created = [event for event in events if isinstance(event, TaskCreated)]
        tasks = [TaskRef(live.id, event.task.id, event.task.name) for event in created]
        try:
            if writes or record:
                await self._store.append(live.id, writes, record, keep_s=self._desk.ttl_s if tasks else 0.0)
        except StoreError:
            live.doubt()  # it may have been carried out
            raise
        for task in tasks:
            self._works.spawn(self._desk.submit(task))
        for event in events:
            if isinstance(event, ResponseCreated):
                await self._works.look_after(live, is_sure=event.response.status != "queued")

    async def _unmake(self, task: TaskRef) -> None:
        while True:
            with suppress(StoreError):
                await self._store.erase(task.session_id)
                break
            await asyncio.sleep(RETRY_S)
        await self._desk.withdraw(task)


class _Place:
    """That of a task which a command makes, if it does."""

    def __init__(self, works: Works, desk: Desk, live: LiveSession, created: TaskCreated, payer: str) -> None:
        self._works = works
        self._desk = desk
        self._live = live
        self._task = TaskRef(live.id, created.task.id, created.task.name)
        self._payer = payer

    async def take(self) -> None:
        await self._desk.announce(self._task, self._payer)

    def give_back(self) -> None:
        self._works.whole(self._live, self._withdraw())

    async def _withdraw(self) -> None:
        """Unless it is the place of another command's task by now, which has the same id."""
        with suppress(NotFound):
            await self._live.refresh()
        if not self._live.state.knows(self._task.task_id):
            await self._desk.withdraw(self._task)


def _task_id(live: LiveSession, command: TaskCreate, principal: Principal) -> str:
    """The id of a task whose client has chosen none: the same one, if the same command comes to several instances. So
    they announce the same task."""
    if command.event_id is None:
        return new_id("task")
    named = joined(live.id, principal.user, command.event_id)
    return f"task_{hashlib.blake2b(named.encode(errors='surrogatepass'), digest_size=16).hexdigest()}"


def _ending(state: SessionState, decision: Decision, payer: str) -> int:
    """How many of a payer's responses in the session are being stopped, by this decision or before."""
    stopped = {entry.response_id for entry in decision.cancels if isinstance(entry, CancelResponse)}
    theirs = [one for one in state.unfinished.values() if one.bill and one.bill.payer == payer]
    return sum(one.stopping or one.id in stopped for one in theirs)


def _made(decision: Decision) -> Made:
    ids: dict[str, str] = {}
    for event in decision.events:
        match event:
            case ItemCreated(item=item):
                ids["item_id"] = item.id
            case ResponseCreated(response=response):
                ids["response_id"] = response.id
            case TaskCreated(task=task):
                ids["task_id"] = task.id
    return Made(**ids)


def _writes(decision: Decision, position: int) -> Sequence[Write]:
    writes = []
    if decision.events:
        writes.append(Write(SESSION_CHANNEL, decision.events, expect=position))
    if decision.cancels:
        writes.append(Write(CONTROL_CHANNEL, decision.cancels))
    return writes
