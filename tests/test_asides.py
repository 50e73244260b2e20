"""The messages beside the logs wait in order, and who has too many waits with them."""

from __future__ import annotations

import asyncio

from realtime.asides import MAX_WAITING, Asides
from realtime.protocol import ParticipantJoined, ParticipantLeft, Pong, ServerMessage
from tests.contract import participant

ANN, BOB = participant("conn_1"), participant("conn_2", "bob")


def all_of(asides: Asides, audience: dict[str, object] | None = None) -> list[ServerMessage]:
    """Everything that waits."""
    found = []
    while (message := asides.next(asides.known)) is not None:
        found.append(message)
    return found


async def turns() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def filled() -> Asides:
    """Asides with room for one more before who puts has to wait."""
    asides = Asides()
    for number in range(MAX_WAITING - 1):
        await asides.put(Pong(event_id=str(number)))
    return asides


def test_at_first_nothing_waits() -> None:
    """Nothing was put, nobody came."""
    assert Asides().next({}) is None


async def test_messages_come_in_order() -> None:
    """First in, first out."""
    asides = Asides()
    messages = [Pong(event_id=str(number)) for number in range(3)]
    for message in messages:
        await asides.put(message)
    assert all_of(asides) == messages


def test_who_came_and_went_is_told() -> None:
    """Once, as the difference between the audience that was told and the one that is."""
    asides = Asides()
    asides.known = {"conn_1": ANN}
    audience = {"conn_2": BOB}
    assert [asides.next(audience) for _ in range(3)] == [
        ParticipantLeft(participant=ANN),
        ParticipantJoined(participant=BOB),
        None,
    ]


def test_who_came_and_went_between_is_not_told() -> None:
    """A client that was not ready is told what is, not what was."""
    asides = Asides()
    asides.known = {"conn_1": ANN}
    assert asides.next({"conn_1": ANN}) is None


async def test_answers_come_before_newer_arrivals() -> None:
    """What waits already is told first."""
    asides = Asides()
    await asides.put(Pong())
    audience = {"conn_1": ANN}
    assert [asides.next(audience) for _ in range(2)] == [Pong(), ParticipantJoined(participant=ANN)]


async def test_who_puts_too_much_waits() -> None:
    """Until the client has taken one; the message itself is in its place already."""
    asides = await filled()
    putting = asyncio.ensure_future(asides.put(Pong(event_id="last")))
    await turns()
    assert not putting.done()
    assert asides.next(asides.known) == Pong(event_id="0")
    await putting
    assert all_of(asides)[-1] == Pong(event_id="last")


async def test_several_wait_until_there_is_room_for_them() -> None:
    """Room for one lets no more go on than there is room for."""
    asides = await filled()
    putting = [asyncio.ensure_future(asides.put(Pong(event_id=f"late {number}"))) for number in range(3)]
    await turns()
    asides.next(asides.known)
    await turns()
    assert not any(task.done() for task in putting)
    asides.next(asides.known)
    asides.next(asides.known)
    await turns()
    assert all(task.done() for task in putting)


async def test_closing_lets_who_waits_go_on() -> None:
    """And nobody waits after it."""
    asides = await filled()
    putting = asyncio.ensure_future(asides.put(Pong()))
    await turns()
    asides.close()
    await putting
    await asides.put(Pong())


async def test_a_cancelled_put_harms_nobody() -> None:
    """One that waits may be cancelled; the others still go on."""
    asides = await filled()
    putting = [asyncio.ensure_future(asides.put(Pong())) for _ in range(2)]
    await turns()
    putting[0].cancel()
    await turns()
    assert putting[0].cancelled()
    asides.next(asides.known)
    asides.next(asides.known)
    await putting[1]


def test_closing_twice_is_closing() -> None:
    """Without anybody who waits."""
    asides = Asides()
    asides.close()
    asides.close()
