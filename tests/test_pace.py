"""Streams rest only where it is they that make the process busy."""

from __future__ import annotations

from realtime.pace import FEW_READS, LATE_S, MAX_REST_S, Pace


def test_a_process_that_is_busy_with_streams_rests_more_and_more() -> None:
    """Up to the longest rest, and less again once it is idle."""
    pace = Pace()
    pace.observe(busy=1.0, late_s=0.0, reads_per_s=FEW_READS)
    assert 0.0 < pace.rest_s < MAX_REST_S
    for _ in range(10):
        pace.observe(busy=0.0, late_s=LATE_S, reads_per_s=FEW_READS)
    assert pace.rest_s == MAX_REST_S
    pace.observe(busy=0.0, late_s=0.0, reads_per_s=FEW_READS)
    assert pace.rest_s < MAX_REST_S


def test_a_process_that_is_busy_with_something_else_does_not_rest() -> None:
    """However busy, and however late its timers: rests would gain nothing."""
    pace = Pace()
    pace.observe(busy=1.0, late_s=1.0, reads_per_s=FEW_READS - 1)
    assert pace.rest_s == 0.0
