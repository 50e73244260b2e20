"""The engine in process, without sockets: commands in, events out, viewers that come and go. Others borrow `Tab`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any
from unittest import mock

import msgspec
import pytest

from realtime import app, pace, parts
from realtime import engine as engine_module
from realtime.cursor import Cursor, find_start
from realtime.doorbell import Doorbell
from realtime.engine import Engine
from realtime.errors import ConflictError, NotFound, RateLimited, ServerError, StoreError, Unavailable
from realtime.live import LiveSession
from realtime.log import Deltas
from realtime.observe import logs
from realtime.protocol import (
    SESSION_CHANNEL,
    ItemCreate,
    NewItem,
    Overrides,
    Participant,
    ResponseCancel,
    ResponseCreate,
    ResponseDone,
    ResponseInProgress,
    SessionClose,
    SessionUpdate,
    new_id,
    timestamp,
)
from realtime.responders.base import Request, Responder, ResponderEvent
from realtime.settings import Settings
from realtime.store.base import CommandRecord, Viewer, Write
from realtime.store.memory import MemoryStore
from realtime.viewers import SERVER_ENDED_FLOOR_S, UNSEEN_FLOOR_S
from tests.contract import begun, created, done
from tests.support.client import Event, Transcript
from tests.support.clock import advancing_clock
from tests.support.limits import GENEROUS
from tests.support.principals import known
from tests.support.stores import Faulty, unavailable

ANN = known("ann")

PATIENCE_S = 20.0


class EngineUnderTest(Engine):
    """An engine that keeps what was reported to the log beside it."""

    reports: list[BaseException]
    background: int
    """Its tasks while there is nothing to do."""
    stuck = False

    @property
    def idle(self) -> bool:
        """Nothing runs, nobody looks."""
        return not self._running and not list(self.hub.sessions()) and len(self._background._tasks) == self.background

    def give_up(self) -> None:
        """Cancel once more what the engine waits for at its end."""
        self.stuck = True
        for task in self._background._tasks:
            task.cancel()

    async def settled(self) -> None:
        """Return once nothing runs and nobody looks; fail if that doesn't come."""
        async with asyncio.timeout(PATIENCE_S):
            while not self.idle:  # noqa: ASYNC110  # no event tells of it
                await asyncio.sleep(0)


@asynccontextmanager
async def running_engine(
    responder: Responder, *, store: MemoryStore | None = None, **settings: Any
) -> AsyncIterator[EngineUnderTest]:
    """The engine of an application with these settings, over a store in memory."""
    chosen = Settings(**{"allowed_models": ("*",), "upstream_idle_timeout_s": 1e6, **GENEROUS, **settings})
    reports: list[BaseException] = []
    with (
        mock.patch.object(app, "Engine", EngineUnderTest),
        mock.patch.object(parts, "MemoryStore", lambda **options: store or MemoryStore(**options)),
        mock.patch.object(logs, "report", reports.append),
        mock.patch.object(pace, "MAX_REST_S", 0.0),  # a busy test would rest by the wall clock
    ):
        application = app.create_app(responder, chosen)
        engine: EngineUnderTest = application.state.engine
        async with application.router.lifespan_context(application):
            engine.reports = reports
            engine.background = len(engine._background._tasks)
            try:
                yield engine
            finally:
                leaving = asyncio.get_running_loop().call_later(PATIENCE_S, engine.give_up)
    leaving.cancel()
    assert not engine.stuck, "the engine did not end by itself"


