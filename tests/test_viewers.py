"""When a response that nobody looks at has to end. Times are numbers."""

from __future__ import annotations

import pytest

from realtime.viewers import SERVER_ENDED_FLOOR_S, UNSEEN_FLOOR_S, Audience
from tests.contract import participant, session

PLAIN = session()
GRACE = session(disconnect_grace_ms=60_000)
ANN, BOB = participant("conn_1"), participant("conn_2", "bob")


def left(floor_s: float = 0.0) -> Audience:
    """An audience whose only viewer left at 100."""
    audience = Audience([ANN], now=0.0)
    audience.leave(ANN, floor_s=floor_s, now=100.0)
    return audience


def test_while_somebody_looks_nothing_is_due() -> None:
    """One viewer of two is enough."""
    audience = Audience([ANN, BOB], now=0.0)
    audience.leave(ANN, floor_s=0.0, now=100.0)
    assert audience.due("r", PLAIN) is None


def test_without_a_grace_it_is_due_at_once() -> None:
    """The moment that the last viewer leaves."""
    assert left().due("r", PLAIN) == 100.0


def test_the_grace_counts_from_the_last_leave() -> None:
    """From then on, in seconds."""
    assert left().due("r", GRACE) == 160.0


def test_continue_is_never_due() -> None:
    """Such a response goes on without viewers, seen or not."""
    audience = left()
    audience.created("r", now=100.0)
    assert audience.due("r", session(on_disconnect="continue")) is None


@pytest.mark.parametrize("floor_s", [5.0, SERVER_ENDED_FLOOR_S])
def test_the_floor_of_a_leave_is_the_least_grace(floor_s: float) -> None:
    """Who was cut off by the server, or reconnects slowly by design, has time to come back."""
    assert left(floor_s).due("r", PLAIN) == 100.0 + floor_s


def test_a_longer_grace_counts_before_the_floor() -> None:
    """The floor is no ceiling."""
    assert left(SERVER_ENDED_FLOOR_S).due("r", GRACE) == 160.0


def test_an_unseen_response_waits_from_its_creation() -> None:
    """A response made without viewers has its own floor, whatever the last leave's was."""
    audience = left()
    audience.created("r", now=500.0)
    assert audience.due("r", PLAIN) == 500.0 + UNSEEN_FLOOR_S
    assert audience.due("r", GRACE) == 560.0
    assert audience.due("other", PLAIN) == 100.0


def test_a_response_with_a_viewer_is_seen() -> None:
    """Its clock starts when the viewer leaves."""
    audience = Audience([ANN], now=0.0)
    audience.created("r", now=50.0)
    audience.leave(ANN, floor_s=0.0, now=100.0)
    assert audience.due("r", PLAIN) == 100.0


def test_who_joins_sees_what_runs() -> None:
    """Once anybody has looked, the floor of the unseen is over."""
    audience = left()
    audience.created("r", now=500.0)
    audience.join(BOB)
    assert audience.due("r", PLAIN) is None
    audience.leave(BOB, floor_s=0.0, now=501.0)
    assert audience.due("r", PLAIN) == 501.0


def test_a_viewer_that_comes_back_stops_the_clock() -> None:
    """And the next leave starts it anew, with its own floor."""
    audience = left(SERVER_ENDED_FLOOR_S)
    audience.join(ANN)
    assert audience.due("r", GRACE) is None
    audience.leave(ANN, floor_s=0.0, now=300.0)
    assert audience.due("r", PLAIN) == 300.0


def test_a_session_that_was_just_opened_here_waits() -> None:
    """Who opens a session without viewers does not know how the last one left: the server may have ended it."""
    assert Audience(now=100.0).due("r", PLAIN) == 100.0 + SERVER_ENDED_FLOOR_S


def test_the_clock_of_a_response_goes_with_it() -> None:
    """After its end nothing of it is kept; ending twice, or unseen, does no harm."""
    audience = left()
    audience.created("r", now=500.0)
    audience.ended("r")
    audience.ended("r")
    assert audience.due("r", PLAIN) == 100.0


def test_participants_are_the_oldest_first() -> None:
    """In the order in which they joined."""
    audience = Audience([ANN], now=0.0)
    audience.join(BOB)
    assert list(audience.participants.values()) == [ANN, BOB]


def test_participants_that_were_told_never_change() -> None:
    """A reader that kept them can see what is new: each change makes a new mapping."""
    audience = Audience([ANN], now=0.0)
    kept = audience.participants
    audience.join(BOB)
    audience.leave(ANN, floor_s=0.0, now=1.0)
    assert dict(kept) == {"conn_1": ANN}
    assert dict(audience.participants) == {"conn_2": BOB}


def test_who_was_not_there_may_leave() -> None:
    """A leave that was told twice changes nobody else."""
    audience = Audience([ANN], now=0.0)
    audience.leave(BOB, floor_s=0.0, now=1.0)
    assert list(audience.participants) == ["conn_1"]
