"""Who is thought lost, and when: leases, what lost instances leave behind, and what nobody was told of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from realtime.lease import BEATS_PER_LEASE, Confidence
from realtime.log import Entry
from realtime.protocol import SESSION_CHANNEL, Response, ResponseCreated, ResponseDone
from realtime.store.base import Gone, Viewer, Write
from realtime.viewers import SERVER_ENDED_FLOOR_S
from tests.contract import NOW, begun, created, done, participant, spoken
from tests.support.stores import Elsewhere, Line
from tests.test_engine import EngineUnderTest, Tab, opened, stored, turns_of_the_loop
from tests.test_instances import LEASE_S, Instances, instances, noted

# --- Confidence ------------------------------------------------------------------------------------------------------


def test_confidence_takes_a_whole_lease_of_answers() -> None:
    """And not a moment less."""
    confidence = Confidence(9.0)
    assert [confidence.answered(float(now)) for now in range(100, 112)] == [False] * 9 + [True] * 3


def test_confidence_is_lost_with_one_failure() -> None:
    """From the next answer on everybody has a whole lease again."""
    confidence = Confidence(9.0)
    for now in range(20):
        confidence.answered(float(now))
    confidence.failed()
    assert [confidence.answered(float(now)) for now in range(20, 31)] == [False] * 9 + [True] * 2


def test_confidence_is_not_regained_by_silence() -> None:
    """Time passes, and nobody answers."""
    confidence = Confidence(9.0)
    confidence.failed()
    confidence.failed()
    assert not confidence.answered(1000.0)


def test_who_stood_still_begins_anew() -> None:
    """A process that was stopped has heard of nothing: its first answer after that proves nothing."""
    confidence = Confidence(9.0)
    for now in range(20):
        confidence.answered(float(now))
    assert not confidence.answered(60.0)
    assert [confidence.answered(60.0 + now) for now in range(1, 11)] == [False] * 8 + [True] * 2


@pytest.mark.parametrize(("gap_s", "is_break"), [(3.0, False), (6.0, False), (6.1, True), (9.0, True)])
def test_how_long_a_break_is(gap_s: float, is_break: bool) -> None:
    """So long that others, who renew their leases every third of one, may have lost theirs."""
    confidence = Confidence(9.0)
    for now in range(20):
        confidence.answered(float(now))
    assert confidence.answered(19.0 + gap_s) is not is_break


def test_confidence_with_slow_beats() -> None:
    """Answers at the pace of the beats are unbroken."""
    confidence = Confidence(9.0)
    answers = [confidence.answered(now * 9.0 / BEATS_PER_LEASE) for now in range(6)]
    assert answers == [False, False, False, True, True, True]


# --- one instance that looks, and others that are only told of -------------------------------------------------------


class Alone(Instances):
    """One instance; what others do, the test does."""

    @property
    def engine(self) -> EngineUnderTest:
        return self.engines[0]

    @property
    def line(self) -> Line:
        store = self.stores[0]
        assert isinstance(store, Line)
        return store

    async def append(self, tab: Tab, channel: str, *entries: Entry) -> None:
        """What another instance does."""
        await Elsewhere(self.line).append(tab.live.id, [Write(channel, entries)])
        await turns_of_the_loop()

    async def join(self, tab: Tab, connection_id: str, instance: str) -> None:
        """Somebody looks at the session elsewhere."""
        await Elsewhere(self.line).join(tab.live.id, Viewer(participant(connection_id), instance))
        await turns_of_the_loop()

    async def sign(self, instance: str, lease_s: float = LEASE_S) -> None:
        """Another instance lives."""
        await Elsewhere(self.line).sign(instance, lease_s)

    async def pass_while_living(self, seconds: float, *others: str) -> None:
        """Let time pass in which other instances sign."""
        for _ in range(round(seconds)):
            for instance in others:
                await self.sign(instance)
            await self.pass_s(1.0)


@asynccontextmanager
async def alone(**settings: Any) -> AsyncIterator[tuple[Alone, Tab]]:
    """An instance that has lived for long, and a tab at a session of it."""
    async with instances(Line, **settings) as one:
        found = Alone(one.stores, one.responders, one.advance)
        found.engines = one.engines
        async with opened(found.engine) as tab:
            await found.pass_s(LEASE_S + 2)
            yield found, tab


async def foreign_response(found: Alone, tab: Tab, name: str = "r", instance: str = "inst_2") -> None:
    """A response that runs on another instance, and has said something."""
    await found.sign(instance)
    await found.append(tab, SESSION_CHANNEL, created(name))
    await found.append(tab, name, begun(name, instance), spoken(name, "half ", "a word"))
    await turns_of_the_loop()


async def end_of(found: Alone, tab: Tab, name: str = "r") -> ResponseDone | None:
    """The end of a response, if it has one; and it has never more than one."""
    _, ends = await stored(found.engine, tab.live.id, name)
    assert len(ends) <= 1
    return ends[0] if ends else None


async def test_an_instance_signs_while_it_lives() -> None:
    """However long that is, and not longer."""
    async with alone() as (found, _):
        own = found.engine.instance
        for _ in range(40):
            assert await found.line.living({own}) == {own}
            await found.pass_s(1)
        line = found.line
    assert await line.living({own}) == set()


async def test_an_instance_that_could_not_sign_tries_again_soon() -> None:
    """Long before its next beat: whoever has connections and no lease is taken for dead."""
    async with alone() as (found, _):
        own = found.engine.instance
        found.line.cut()
        await found.pass_s(LEASE_S + 1)
        found.line.is_down = False
        assert await found.line.living({own}) == set()
        await found.pass_s(1)
        assert await found.line.living({own}) == {own}
        found.line.mend()


async def test_what_a_lost_instance_ran_is_ended_once() -> None:
    """As far as it came, soon after its lease has run out, and not before."""
    async with alone() as (found, tab):
        await foreign_response(found, tab)
        await found.pass_while_living(20, "inst_2")
        await found.pass_s(LEASE_S - 2)
        assert await end_of(found, tab) is None
        await found.pass_s(3)
        end = await end_of(found, tab)
        assert end is not None
        assert (end.status, end.error and end.error.code) == ("failed", "instance_lost")
        assert (end.output_chars, end.usage.estimated) == (len("half a word"), True)
        assert (await tab.done("r"))["error"]["code"] == "instance_lost"
        assert tab.transcript.texts["r"] == "half a word"
        await found.pass_s(20)
        assert await end_of(found, tab) == end


async def test_what_waited_behind_it_runs() -> None:
    """On the instance that has buried it."""
    async with alone() as (found, tab):
        await foreign_response(found, tab)
        order = await noted(found.line, tab.live.id)
        waiting = await tab.respond(multitask_strategy="enqueue")
        await found.pass_s(5)
        assert found.asked == []
        await found.pass_s(LEASE_S)
        found.open_gates()
        assert (await tab.done(waiting))["status"] == "completed"
        assert order == ["ResponseDone r", f"ResponseInProgress {waiting}", f"ResponseDone {waiting}"]


async def test_an_end_that_was_missed_is_not_written_again() -> None:
    """It is found when the response is to be ended here, whoever has ended it."""
    async with alone() as (found, tab):
        await foreign_response(found, tab)
        found.line.is_cut = True
        await found.append(tab, "r", done("r"))
        found.line.is_cut = False
        await found.pass_s(LEASE_S * 2)
        assert (await tab.done("r"))["status"] == "completed"
        assert await end_of(found, tab) == done("r")


async def test_two_that_bury_bury_once() -> None:
    """Every instance that has the session open sees the same, and one of them is first."""
    async with instances(Elsewhere, Elsewhere, Elsewhere) as all_of_them, AsyncExitStack() as stack:
        first = await stack.enter_async_context(opened(all_of_them.engines[0]))
        tabs = [await stack.enter_async_context(opened(engine, first.live.id)) for engine in all_of_them.engines[1:]]
        store = all_of_them.stores[0]
        await store.append(first.live.id, [Write(SESSION_CHANNEL, [created("r")])])
        await store.append(first.live.id, [Write("r", [begun("r", "inst_lost"), spoken("r", "x")])])
        await all_of_them.pass_s(LEASE_S * 2)
        for tab in (first, *tabs):
            assert (await tab.done("r"))["error"]["code"] == "instance_lost"
        _, ends = await stored(all_of_them.engines[0], first.live.id, "r")
        assert len(ends) == 1


async def test_viewers_of_a_lost_instance_leave_with_a_floor() -> None:
    """They were cut off, and have time to come back before what runs for them ends."""
    async with instances(Line) as one:
        found = Alone(one.stores, one.responders, one.advance)
        found.engines = one.engines
        await found.pass_s(LEASE_S + 2)
        async with opened(found.engine) as tab:
            await tab.respond()
            await tab.until("response.output_text.delta")
            await found.sign("inst_2")
            await found.join(tab, "conn_2", "inst_2")
        await found.pass_while_living(20, "inst_2")
        assert found.closed == 0
        await found.pass_s(LEASE_S + SERVER_ENDED_FLOOR_S - 1)
        assert found.closed == 0
        await found.pass_s(4)
        assert found.closed == 1


async def test_viewers_of_instances_that_live_stay() -> None:
    """Whatever happens to others."""
    async with alone() as (found, tab):
        await found.sign("inst_2")
        await found.sign("inst_3")
        await found.join(tab, "conn_2", "inst_2")
        await found.join(tab, "conn_3", "inst_3")
        await found.pass_while_living(LEASE_S * 2, "inst_2")
        assert set(tab.live.audience.participants) == {tab.participant.connection_id, "conn_2"}


@pytest.mark.parametrize("outage_s", [1, 5, 20, 60])
async def test_an_outage_of_the_store_blames_nobody(outage_s: int) -> None:
    """Leases run out meanwhile: everybody has a whole one to sign again."""
    async with alone() as (found, tab):
        await foreign_response(found, tab)
        await found.join(tab, "conn_2", "inst_2")
        found.line.cut()
        await found.pass_s(outage_s)
        await found.sign("inst_2", 0.0)  # whatever was left of it
        found.line.mend()
        await found.pass_s(LEASE_S - 2)
        assert await end_of(found, tab) is None
        await found.pass_while_living(LEASE_S * 2, "inst_2")
        assert await end_of(found, tab) is None
        assert "conn_2" in tab.live.audience.participants
        await found.pass_s(LEASE_S * 2)
        assert await end_of(found, tab) is not None


async def test_a_store_that_has_forgotten_its_leases_blames_nobody() -> None:
    """It restarts between two questions, and nobody sees it fail: this one's own lease is gone, too."""
    for moment in range(8):
        async with alone() as (found, tab):
            await foreign_response(found, tab)
            await found.pass_while_living(3, "inst_2")
            await found.pass_s(moment / 2)
            found.line._instances.clear()
            await found.pass_s(BEATS_PER_LEASE)
            await found.pass_while_living(LEASE_S * 2, "inst_2")
            assert await end_of(found, tab) is None
            await found.pass_s(LEASE_S * 2)