class Tab:
    """Somebody who looks at a session through a cursor, as a connection does, and holds it to the protocol."""

    def __init__(self, engine: Engine) -> None:
        self.participant = Participant(user="ann", connection_id=new_id("conn"), since=timestamp())
        self.floor_s = 0.0
        self.transcript = Transcript()
        self.live: LiveSession
        self._engine = engine
        self._doorbell = Doorbell()
        self._cursor: Cursor | None = None

    def wake(self) -> None:
        """Something may be new."""
        self._doorbell.ring()

    def follows(self, channel: str) -> bool:
        """Whether the channel's end was not shown yet."""
        return self._cursor is not None and channel in self._cursor.positions

    async def look(self, live: LiveSession) -> None:
        """Begin with the session's history."""
        self.live = live
        self._cursor = Cursor(live, await find_start(live, None))

    async def send(self, command: Any) -> None:
        """Carry out a command."""
        await self._engine.commands.execute(self.live, command, ANN)

    async def respond(self, **fields: Any) -> str:
        """Start a response; returns its id."""
        response_id = new_id("resp")
        await self.send(ResponseCreate(**{"response_id": response_id, "input": "go", **fields}))
        return response_id

    async def cancel(self, response_id: str, event_id: str | None = None) -> None:
        """Ask for a response's end."""
        await self.send(ResponseCancel(response_id=response_id, event_id=event_id))

    async def until(self, kind: str, *, patience_s: float | None = PATIENCE_S, **fields: Any) -> Event:
        """Look on until an event of that type with those top-level fields; returns it."""
        async with asyncio.timeout(patience_s):
            while True:
                event = await self._next()
                if event["type"] == kind and all(event.get(name) == value for name, value in fields.items()):
                    return event

    async def done(self, response_id: str) -> Event:
        """Look on until the response's end."""
        return self.transcript.done.get(response_id) or await self.until("response.done", response_id=response_id)

    async def _next(self) -> Event:
        assert self._cursor is not None
        while True:
            event = await self._cursor.next(asyncio.get_running_loop().time())
            if event is not None:
                found: Event = msgspec.to_builtins(event)
                self.transcript.apply(found)
                return found
            await self._doorbell.wait(self._cursor.due)


@asynccontextmanager
async def opened(engine: Engine, session_id: str | None = None) -> AsyncIterator[Tab]:
    """A tab that looks at a session: a new one, or `session_id`."""
    tab = Tab(engine)
    async with engine.attach(session_id or await engine.commands.create(ANN), tab, ANN) as live:
        await tab.look(live)
        yield tab


async def stored(engine: Engine, session_id: str, response_id: str) -> tuple[str, list[ResponseDone]]:
    """What the store has of a response: its text, and its ends, the last of which is the last entry."""
    entries = await engine.store.read(session_id, response_id, 0, 10_000_000)
    text = "".join("".join(entry.texts) for entry in entries if isinstance(entry, Deltas))
    ends = [entry for entry in entries if isinstance(entry, ResponseDone)]
    assert not ends or entries[-1] is ends[-1]
    return text, ends


async def turns_of_the_loop(count: int = 50) -> None:
    """Let the loop turn, for what might but shouldn't happen."""
    for _ in range(count):
        await asyncio.sleep(0)


