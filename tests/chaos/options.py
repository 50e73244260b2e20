"""What a chaos run is asked for."""

from __future__ import annotations

from msgspec import Struct


class Options(Struct, frozen=True, kw_only=True):
    """The size of a run, and the seed of every random choice in it."""

    seed: int = 1
    seconds: float = 60
    """How long there are faults."""
    sessions: int = 50
    instances: int = 3
    lease_s: float = 4
    drain_s: float = 3
    appendfsync: str = "always"
    """How Redis writes. With `everysec` a killed Redis may come back without what a slow disk was holding up, and
    nobody can tell that from a loss of ours."""
    events: str = ""
    """A file that is told at once what is done, and what is found."""
    control: bool = False
    """Run the naive server, in which the checks must find violations."""
    settle_s: float = 45
    """How long everything may take to finish once there are no more faults."""