async def test_a_process_that_stood_still_blames_nobody() -> None:
    """Others may have, too, on the same machine: they have a whole lease to sign again."""
    async with alone() as (found, tab):
        await foreign_response(found, tab)
        await found.pass_while_living(5, "inst_2")
        found.advance(60)  # nothing runs meanwhile
        await turns_of_the_loop()
        await found.pass_s(LEASE_S - 2)
        assert await end_of(found, tab) is None
        await found.pass_while_living(LEASE_S * 2, "inst_2")
        assert await end_of(found, tab) is None
        await found.pass_s(LEASE_S * 2)


async def test_a_new_instance_blames_nobody_at_first() -> None:
    """It has not seen for long enough that the store answers."""
    async with instances(Line) as one:
        found = Alone(one.stores, one.responders, one.advance)
        found.engines = one.engines
        async with opened(found.engine) as tab:
            await found.append(tab, SESSION_CHANNEL, created("r"))
            await found.append(tab, "r", begun("r", "inst_2"))
            await found.pass_s(LEASE_S - 1)
            assert await end_of(found, tab) is None
            await found.pass_s(4)
            assert await end_of(found, tab) is not None


async def test_many_sessions_of_a_lost_instance_do_not_keep_this_one_from_signing() -> None:
    """Ending what another has left takes as long as it takes."""
    async with instances(Line) as one, AsyncExitStack() as stack:
        found = Alone(one.stores, one.responders, one.advance)
        found.engines = one.engines
        tabs = [await stack.enter_async_context(opened(found.engine)) for _ in range(30)]
        for tab in tabs:
            await found.append(tab, SESSION_CHANNEL, created("r"))
            await found.append(tab, "r", begun("r", "inst_2"))
        await found.pass_s(LEASE_S - 2)
        take, own = found.line.append, found.engine.instance
        missing = 0

        async def slow(session_id: str, *arguments: object) -> None:
            nonlocal missing
            await asyncio.sleep(1.0)
            missing += own not in await found.line.living({own})
            await take(session_id, *arguments)  # type: ignore[arg-type]

        found.line.append = slow  # type: ignore[assignment, method-assign]
        await found.pass_s(60)
        assert missing == 0
        for tab in tabs:
            assert await end_of(found, tab) is not None