class Gated:
    """A responder that says a piece, waits for its gate, and says another. One for all of a test's responses."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.asked: list[Request] = []
        self.closed = 0

    async def __call__(self, request: Request) -> AsyncIterator[ResponderEvent]:
        """Answer."""
        self.asked.append(request)
        try:
            yield "one "
            await self.gate.wait()
            yield "two"
        finally:
            self.closed += 1


async def test_responses_wait_for_each_other_in_order() -> None:
    """Of three that are enqueued each begins once the one before it has its end in the store."""
    running = []

    async def responder(request: Request) -> AsyncIterator[ResponderEvent]:
        running.append(request.response_id)
        yield "done"
        assert running[-1] == request.response_id

    async with running_engine(responder) as engine:
        async with opened(engine) as tab:
            ids = [await tab.respond(multitask_strategy="enqueue") for _ in range(3)]
            for response_id in ids:
                assert (await tab.done(response_id))["status"] == "completed"
        assert running == ids
        kinds = [(event["type"], event.get("response_id")) for event in tab.transcript.events]
        for first, second in pairwise(ids):
            assert kinds.index(("response.done", first)) < kinds.index(("response.in_progress", second))
        await engine.settled()


async def test_an_interrupting_response_starts_after_the_ends_of_the_others() -> None:
    """It cancels what runs and what waits, in its own name, and runs once their ends are stored."""
    responder = Gated()
    async with running_engine(responder) as engine:
        async with opened(engine) as tab:
            running = await tab.respond()
            await tab.until("response.output_text.delta")
            waiting = await tab.respond(multitask_strategy="enqueue")
            interrupting = await tab.respond(multitask_strategy="interrupt", event_id="evt_i")
            responder.gate.set()
            await tab.done(interrupting)
        for response_id in running, waiting:
            end = tab.transcript.done[response_id]
            assert (end["status"], end["stop_reason"], end["for_event_id"]) == ("cancelled", "interrupted", "evt_i")
        assert tab.transcript.done[interrupting]["status"] == "completed"
        assert [request.response_id for request in responder.asked] == [running, interrupting]
        kinds = [(event["type"], event.get("response_id")) for event in tab.transcript.events]
        began = kinds.index(("response.in_progress", interrupting))
        assert kinds.index(("response.done", running)) < began
        assert kinds.index(("response.done", waiting)) < began
        await engine.settled()


async def test_two_creations_at_once_are_decided_one_after_the_other() -> None:
    """Under `reject` one of them is refused, from whichever tab it came."""
    responder = Gated()
    responder.gate.set()
    async with running_engine(responder) as engine:
        async with opened(engine) as first, opened(engine, first.live.id) as second:
            results = await asyncio.gather(first.respond(), second.respond(), return_exceptions=True)
            refused = [result for result in results if isinstance(result, ConflictError)]
            created = [result for result in results if isinstance(result, str)]
            assert [error.code for error in refused] == ["response_in_progress"]
            await first.done(created[0])
            await second.done(created[0])
        await engine.settled()


async def test_a_command_is_carried_out_once_under_its_event_id() -> None:
    """Sent again, also at the same moment, it does nothing; with other content it is refused."""
    async with running_engine(Gated()) as engine:
        async with opened(engine) as first, opened(engine, first.live.id) as second:
            command = ItemCreate(event_id="evt_1", item=NewItem(role="user", content="hello"))
            await asyncio.gather(first.send(command), second.send(command), first.send(command))
            await first.send(command)
            other = ItemCreate(event_id="evt_1", item=NewItem(role="user", content="other"))
            with pytest.raises(ConflictError) as refused:
                await second.send(other)
            assert refused.value.code == "event_id_reused"
            await first.send(SessionUpdate(session=Overrides(instructions="x")))
            await first.until("session.updated")
        assert [item["content"] for item in first.transcript.items] == ["hello"]
        await engine.settled()


async def test_a_refused_command_may_be_retried_under_its_event_id() -> None:
    """A refusal is not recorded."""
    responder = Gated()
    async with running_engine(responder) as engine:
        async with opened(engine) as tab:
            running = await tab.respond()
            retried = ResponseCreate(response_id="again", input="go", event_id="evt_1")
            with pytest.raises(ConflictError):
                await tab.send(retried)
            await tab.cancel(running)
            await tab.done(running)
            responder.gate.set()
            await tab.send(retried)
            assert (await tab.done("again"))["status"] == "completed"
        await engine.settled()


async def test_cancelling_what_is_done_is_no_error() -> None:
    """It changes nothing, and nothing comes after the end."""
    responder = Gated()
    responder.gate.set()
    async with running_engine(responder) as engine:
        async with opened(engine) as tab:
            response_id = await tab.respond()
            await tab.done(response_id)
            await tab.cancel(response_id)
            await turns_of_the_loop()
            text, ends = await stored(engine, tab.live.id, response_id)
            assert (text, len(ends)) == ("one two", 1)
            with pytest.raises(NotFound):
                await tab.cancel("nonsense")
        await engine.settled()


async def test_closing_a_session_ends_all_its_responses_in_the_closes_name() -> None:
    """The end of each carries the id of the command that caused it."""
    async with running_engine(Gated()) as engine:
        async with opened(engine) as tab:
            ids = [await tab.respond(multitask_strategy="enqueue") for _ in range(3)]
            await tab.until("response.output_text.delta")
            await tab.send(SessionClose(event_id="evt_close"))
            await tab.until("session.closed")
        for response_id in ids:
            end = tab.transcript.done[response_id]
            assert (end["status"], end["stop_reason"]) == ("cancelled", "session_closed")
            assert end.get("for_event_id") == "evt_close"
        await engine.settled()


async def test_erasing_a_session_ends_its_responses() -> None:
    """The responder is closed, and nothing of the session is left."""
    responder = Gated()
    async with running_engine(responder) as engine:
        async with opened(engine) as tab:
            for _ in range(3):
                await tab.respond(multitask_strategy="enqueue")
            await tab.until("response.output_text.delta")
            await engine.store.erase(tab.live.id)
            async with asyncio.timeout(PATIENCE_S):
                while not responder.closed:  # noqa: ASYNC110
                    await asyncio.sleep(0)
        await engine.settled()
        assert (len(responder.asked), responder.closed) == (1, 1)
        assert engine.reports == []


async def test_leaving_the_engine_closes_what_runs() -> None:
    """No responder outlives the engine."""
    responder = Gated()
    async with running_engine(responder) as engine:
        async with opened(engine) as tab:
            await tab.respond(on_disconnect="continue")
            await tab.until("response.output_text.delta")
        assert responder.closed == 0
    assert responder.closed == 1


async def test_leaving_the_engine_while_a_response_is_being_stopped_takes_no_time() -> None:
    """A responder that still cleans up is not waited for, and neither is a journal that has ended."""
    cleaning_up = asyncio.Event()

    async def lingers(request: Request) -> AsyncIterator[ResponderEvent]:
        try:
            yield "one"
            await asyncio.get_running_loop().create_future()
        finally:
            cleaning_up.set()
            await asyncio.get_running_loop().create_future()

    async with running_engine(lingers) as engine:
        async with opened(engine) as tab:
            response_id = await tab.respond(on_disconnect="continue")
            await tab.until("response.output_text.delta")
            await tab.cancel(response_id)
            await cleaning_up.wait()


# --- viewers ---------------------------------------------------------------------------------------------------------


async def test_the_last_viewer_counts() -> None:
    """One of two leaves and nothing happens; the other leaves and the response ends at once."""
    responder = Gated()
    async with running_engine(responder) as engine:
        async with opened(engine) as first:
            async with opened(engine, first.live.id) as second:
                response_id = await first.respond()
                await second.until("response.output_text.delta")
            await turns_of_the_loop()
            assert responder.closed == 0
        await engine.settled()
        _, [end] = await stored(engine, first.live.id, response_id)
        assert (end.status, end.stop_reason, end.for_event_id) == ("cancelled", "disconnected", None)
        assert (responder.closed, end.usage.estimated) == (1, True)


@pytest.mark.parametrize(
    ("grace_ms", "floor_s", "lasts_s"),
    [
        (0, SERVER_ENDED_FLOOR_S, 15.0),
        (2_000, 0.0, 2.0),
        (2_000, SERVER_ENDED_FLOOR_S, 15.0),
        (40_000, SERVER_ENDED_FLOOR_S, 40.0),
    ],
)
async def test_a_response_waits_for_its_grace_and_its_floor(grace_ms: int, floor_s: float, lasts_s: float) -> None:
    """The longer one of the two, from when the last viewer left."""
    responder = Gated()
    async with running_engine(responder, disconnect_grace_ms=grace_ms) as engine:
        with advancing_clock() as advance:
            async with opened(engine) as tab:
                response_id = await tab.respond()
                await tab.until("response.output_text.delta")
                advance(100.0)
                await turns_of_the_loop()
                tab.floor_s = floor_s
            await turns_of_the_loop()
            advance(lasts_s - 0.5)
            await turns_of_the_loop()
            assert responder.closed == 0
            advance(1.0)
            await engine.settled()
        _, [end] = await stored(engine, tab.live.id, response_id)
        assert (end.status, end.stop_reason) == ("cancelled", "disconnected")


async def test_a_viewer_that_returns_stops_the_clock() -> None:
    """And when it leaves again, the whole grace begins anew."""
    responder = Gated()
    async with running_engine(responder, disconnect_grace_ms=2_000) as engine:
        with advancing_clock() as advance:
            async with opened(engine) as tab:
                response_id = await tab.respond()
                await tab.until("response.output_text.delta")
            await turns_of_the_loop()
            advance(1.5)
            async with opened(engine, tab.live.id) as returned:
                await returned.until("response.output_text.delta")
                advance(60.0)
                await turns_of_the_loop()
            await turns_of_the_loop()
            advance(1.5)
            await turns_of_the_loop()
            assert responder.closed == 0
            responder.gate.set()
            await engine.settled()
        text, [end] = await stored(engine, tab.live.id, response_id)
        assert (text, end.status) == ("one two", "completed")


async def test_each_response_has_its_own_grace() -> None:
    """Of two that run and wait, the one without grace ends at once, the other at its time."""
    responder = Gated()
    async with running_engine(responder) as engine:
        with advancing_clock() as advance:
            async with opened(engine) as tab:
                patient = await tab.respond(disconnect_grace_ms=5_000)
                await tab.until("response.output_text.delta")
                hasty = await tab.respond(multitask_strategy="enqueue")
                lasting = await tab.respond(multitask_strategy="enqueue", on_disconnect="continue")
            await turns_of_the_loop()
            assert len((await stored(engine, tab.live.id, hasty))[1]) == 1
            assert (await stored(engine, tab.live.id, patient))[1] == []
            advance(4.5)
            await turns_of_the_loop()
            assert (await stored(engine, tab.live.id, patient))[1] == []
            responder.gate.set()
            advance(1.0)
            await engine.settled()
        ends = {name: (await stored(engine, tab.live.id, name))[1] for name in (patient, hasty, lasting)}
        assert [end.status for [end] in ends.values()][1:] == ["cancelled", "completed"]


async def test_a_response_that_nobody_has_seen_waits_from_its_creation() -> None:
    """It is not cancelled for a viewer that left before it was made."""
    responder = Gated()
    async with running_engine(responder) as engine:
        with advancing_clock() as advance:
            async with opened(engine) as tab:
                pass
            await engine.settled()
            advance(100.0)
            async with engine.hub.use(tab.live.id) as live:
                command = ResponseCreate(response_id="unseen", input="go")
                await engine.commands.execute(live, command, ANN)
            await turns_of_the_loop()
            advance(UNSEEN_FLOOR_S - 0.5)
            await turns_of_the_loop()
            assert (len(responder.asked), responder.closed) == (1, 0)
            advance(1.0)
            await engine.settled()
        _, [end] = await stored(engine, tab.live.id, "unseen")
        assert (end.status, end.stop_reason) == ("cancelled", "disconnected")


async def test_once_seen_it_has_no_floor_any_more() -> None:
    """A viewer comes, sees it and leaves: it ends at once."""
    responder = Gated()
    async with running_engine(responder) as engine:
        session_id = await engine.commands.create(ANN)
        async with engine.hub.use(session_id) as live:
            await engine.commands.execute(live, ResponseCreate(response_id="seen", input="go"), ANN)
            async with opened(engine, session_id) as tab:
                await tab.until("response.output_text.delta")
            await turns_of_the_loop()
        await engine.settled()
        assert responder.closed == 1


async def test_a_process_that_froze_for_longer_than_the_lease_blames_nobody() -> None:
    """It was stopped, or its machine was: its viewers are still there, and no response ends for it."""
    now = [1000.0]
    store = MemoryStore(clock=lambda: now[0])
    responder = Gated()
    async with running_engine(responder, store=store, lease_s=10.0) as engine:
        async with opened(engine) as tab:
            response_id = await tab.respond()
            await tab.until("response.output_text.delta")
            now[0] += 60.0  # neither the beat nor the sweep could run meanwhile; the sweep is first
            store.sweep()
            await turns_of_the_loop()
            assert responder.closed == 0
            responder.gate.set()
            assert (await tab.done(response_id))["status"] == "completed"
        await engine.settled()


async def test_the_beat_keeps_viewers_and_sessions_in_use_alive() -> None:
    """Hours pass in steps shorter than the lease, and nobody is thought lost."""
    now = [0.0]
    store = MemoryStore(clock=lambda: now[0], session_ttl_s=20)
    responder = Gated()
    async with running_engine(responder, store=store, lease_s=10.0, session_ttl_s=20) as engine:
        with advancing_clock() as advance:
            async with opened(engine) as tab:
                response_id = await tab.respond()
                await tab.until("response.output_text.delta")
                for _ in range(100):
                    now[0] += 4.0
                    advance(4.0)
                    await turns_of_the_loop(5)
                    store.sweep()
                assert responder.closed == 0
                responder.gate.set()
                assert (await tab.done(response_id))["status"] == "completed"
            await engine.settled()


class _SlowClaims(MemoryStore):
    """A store in which something happens while a response is being claimed."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        super().__init__()
        self._meanwhile = meanwhile

    async def append(
        self, session_id: str, writes: Sequence[Write], command: CommandRecord | None = None, *, keep_s: float = 0.0
    ) -> None:
        if any(isinstance(write.entries[0], ResponseInProgress) for write in writes):
            self._meanwhile()
        await super().append(session_id, writes, command, keep_s=keep_s)


