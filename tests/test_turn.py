"""One turn with each kind of responder that somebody may write: it ends in exactly one done, and the next one runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any, Literal

import pytest
from msgspec.structs import replace

from realtime import journal as journal_module
from realtime import live as live_module
from realtime import turn as turn_module
from realtime import upkeep as upkeep_module
from realtime.errors import ConflictError, UpstreamError
from realtime.log import Entry
from realtime.protocol import ResponseDone, ResponseInProgress
from realtime.responders.base import Finish, Reasoning, Request, Responder, ResponderEvent, Text, TokenCount
from realtime.store.base import CommandRecord, Snapshot, Write
from realtime.store.memory import MemoryStore
from realtime.turn import End, Turn
from tests.contract import begun, created, done, spoken
from tests.support.stores import Faulty, forget, unavailable
from tests.test_engine import EngineUnderTest, Tab, opened, running_engine, stored, turns_of_the_loop

MANY = 20_000
"""Pieces that a responder says before it gives up on ever being stopped."""

Events = AsyncIterator[ResponderEvent]


async def forever() -> None:
    """Wait until cancelled."""
    await asyncio.get_running_loop().create_future()


def first_then(first: Responder) -> Responder:
    """A responder whose answer to a session's first message is `first`'s; to later ones it says `next`."""

    async def later(request: Request) -> Events:
        yield "next"

    return lambda request: (first if len(request.messages) == 1 else later)(request)


async def ended(engine: EngineUnderTest, tab: Tab, response_id: str) -> tuple[str, ResponseDone]:
    """The stored text and the one end of a response, which are what was shown; and that another one runs after it."""
    shown = await tab.done(response_id)
    next_id = await tab.respond()
    assert (await tab.done(next_id))["status"] == "completed"
    text, ends = await stored(engine, tab.live.id, response_id)
    assert len(ends) == 1
    [end] = ends
    assert (end.status, end.stop_reason, end.output_chars) == (
        shown["status"],
        shown["stop_reason"],
        shown["output_chars"],
    )
    assert end.output_chars == len(text)
    assert tab.transcript.texts[response_id] == text
    assert tab.transcript.texts[next_id] == "next"
    return text, end


async def answer_of(responder: Responder, **options: Any) -> tuple[str, ResponseDone]:
    """How a response of `responder` ends when nobody stops it."""
    async with running_engine(first_then(responder), **options) as engine:
        async with opened(engine) as tab:
            result = await ended(engine, tab, await tab.respond())
        await engine.settled()
        return result


async def cancelled(responder: Responder, *, after: int = 1) -> tuple[str, ResponseDone]:
    """How a response ends that is cancelled once so many of its events beside `in_progress` were shown."""
    async with running_engine(first_then(responder)) as engine:
        async with opened(engine) as tab:
            response_id = await tab.respond()
            await tab.until("response.in_progress")
            if after:
                await tab.until("response.output_text.delta")
            await turns_of_the_loop(5)
            await tab.cancel(response_id, "evt_c")
            result = await ended(engine, tab, response_id)
            assert result[1].for_event_id == "evt_c"
        await engine.settled()
        return result


# --- that end by themselves ------------------------------------------------------------------------------------------


async def says_nothing(request: Request) -> Events:
    """An async generator that yields nothing."""
    if not request.messages:
        yield ""


async def says_empty_strings(request: Request) -> Events:
    yield ""
    yield Text("")
    yield Reasoning("")


async def raises_first(request: Request) -> Events:
    if request.messages:
        raise ValueError("canary")
    yield ""


async def raises_after_a_piece(request: Request) -> Events:
    yield "a piece"
    raise ValueError("canary")


async def raises_an_upstream_error(request: Request) -> Events:
    yield "a piece"
    raise UpstreamError("upstream_overloaded", "The model's provider is overloaded.")


async def raises_a_timeout(request: Request) -> Events:
    """Somebody else's, not that of the silence."""
    yield "a piece"
    raise TimeoutError("canary")


async def yields_nonsense(request: Request) -> Events:
    yield "a piece"
    yield 17  # type: ignore[misc]


async def yields_a_lone_surrogate(request: Request) -> Events:
    yield "a piece"
    yield Text("\ud800")


