"""How often an address connects: what comes too soon waits its turn, before a byte of it is read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from ipaddress import ip_address, ip_network

from realtime.access.addresses import counted
from realtime.access.rates import Rate

MAX_WAIT_S = 10.0
"""How long a connection may have to wait."""
MAX_ADDRESSES = 100_000
"""Addresses that are remembered; with more than so many of them at once nobody waits."""


class Arrivals:
    """The turns of new connections, by the addresses that they come from. Pure: `now` is seconds of any clock that only
    goes on.

    `rate` is how many of one address are read at once, and in which time they are allowed again. Those that come
    through `proxies`, a list of networks, or not over IP, never wait: they are many clients'.
    """

    def __init__(self, rate: Rate, proxies: Iterable[str]) -> None:
        self._rate = rate
        self._proxies = [ip_network(proxy) for proxy in proxies]
        self._full_at: dict[str, float] = {}

    def __len__(self) -> int:
        """How many addresses are remembered."""
        return len(self._full_at)

    def wait_s(self, host: str, now: float) -> float | None:
        """In how many seconds it is the turn of a connection that has come from `host` now, which takes that turn.
        `None` if that would be in more than `MAX_WAIT_S`: it is to be turned away, and takes none."""
        if self._is_exempt(host) or not self._has_room(now):
            return 0.0
        address = counted(host)
        full_at = max(self._full_at.get(address, -math.inf), now) + self._rate.interval_s
        wait_s = max(0.0, full_at - now - self._rate.period_s)
        if wait_s > MAX_WAIT_S:
            return None
        self._full_at[address] = full_at
        return wait_s

    def _is_exempt(self, host: str) -> bool:
        try:
            address = ip_address(host)
        except ValueError:
            return True
        return any(address in network for network in self._proxies)

    def _has_room(self, now: float) -> bool:
        if len(self._full_at) >= MAX_ADDRESSES:
            self._full_at = {address: at for address, at in self._full_at.items() if at > now}
        return len(self._full_at) < MAX_ADDRESSES