async def test_a_response_that_should_run_here_and_does_not_is_ended() -> None:
    """The store has its claim and has lost its end: nobody else would ever end it."""
    async with alone() as (found, tab):
        await found.append(tab, SESSION_CHANNEL, created("r"))
        await found.append(tab, "r", begun("r", found.engine.instance), spoken("r", "x"))
        await found.pass_s(3)
        end = await end_of(found, tab)
        assert end is not None
        assert (end.status, end.error and end.error.code, end.output_chars) == ("failed", "store_lost", 1)
        assert (await tab.done("r"))["status"] == "failed"


async def test_a_response_that_runs_here_is_left_alone() -> None:
    """However long it takes."""
    async with alone() as (found, tab):
        response_id = await tab.respond()
        await found.pass_s(LEASE_S * 3)
        found.open_gates()
        assert (await tab.done(response_id))["status"] == "completed"


def accepted(name: str, status: str = "queued") -> ResponseCreated:
    response = Response(
        id=name,
        status="queued" if status == "queued" else "in_progress",
        model="m",
        created_at=NOW,
        metadata={},
        user="ann",
    )
    return ResponseCreated(response=response)


@pytest.mark.parametrize("status", ["queued", "in_progress"])
async def test_what_nobody_has_started_is_started_by_the_second_look(status: str) -> None:
    """Whoever accepted it may have been killed before it claimed it; it has the time of a look to do so."""
    async with alone() as (found, tab):
        await found.append(tab, SESSION_CHANNEL, accepted("r", status))
        await found.pass_s(0.5)
        assert found.asked == []
        await found.pass_s(2.5)
        assert found.asked == ["r"]
        found.open_gates()
        assert (await tab.done("r"))["status"] == "completed"


