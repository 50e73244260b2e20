"""Keeps responses moving: the one place where logs, turns and viewers meet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from functools import partial
from types import TracebackType
from typing import Any, Self

import msgspec

from realtime.access.admission import Admission
from realtime.access.principal import Principal
from realtime.access.revocations import Revocations
from realtime.access.rules import check_may_see
from realtime.access.till import Purse
from realtime.background import Background
from realtime.commands import Commands
from realtime.control import CancelResponse, CancelTask
from realtime.errors import NotFound, RealtimeError, StoreError, session_not_found
from realtime.hub import Hub
from realtime.live import RETRY_S, LiveSession, Reader
from realtime.observe import metrics
from realtime.protocol import (
    ChannelEvent,
    Session,
    TaskDone,
    is_task_id,
    timestamp,
)
from realtime.session import (
    Limits,
    ResponseState,
    TaskState,
)
from realtime.store.base import PositionConflict, Store, TaskRef, Viewer, Write
from realtime.tasks.desk import Desk
from realtime.turn import STOP_TIMEOUT_S, End, Turn, Turns

LATE_S = 5.0
"""How much later than its caller was told of a failure a call to the store may still have its effect."""
MAX_END_S = 1.0
"""How long the ends of responses may take to be stored when an instance has to go."""


class Engine:
    """The sessions of this process at work. Owned by `async with`, inside which its journal and turns run.

    `commands` carries out what clients ask for; `defaults` and `limits` are for that.
    """

    def __init__(
        self,
        store: Store,
        turns: Turns,
        desk: Desk,
        admission: Admission,
        revocations: Revocations,
        *,
        defaults: Session,
        limits: Limits,
        ttl_s: float,
    ) -> None:
        self.store = store
        self.desk = desk
        self.instance = turns.instance
        self.hub = Hub(store, self)
        self.draining = False
        """Whether nothing is started here any more."""
        self.commands = Commands(store, self, desk, admission, turns, defaults=defaults, limits=limits, ttl_s=ttl_s)
        self._turns = turns
        self._revocations = revocations
        self._admitted: dict[str, dict[str, Purse]] = {}
        """By session and response: what is held for responses that were created here and do not run yet."""
        self._ttl_s = ttl_s
        self._running: dict[str, dict[str, Turn]] = {}
        self._background = Background()
        self._commits: set[asyncio.Task[None]] = set()
        self._kept_open: set[LiveSession] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    async def __aenter__(self) -> Self:
        await self._background.__aenter__()
        self.spawn(self._turns.journal.run())
        self.spawn(self._turns.pace.run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._background.__aexit__(kind, error, trace)
        if left := self._commits | self._turns.abandoned:
            _, late = await asyncio.wait(left, timeout=STOP_TIMEOUT_S)
            for task in late & self._commits:
                task.cancel()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Have `work` run until it ends or the engine does."""
        self._background.spawn(work)

    def describe(self, live: LiveSession) -> Session:
        """The session as clients see it now."""
        return msgspec.structs.replace(live.state.session, expires_at=timestamp(in_s=self._ttl_s))

    @asynccontextmanager
    async def use(self, session_id: str, principal: Principal) -> AsyncIterator[LiveSession]:
        """Use a session that the principal may see. Raises `NotFound` for any other, there or not, and
        `AuthenticationError` where their token counts no more for it."""
        async with self.hub.use(session_id) as live:
            self.check_may_see(live, principal)
            await self.store.use(session_id)  # not before: a stranger does not keep it
            yield live

    def check_may_see(self, live: LiveSession, principal: Principal) -> None:
        """Raise what `use` raises, if by now the principal may not use the session any more."""
        check_may_see(live.state.session, principal)
        self._revocations.check(principal, live.id)  # after that: a stranger is not told of it

    @asynccontextmanager
    async def attach(self, session_id: str, reader: Reader, principal: Principal) -> AsyncIterator[LiveSession]:
        """Look at a session, as a participant, for as long as the block lasts. Raises as `use`."""
        if is_task_id(session_id):
            raise session_not_found()
        async with self.hub.use(session_id) as live:
            self.check_may_see(live, principal)
            joining: asyncio.Task[None] | None  # until it has; a task would be kept as long as the connection
            joining = self.whole(live, self.store.join(session_id, Viewer(reader.participant, self.instance)))
            try:
                await asyncio.shield(joining)
                joining = None
                live.readers.add(reader)
                yield live
            finally:
                live.leave(reader)
                self.spawn(self._leave(session_id, reader, joining))

    async def finish_turns(self) -> None:
        """Return once no response runs here."""
        await self._idle.wait()

    async def end_turns(self, error: RealtimeError) -> None:
        """End every response that runs here because of `error`; returns once that is stored, or can't be in time."""
        for turns in self._running.values():
            for turn in turns.values():
                turn.stop(End.failed(error))
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_TIMEOUT_S + MAX_END_S):
                await self._idle.wait()

    def runs(self, session_id: str, response_id: str) -> bool:
        """Whether a response runs here."""
        return response_id in self._running.get(session_id, ())

    def start_next(self, live: LiveSession) -> None:
        """Run the response of a session that waits for nobody else, if there is one."""
        response = live.state.runnable()
        is_wanted = live.users > 0 and not self.draining
        if response is not None and is_wanted and not self.runs(live.id, response.id):
            self._start(live, response)

    async def bury(self, live: LiveSession, response: ResponseState, error: RealtimeError) -> None:
        """End a response that nobody runs any more, and go on with the next one."""
        try:
            await Turn(live, response, self._turns).bury(error)
        except (PositionConflict, RealtimeError):
            live.doubt()
        else:
            self.start_next(live)

    def followed(self, live: LiveSession) -> list[str]:
        """The responses that run elsewhere, and the tasks that run: a worker's words come from the store."""
        responses = [one.id for one in live.state.unfinished.values() if one.running and one.instance != self.instance]
        return responses + [task.id for task in live.state.unfinished_tasks.values() if task.running]

    def changed(self, live: LiveSession) -> None:
        """Whatever happened to a session: end what has to end."""
        self._let_go(live)
        if live.gone:
            self._end_all(live, _cancelled(f"session_{live.gone.reason}"))
            if live.state.unfinished_tasks:
                self.spawn(self._forget_tasks(live))
            self._keep_open(live)
            return
        if live.state.closed:
            self._end_all(live, _cancelled("session_closed", live.state.closed_by))
            for task in list(live.state.unfinished_tasks.values()):
                self._end_waiting(live, task, live.state.closed_by)
        for response_id, turn in self._running.get(live.id, {}).items():
            response = live.state.responses.get(response_id)
            if response is None or response.done:
                turn.lose()
        self._keep_open(live)
        self._look_for_viewers(live)

    def asked(self, live: LiveSession, request: ChannelEvent) -> None:
        """Do what the control channel asks for, where it concerns this instance."""
        if isinstance(request, CancelResponse):
            response = live.state.unfinished.get(request.response_id)
            if response is not None:
                self._stop(live, response, _cancelled(request.reason, request.for_event_id))
        elif isinstance(request, CancelTask):
            task = live.state.unfinished_tasks.get(request.task_id)
            if task is not None:
                self._end_waiting(live, task, request.for_event_id)

    def unended(self, live: LiveSession, response: ResponseState) -> None:
        """Write an end that the store has lost, so that whoever comes finds one. Who has seen it sees no other."""
        if not self.runs(live.id, response.id):
            lost = StoreError("store_lost", "The store has lost the end of the response.")
            self.spawn(self.bury(live, response, lost))

    def _keep_open(self, live: LiveSession) -> None:
        """Keep a session open while a response of it is unfinished: whoever runs it may be lost, and somebody has to
        notice."""
        is_busy = bool(live.state.unfinished) and not live.gone
        if is_busy and live not in self._kept_open:
            self._kept_open.add(live)
            self.hub.retain(live)
        elif not is_busy and live in self._kept_open:
            self._kept_open.discard(live)
            self.hub.release(live)

    def keep(self, live: LiveSession, response_id: str, purse: Purse) -> None:
        """Keep what a response may cost until it runs, unless it does already or has ended."""
        if response_id not in live.state.responses:  # the session was erased at once
            purse.drop()
        elif not self.runs(live.id, response_id):
            self._admitted.setdefault(live.id, {})[response_id] = purse
            self._let_go(live)

    def _let_go(self, live: LiveSession) -> None:
        """Let go of what is held for responses that others have taken over, or that are not there any more."""
        admitted = self._admitted.get(live.id, {})
        for response_id, purse in list(admitted.items()):
            response = live.state.responses[response_id]
            if response.done or (response.running and response.instance != self.instance):
                admitted.pop(response_id)
                purse.drop()
            elif live.gone:
                admitted.pop(response_id)
                purse.settle(None)
        if not admitted:
            self._admitted.pop(live.id, None)

    async def look_after(self, live: LiveSession, *, is_sure: bool = False) -> None:
        """Start what may run.

        Who appends a queued response, and who appends an end, looks in the store whether the other came from elsewhere
        meanwhile: at least one of the two sees both.
        """
        if not is_sure:
            with suppress(RealtimeError):
                await live.refresh()
        self.start_next(live)

    def whole(self, live: LiveSession, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do `work` to its end, even if whoever waits for it is cancelled."""
        self.hub.retain(live)
        task = asyncio.create_task(work)
        self._commits.add(task)
        task.add_done_callback(partial(self._committed, live))
        return task

    def _committed(self, live: LiveSession, task: asyncio.Task[None]) -> None:
        self._commits.discard(task)
        self.hub.release(live)
        if not task.cancelled():
            task.exception()  # who waited has been told of it, or is gone

    def _end_all(self, live: LiveSession, end: End) -> None:
        for response in list(live.state.unfinished.values()):
            self._stop(live, response, end)

    def _end_waiting(self, live: LiveSession, task: TaskState, event_id: str | None) -> None:
        """End a task that no worker has begun; one that runs is ended by its worker."""
        if not (task.stopping or task.running):
            self.spawn(self._end_task(live, task, event_id))
        task.stopping = True

    async def _end_task(self, live: LiveSession, task: TaskState, event_id: str | None) -> None:
        done = TaskDone(task_id=task.id, status="cancelled", for_event_id=event_id, at=timestamp())
        with suppress(PositionConflict, RealtimeError):  # it has begun, or whoever would begin it finds out
            await self.store.append(live.id, [Write(task.id, [done], expect=0)])
            await self.store.untrack([TaskRef(live.id, task.id, task.name)])

    async def _forget_tasks(self, live: LiveSession) -> None:
        """The session is gone: nobody has to look after its tasks, and they take up nobody's place."""
        tasks = [TaskRef(live.id, one.id, one.name) for one in live.state.unfinished_tasks.values()]
        with suppress(StoreError):  # then they are found to be over
            await self.store.untrack(tasks)

    def _stop(self, live: LiveSession, response: ResponseState, end: End) -> None:
        turn = self._running.get(live.id, {}).get(response.id)
        if turn is None and response.running:
            return  # it runs elsewhere, and is told there
        response.stopping = True
        (turn or self._start(live, response)).stop(end)

    def _start(self, live: LiveSession, response: ResponseState) -> Turn:
        self._admitted.get(live.id, {}).pop(response.id, None)
        turn = self._running.setdefault(live.id, {})[response.id] = Turn(live, response, self._turns)
        self._idle.clear()
        self.hub.retain(live)
        self.spawn(self._run(live, response.id, turn))
        return turn

    async def _run(self, live: LiveSession, response_id: str, turn: Turn) -> None:
        try:
            try:
                with metrics.RESPONSES_RUNNING.track_inprogress():
                    await turn.run()
            finally:
                self._forget(live.id, response_id)
            await self.look_after(live)
        finally:
            self.hub.release(live)

    def _forget(self, session_id: str, response_id: str) -> None:
        turns = self._running[session_id]
        del turns[response_id]
        if not turns:
            del self._running[session_id]
        if not self._running:
            self._idle.set()

    def _look_for_viewers(self, live: LiveSession) -> None:
        """Cancel the responses that nobody has looked at for their grace, and look again when the next one is due."""
        live.stop_timer()
        now = asyncio.get_running_loop().time()
        waiting = []
        for response in list(live.state.unfinished.values()):
            due = live.audience.due(response.id, live.state.settings_of(response))
            if due is not None and due <= now:
                self._stop(live, response, _cancelled("disconnected"))
            elif due is not None:
                waiting.append(due)
        if waiting:
            live.start_timer(min(waiting), self._look_for_viewers)

    async def _leave(self, session_id: str, reader: Reader, joining: asyncio.Task[None] | None) -> None:
        """Tell the store that a connection is gone, after it was told that it came, and until it has heard.

        Where it did not say that it had heard of the join, that may still be under way.
        """
        if joining is not None:
            await asyncio.wait([joining])
        await self._tell_left(session_id, reader)
        if joining is not None and not joining.cancelled() and isinstance(joining.exception(), StoreError):
            await asyncio.sleep(LATE_S)
            await self._tell_left(session_id, reader)

    async def _tell_left(self, session_id: str, reader: Reader) -> None:
        while True:
            try:
                await self.store.leave(session_id, reader.participant.connection_id, reader.floor_s)
                return
            except NotFound:
                return
            except StoreError:
                await asyncio.sleep(RETRY_S)


def _cancelled(reason: str, event_id: str | None = None) -> End:
    return End(status="cancelled", stop_reason=reason, for_event_id=event_id)