async def test_a_grace_that_ends_with_the_claim_ends_the_response() -> None:
    """The turn learns of it from its own append, and does not call the model any more."""
    responder = Gated()
    with advancing_clock() as advance:
        store = _SlowClaims(lambda: advance(UNSEEN_FLOOR_S + 1))
        async with running_engine(responder, store=store) as engine:
            session_id = await engine.commands.create(ANN)
            async with engine.hub.use(session_id) as live:
                await engine.commands.execute(live, ResponseCreate(response_id="late", input="go"), ANN)
            await turns_of_the_loop()  # the clock jumps meanwhile
            await engine.settled()
            _, [end] = await stored(engine, session_id, "late")
            assert (end.status, end.stop_reason) == ("cancelled", "disconnected")
            assert responder.asked == []


# --- a store that does not answer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["after", "untold"])
@pytest.mark.parametrize("is_sent_again", [True, False])
async def test_a_command_without_an_answer_may_have_been_carried_out(fault: str, is_sent_again: bool) -> None:
    """Who sent it is told that it failed, and may send it again: it was made once, and it runs."""
    responder = Gated()
    responder.gate.set()
    store = Faulty()
    async with running_engine(responder, store=store) as engine:
        with advancing_clock() as advance:
            async with opened(engine) as tab:
                command = ResponseCreate(response_id="r", input="go", event_id="evt_1")
                store.faults = [fault]
                with pytest.raises(StoreError):
                    await tab.send(command)
                await turns_of_the_loop()
                if is_sent_again:
                    outcome = await engine.commands.execute(tab.live, command, ANN)
                    assert (outcome.duplicate, outcome.made.response_id) == (True, "r")
                for _ in range(3):
                    advance(1.0)
                    await turns_of_the_loop()
                assert (await tab.done("r"))["status"] == "completed"
            await engine.settled()
        assert len(responder.asked) == 1


