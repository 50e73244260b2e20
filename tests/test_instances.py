"""Several instances over one store, in one process: whatever happens on one of them, all of them come to the same."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from random import Random
from typing import Any

import pytest

from realtime.errors import ConflictError, StoreError, UpstreamError
from realtime.log import Deltas
from realtime.protocol import (
    Overrides,
    ResponseCreated,
    ResponseDone,
    ResponseInProgress,
    SessionClose,
    SessionUpdate,
)
from realtime.responders.base import Request, Responder, ResponderEvent
from realtime.store.base import Appended, Notice, Store, Write
from realtime.store.memory import MemoryStore
from realtime.viewers import SERVER_ENDED_FLOOR_S
from tests.contract import done
from tests.support.clock import advancing_clock
from tests.support.stores import Distant, Elsewhere, Late, Line, forget
from tests.test_engine import (
    PATIENCE_S,
    EngineUnderTest,
    Gated,
    Tab,
    opened,
    running_engine,
    stored,
    turns_of_the_loop,
)

LEASE_S = 9.0


class Instances:
    """Two of them, their stores, and what they were asked for. `advance` lets time pass."""

    def __init__(self, stores: list[MemoryStore], responders: list[Gated], advance: Callable[[float], None]) -> None:
        self.stores = stores
        self.responders = responders
        self.engines: list[EngineUnderTest] = []
        self.advance = advance

    @property
    def asked(self) -> list[str]:
        """The responses that some model was asked for."""
        return [request.response_id for responder in self.responders for request in responder.asked]

    @property
    def closed(self) -> int:
        return sum(responder.closed for responder in self.responders)

    def open_gates(self) -> None:
        """Let every answer end."""
        for responder in self.responders:
            responder.gate.set()

    async def pass_s(self, seconds: float, *, step_s: float = 0.5) -> None:
        """Let so much time pass that all that is due in it happens."""
        for _ in range(round(seconds / step_s)):
            self.advance(step_s)
            await turns_of_the_loop(20)

    async def settled(self) -> None:
        for engine in self.engines:
            await engine.settled()


@asynccontextmanager
async def instances(
    *kinds: Callable[[MemoryStore], MemoryStore], responders: list[Responder] | None = None, **settings: Any
) -> AsyncIterator[Instances]:
    """So many instances as `kinds` of ways to the store are given."""
    with advancing_clock() as advance:
        base = MemoryStore(clock=asyncio.get_running_loop().time)
        gated = [Gated() for _ in kinds]
        found = Instances([kind(base) for kind in kinds], gated, advance)
        async with AsyncExitStack() as stack:
            for number, store in enumerate(found.stores):
                responder = responders[number] if responders else gated[number]
                engine = running_engine(responder, store=store, **{"lease_s": LEASE_S, **settings})
                found.engines.append(await stack.enter_async_context(engine))
            yield found
            await found.settled()


@pytest.fixture
async def pair() -> AsyncIterator[Instances]:
    """Two instances that hear of each other at once."""
    async with instances(Elsewhere, Elsewhere) as pair:
        yield pair


async def both(pair: Instances, stack: AsyncExitStack) -> tuple[Tab, Tab]:
    """A tab on each instance, at one session."""
    here = await stack.enter_async_context(opened(pair.engines[0]))
    there = await stack.enter_async_context(opened(pair.engines[1], here.live.id))
    return here, there


async def noted(store: Store, session_id: str) -> list[str]:
    """From now on, which responses begin and end, in the order of the store."""
    order: list[str] = []

    def note(notice: Notice) -> None:
        if isinstance(notice, Appended):
            for entry in notice.entries:
                if isinstance(entry, ResponseInProgress | ResponseDone):
                    order.append(f"{type(entry).__name__} {entry.response_id}")

    await store.watch(session_id, note)
    return order


# --- one session, two instances ------------------------------------------------------------------------------------


async def test_a_response_runs_where_it_was_asked_for_and_is_seen_everywhere(pair: Instances) -> None:
    """Once, and every tab has the same text."""
    async with AsyncExitStack() as stack:
        here, there = await both(pair, stack)
        for asking, instance in ((here, 0), (there, 1)):
            response_id = await asking.respond()
            for tab in (here, there):
                await tab.until("response.output_text.delta", response_id=response_id)
            assert pair.responders[instance].asked[-1].response_id == response_id
            pair.open_gates()
            ends = [await tab.done(response_id) for tab in (here, there)]
            assert [end["status"] for end in ends] == ["completed"] * 2
            assert here.transcript.texts[response_id] == there.transcript.texts[response_id] == "one two"
        assert len(pair.asked) == 2
        assert here.transcript.events != []
        assert "instance" not in str(here.transcript.events + there.transcript.events)


async def test_a_response_is_cancelled_from_another_instance(pair: Instances) -> None:
    """Its model is closed, and its end carries the id of the command."""
    async with AsyncExitStack() as stack:
        here, there = await both(pair, stack)
        response_id = await here.respond()
        await there.until("response.output_text.delta")
        await there.cancel(response_id, "evt_c")
        for tab in (here, there):
            end = await tab.done(response_id)
            assert (end["status"], end["stop_reason"], end["for_event_id"]) == ("cancelled", "cancelled", "evt_c")
        assert pair.closed == 1
        text, ends = await stored(pair.engines[0], here.live.id, response_id)
        assert (text, len(ends)) == ("one ", 1)


async def test_a_response_that_waits_is_cancelled_from_anywhere(pair: Instances) -> None:
    """It never runs, and its end is all that there is of it."""
    async with AsyncExitStack() as stack:
        here, there = await both(pair, stack)
        await here.respond()
        waiting = await here.respond(multitask_strategy="enqueue")
        await there.cancel(waiting)
        for tab in (here, there):
            assert (await tab.done(waiting))["status"] == "cancelled"
        [end] = await pair.stores[0].read(here.live.id, waiting, 0, 1000)
        assert isinstance(end, ResponseDone)
        assert waiting not in pair.asked
        pair.open_gates()


@pytest.mark.parametrize("asking", [0, 1])
async def test_what_was_enqueued_elsewhere_runs_in_its_turn(pair: Instances, asking: int) -> None:
    """Whoever ends the one before it, or asked for it, starts it, once."""
    async with AsyncExitStack() as stack:
        tabs = await both(pair, stack)
        first = await tabs[0].respond()
        await tabs[1].until("response.output_text.delta")
        ids = [await tabs[asking].respond(multitask_strategy="enqueue") for _ in range(3)]
        assert pair.asked == [first]
        pair.open_gates()
        for response_id in ids:
            for tab in tabs:
                assert (await tab.done(response_id))["status"] == "completed"
        assert sorted(pair.asked) == sorted([first, *ids])


async def test_who_ends_a_response_finds_what_waits_elsewhere() -> None:
    """Although it has not heard of it, and nobody looks a second time."""
    async with instances(Late, Late) as pair, AsyncExitStack() as stack:
        here, there = await both(pair, stack)
        first = await here.respond()
        await here.until("response.output_text.delta")
        await there.live.refresh()
        second = await there.respond(multitask_strategy="enqueue")
        assert second not in here.live.state.responses
        pair.open_gates()
        await here.done(first)
        assert (await here.done(second))["status"] == "completed"
        assert [request.response_id for request in pair.responders[0].asked] == [first, second]


async def test_who_enqueues_a_response_finds_that_it_need_not_wait() -> None:
    """The one before it has ended elsewhere, which was not heard of."""
    async with instances(Late, Late) as pair, AsyncExitStack() as stack:
        here, there = await both(pair, stack)
        pair.open_gates()
        first = await here.respond()
        await there.live.refresh()
        assert first in there.live.state.unfinished
        await here.done(first)
        second = await there.respond(multitask_strategy="enqueue")
        assert (await there.done(second))["status"] == "completed"
        assert [request.response_id for request in pair.responders[1].asked] == [second]


async def test_an_interruption_reaches_what_runs_elsewhere(pair: Instances) -> None:
    """It starts when the end of the other is stored, and not before."""
    async with AsyncExitStack() as stack:
        here, there = await both(pair, stack)
        order = await noted(pair.stores[0], here.live.id)
        running = await here.respond()
        await there.until("response.output_text.delta")
        waiting = await there.respond(multitask_strategy="enqueue")
        urgent = await there.respond(multitask_strategy="interrupt", event_id="evt_i")
        pair.open_gates()
        for tab in (here, there):
            assert (await tab.done(urgent))["status"] == "completed"
            for other in (running, waiting):
                end = tab.transcript.done[other]
                assert (end["status"], end["for_event_id"]) == ("cancelled", "evt_i")
        assert order[-2:] == [f"ResponseInProgress {urgent}", f"ResponseDone {urgent}"]
        assert sorted(pair.asked) == sorted([running, urgent])


async def test_two_creations_on_two_instances_are_decided_one_after_the_other() -> None:
    """Under `reject` one of them is refused, wherever it came from, however slow the store is."""
    for seed in range(20):
        random = Random(seed)
        async with instances(*[distant(random)] * 2) as pair, AsyncExitStack() as stack:
            tabs = await both(pair, stack)
            results = await asyncio.gather(*(tab.respond() for tab in tabs), return_exceptions=True)
            made = [result for result in results if isinstance(result, str)]
            assert len(made) == 1, results
            pair.open_gates()
            for tab in tabs:
                await tab.done(made[0])
            assert pair.asked == made


async def test_closing_a_session_ends_what_runs_elsewhere(pair: Instances) -> None:
    """In the name of the close, and everybody is told that it is over, last."""
    async with AsyncExitStack() as stack:
        here, there = await both(pair, stack)
        ids = [await here.respond(multitask_strategy="enqueue") for _ in range(2)]
        await there.until("response.output_text.delta")
        await there.send(SessionClose(event_id="evt_close"))
        for tab in (here, there):
            await tab.until("session.closed")
            for response_id in ids:
                assert tab.transcript.done[response_id]["for_event_id"] == "evt_close"


async def test_erasing_a_session_elsewhere_ends_what_runs(pair: Instances) -> None:
    """The model is closed, and nobody complains."""
    async with AsyncExitStack() as stack:
        here, there = await both(pair, stack)
        await here.respond()
        await there.until("response.output_text.delta")
        await pair.stores[1].erase(here.live.id)
        await until(lambda: pair.closed == 1)
        assert here.live.gone == there.live.gone
    assert [engine.reports for engine in pair.engines] == [[], []]


async def test_settings_are_everybody_s(pair: Instances) -> None:
    """What is changed on one instance counts on the other."""
    async with AsyncExitStack() as stack:
        here, there = await both(pair, stack)
        await here.send(SessionUpdate(session=Overrides(instructions="Be brief")))
        await there.respond()
        await here.until("response.output_text.delta")
        assert pair.responders[1].asked[0].instructions == "Be brief"
        pair.open_gates()


# --- viewers of two instances --------------------------------------------------------------------------------------


async def until(met: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not met():  # noqa: ASYNC110  # no event tells of it
            await asyncio.sleep(0)


async def test_the_last_viewer_of_all_instances_counts(pair: Instances) -> None:
    """The one at the owner leaves and nothing happens; the one elsewhere leaves and the model is closed at once."""
    async with opened(pair.engines[0]) as here:
        response_id = await here.respond()
        await here.until("response.output_text.delta")
        there = opened(pair.engines[1], here.live.id)
        await there.__aenter__()
    await turns_of_the_loop()
    assert pair.closed == 0
    await there.__aexit__(None, None, None)
    await until(lambda: pair.closed == 1)
    await pair.settled()
    _, [end] = await stored(pair.engines[0], here.live.id, response_id)
    assert (end.status, end.stop_reason) == ("cancelled", "disconnected")


async def test_a_viewer_that_goes_over_to_another_instance_stops_the_clock(pair: Instances) -> None:
    """Within the grace it may come back anywhere."""
    async with opened(pair.engines[0]) as here:
        response_id = await here.respond(disconnect_grace_ms=5000)
        await here.until("response.output_text.delta")
    await pair.pass_s(4)
    async with opened(pair.engines[1], here.live.id) as there:
        await pair.pass_s(20)
        assert pair.closed == 0
        pair.open_gates()
        assert (await there.done(response_id))["status"] == "completed"
        assert there.transcript.texts[response_id] == "one two"


async def test_the_floor_of_a_leave_counts_elsewhere_too(pair: Instances) -> None:
    """A viewer that its instance has sent away has time to come back, wherever the response runs."""
    async with opened(pair.engines[0]) as here:
        await here.respond()
        await here.until("response.output_text.delta")
        async with opened(pair.engines[1], here.live.id) as there:
            there.floor_s = SERVER_ENDED_FLOOR_S
            here.floor_s = 0.0
            await turns_of_the_loop()
            await leave(here)  # the one without a floor goes first, so the other's counts
    await pair.pass_s(SERVER_ENDED_FLOOR_S - 1)
    assert pair.closed == 0
    await pair.pass_s(2)
    assert pair.closed == 1


async def leave(tab: Tab) -> None:
    """Be counted no more, as after a connection that was cut."""
    await tab.live.store.leave(tab.live.id, tab.participant.connection_id, 0.0)


# --- one that is thought dead --------------------------------------------------------------------------------------


async def test_an_instance_that_is_cut_off_is_lost_and_yields() -> None:
    """Its responses end elsewhere with what is stored. It goes on for its viewers meanwhile, and once it hears of that,
    it closes the model, forgets what it has shown beyond, and writes nothing more."""
    async with instances(Line, Elsewhere) as pair, AsyncExitStack() as stack:
        line = pair.stores[0]
        assert isinstance(line, Line)
        here, there = await both(pair, stack)
        response_id = await here.respond()
        await there.until("response.output_text.delta")
        waiting = await there.respond(multitask_strategy="enqueue")
        await pair.pass_s(LEASE_S * 2)
        line.cut()
        pair.responders[0].gate.set()
        await here.until("response.output_text.delta", delta="two")
        await pair.pass_s(LEASE_S * 2)
        pair.responders[1].gate.set()
        end = await there.done(response_id)
        assert (end["status"], end["error"]["code"], end["output_chars"]) == ("failed", "instance_lost", 4)
        assert there.transcript.texts[response_id] == "one "
        assert (await there.done(waiting))["status"] == "completed"
        assert pair.responders[1].asked[0].response_id == waiting
        assert here.transcript.texts[response_id] == "one two"
        before = await pair.stores[1].read(here.live.id, response_id, 0, 1000)
        line.mend()
        await pair.pass_s(2)
        end = await here.done(response_id)
        assert end["error"]["code"] == "instance_lost"
        assert here.transcript.texts[response_id] == "one "
        assert (await here.done(waiting))["status"] == "completed"
        resets = [event["type"] for event in here.transcript.events if event.get("reset")]
        assert resets == ["response.in_progress"]
        assert pair.responders[0].closed == 1
        assert await pair.stores[1].read(here.live.id, response_id, 0, 1000) == before
        assert [len(engine.reports) for engine in pair.engines] == [0, 0]


async def test_viewers_of_an_instance_that_was_thought_dead_count_again() -> None:
    """They look at the session all the while: once it is back, what runs for them elsewhere goes on."""
    async with instances(Line, Elsewhere) as pair, AsyncExitStack() as stack:
        line = pair.stores[0]
        assert isinstance(line, Line)
        here = await stack.enter_async_context(opened(pair.engines[0]))
        async with opened(pair.engines[1], here.live.id) as there:
            response_id = await there.respond()
            await there.until("response.output_text.delta")
        await pair.pass_s(LEASE_S * 2)
        line.cut()
        async with pair.engines[1].hub.use(here.live.id) as other:
            while here.participant.connection_id in other.audience.participants:
                await pair.pass_s(1)
            line.mend()
            await pair.pass_s(SERVER_ENDED_FLOOR_S + 5)
            assert list(other.audience.participants) == [here.participant.connection_id]
        assert pair.closed == 0
        pair.open_gates()
        assert (await here.done(response_id))["status"] == "completed"


async def test_an_owner_that_was_ended_elsewhere_before_it_has_said_anything_yields(pair: Instances) -> None:
    """There is nothing to reset, and one end."""
    async with AsyncExitStack() as stack:
        here, there = await both(pair, stack)
        response_id = await here.respond()
        await here.until("response.in_progress")
        await turns_of_the_loop(5)
        await pair.stores[1].append(here.live.id, [Write(response_id, [done(response_id)], expect=1)])
        for tab in (here, there):
            await tab.done(response_id)
        await until(lambda: pair.closed == 1)
        await turns_of_the_loop()
        _, ends = await stored(pair.engines[0], here.live.id, response_id)
        assert len(ends) == 1


@pytest.mark.parametrize("left", [0, 1, 2])
async def test_an_end_that_the_store_has_lost_is_written_anew(left: int) -> None:
    """It has failed, for whoever comes; who has seen the end it had sees no other."""
    async with instances(Line, Elsewhere) as pair, AsyncExitStack() as stack:
        line = pair.stores[0]
        assert isinstance(line, Line)
        pair.open_gates()
        here = await stack.enter_async_context(opened(pair.engines[0]))
        response_id = await here.respond()
        assert (await here.done(response_id))["status"] == "completed"
        forget(line, here.live.id, response_id, left)
        line.miss()
        await turns_of_the_loop()
        there = await stack.enter_async_context(opened(pair.engines[1], here.live.id))
        end = await there.done(response_id)
        assert (end["status"], end["error"]["code"]) == ("failed", "store_lost")
        assert end["output_chars"] == len(there.transcript.texts[response_id])
        second = await here.respond()
        for tab in (here, there):
            assert (await tab.done(second))["status"] == "completed"
        assert here.transcript.done[response_id]["status"] == "completed"
        assert len(pair.asked) == 2


# --- any order -----------------------------------------------------------------------------------------------------


def distant(random: Random) -> Callable[[MemoryStore], MemoryStore]:
    """A way to the store that takes its time, a different one for each call and each notice."""

    def make(store: MemoryStore) -> MemoryStore:
        found = Distant(store, lambda: random.randrange(4))
        found.hops = lambda: random.randrange(12)
        return found

    return make


def chatty(random: Random) -> Responder:
    async def responder(request: Request) -> AsyncIterator[ResponderEvent]:
        for number in range(random.randrange(12)):
            for _ in range(random.randrange(4)):
                await asyncio.sleep(0)
            yield f"{number} "

    return responder


@pytest.mark.parametrize("seed", range(60))
async def test_whatever_is_asked_for_anywhere_ends_once(seed: int) -> None:
    """Creations, interruptions and cancellations on two slow instances: every response has one claim and one end, all
    tabs have the text that is stored, and nothing is left waiting."""
    random = Random(seed)
    async with instances(*[distant(random)] * 2, responders=[chatty(random)] * 2) as pair, AsyncExitStack() as stack:
        tabs = list(await both(pair, stack))
        ids: list[str] = []
        for _ in range(random.randrange(3, 9)):
            tab = random.choice(tabs)
            strategy = random.choice(["enqueue", "enqueue", "enqueue", "interrupt"])
            if ids and random.random() < 0.3:
                await try_cancel(tab, random.choice(ids))
            else:
                ids.append(await tab.respond(multitask_strategy=strategy))
            await turns_of_the_loop(random.randrange(30))
        passing = asyncio.create_task(pair.pass_s(4))
        for tab in tabs:
            for response_id in ids:
                await tab.done(response_id)
        await passing
        for response_id in ids:
            entries = await pair.stores[0].read(tabs[0].live.id, response_id, 0, 10_000)
            kinds = Counter(type(entry) for entry in entries)
            assert kinds[ResponseDone] == 1
            assert kinds[ResponseInProgress] <= 1
            text = "".join("".join(entry.texts) for entry in entries if isinstance(entry, Deltas))
            for tab in tabs:
                assert tab.transcript.texts[response_id] == text
                assert not any(event.get("reset") for event in tab.transcript.events)


async def try_cancel(tab: Tab, response_id: str) -> None:
    await until(lambda: response_id in tab.live.state.responses)
    await tab.cancel(response_id)


def slow_talker(random: Random) -> Responder:
    """It takes its time, by the loop's clock, and now and then fails."""

    async def responder(request: Request) -> AsyncIterator[ResponderEvent]:
        for number in range(random.randrange(30)):
            if random.random() < 0.3:
                await asyncio.sleep(random.random())
            yield f"{number} "
        if random.random() < 0.1:
            raise UpstreamError("upstream_failed", "No.")

    return responder