async def finishes_early(request: Request) -> Events:
    yield "a piece"
    yield Finish("max_tokens", TokenCount(input_tokens=5, output_tokens=7))
    yield "too much"


def raises_when_called(request: Request) -> Events:
    raise ValueError("canary")


class PlainIterator:
    """An async iterator that is no generator: it has no `aclose`."""

    def __init__(self, pieces: int) -> None:
        self._left = pieces

    def __aiter__(self) -> PlainIterator:
        return self

    async def __anext__(self) -> ResponderEvent:
        if not self._left:
            raise StopAsyncIteration
        self._left -= 1
        return "a piece"


class WaitingIterator(PlainIterator):
    """One that waits for ever at its end."""

    async def __anext__(self) -> ResponderEvent:
        if not self._left:
            await forever()
        return await super().__anext__()


@pytest.mark.parametrize(
    ("responder", "text", "status", "reason"),
    [
        (says_nothing, "", "completed", "end_turn"),
        (says_empty_strings, "", "completed", "end_turn"),
        (raises_first, "", "failed", "responder_failed"),
        (raises_after_a_piece, "a piece", "failed", "responder_failed"),
        (raises_an_upstream_error, "a piece", "failed", "upstream_overloaded"),
        (raises_a_timeout, "a piece", "failed", "responder_failed"),
        (yields_nonsense, "a piece", "failed", "responder_failed"),
        (yields_a_lone_surrogate, "a piece", "failed", "responder_failed"),
        (finishes_early, "a piece", "incomplete", "max_tokens"),
        (raises_when_called, "", "failed", "responder_failed"),
        (lambda request: PlainIterator(1), "a piece", "completed", "end_turn"),
        (lambda request: PlainIterator(0), "", "completed", "end_turn"),
    ],
)
async def test_each_responder_has_one_end(responder: Responder, text: str, status: str, reason: str) -> None:
    """Its partial text is kept, and its error told by its code."""
    said, end = await answer_of(responder)
    assert (said, end.status) == (text, status)
    assert reason == (end.error.code if end.error else end.stop_reason)
    assert end.error is None or "canary" not in end.error.message


async def test_silence_ends_a_response() -> None:
    """A responder that says nothing more has stalled."""

    async def stalls(request: Request) -> Events:
        yield "a piece"
        await forever()

    said, end = await answer_of(stalls, upstream_idle_timeout_s=0.05)
    assert (said, end.status) == ("a piece", "failed")
    assert end.error is not None
    assert end.error.code == "upstream_stalled"


async def test_an_answer_of_many_pieces_without_a_pause_is_whole() -> None:
    """A responder that never awaits, with more pieces than any window holds."""

    async def hurries(request: Request) -> Events:
        for number in range(3_000):
            yield f"{number} "

    said, end = await answer_of(hurries)
    assert (said, end.status) == ("".join(f"{number} " for number in range(3_000)), "completed")


@pytest.mark.parametrize("pieces", [0, 1])
async def test_a_cancellation_out_of_the_responder_is_a_failure_of_its_own(pieces: int) -> None:
    """A responder may wait for something that is cancelled; nobody has stopped the response, and it ends anyway."""

    async def waits_for_a_cancelled_task(request: Request) -> Events:
        for _ in range(pieces):
            yield "a piece"
        task = asyncio.create_task(forever())
        asyncio.get_running_loop().call_soon(task.cancel)
        await task

    said, end = await answer_of(waits_for_a_cancelled_task)
    assert (said, end.status) == ("a piece" * pieces, "failed")
    assert end.error is not None
    assert end.error.code == "responder_failed"


# --- that are cancelled ----------------------------------------------------------------------------------------------


async def waits(request: Request) -> Events:
    yield "a piece"
    await forever()


async def waits_at_once(request: Request) -> Events:
    await forever()
    yield ""


async def swallows_and_says_more(request: Request) -> Events:
    yield "a piece"
    with suppress(asyncio.CancelledError):
        await forever()
    yield "more"
    yield "and more"


async def swallows_and_returns(request: Request) -> Events:
    yield "a piece"
    try:
        await forever()
    except asyncio.CancelledError:
        return


