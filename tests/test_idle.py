"""Silence ends a block, progress lets it go on. Time is the loop's, moved by the test."""

from __future__ import annotations

import asyncio

import pytest

from realtime.idle import IdleTimeout
from tests.support.clock import advancing_clock


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class Block:
    """A block under a timeout, which waits until it is let go."""

    def __init__(self, idle_s: float) -> None:
        self.idle = IdleTimeout(idle_s)
        self.go = asyncio.Event()
        self.task = asyncio.ensure_future(self._run())

    async def _run(self) -> str:
        async with self.idle:
            await self.go.wait()
        return "through"


async def test_silence_ends_the_block() -> None:
    """After `idle_s` without progress the block raises `TimeoutError`, and says that it was this one's."""
    with advancing_clock() as advance:
        block = Block(60)
        await turns()
        advance(61)
        await turns()
        with pytest.raises(TimeoutError):
            await block.task
        assert block.idle.expired


async def test_a_block_may_end_before() -> None:
    """A block that is over in time is left without an error, and the timer is gone."""
    with advancing_clock() as advance:
        block = Block(60)
        await turns()
        advance(59)
        await turns()
        block.go.set()
        assert await block.task == "through"
        advance(60)
        await turns()
        assert not block.idle.expired


async def test_progress_starts_the_silence_anew() -> None:
    """Any number of times, each shortly before it is too late."""
    with advancing_clock() as advance:
        block = Block(60)
        for _ in range(5):
            await turns()
            advance(59)
            block.idle.progress()
        await turns()
        assert not block.task.done()
        advance(61)
        await turns()
        with pytest.raises(TimeoutError):
            await block.task


async def test_only_the_last_progress_counts() -> None:
    """The silence is measured from the last progress, not from when the timer looked."""
    with advancing_clock() as advance:
        block = Block(60)
        await turns()
        advance(30)
        block.idle.progress()
        advance(30)  # the timer looks, and finds the progress of 30 s ago
        await turns()
        assert not block.task.done()
        advance(30)
        await turns()
        with pytest.raises(TimeoutError):
            await block.task


async def test_another_s_timeout_is_not_this_one_s() -> None:
    """A `TimeoutError` from within the block passes, and `expired` tells them apart."""
    idle = IdleTimeout(60)
    with pytest.raises(TimeoutError, match="mine"):
        async with idle:
            raise TimeoutError("mine")
    assert not idle.expired


async def test_a_cancellation_is_no_timeout() -> None:
    """Cancelled from outside, the block says so."""
    block = Block(60)
    await turns()
    block.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await block.task
    assert not block.idle.expired


async def test_errors_pass() -> None:
    """What the block raises comes out as it is."""
    with pytest.raises(ValueError, match="no"):
        async with IdleTimeout(60):
            raise ValueError("no")