async def test_a_command_that_lands_late_is_found_when_it_is_sent_again() -> None:
    """The store had it in its queue when it failed, and tells nobody of it here."""
    responder = Gated()
    responder.gate.set()
    store = Faulty()
    async with running_engine(responder, store=store) as engine:
        with advancing_clock() as advance:
            async with opened(engine) as tab:
                command = ResponseCreate(response_id="r", input="go", event_id="evt_1")
                store.faults = ["late"]
                with pytest.raises(StoreError):
                    await tab.send(command)
                await turns_of_the_loop()
                with mock.patch.object(store, "_listeners", {}):
                    await store.land()
                assert "r" not in tab.live.state.responses
                assert (await engine.commands.execute(tab.live, command, ANN)).duplicate
                for _ in range(3):
                    advance(1.0)
                    await turns_of_the_loop()
                assert (await tab.done("r"))["status"] == "completed"
            await engine.settled()


async def test_a_command_that_was_not_carried_out_may_be_sent_again() -> None:
    """It failed before it had an effect."""
    responder = Gated()
    responder.gate.set()
    store = Faulty()
    async with running_engine(responder, store=store) as engine:
        async with opened(engine) as tab:
            command = ResponseCreate(response_id="r", input="go", event_id="evt_1")
            store.faults = ["before"]
            with pytest.raises(StoreError):
                await tab.send(command)
            assert not (await engine.commands.execute(tab.live, command, ANN)).duplicate
            assert (await tab.done("r"))["status"] == "completed"
        await engine.settled()