async def swallows_and_finishes(request: Request) -> Events:
    yield "a piece"
    try:
        await forever()
    except asyncio.CancelledError:
        yield Finish("end_turn", TokenCount(input_tokens=1, output_tokens=1))


async def raises_in_cleanup(request: Request) -> Events:
    try:
        yield "a piece"
        await forever()
    finally:
        raise ValueError("canary")


async def turns_it_into_an_error(request: Request) -> Events:
    yield "a piece"
    try:
        await forever()
    except asyncio.CancelledError:
        raise UpstreamError("upstream_disconnected", "The connection to the model was lost.") from None


async def cleans_up_for_some_turns(request: Request) -> Events:
    try:
        yield "a piece"
        await forever()
    finally:
        await turns_of_the_loop(100)


async def says_more_in_cleanup(request: Request) -> Events:
    """Python calls this an error: "async generator ignored GeneratorExit"."""
    try:
        yield "a piece"
        await forever()
    finally:
        yield "more"


@pytest.mark.parametrize(
    "responder",
    [
        waits,
        swallows_and_says_more,
        swallows_and_returns,
        swallows_and_finishes,
        raises_in_cleanup,
        turns_it_into_an_error,
        cleans_up_for_some_turns,
        says_more_in_cleanup,
        lambda request: WaitingIterator(1),
    ],
)
async def test_whatever_a_responder_makes_of_being_stopped_it_is_cancelled(responder: Responder) -> None:
    """The end that was asked for is the response's end, and what it had said is kept."""
    said, end = await cancelled(responder)
    assert (said, end.status, end.stop_reason, end.error) == ("a piece", "cancelled", "cancelled", None)
    assert end.usage.estimated


@pytest.mark.parametrize("responder", [waits_at_once, lambda request: WaitingIterator(0)])
async def test_a_responder_that_has_said_nothing_is_stopped_too(responder: Responder) -> None:
    """Its text is empty."""
    said, end = await cancelled(responder, after=0)
    assert (said, end.status) == ("", "cancelled")


async def test_a_responder_that_never_awaits_is_stopped() -> None:
    """It leaves the loop its turns: a command that comes meanwhile is carried out."""
    said = 0

    async def never_awaits(request: Request) -> Events:
        nonlocal said
        while said < MANY:
            said += 1
            yield "x"

    async with running_engine(first_then(never_awaits)) as engine:
        async with opened(engine) as tab:
            response_id = await tab.respond()
            await tab.until("response.in_progress")
            await tab.cancel(response_id)
            _, end = await ended(engine, tab, response_id)
        assert (end.status, said < MANY) == ("cancelled", True)
        await engine.settled()


