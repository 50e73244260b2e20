"""Cancel against completion, thousands of times in process: one end each, and what is stored is what was shown."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import pytest

from realtime.protocol import ResponseCreate, SessionClose
from realtime.responders.base import Finish, Request, ResponderEvent, TokenCount
from tests.support.scale import scaled
from tests.test_engine import EngineUnderTest, Tab, opened, running_engine, stored, turns_of_the_loop

ROUNDS = scaled(5_000, 1_000)
MIXED_ROUNDS = scaled(2_000, 500)
LONGEST = 9
"""Turns of the loop until something happens: more than a response takes from its last piece to its stored end."""
PIECES = ("one ", "zwei 👋 ", "three")


class Steps:
    """A responder that waits some turns of the loop before each of its pieces, as many as its request's text says."""

    def __init__(self) -> None:
        self.open = 0

    async def __call__(self, request: Request) -> AsyncIterator[ResponderEvent]:
        """Answer with all of `PIECES`, unless stopped before."""
        self.open += 1
        try:
            for turns, piece in zip(request.messages[-1].content.split(), PIECES, strict=True):
                await turns_of_the_loop(int(turns))
                yield piece
            yield Finish("end_turn", TokenCount(input_tokens=1, output_tokens=3))
        finally:
            self.open -= 1


async def after(turns: int, act: Callable[[], Awaitable[Any]]) -> None:
    """Do something so many turns of the loop later."""
    await turns_of_the_loop(turns)
    await act()


async def all_at_once(*acts: Coroutine[Any, Any, Any]) -> None:
    """Return when all are done."""
    async with asyncio.TaskGroup() as group:
        for act in acts:
            group.create_task(act)


def steps(chance: random.Random) -> str:
    """The text that makes `Steps` wait at random."""
    return " ".join(str(chance.randrange(LONGEST)) for _ in PIECES)


def about_the_end(waits: str, chance: random.Random) -> int:
    """Some turn of the loop at which a response that waits so may be about to complete; sometimes much earlier."""
    turns = sum(map(int, waits.split()))
    return chance.randrange(turns + 1) if chance.random() < 0.2 else turns + chance.randrange(4 * LONGEST)


async def check(engine: EngineUnderTest, tab: Tab, response_id: str) -> str:
    """One end, shown as it is stored, with the text that is stored; returns its status."""
    text, ends = await stored(engine, tab.live.id, response_id)
    assert len(ends) == 1
    [end] = ends
    shown = tab.transcript.done[response_id]
    assert (shown["status"], shown["stop_reason"]) == (end.status, end.stop_reason)
    assert shown.get("for_event_id") == end.for_event_id
    assert tab.transcript.texts[response_id] == text
    assert "".join(PIECES).startswith(text)
    assert shown["output_chars"] == len(text.encode("utf-16-le")) // 2
    assert shown["usage"]["estimated"] == (end.status == "cancelled")
    if end.status == "completed":
        assert (text, end.stop_reason, end.for_event_id) == ("".join(PIECES), "end_turn", None)
    else:
        assert (end.status, end.error) == ("cancelled", None)
    return end.status


async def cancelled_from_two_tabs(engine: EngineUnderTest, chance: random.Random) -> tuple[str, str | None]:
    """One response, and a cancel from each of two tabs at some time; returns how it ended, and whose cancel it was."""
    async with opened(engine) as first, opened(engine, first.live.id) as second:
        waits = steps(chance)
        response_id = await first.respond(input=waits)
        await all_at_once(
            first.done(response_id),
            second.done(response_id),
            after(about_the_end(waits, chance), lambda: first.cancel(response_id, "evt_first")),
            after(about_the_end(waits, chance), lambda: second.cancel(response_id, "evt_second")),
        )
        status = await check(engine, first, response_id)
        await check(engine, second, response_id)
        end = first.transcript.done[response_id]
        assert status == "completed" or end["stop_reason"] == "cancelled"
        return status, end.get("for_event_id")


@pytest.mark.timeout(120)
async def test_a_cancel_against_the_completion() -> None:
    """2,000 times, in every order of turns of the loop, from two tabs."""
    chance = random.Random(4)
    seen: Counter[tuple[str, str | None]] = Counter()
    responder = Steps()
    async with running_engine(responder) as engine:
        for _ in range(ROUNDS):
            seen[await cancelled_from_two_tabs(engine, chance)] += 1
        await engine.settled()
        assert (responder.open, engine.reports) == (0, [])
    assert set(seen) == {("completed", None), ("cancelled", "evt_first"), ("cancelled", "evt_second")}
    assert min(seen.values()) > ROUNDS / 10


async def ended_somehow(engine: EngineUnderTest, chance: random.Random) -> list[str]:
    """Two responses, one behind the other, and a few things at random that may end them; returns how they ended."""
    async with opened(engine) as watcher:
        session_id = watcher.live.id
        ids = [await watcher.respond(input=steps(chance), multitask_strategy="enqueue") for _ in range(2)]
        last = 2 * LONGEST * (len(PIECES) + 1)

        async def interrupt() -> None:
            command = ResponseCreate(response_id="late", input=steps(chance), multitask_strategy="interrupt")
            await watcher.send(command)
            ids.append("late")

        async def look_and_leave() -> None:
            async with opened(engine, session_id) as tab:
                await turns_of_the_loop(chance.randrange(last))
                await tab.cancel(chance.choice(ids))

        things: list[Callable[[], Awaitable[Any]]] = [
            look_and_leave,
            interrupt,
            lambda: watcher.cancel(ids[0], "evt_0"),
            lambda: watcher.cancel(ids[1], "evt_1"),
        ]
        some = chance.sample(things, k=chance.randrange(1, len(things) + 1))
        await all_at_once(*(after(chance.randrange(last), thing) for thing in some))
        if chance.random() < 0.3:
            await watcher.send(SessionClose(event_id="evt_close"))
    async with opened(engine, session_id) as late:  # the watcher is gone; what still ran ends for it, or has ended
        for response_id in ids:
            await late.done(response_id)
        return [await check(engine, late, response_id) for response_id in ids]


async def test_several_causes_against_each_other_and_the_completion() -> None:
    """Cancels, an interrupting response, the session's close, viewers that come and go: one end each, none left."""
    chance = random.Random(5)
    seen: Counter[str] = Counter()
    responder = Steps()
    async with running_engine(responder) as engine:
        for _ in range(MIXED_ROUNDS):
            seen.update(await ended_somehow(engine, chance))
        await engine.settled()
        assert (responder.open, engine.reports) == (0, [])
    assert min(seen[status] for status in ("completed", "cancelled")) > MIXED_ROUNDS / 10