async def test_what_was_claimed_between_two_looks_is_left_alone() -> None:
    """Also where that was not heard of."""
    async with alone() as (found, tab):
        await found.append(tab, SESSION_CHANNEL, accepted("r"))
        await found.pass_s(1)
        found.line.is_cut = True
        await found.append(tab, "r", begun("r", "inst_2"))
        found.line.is_cut = False
        await found.pass_while_living(5, "inst_2")
        assert found.asked == []
        assert tab.live.state.responses["r"].instance == "inst_2"
        await found.pass_s(LEASE_S * 3)


async def test_a_draining_instance_starts_nothing() -> None:
    """Another one will."""
    async with alone() as (found, tab):
        found.engine.draining = True
        await found.append(tab, SESSION_CHANNEL, accepted("r"))
        await found.pass_s(5)
        assert found.asked == []


async def test_what_was_not_told_is_found_by_a_look() -> None:
    """Of a session in which something runs."""
    async with alone() as (found, tab):
        response_id = await tab.respond()
        await tab.until("response.output_text.delta")
        found.line.is_cut = True
        await found.append(tab, SESSION_CHANNEL, accepted("later"))
        assert "later" not in tab.live.state.responses
        found.line.is_cut = False
        await found.pass_s(2)
        assert "later" in tab.live.state.responses
        found.open_gates()
        await tab.done(response_id)
        await tab.done("later")


