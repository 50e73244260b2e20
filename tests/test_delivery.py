"""What readers were sent is summed up, and told the metrics once."""

from __future__ import annotations

from prometheus_client import generate_latest

from realtime.observe import metrics
from realtime.observe.delivery import EVERY, MOST, Deliveries
from realtime.protocol import OutputTextDelta, Pong
from tests.support.figures import Figures

LABELS = {"transport": "made_up"}


def told() -> Figures:
    """The metrics now."""
    return Figures(generate_latest(metrics.REGISTRY).decode())


def delta(merged: int = 1, *, replay: bool = False) -> OutputTextDelta:
    """A frame that stands for so many pieces."""
    return OutputTextDelta(response_id="resp_1", delta="x", seq=merged, merged=merged, replay=replay)


def test_merged_pieces_are_those_that_shared_a_message() -> None:
    """Once each, however often it is told."""
    before, deliveries = told(), Deliveries("made_up")
    for message in (delta(), delta(merged=5), Pong(), None):
        deliveries.sent(message, 0.001)
    for _ in range(2):
        deliveries.tell()
    after = told()
    for name, more in {"frames": 4, "deltas": 6, "deltas_merged": 4}.items():
        name = f"realtime_{name}_total"
        assert after.of(name, **LABELS) == before.of(name, **LABELS) + more, name


def test_one_latency_in_so_many_is_told_and_no_more_than_may_be() -> None:
    """But for what is replayed, and what nobody knows since when it has waited."""
    name, deliveries = "realtime_token_latency_seconds_count", Deliveries("made_up")
    for message, waited_s, times, more in (
        (delta(), 0.001, 3 * EVERY, 3),
        (delta(replay=True), 0.001, 3 * EVERY, 0),
        (delta(), float("-inf"), 3 * EVERY, 0),
        (delta(), 0.001, 2 * MOST * EVERY, MOST),
    ):
        before = told().of(name, **LABELS)
        for _ in range(times):
            deliveries.sent(message, waited_s)
        deliveries.tell()
        assert told().of(name, **LABELS) == before + more
