"""The sequence of a drain, on doubles: who is told what, what is waited for and for how long, what is ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from realtime.drain import GOODBYE_S, MAX_ENDS_S, MAX_RETURN_S, Drain
from realtime.errors import RealtimeError
from tests.support.clock import advancing_clock
from tests.support.sdk import turns

HOUR_S = 3600.0


class Door:
    """Some connections; `told` is what they were told."""

    def __init__(self, inside: int = 0) -> None:
        self.draining = False
        self.told: list[tuple[float, float]] = []
        self._inside = inside
        self._empty = asyncio.Event()

    def __len__(self) -> int:
        return self._inside

    def leave(self) -> None:
        """The last client goes."""
        self._inside = 0
        self._empty.set()

    def say_goodbye(self, time_left_s: float, spread_s: float) -> None:
        assert self.draining
        self.told.append((time_left_s, spread_s))

    async def empty(self) -> None:
        if self._inside:
            await self._empty.wait()


class Work:
    """Model calls, if any, that run until `finish`; `ends` is what they were ended with."""

    def __init__(self, *, runs: bool = False, stuck: bool = False) -> None:
        self.draining = False
        self.ends: list[RealtimeError] = []
        self._over = asyncio.Event()
        self._stuck = stuck
        if not runs:
            self.finish()

    def finish(self) -> None:
        """The last one ends by itself."""
        self._over.set()

    async def finish_turns(self) -> None:
        assert self.draining
        await self._over.wait()

    async def end_turns(self, error: RealtimeError) -> None:
        if not self._over.is_set():
            self.ends.append(error)
        if self._stuck:
            await asyncio.Event().wait()


@asynccontextmanager
async def draining(door: Door, *works: Work, shared: bool = False) -> AsyncIterator[asyncio.Task[None]]:
    """A drain of an hour that has begun, as a task."""
    task = asyncio.create_task(Drain(door, works, drain_s=HOUR_S, shared=shared).run())
    try:
        await turns()
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


async def goes(task: asyncio.Task[None]) -> bool:
    """Whether the drain is over at once, but for the moment after the goodbye."""
    done, _ = await asyncio.wait([task], timeout=GOODBYE_S * 5)
    return bool(done)


async def test_the_door_is_closed_before_anything_is_waited_for() -> None:
    """Nobody is let in and nothing begins, while what runs may go on."""
    door, responses, one_shots = Door(1), Work(runs=True), Work(runs=True)
    async with draining(door, responses, one_shots) as task:
        assert door.draining
        assert responses.draining
        assert one_shots.draining
        assert not task.done()


@pytest.mark.parametrize("shared", [False, True])
async def test_without_connections_and_turns_it_is_over_at_once(shared: bool) -> None:
    """There is nobody to wait for."""
    door = Door()
    async with draining(door, Work(), shared=shared) as task:
        assert task.done()


async def test_the_only_instance_does_not_wait_for_idle_clients() -> None:
    """They have nowhere to go: they are told, and that is all."""
    door = Door(3)
    async with draining(door, Work()) as task:
        assert door.told == [(GOODBYE_S, MAX_RETURN_S)]
        assert not task.done(), "the clients have a moment to take it"
        assert await goes(task)


async def test_the_only_instance_tells_its_clients_when_what_runs_has_ended() -> None:
    """Who was told before would leave in the middle of an answer."""
    door, work, other = Door(1), Work(runs=True), Work(runs=True)
    async with draining(door, work, other) as task:
        work.finish()
        await turns()
        assert door.told == []
        assert not task.done()
        other.finish()
        await turns()
        assert door.told == [(GOODBYE_S, MAX_RETURN_S)]
        assert await goes(task)
        assert work.ends + other.ends == []


async def test_clients_with_somewhere_to_go_get_the_drain_to_leave() -> None:
    """They are told at once, and come back at times spread over all of it but the part that is kept for the ends."""
    door, work = Door(1), Work(runs=True)
    async with draining(door, work, shared=True) as task:
        assert door.told == [(HOUR_S - MAX_ENDS_S, HOUR_S - MAX_ENDS_S)]
        work.finish()
        await turns()
        assert not task.done()
        door.leave()
        await turns()
        assert task.done()
        assert len(door.told) == 1


async def test_it_waits_for_what_runs_after_the_last_client_has_left() -> None:
    """They follow their answers from elsewhere."""
    door, work = Door(1), Work(runs=True)
    async with draining(door, work, shared=True) as task:
        door.leave()
        await turns()
        assert not task.done()
        work.finish()
        await turns()
        assert task.done()
        assert work.ends == []


@pytest.mark.parametrize("shared", [False, True])
async def test_what_still_runs_at_the_deadline_is_ended(shared: bool) -> None:
    """As failed by the shutdown, a moment before the whole time is over."""
    with advancing_clock() as advance:
        door, work, finished = Door(), Work(runs=True), Work()
        async with draining(door, work, finished, shared=shared) as task:
            advance(HOUR_S - MAX_ENDS_S - 1)
            await turns()
            assert work.ends == []
            advance(1)
            await turns()
            assert [(error.type, error.code) for error in work.ends] == [("server_error", "instance_shutdown")]
            assert finished.ends == []
            assert task.done()


async def test_clients_that_do_not_leave_are_not_waited_for_beyond_the_deadline() -> None:
    """They are cut off then, which they understand too."""
    with advancing_clock() as advance:
        async with draining(Door(1), Work(), shared=True) as task:
            advance(HOUR_S - MAX_ENDS_S - 1)
            await turns()
            assert not task.done()
            advance(1)
            assert await goes(task)


async def test_ends_that_nobody_can_bring_about_do_not_hold_it_up() -> None:
    """Such as one that a store does not take."""
    with advancing_clock() as advance:
        stuck, work = Work(runs=True, stuck=True), Work(runs=True)
        async with draining(Door(), stuck, work) as task:
            advance(HOUR_S - MAX_ENDS_S)
            await turns()
            assert work.ends
            assert not task.done()
            advance(MAX_ENDS_S)
            await turns()
            assert task.done()


async def test_a_short_drain_keeps_little_of_it_for_the_ends() -> None:
    """Most of it belongs to what runs."""
    with advancing_clock() as advance:
        work = Work(runs=True)
        task = asyncio.create_task(Drain(Door(), [work], drain_s=1, shared=False).run())
        await turns()
        advance(0.7)
        await turns()
        assert work.ends == []
        advance(0.1)
        await turns()
        assert task.done()


async def test_cancelled_it_ends_nothing() -> None:
    """Who is in a hurry does not wait for a store."""
    work = Work(runs=True)
    async with draining(Door(1), work):
        pass
    assert work.ends == []