async def test_a_session_that_the_store_has_lost_ends() -> None:
    """The model is closed, and its viewers are told."""
    async with alone() as (found, tab):
        await tab.respond()
        await tab.until("response.output_text.delta")
        del found.line._sessions[tab.live.id]
        await found.pass_s(2)
        assert tab.live.gone == Gone("lost")
        assert found.closed == 1
        assert found.engine.reports == []


async def test_a_session_that_is_open_is_in_use() -> None:
    """Hours pass, and it does not expire."""
    async with alone(session_ttl_s=100) as (found, tab):
        found.line._ttl_s = 100
        for _ in range(10):
            await found.pass_s(40, step_s=1.0)
            found.line.sweep()
        assert tab.live.gone is None


async def test_upkeep_goes_on_after_failures() -> None:
    """However often the store comes and goes."""
    async with alone() as (found, tab):
        await foreign_response(found, tab)
        for _ in range(15):
            found.line.cut()
            await found.pass_s(1)
            found.line.mend()
            await found.pass_s(1)
        assert await end_of(found, tab) is None
        await found.pass_s(LEASE_S * 2)
        assert await end_of(found, tab) is not None


async def test_confidence_grows_while_nothing_is_open() -> None:
    """Who has lived for long knows at once that an instance is lost whose session comes to it."""
    async with instances(Line) as one:
        found = Alone(one.stores, one.responders, one.advance)
        found.engines = one.engines
        await found.pass_s(LEASE_S * 2)
        async with opened(found.engine) as tab:
            await found.append(tab, SESSION_CHANNEL, created("r"))
            await found.append(tab, "r", begun("r", "inst_2"))
            await found.pass_s(2)
            assert await end_of(found, tab) is not None


async def test_a_session_that_expired_all_the_same_ends() -> None:
    """Found when it is said to be in use."""
    async with alone(session_ttl_s=30) as (found, tab):
        del found.line._sessions[tab.live.id]
        await found.pass_s(11)
        assert tab.live.gone == Gone("lost")


async def test_a_session_that_is_lost_while_it_is_mended_ends_alone() -> None:
    """The others are still looked after."""
    async with alone() as (found, tab), opened(found.engine) as other:
        for looking in (tab, other):
            await found.join(looking, "conn_2", "inst_2")
        del found.line._sessions[tab.live.id]
        await found.pass_s(2)
        assert tab.live.gone == Gone("lost")
        assert list(other.live.audience.participants) == [other.participant.connection_id]


async def test_a_viewer_that_only_this_instance_does_not_count_is_found() -> None:
    """The store has it, and what it said of it was lost."""
    async with alone() as (found, tab):
        tab.live.audience.leave(tab.participant.connection_id, floor_s=60, now=asyncio.get_running_loop().time())
        await found.pass_s(2)
        assert list(tab.live.audience.participants) == [tab.participant.connection_id]


async def test_a_viewer_that_leaves_while_it_joins_again_is_gone() -> None:
    """Whichever of the two the store hears of last."""
    async with alone() as (found, tab):
        async with opened(found.engine, tab.live.id) as leaving:
            connection_id = leaving.participant.connection_id
            await Elsewhere(found.line).leave(tab.live.id, connection_id, 60)
            join = found.line.join

            async def slow(session_id: str, viewer: Viewer) -> None:
                await asyncio.sleep(1.5)
                await join(session_id, viewer)

            found.line.join = slow  # type: ignore[method-assign]
            await found.pass_s(1.5)
        await found.pass_s(4)
        assert connection_id not in tab.live.audience.participants
