"""Carries commands out and keeps responses moving: the one place where decisions, logs, turns and viewers meet."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

import msgspec

from realtime.errors import ConflictError, NotFound, RealtimeError
from realtime.hub import Hub, LiveSession, Reader
from realtime.protocol import (
    CONTROL_CHANNEL,
    SESSION_CHANNEL,
    Command,
    Session,
    new_id,
    timestamp,
)
from realtime.session import CancelResponse, Decision, Limits, ResponseState, decide, truncated_response
from realtime.store.base import CommandRecord, CommandSeen, PositionConflict, Store, Write
from realtime.turn import STOP_TIMEOUT_S, End, Turn, Turns, answer_text

BEATS_PER_LEASE = 3


class Engine:
    """The sessions of this process at work. Owned by `async with`, inside which its journal and turns run.

    `defaults` is the template of a new session's settings; its identity and times are filled in.
    """

    def __init__(
        self, store: Store, turns: Turns, *, defaults: Session, limits: Limits, lease_s: float, ttl_s: float
    ) -> None:
        self.store = store
        self.hub = Hub(store, changed=self._changed, cancel=self._cancel)
        self._turns = turns
        self._defaults = defaults
        self._limits = limits
        self._lease_s = lease_s
        self._ttl_s = ttl_s
        self._running: dict[tuple[str, str], Turn] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._group = asyncio.TaskGroup()
        self._stopping = False

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        self.spawn(self._turns.journal.run())
        self.spawn(self._turns.pace.run())
        self.spawn(self._beat())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await self._group.__aexit__(kind, error, trace)
        if self._turns.abandoned:
            await asyncio.wait(self._turns.abandoned, timeout=STOP_TIMEOUT_S)

    async def create(self, user: str) -> str:
        """Make a session of `user`'s; returns its id."""
        session_id = new_id("sess")
        session = msgspec.structs.replace(
            self._defaults, id=session_id, owner=user, created_at=timestamp(), expires_at=""
        )
        await self.store.create(session)
        return session_id

    def describe(self, live: LiveSession) -> Session:
        """The session as clients see it now."""
        return msgspec.structs.replace(live.state.session, expires_at=timestamp(in_s=self._ttl_s))

    @asynccontextmanager
    async def attach(self, session_id: str, viewer: Reader) -> AsyncIterator[LiveSession]:
        """Look at a session, as a participant, for as long as the block lasts. Raises `NotFound`."""
        async with self.hub.use(session_id) as live:
            await self.store.hold(session_id, [viewer.participant], self._lease_s)
            live.readers.add(viewer)
            try:
                yield live
            finally:
                live.leave(viewer)
                self.spawn(self._release(session_id, viewer))

    async def execute(self, live: LiveSession, command: Command, user: str) -> None:
        """Carry out a command: append what it comes to. Raises the `RealtimeError` that refuses it.

        A command whose `event_id` was carried out before does nothing. Cancelled, it was carried out whole or not at
        all.
        """
        record = _record(command, user)
        while not await self._seen(live, record):
            answer = truncated_response(command)
            heard = await answer_text(live, answer) if answer else ""
            try:
                decision = decide(
                    live.state,
                    command,
                    user=user,
                    now=timestamp(),
                    limits=self._limits,
                    heard=heard,
                    expires_at=timestamp(in_s=self._ttl_s),
                )
            except RealtimeError:
                if await self._seen(live, record):
                    return  # the same command was carried out meanwhile, and is what this one clashed with
                raise
            writes = _writes(live, decision)
            try:
                if writes:
                    await self.store.append(live.id, writes, record)
                return
            except PositionConflict:
                await live.refresh()
            except CommandSeen:
                continue

    async def _seen(self, live: LiveSession, record: CommandRecord | None) -> bool:
        if record is None:
            return False
        seen = await self.store.find_command(live.id, record.user, record.event_id)
        if seen is not None and seen.digest != record.digest:
            raise ConflictError("event_id_reused", "Another command was sent under that event_id.", param="event_id")
        return seen is not None

    def _changed(self, live: LiveSession) -> None:
        """Whatever happened to a session: end what has to end, start what may start."""
        if live.gone:
            self._end_all(live, End(status="cancelled", stop_reason=f"session_{live.gone.reason}"))
            return
        if live.state.closed:
            self._end_all(live, _cancelled("session_closed", live.state.closed_by))
        response = live.state.runnable()
        if response is not None and (live.id, response.id) not in self._running:
            self._start(live, response)
        self._look_for_viewers(live)

    def _cancel(self, live: LiveSession, request: CancelResponse) -> None:
        response = live.state.unfinished.get(request.response_id)
        if response is not None:
            self._stop(live, response, _cancelled(request.reason, request.for_event_id))

    def _end_all(self, live: LiveSession, end: End) -> None:
        for response in list(live.state.unfinished.values()):
            self._stop(live, response, end)

    def _stop(self, live: LiveSession, response: ResponseState, end: End) -> None:
        turn = self._running.get((live.id, response.id))
        if turn is None and response.running:
            return  # it runs elsewhere, and is told there
        response.stopping = True
        (turn or self._start(live, response)).stop(end)

    def _start(self, live: LiveSession, response: ResponseState) -> Turn:
        turn = self._running[live.id, response.id] = Turn(live, response, self._turns)
        self.hub.retain(live)
        self.spawn(self._run(live, response.id, turn))
        return turn

    async def _run(self, live: LiveSession, response_id: str, turn: Turn) -> None:
        try:
            await turn.run()
        finally:
            del self._running[live.id, response_id]
            self.hub.release(live)

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

    async def _release(self, session_id: str, viewer: Reader) -> None:
        try:
            await self.store.release(session_id, viewer.participant.connection_id, viewer.floor_s)
        except NotFound:
            return

    async def _beat(self) -> None:
        """Say again and again who looks from here, so that nobody is thought lost and no session in use expires."""
        while True:
            await asyncio.sleep(min(self._lease_s, self._ttl_s) / BEATS_PER_LEASE)
            for live in self.hub.sessions():
                await self._hold(live)
                await asyncio.sleep(0)  # thousands of sessions must not stop the loop

    async def _hold(self, live: LiveSession) -> None:
        viewers = [reader.participant for reader in live.readers]
        try:
            await self.store.hold(live.id, viewers, self._lease_s)
        except NotFound:
            return

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Have `work` run until it ends or the engine does. It must not raise: that would end the engine.

        An engine that is stopping takes no more work."""
        if self._stopping:
            work.close()
            return
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _cancelled(reason: str, event_id: str | None = None) -> End:
    return End(status="cancelled", stop_reason=reason, for_event_id=event_id)


def _record(command: Command, user: str) -> CommandRecord | None:
    if command.event_id is None:
        return None
    digest = hashlib.blake2b(msgspec.json.encode(command), digest_size=16).digest()
    return CommandRecord(user, command.event_id, digest)


def _writes(live: LiveSession, decision: Decision) -> list[Write]:
    writes = []
    if decision.events:
        writes.append(Write(SESSION_CHANNEL, decision.events, expect=live.state.position))
    if decision.cancels:
        writes.append(Write(CONTROL_CHANNEL, decision.cancels))
    return writes