async def look_on(tab: Tab) -> None:
    """Read whatever comes, for ever; the transcript holds it to the protocol."""
    while True:
        try:
            await tab.until("nothing of this kind", patience_s=None)
        except StoreError:
            await asyncio.sleep(0.1)


async def try_to(work: Awaitable[object]) -> None:
    """Do what a store that does not answer, or a session that is full of responses, may refuse."""
    with suppress(StoreError, ConflictError):
        await work


@pytest.mark.parametrize("seed", range(40))
async def test_whatever_is_cut_off_meanwhile_every_response_ends_once(seed: int) -> None:
    """Lines are cut and mended, leases run out, others take over: once all is mended, everybody has what is stored."""
    random = Random(seed)
    kinds = [Line, Line, Elsewhere]
    talkers = [slow_talker(random)] * 3
    async with instances(*kinds, responders=talkers, on_disconnect="continue") as three, AsyncExitStack() as stack:
        first = await stack.enter_async_context(opened(three.engines[0]))
        others = [await stack.enter_async_context(opened(engine, first.live.id)) for engine in three.engines[1:]]
        tabs = [first, *others]
        lookers = [asyncio.create_task(look_on(tab)) for tab in tabs]
        lines = [store for store in three.stores if isinstance(store, Line)]
        await three.pass_s(LEASE_S + 2)
        for _ in range(14):
            tab, line = random.choice(tabs), random.choice(lines)
            known = list(tab.live.state.responses)
            match random.randrange(6):
                case 0 | 1:
                    await try_to(tab.respond(multitask_strategy=random.choice(["enqueue", "enqueue", "interrupt"])))
                case 2 if known:
                    await try_to(tab.cancel(random.choice(known)))
                case 3 | 4:
                    line.mend() if line.is_cut else line.cut()
                case _:
                    await three.pass_s(random.choice([1, 3, LEASE_S * 1.5]))
            await turns_of_the_loop(random.randrange(20))
        for line in lines:
            line.mend()
        await three.pass_s(LEASE_S * 3)
        for _ in range(100):  # a long row of long answers
            if any(tab.live.state.unfinished for tab in tabs):
                await three.pass_s(1)
        for looker in lookers:
            assert not looker.done(), looker.exception()
            looker.cancel()
        await asyncio.wait(lookers)
        await check_all(three, tabs)


async def check_all(found: Instances, tabs: list[Tab]) -> None:
    """Every response that was created has one end, its last event, and every tab has seen that and its text."""
    store, session_id = found.stores[-1], tabs[0].live.id
    accepted = list(await store.read(session_id, "session", 0, 100_000))
    ids = [event.response.id for event in accepted if isinstance(event, ResponseCreated)]
    for response_id in ids:
        entries = await store.read(session_id, response_id, 0, 100_000)
        kinds = Counter(type(entry) for entry in entries)
        assert (kinds[ResponseDone], type(entries[-1])) == (1, ResponseDone)
        assert kinds[ResponseInProgress] <= 1
        text = "".join("".join(entry.texts) for entry in entries if isinstance(entry, Deltas))
        for tab in tabs:
            assert tab.transcript.texts[response_id] == text
            assert tab.transcript.done[response_id]["status"] == entries[-1].status  # type: ignore[union-attr]
            assert tab.live.state.unfinished == {}
    assert [list(tab.live.audience.participants) for tab in tabs] == [list(tabs[0].live.audience.participants)] * 3
    assert {tab.participant.connection_id for tab in tabs} == set(tabs[0].live.audience.participants)
    assert [engine.reports for engine in found.engines] == [[], [], []]
