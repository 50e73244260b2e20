"""How much of a thing a test does: in the gate less than what was promised, which `make test-full` does whole."""

from __future__ import annotations

import os

IS_FULL = os.environ.get("REALTIME_TEST_FULL", "") == "1"


def scaled(full: int, gate: int) -> int:
    """The number that is promised, or the one that the gate has time for."""
    return full if IS_FULL else gate