class HangingStore(MemoryStore):
    """A store whose joins and appends take until `gate` is opened, and have their effect then."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.gate.set()

    async def join(self, session_id: str, viewer: Viewer) -> None:
        await self.gate.wait()
        await super().join(session_id, viewer)

    async def append(
        self, session_id: str, writes: Sequence[Write], command: CommandRecord | None = None, *, keep_s: float = 0.0
    ) -> None:
        await self.gate.wait()
        await super().append(session_id, writes, command, keep_s=keep_s)


@pytest.mark.parametrize("limits", [{"max_responses_per_user": 1}, {"rate_responses": "1/hour"}])
async def test_what_a_command_takes_is_not_refused_to_its_like(limits: dict[str, Any]) -> None:
    """Sent again while it is being carried out, it waits for that, and is told the same."""
    responder, store = Gated(), HangingStore()
    responder.gate.set()
    async with running_engine(responder, store=store, **limits) as engine:
        async with opened(engine) as tab:
            store.gate.clear()
            command = ResponseCreate(response_id="r", input="go", event_id="evt_1")
            sent = [asyncio.create_task(engine.commands.execute(tab.live, command, ANN)) for _ in range(3)]
            await turns_of_the_loop()
            assert not any(one.done() for one in sent)
            store.gate.set()
            outcomes = await asyncio.gather(*sent)
            assert [one.duplicate for one in outcomes] == [False, True, True]
            assert {one.made.response_id for one in outcomes} == {"r"}
            await tab.done("r")
        await engine.settled()
    assert engine.commands._under_way == {}


async def test_what_was_refused_to_a_command_is_asked_again_by_its_like() -> None:
    """One that waited is carried out by itself, if the one before was not."""
    responder = Gated()
    async with running_engine(responder, max_responses_per_user=1) as engine:
        async with opened(engine) as tab:
            await tab.respond(response_id="first")
            command = ResponseCreate(response_id="r", input="go", event_id="evt_1", multitask_strategy="enqueue")
            sent = [asyncio.create_task(engine.commands.execute(tab.live, command, ANN)) for _ in range(3)]
            outcomes = await asyncio.gather(*sent, return_exceptions=True)
            assert [type(one) for one in outcomes] == [RateLimited] * 3
            assert len({id(one) for one in outcomes}) == 3
            responder.gate.set()
            await tab.done("first")
        await engine.settled()
    assert engine.commands._under_way == {}


async def test_where_the_store_does_not_answer_a_command_its_like_fail_with_it() -> None:
    """All at once, and not each after a time of its own. What comes after that is carried out."""
    responder, store = Gated(), Faulty()
    responder.gate.set()
    async with running_engine(responder, store=store) as engine:
        async with opened(engine) as tab:
            store.faults = ["before"]
            command = ResponseCreate(response_id="r", input="go", event_id="evt_1")
            sent = [engine.commands.execute(tab.live, command, ANN) for _ in range(8)]
            outcomes = await asyncio.gather(*sent, return_exceptions=True)
            assert [type(one) for one in outcomes] == [StoreError] * 8
            assert not (await engine.commands.execute(tab.live, command, ANN)).duplicate
            await tab.done("r")
        await engine.settled()
    assert engine.commands._under_way == {}


@pytest.mark.parametrize("cancelled", [0, 1])
async def test_a_command_that_is_cancelled_takes_none_of_its_like_along(cancelled: int) -> None:
    """Neither the one that is being carried out those that wait for it, nor one that waits the others."""
    responder, store = Gated(), HangingStore()
    responder.gate.set()
    async with running_engine(responder, store=store) as engine:
        async with opened(engine) as tab:
            store.gate.clear()
            command = ResponseCreate(response_id="r", input="go", event_id="evt_1")
            sent = [asyncio.create_task(engine.commands.execute(tab.live, command, ANN)) for _ in range(4)]
            await turns_of_the_loop()
            sent[cancelled].cancel()
            await asyncio.wait([sent.pop(cancelled)])
            await turns_of_the_loop()
            assert not any(one.done() for one in sent)
            store.gate.set()
            outcomes = await asyncio.gather(*sent)
            assert {one.made.response_id for one in outcomes} == {"r"}
            assert sum(not one.duplicate for one in outcomes) == cancelled
            await tab.done("r")
        await engine.settled()
    assert engine.commands._under_way == {}


async def test_a_viewer_that_leaves_while_it_comes_is_gone() -> None:
    """The store hears of the leave after the join, however long that takes: it counts nobody who isn't there."""
    store = HangingStore()
    async with running_engine(Gated(), store=store) as engine:
        async with opened(engine) as tab:
            store.gate.clear()

            async def come() -> None:
                async with opened(engine, tab.live.id):
                    raise AssertionError("the store never answered")

            coming = asyncio.create_task(come())
            await turns_of_the_loop()
            coming.cancel()
            await asyncio.wait([coming])
            await turns_of_the_loop()
            store.gate.set()
            await turns_of_the_loop()
            assert await store.viewers(tab.live.id) == [Viewer(tab.participant, engine.instance)]
        await engine.settled()


