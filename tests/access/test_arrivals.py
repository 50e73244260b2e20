"""The turns of new connections, by address."""

from __future__ import annotations

import pytest

from realtime.access import arrivals
from realtime.access.arrivals import MAX_WAIT_S, Arrivals
from realtime.access.rates import Rate

PER_SECOND = Rate(2, 1.0)


def made(*proxies: str) -> Arrivals:
    """Two connections a second, unless they come from `proxies`."""
    return Arrivals(PER_SECOND, proxies)


def test_so_many_are_read_at_once_and_the_others_one_after_the_other() -> None:
    """Each takes a turn of its own."""
    turns = made()
    assert [turns.wait_s("10.0.0.1", 100.0) for _ in range(4)] == [0.0, 0.0, 0.5, 1.0]


def test_who_would_wait_for_too_long_is_turned_away_and_takes_no_turn() -> None:
    """However many have come: a moment later there is a turn again."""
    turns = made()
    waits = [turns.wait_s("10.0.0.1", 100.0) for _ in range(1000)]
    assert waits[:22] == [0.0, 0.0, *(0.5 * number for number in range(1, 21))]
    assert set(waits[22:]) == {None}
    assert turns.wait_s("10.0.0.1", 100.5) == MAX_WAIT_S
    assert turns.wait_s("10.0.0.1", 112.0) == 0.0


def test_turns_come_again_with_time() -> None:
    """After a second all of them."""
    turns = made()
    assert [turns.wait_s("10.0.0.1", now) for now in (0.0, 0.0, 0.5, 2.0, 2.0)] == [0.0] * 5


def test_every_address_has_turns_of_its_own() -> None:
    """Those of IPv6 by their networks."""
    turns = made()
    for host in ("10.0.0.1", "10.0.0.2", "2001:db8::1", "2001:db8:0:1::1"):
        assert [turns.wait_s(host, 0.0) for _ in range(2)] == [0.0, 0.0]
    assert turns.wait_s("2001:db8::2", 0.0) == 0.5


@pytest.mark.parametrize("host", ["10.1.2.3", "::ffff:10.1.2.3", "", "/run/socket"])
def test_many_clients_in_one_never_wait(host: str) -> None:
    """Those behind a proxy, or a socket of this machine."""
    turns = made("10.1.2.0/24", "::ffff:10.1.2.0/120")
    assert [turns.wait_s(host, 0.0) for _ in range(9)] == [0.0] * 9


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses that may connect again are forgotten; with too many others at once nobody waits."""
    monkeypatch.setattr(arrivals, "MAX_ADDRESSES", 3)
    turns = made()
    for number in range(10):
        assert turns.wait_s(f"10.0.0.{number}", 0.0) == 0.0
    assert len(turns) == 3
    assert turns.wait_s("10.0.0.9", 9.0) == 0.0
    assert len(turns) == 1
