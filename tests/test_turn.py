"""One turn with each kind of responder that somebody may write: it ends in exactly one done, and the next one runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest

from realtime.errors import UpstreamError
from realtime.protocol import ResponseDone
from realtime.responders.base import Finish, Reasoning, Request, Responder, ResponderEvent, Text, TokenCount
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
async def test_a_responder_that_takes_long_to_stop_holds_up_nobody(where: str) -> None:
    """The response is over for its viewers, and the next one runs, while it still cleans up."""
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