class LateJoins(Faulty):
    """A store that fails joins, and carries them out a second later."""

    late = False

    async def join(self, session_id: str, viewer: Viewer) -> None:
        if not self.late:
            await super().join(session_id, viewer)
            return
        self.landing = asyncio.create_task(self._land(session_id, viewer))
        raise unavailable()

    async def _land(self, session_id: str, viewer: Viewer) -> None:
        await asyncio.sleep(1)
        await super().join(session_id, viewer)


async def test_a_join_that_lands_after_the_leave_counts_nobody() -> None:
    """The viewer was refused, because the store did not answer in time."""
    store = LateJoins()
    async with running_engine(Gated(), store=store) as engine:
        with advancing_clock() as advance:
            async with opened(engine) as tab:
                store.late = True
                with pytest.raises(StoreError):
                    async with opened(engine, tab.live.id):
                        raise AssertionError("the store failed")
                await turns_of_the_loop()
                advance(1.1)
                await turns_of_the_loop()
                assert store.landing.done()
                for _ in range(6):
                    advance(1.0)
                    await turns_of_the_loop()
                assert await store.viewers(tab.live.id) == [Viewer(tab.participant, engine.instance)]
            await engine.settled()


async def test_a_command_is_carried_out_although_who_sent_it_is_gone() -> None:
    """And what it has made is started."""
    store, responder = HangingStore(), Gated()
    async with running_engine(responder, store=store) as engine:
        async with opened(engine) as tab:
            store.gate.clear()
            sending = asyncio.create_task(tab.respond(response_id="r"))
            await turns_of_the_loop()
            sending.cancel()
            await asyncio.wait([sending])
            store.gate.set()
            responder.gate.set()
            assert (await tab.done("r"))["status"] == "completed"
        await engine.settled()