@pytest.mark.parametrize("where", ["in its cleanup", "swallowing the cancellation"])
async def test_a_responder_that_takes_long_to_stop_holds_up_nobody(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The response is over for its viewers, and the next one runs, while it still cleans up."""
    monkeypatch.setattr(turn_module, "STOP_TIMEOUT_S", 0.05)
    done_with_it = asyncio.Event()

    async def lingers(request: Request) -> Events:
        try:
            yield "a piece"
            await forever()
        except asyncio.CancelledError:
            await done_with_it.wait()
            if where == "in its cleanup":
                raise

    async with running_engine(first_then(lingers)) as engine:
        async with opened(engine) as tab:
            try:
                response_id = await tab.respond()
                await tab.until("response.output_text.delta")
                await tab.cancel(response_id)
                _, end = await ended(engine, tab, response_id)
                assert end.status == "cancelled"
            finally:
                done_with_it.set()
        await engine.settled()


@pytest.mark.parametrize("stop_twice", [False, True])
async def test_of_two_ends_the_first_counts(stop_twice: bool) -> None:
    """A second cancel, while the responder still cleans up, changes nothing and does not disturb the cleanup."""
    cleaned_up = []
    going_on = asyncio.Event()

    async def responder(request: Request) -> Events:
        try:
            yield "a piece"
            await forever()
        finally:
            await going_on.wait()
            cleaned_up.append(True)

    async with running_engine(first_then(responder)) as engine:
        async with opened(engine) as tab:
            response_id = await tab.respond()
            await tab.until("response.output_text.delta")
            await tab.cancel(response_id, "evt_1")
            await turns_of_the_loop(5)
            if stop_twice:
                await tab.cancel(response_id, "evt_2")
            going_on.set()
            _, end = await ended(engine, tab, response_id)
        await engine.settled()
        assert (end.for_event_id, cleaned_up) == ("evt_1", [True])


def yields(pieces: int, closed: list[int]) -> Responder:
    """A responder that waits before each of its pieces, and notes at which one it was closed."""

    async def responder(request: Request) -> Events:
        for number in range(pieces):
            try:
                await asyncio.sleep(0)
                yield f"{number} "
            except BaseException:
                closed.append(number)
                raise

    return responder


@pytest.mark.parametrize("turns", range(26))
async def test_a_generator_may_be_closed_at_any_of_its_yields(turns: int) -> None:
    """At every point there is one end, the text is a prefix, and nothing is reported (the loop is in debug mode)."""
    loop = asyncio.get_running_loop()
    loop.set_debug(True)
    unhandled: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _loop, context: unhandled.append(context))
    closed: list[int] = []
    async with running_engine(first_then(yields(8, closed))) as engine:
        async with opened(engine) as tab:
            response_id = await tab.respond()
            await turns_of_the_loop(turns)
            await tab.cancel(response_id)
            said, end = await ended(engine, tab, response_id)
        await engine.settled()
        assert "0 1 2 3 4 5 6 7 ".startswith(said)
        assert (end.status == "completed") == (said == "0 1 2 3 4 5 6 7 ") or end.status == "cancelled"
        assert len(closed) <= 1
        assert engine.reports == []
    assert unhandled == []


# --- the claim -------------------------------------------------------------------------------------------------------


class ClaimsFail(Faulty):
    """A store that takes everything but claims, while it `refuses` them."""

    refuses = True

    async def append(
        self, session_id: str, writes: Sequence[Write], command: CommandRecord | None = None, *, keep_s: float = 0.0
    ) -> None:
        if self.refuses and isinstance(writes[0].entries[0], ResponseInProgress):
            raise unavailable()
        await super().append(session_id, writes, command, keep_s=keep_s)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is tried again at once."""
    for module in (turn_module, live_module, journal_module):
        monkeypatch.setattr(module, "RETRY_S", 0.0)


@pytest.fixture
def nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a turn leaves undone nobody else does."""
    monkeypatch.setattr(upkeep_module.Upkeep, "look_once", lambda _: turns_of_the_loop(1))


async def says_two_words(request: Request) -> Events:
    yield "two "
    yield "words"


async def kinds_of(engine: EngineUnderTest, session_id: str, response_id: str) -> list[str]:
    return [type(entry).__name__ for entry in await engine.store.read(session_id, response_id, 0, 10_000)]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", ["before", "after", "untold", "late"])
@pytest.mark.parametrize("times", [1, 3])
async def test_a_claim_without_an_answer_is_a_claim_or_is_made_again(fault: str, times: int) -> None:
    """The response runs once, whether the claim was made by the call that failed or by the next."""
    asked = 0

    async def responder(request: Request) -> Events:
        nonlocal asked
        asked += 1
        await store.land()
        yield "words"

    store = Faulty()
    async with running_engine(responder, store=store) as engine:
        async with opened(engine) as tab:
            store.faults = ["", *[fault] * times]
            response_id = await tab.respond()
            assert (await tab.done(response_id))["status"] == "completed"
            while store.under_way:
                await store.land()
            assert await kinds_of(engine, tab.live.id, response_id) == ["ResponseInProgress", "Deltas", "ResponseDone"]
        await engine.settled()
    assert asked == 1


@pytest.mark.usefixtures("impatient")
async def test_a_claim_by_another_instance_is_its_own() -> None:
    """It came first while the store did not answer: nobody is asked here, and the response is the other's."""
    store = ClaimsFail()
    async with running_engine(says_two_words, store=store) as engine:
        async with opened(engine) as tab:
            response_id = await tab.respond()
            await turns_of_the_loop()
            claim: list[Entry] = [begun(response_id, "inst_2"), spoken(response_id, "its ", "words")]
            await MemoryStore.append(store, tab.live.id, [Write(response_id, claim, expect=0)])
            store.refuses = False
            await turns_of_the_loop()
            await MemoryStore.append(store, tab.live.id, [Write(response_id, [done(response_id)], expect=3)])
            await tab.done(response_id)
            assert tab.transcript.texts[response_id] == "its words"
        await engine.settled()
        assert engine.reports == []


@pytest.mark.usefixtures("impatient")
async def test_a_response_is_stopped_while_it_can_t_be_claimed() -> None:
    """Once the store takes claims again it has its two events, and no model was ever asked."""
    asked = []

    async def responder(request: Request) -> Events:
        asked.append(request)
        yield "words"

    store = ClaimsFail()
    async with running_engine(responder, store=store) as engine:
        async with opened(engine) as tab:
            response_id = await tab.respond()
            await turns_of_the_loop()
            await tab.cancel(response_id, "evt_c")
            await turns_of_the_loop()
            assert await kinds_of(engine, tab.live.id, response_id) == []
            store.refuses = False
            end = await tab.done(response_id)
            assert (end["status"], end["for_event_id"]) == ("cancelled", "evt_c")
            assert await kinds_of(engine, tab.live.id, response_id) == ["ResponseInProgress", "ResponseDone"]
        await engine.settled()
    assert asked == []


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", ["before", "after", "untold", "late"])
async def test_the_end_of_what_never_ran_is_written_without_an_answer(fault: str) -> None:
    """It is its only event, once."""
    store = Faulty()
    gate = asyncio.Event()

    async def responder(request: Request) -> Events:
        yield "a piece"
        await gate.wait()

    async with running_engine(responder, store=store) as engine:
        async with opened(engine) as tab:
            first = await tab.respond()
            await tab.until("response.output_text.delta")
            waiting = await tab.respond(multitask_strategy="enqueue")
            store.faults = ["", fault]
            await tab.cancel(waiting)
            assert (await tab.done(waiting))["status"] == "cancelled"
            await store.land()
            assert await kinds_of(engine, tab.live.id, waiting) == ["ResponseDone"]
            gate.set()
            await tab.done(first)
        await engine.settled()


async def test_what_was_stopped_while_it_waited_is_not_ended_once_it_runs_elsewhere() -> None:
    """Another instance has claimed it in that moment: it is told by the control channel, and its log is its own."""
    async with running_engine(says_two_words) as engine:
        async with opened(engine) as tab:
            queued = replace(created("r"), response=replace(created("r").response, status="queued"))
            await engine.store.append(tab.live.id, [Write("session", [created("q"), queued])])
            await engine.store.append(tab.live.id, [Write("q", [begun("q", "inst_2")])])
            turn = Turn(tab.live, tab.live.state.responses["r"], engine._turns)
            turn.stop(End(status="cancelled"))
            await engine.store.append(tab.live.id, [Write("r", [begun("r", "inst_2")])])
            await turn.run()
            assert await kinds_of(engine, tab.live.id, "r") == ["ResponseInProgress"]
            for name in "qr":
                await engine.store.append(tab.live.id, [Write(name, [done(name)])])
        await engine.settled()


@pytest.mark.parametrize("status", ["queued", "in_progress"])
async def test_only_what_waited_has_its_end_alone(status: Literal["queued", "in_progress"]) -> None:
    """Stopped before it was claimed: what was created as one that runs is claimed first."""
    async with running_engine(says_two_words) as engine:
        async with opened(engine) as tab:
            engine.draining = True  # nobody else starts it
            accepted = replace(created("r"), response=replace(created("r").response, status=status))
            await engine.store.append(tab.live.id, [Write("session", [accepted])])
            turn = Turn(tab.live, tab.live.state.responses["r"], engine._turns)
            turn.stop(End(status="cancelled"))
            await turn.run()
            claim = ["ResponseInProgress"] if status == "in_progress" else []
            assert await kinds_of(engine, tab.live.id, "r") == [*claim, "ResponseDone"]
        await engine.settled()


async def test_a_full_session_refuses_the_claim() -> None:
    """The response has failed before it began: its end is its only event, and the next one is refused."""
    async with running_engine(says_two_words, max_session_bytes=100) as engine:
        async with opened(engine) as tab:
            response_id = await tab.respond(input="x" * 200)
            end = await tab.done(response_id)
            assert (end["status"], end["error"]["code"]) == ("failed", "session_full")
            assert await kinds_of(engine, tab.live.id, response_id) == ["ResponseDone"]
            with pytest.raises(ConflictError):
                await tab.respond()
        await engine.settled()


async def test_a_session_that_fills_up_ends_the_response() -> None:
    """What was shown is kept with the end."""
    said = "x" * 100

    async def responder(request: Request) -> Events:
        while True:
            await asyncio.sleep(0.01)  # a flush for each piece
            yield said

    async with running_engine(responder, max_session_bytes=2_000, journal_interval_ms=1) as engine:
        async with opened(engine) as tab:
            response_id = await tab.respond()
            end = await tab.done(response_id)
            assert (end["status"], end["error"]["code"]) == ("failed", "session_full")
            text, _ = await stored(engine, tab.live.id, response_id)
            assert text == tab.transcript.texts[response_id]
            assert (len(text) > 1_000, end["output_chars"]) == (True, len(text))
        await engine.settled()


# --- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", ["before", "after", "untold", "late"])
async def test_an_end_without_an_answer_is_written_once(fault: str) -> None:
    """Its viewers see it, whether anybody was told of it or not, and the next response runs."""
    store = Faulty()

    async def responder(request: Request) -> Events:
        yield "words"
        store.faults = [fault]

    async with running_engine(first_then(responder), store=store, journal_interval_ms=1) as engine:
        async with opened(engine) as tab:
            said, end = await ended(engine, tab, await tab.respond())
            while store.under_way:
                await store.land()
            assert (said, end.status) == ("words", "completed")
        await engine.settled()


class FailsAfterwards(Faulty):
    """A store that fails the second time that it is asked where a session stands, once something went untold."""

    loads = -1000

    async def load(self, session_id: str) -> Snapshot:
        self.loads += 1
        if self.loads == 2:
            raise unavailable()
        return await super().load(session_id)


@pytest.mark.usefixtures("impatient", "nobody_looks")
async def test_an_end_that_is_not_known_is_read_until_it_is() -> None:
    """The journal has found it, nobody was told, and the store fails when it is asked for it."""
    store = FailsAfterwards()

    async def responder(request: Request) -> Events:
        yield "words"
        store.faults = ["untold"]
        store.loads = 0

    async with running_engine(responder, store=store, journal_interval_ms=1) as engine:
        async with opened(engine) as tab:
            assert (await tab.done(await tab.respond()))["status"] == "completed"
            assert store.loads > 2
        await engine.settled()


@pytest.mark.usefixtures("impatient", "nobody_looks")
@pytest.mark.parametrize("at_the_end", [False, True])
@pytest.mark.parametrize("left", [0, 1, 2, 3])
async def test_a_response_that_the_store_has_lost_a_part_of_says_so(left: int, at_the_end: bool) -> None:
    """It has failed, with what is left of it, and whoever had seen more forgets it. What it has used it has used."""
    gate = asyncio.Event()

    async def responder(request: Request) -> Events:
        for piece in ("a", "b", "c"):
            yield piece
        await gate.wait()
        if not at_the_end:
            yield "d"
            await forever()

    store = Faulty()
    async with running_engine(responder, store=store) as engine:
        async with opened(engine) as tab:
            response_id = await tab.respond()
            await tab.until("response.output_text.delta")
            while len(await kinds_of(engine, tab.live.id, response_id)) < 2:  # noqa: ASYNC110  # no event tells of it
                await asyncio.sleep(0.01)
            forget(store, tab.live.id, response_id, left)
            gate.set()
            end = await tab.done(response_id)
            assert (end["status"], end["error"]["code"]) == ("failed", "store_lost")
            text, ends = await stored(engine, tab.live.id, response_id)
            assert (text, len(ends)) == ("abc"[: max(0, left - 1)], 1)
            assert tab.transcript.texts[response_id] == text
            assert end["output_chars"] == len(text)
            assert end["usage"]["output_tokens"] == 1
        await engine.settled()
