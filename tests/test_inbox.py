"""Commands are carried out one after the other, in their order, and only so many wait."""

from __future__ import annotations

import asyncio

from realtime.inbox import MAX_WAITING, Inbox
from realtime.protocol import AuthRefresh, Command, SessionClose
from tests.support.clock import advancing_clock


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class Desk:
    """Carries out a command when it is let; keeps the order."""

    def __init__(self) -> None:
        self.begun: list[str | None] = []
        self.done: list[str | None] = []
        self.permits = asyncio.Semaphore(0)

    async def execute(self, command: Command | AuthRefresh) -> None:
        self.begun.append(command.event_id)
        await self.permits.acquire()
        self.done.append(command.event_id)

    def allow(self, count: int) -> None:
        for _ in range(count):
            self.permits.release()


def command(number: int) -> Command:
    return SessionClose(event_id=str(number))


async def test_commands_are_carried_out_in_order() -> None:
    """One begins when the one before it is done."""
    desk = Desk()
    inbox = Inbox(desk.execute)
    for number in range(3):
        await inbox.put(command(number))
    await turns()
    assert desk.begun == ["0"]
    desk.allow(3)
    await turns()
    assert desk.done == ["0", "1", "2"]


async def test_putting_does_not_wait_for_the_command() -> None:
    """The reader goes on reading while commands wait."""
    desk = Desk()
    inbox = Inbox(desk.execute)
    async with asyncio.timeout(20):
        for number in range(MAX_WAITING - 1):
            await inbox.put(command(number))
    desk.allow(MAX_WAITING)
    await turns(MAX_WAITING * 2)
    assert len(desk.done) == MAX_WAITING - 1


async def test_an_inbox_that_was_empty_works_again() -> None:
    """Its task ends with the last command, and a new one begins with the next."""
    desk = Desk()
    desk.allow(2)
    inbox = Inbox(desk.execute)
    for number in range(2):
        await inbox.put(command(number))
        await turns()
        assert len(asyncio.all_tasks()) == 1
    assert desk.done == ["0", "1"]


async def test_putting_waits_while_too_many_do() -> None:
    """And only while: once one is carried out there is room again."""
    desk = Desk()
    inbox = Inbox(desk.execute)
    for number in range(MAX_WAITING - 1):
        await inbox.put(command(number))
    putting = asyncio.ensure_future(inbox.put(command(MAX_WAITING - 1)))
    await turns()
    assert not putting.done()
    desk.allow(1)
    await turns()
    went_on = putting.done()
    desk.allow(MAX_WAITING)
    await putting
    await turns(MAX_WAITING * 2)
    assert len(desk.done) == MAX_WAITING
    assert went_on


async def test_finish_lets_what_waits_be_carried_out() -> None:
    """It returns once everything is."""
    desk = Desk()
    inbox = Inbox(desk.execute)
    for number in range(3):
        await inbox.put(command(number))
    desk.allow(3)
    await inbox.finish(60)
    assert desk.done == ["0", "1", "2"]


async def test_finish_gives_up_in_time() -> None:
    """What is not done by then is not done at all."""
    desk = Desk()
    inbox = Inbox(desk.execute)
    with advancing_clock() as advance:
        for number in range(3):
            await inbox.put(command(number))
        desk.allow(1)
        finishing = asyncio.ensure_future(inbox.finish(60))
        await turns()
        advance(61)
        await finishing
        desk.allow(2)
        await turns()
    assert desk.done == ["0"]


async def test_finish_of_an_empty_inbox() -> None:
    """There is nothing to wait for."""
    await Inbox(Desk().execute).finish(60)


async def test_stop_gives_up_what_waits() -> None:
    """The command that is being carried out included; stopping twice is stopping."""
    desk = Desk()
    inbox = Inbox(desk.execute)
    for number in range(3):
        await inbox.put(command(number))
    await turns()
    inbox.stop()
    inbox.stop()
    desk.allow(3)
    await turns()
    assert (desk.begun, desk.done) == (["0"], [])
