"""Ports of 127.0.0.1 for processes that have to be told one, and keep it over a restart."""

import random
import socket

LOWEST, HIGHEST = 10_000, 32_000
"""Below the range from which the kernel takes the ports of outgoing connections: between the search and the use, and
while a process is down, nobody gets the port by chance."""
TRIES = 100


def free_port(*offsets: int) -> int:
    """A port that nobody listens on, nor on the ones that lie `offsets` above it.

    Another process may take it before it is used, which is unlikely: it is drawn from thousands.
    """
    for _ in range(TRIES):
        port = random.randrange(LOWEST, HIGHEST)
        if all(map(_is_free, (port, *(port + offset for offset in offsets)))):
            return port
    raise OSError(f"no free port found between {LOWEST} and {HIGHEST}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