async def test_leaving_the_engine_leaves_no_command_behind() -> None:
    """One that the store never answers is given up after a while."""
    store = HangingStore()
    with mock.patch.object(engine_module, "STOP_TIMEOUT_S", 0.05):
        async with running_engine(Gated(), store=store) as engine:
            tab = Tab(engine)
            async with engine.hub.use(await engine.commands.create(ANN)) as tab.live:
                store.gate.clear()
                sending = asyncio.create_task(tab.respond())
                await turns_of_the_loop()
                sending.cancel()
                await asyncio.wait([sending])


async def test_a_fault_in_the_background_ends_nothing_else() -> None:
    """It is reported, and the engine goes on."""

    async def fault() -> None:
        raise KeyError("ours")

    responder = Gated()
    async with running_engine(responder) as engine:
        engine.spawn(fault())
        await turns_of_the_loop()
        assert [type(error) for error in engine.reports] == [KeyError]
        engine.reports.clear()
        async with opened(engine) as tab:
            await tab.respond()
            responder.gate.set()
            await tab.until("response.done")


async def test_a_session_stays_open_while_a_response_is_unfinished() -> None:
    """Whoever runs it may be lost, and somebody has to notice, though nobody looks from here."""
    async with running_engine(Gated()) as engine:
        session_id = await engine.commands.create(ANN)
        async with engine.hub.use(session_id):
            await engine.store.append(session_id, [Write(SESSION_CHANNEL, [created("r")])])
            await engine.store.append(session_id, [Write("r", [begun("r", "elsewhere")])])
        assert [live.id for live in engine.hub.sessions()] == [session_id]
        await engine.store.append(session_id, [Write("r", [done("r")])])
        await engine.settled()


async def test_ending_all_turns_stores_their_ends() -> None:
    """Those that run, and no other one is started then."""
    responder = Gated()
    async with running_engine(responder) as engine:
        async with opened(engine) as tab:
            running = await tab.respond()
            await tab.until("response.output_text.delta")
            await tab.respond(multitask_strategy="enqueue")
            engine.draining = True
            finishing = asyncio.create_task(engine.finish_turns())
            await turns_of_the_loop()
            assert not finishing.done()
            await engine.end_turns(ServerError("instance_shutdown", "Bye."))
            await finishing
            text, [end] = await stored(engine, tab.live.id, running)
            assert (text, end.status, end.error and end.error.code) == ("one ", "failed", "instance_shutdown")
            assert len(responder.asked) == 1
            with pytest.raises(Unavailable):
                await tab.respond()
            await tab.send(SessionUpdate(session=Overrides(instructions="x")))
            engine.draining = False
            await tab.send(SessionClose())
        await engine.settled()


async def test_ends_that_can_t_be_stored_hold_up_nobody_for_long() -> None:
    """An instance has to go at some time."""
    responder = Gated()
    store = Faulty()
    with mock.patch.object(engine_module, "STOP_TIMEOUT_S", 0.05), mock.patch.object(engine_module, "MAX_END_S", 0.05):
        async with running_engine(responder, store=store) as engine:
            async with opened(engine) as tab:
                await tab.respond(on_disconnect="continue")
                await tab.until("response.output_text.delta")
                store.is_down = True
                async with asyncio.timeout(PATIENCE_S):
                    await engine.end_turns(ServerError("instance_shutdown", "Bye."))
        assert responder.closed == 1
