"""What the terminal client makes of lost connections, without one."""

from __future__ import annotations

import pytest

from realtime.absence import Absence, ChatEnded

LOST, OVERLOADED = 1006, 1013


class Watch:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_nobody_there() -> None:
    """It is not waited for, also by a person: the address is wrong. What answered is."""
    with pytest.raises(ChatEnded, match="no server there: refused"):
        Absence(print).lost(LOST, "refused", 0.1)
    said: list[str] = []
    Absence(said.append).lost(OVERLOADED, "HTTP 501", 0.1)
    assert said == ["no session yet, trying again: HTTP 501"]


def test_a_lost_connection_is_told_with_its_reason() -> None:
    """Where there is one; and once, until it is another, or comes back."""
    said: list[str] = []
    absence = Absence(said.append)
    absence.attached()
    absence.lost(LOST, "lost", 0.1)
    absence.lost(LOST, "refused", 0.1)
    absence.lost(LOST, "refused", 0.1)
    absence.attached()
    absence.lost(LOST, "refused", 0.1)
    refused = "connection lost, coming back: refused"
    assert said == ["connection lost, coming back", refused, refused]


def test_patience_has_an_end() -> None:
    """After so long without a connection, the next wait included; a connection gives all of it again."""
    said: list[str] = []
    watch = Watch()
    absence = Absence(said.append, patience_s=30, clock=watch)
    absence.attached()
    for _ in range(2):
        absence.lost(LOST, "refused", 10)
        watch.now += 20
        absence.lost(LOST, "refused", 10)
        absence.attached()
        watch.now += 1000
    absence.lost(LOST, "refused", 10)
    watch.now += 21
    with pytest.raises(ChatEnded, match="21 s: refused"):
        absence.lost(LOST, "refused", 10)
    assert len(said) == 3


def test_a_person_is_not_hurried() -> None:
    """They can see that it tries, and leave."""
    watch = Watch()
    absence = Absence(lambda _: None, clock=watch)
    absence.attached()
    absence.lost(LOST, "refused", 10)
    watch.now += 1e6
    absence.lost(LOST, "refused", 10)
