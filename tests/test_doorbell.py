"""A doorbell loses no ring, and gives up no later than it was told to."""

from __future__ import annotations

import asyncio

import pytest

from realtime.doorbell import Doorbell
from tests.support.clock import advancing_clock


async def turns(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_ring_wakes_who_waits() -> None:
    """Waiting ends when it rings, and not before."""
    bell = Doorbell()
    waiting = asyncio.ensure_future(bell.wait())
    await turns()
    assert not waiting.done()
    bell.ring()
    await waiting


async def test_a_ring_before_is_kept() -> None:
    """Who comes after the ring does not wait."""
    bell = Doorbell()
    bell.ring()
    await bell.wait()


async def test_several_rings_are_one() -> None:
    """After one wait the doorbell is silent again."""
    bell = Doorbell()
    bell.ring()
    bell.ring()
    await bell.wait()
    waiting = asyncio.ensure_future(bell.wait())
    await turns()
    assert not waiting.done()
    bell.ring()
    bell.ring()
    await waiting


async def test_a_ring_after_the_wake_up_is_not_lost() -> None:
    """What rings between the wake-up and the next wait is answered by the next wait."""
    bell = Doorbell()
    waiting = asyncio.ensure_future(bell.wait())
    await turns()
    bell.ring()
    await waiting
    bell.ring()
    await bell.wait()


async def test_waiting_ends_in_time() -> None:
    """At `until` the wait is over without a ring."""
    bell = Doorbell()
    with advancing_clock() as advance:
        waiting = asyncio.ensure_future(bell.wait(asyncio.get_running_loop().time() + 60))
        await turns()
        advance(59)
        await turns()
        assert not waiting.done()
        advance(1)
        await turns()
        assert waiting.done()
        await waiting


async def test_a_time_that_is_over_is_not_waited_for() -> None:
    """A deadline in the past ends the wait at once."""
    bell = Doorbell()
    with advancing_clock():
        async with asyncio.timeout(20):
            await bell.wait(asyncio.get_running_loop().time() - 1)


async def test_the_end_of_a_wait_rings_no_later_one() -> None:
    """A deadline that came is over: the next wait is not woken by it, nor by one that a ring made needless."""
    bell = Doorbell()
    with advancing_clock() as advance:
        waiting = asyncio.ensure_future(bell.wait(asyncio.get_running_loop().time() + 60))
        await turns()
        bell.ring()
        await waiting
        again = asyncio.ensure_future(bell.wait())
        advance(120)
        await turns()
        assert not again.done()
        bell.ring()
        await again


async def test_a_cancelled_wait_keeps_the_ring() -> None:
    """Who is cancelled while it rings leaves the ring to the next."""
    bell = Doorbell()
    waiting = asyncio.ensure_future(bell.wait())
    await turns()
    bell.ring()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await bell.wait()
