"""Where a request comes from: which proxies are believed, and what of an address is counted."""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import IPv6Address, IPv6Network, ip_address, ip_network

from starlette.types import Scope

from realtime.settings import SettingsError

UNKNOWN = "unknown"
_PROXIED = re.compile(rb"forwarded|via|x-forwarded-.*|x-real-ip|(.*-)?(client|connecting)-ip")
"""Headers that only proxies send."""
CLIENT_BITS = 64
"""What a single client of IPv6 has to itself is a network of so many bits: all its addresses count as one."""


def client_address(scope: Scope) -> str:
    """Who asks, as limits and logs count it: an IPv4 address, an IPv6 network, or `unknown`.

    Never what a client has made up: anything else than an address, which only a proxy can have told, is `unknown`.
    """
    host, _port = scope.get("client") or ("", 0)
    return counted(host)


def counted(host: str) -> str:
    """What an address counts as: as `client_address`."""
    try:
        address = ip_address(host)
    except ValueError:
        return UNKNOWN
    if not isinstance(address, IPv6Address):
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(IPv6Network((int(address), CLIENT_BITS), strict=False))


def is_loopback(scope: Scope) -> bool:
    """Whether this machine itself asks, and for itself: what says that it comes through a proxy does not."""
    if any(_PROXIED.fullmatch(name) for name, _ in scope["headers"]):
        return False
    host, _port = scope.get("client") or ("", 0)
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def trusted_networks(entries: Iterable[str]) -> list[str]:
    """The networks of `REALTIME_TRUSTED_PROXIES`, those of IPv4 also as a socket for both families shows them.

    Raises `SettingsError` for what is neither an address nor a network, and for one that holds every address: then
    the one that a client has made up would count.
    """
    found = []
    for entry in entries:
        try:
            network = ip_network(entry)
        except ValueError:
            raise _refusal(entry, "expected addresses and networks, such as 10.1.2.0/24") from None
        if network.prefixlen == 0:
            raise _refusal(entry, "it holds every address, also those of clients")
        found.append(str(network))
        if network.version == 4:
            found.append(f"::ffff:{network.network_address}/{96 + network.prefixlen}")
    return found


def _refusal(entry: str, reason: str) -> SettingsError:
    return SettingsError(f"REALTIME_TRUSTED_PROXIES={entry!r} is not allowed: {reason}")
