"""When a response that nobody looks at has to end. Times are numbers."""

from __future__ import annotations

import pytest

from realtime.store.base import Viewer
from realtime.viewers import SERVER_ENDED_FLOOR_S, UNSEEN_FLOOR_S, Audience
from tests.contract import participant, session

PLAIN = session()
GRACE = session(disconnect_grace_ms=60_000)
ANN = Viewer(participant("conn_1"), "inst_1")
BOB = Viewer(participant("conn_2", "bob"), "inst_2")


def left(floor_s: float = 0.0) -> Audience:
    """An audience whose only viewer left at 100."""
    audience = Audience([ANN], now=0.0)
    audience.leave("conn_1", floor_s=floor_s, now=100.0)
    return audience


def test_while_somebody_looks_nothing_is_due() -> None:
    """One viewer of two is enough."""
    audience = Audience([ANN, BOB], now=0.0)
    audience.leave("conn_1", floor_s=0.0, now=100.0)
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
    audience.leave("conn_1", floor_s=0.0, now=100.0)
    assert audience.due("r", PLAIN) == 100.0


def test_who_joins_sees_what_runs() -> None:
    """Once anybody has looked, the floor of the unseen is over."""
    audience = left()
    audience.created("r", now=500.0)
    audience.join(BOB)
    assert audience.due("r", PLAIN) is None
    audience.leave("conn_2", floor_s=0.0, now=501.0)
    assert audience.due("r", PLAIN) == 501.0


def test_a_viewer_that_comes_back_stops_the_clock() -> None:
    """And the next leave starts it anew, with its own floor."""
    audience = left(SERVER_ENDED_FLOOR_S)
    audience.join(ANN)
    assert audience.due("r", GRACE) is None
    audience.leave("conn_1", floor_s=0.0, now=300.0)
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
    assert list(audience.participants.values()) == [ANN.participant, BOB.participant]


def test_participants_that_were_told_never_change() -> None:
    """A reader that kept them can see what is new: each change makes a new mapping."""
    audience = Audience([ANN], now=0.0)
    kept = audience.participants
    audience.join(BOB)
    audience.leave("conn_1", floor_s=0.0, now=1.0)
    assert dict(kept) == {"conn_1": ANN.participant}
    assert dict(audience.participants) == {"conn_2": BOB.participant}


def test_who_was_not_there_may_leave() -> None:
    """A leave that was told twice changes nobody else."""
    audience = Audience([ANN], now=0.0)
    audience.leave("conn_2", floor_s=0.0, now=1.0)
    assert list(audience.participants) == ["conn_1"]


def test_a_leave_of_nobody_starts_no_clock_anew() -> None:
    """Of a connection that has left already, however often that is told, with whatever floor."""
    audience = left(SERVER_ENDED_FLOOR_S)
    audience.leave("conn_1", floor_s=0.0, now=110.0)
    assert audience.due("r", PLAIN) == 100.0 + SERVER_ENDED_FLOOR_S


def test_a_viewer_counts_once() -> None:
    """A join that was told twice takes one leave."""
    audience = Audience([ANN], now=0.0)
    audience.join(ANN)
    audience.leave("conn_1", floor_s=0.0, now=100.0)
    assert audience.due("r", PLAIN) == 100.0


def test_what_was_not_told_of_viewers_is_made_up_for() -> None:
    """Who came is there, who went is not, and the others stay where they were in the row."""
    eve = Viewer(participant("conn_3", "eve"), "inst_3")
    audience = Audience([ANN, BOB], now=0.0)
    audience.replace([BOB, eve], now=100.0)
    assert list(audience.participants) == ["conn_2", "conn_3"]
    assert audience.instances == {"inst_2", "inst_3"}


def test_nobody_knows_how_a_viewer_left_whose_leave_was_missed() -> None:
    """It may have been the server's doing: what ran for it waits."""
    audience = Audience([ANN], now=0.0)
    audience.replace([], now=100.0)
    assert audience.due("r", PLAIN) == 100.0 + SERVER_ENDED_FLOOR_S


def test_a_viewer_whose_join_was_missed_sees_what_runs() -> None:
    """Its clock stops, and the floor of the unseen is over."""
    audience = left()
    audience.created("r", now=500.0)
    audience.replace([BOB], now=501.0)
    assert audience.due("r", PLAIN) is None
    audience.leave("conn_2", floor_s=0.0, now=502.0)
    assert audience.due("r", PLAIN) == 502.0


def test_the_row_is_the_one_that_the_store_has() -> None:
    """Whoever has left and come back meanwhile stands at its end."""
    audience = Audience([ANN, BOB], now=0.0)
    audience.replace([BOB, ANN], now=100.0)
    assert list(audience.participants.values()) == [BOB.participant, ANN.participant]


def test_the_same_viewers_again_are_no_news() -> None:
    """The mapping stays the one that was told, and no clock is touched."""
    audience = Audience([ANN, BOB], now=0.0)
    kept = audience.participants
    audience.replace([ANN, BOB], now=100.0)
    assert audience.participants is kept


def test_which_connections_an_instance_has() -> None:
    """Those that are attached to it now."""
    other = Viewer(participant("conn_3"), "inst_1")
    audience = Audience([ANN], now=0.0)
    audience.join(BOB)
    audience.join(other)
    assert audience.instances == {"inst_1", "inst_2"}
    assert audience.attached_to("inst_1") == ["conn_1", "conn_3"]
    audience.leave("conn_2", floor_s=0.0, now=1.0)
    assert audience.instances == {"inst_1"}
    assert audience.attached_to("inst_2") == []
