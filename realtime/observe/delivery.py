"""What clients were sent, counted so that a token pays next to nothing for it: summed up here, told once a second.

A counter of prometheus-client costs half a microsecond, and several times that where processes count together.
"""

from __future__ import annotations

from realtime.observe import metrics
from realtime.protocol import OutputTextDelta, ReasoningDelta, ServerMessage, TaskOutputTextDelta

EVERY = 8
"""One in so many messages with deltas has its latency taken."""
MOST = 200
"""How many latencies are kept until they are told: to tell one costs a microsecond, and readers wait meanwhile."""
_DELTAS = (OutputTextDelta, ReasoningDelta, TaskOutputTextDelta)


class Deliveries:
    """What was sent over one transport since it was last told."""

    __slots__ = ("_delta_frames", "_deltas", "_frames", "_latencies", "_transport", "_turn")

    def __init__(self, transport: str) -> None:
        self._transport = transport
        self._frames = self._deltas = self._delta_frames = self._turn = 0
        self._latencies: list[float] = []

    def sent(self, message: ServerMessage | None, waited_s: float) -> None:
        """A message was written; what it says has waited for so long, below 0 if that is not known."""
        self._frames += 1
        if isinstance(message, _DELTAS):
            self._delta_frames += 1
            self._deltas += message.merged
            if not self._turn and waited_s >= 0 and not message.replay and len(self._latencies) < MOST:
                self._latencies.append(waited_s)
            self._turn = (self._turn + 1) % EVERY

    def tell(self) -> None:
        """Count it in the metrics."""
        if not self._frames:
            return
        metrics.FRAMES.labels(self._transport).inc(self._frames)
        metrics.DELTAS.labels(self._transport).inc(self._deltas)
        metrics.DELTAS_MERGED.labels(self._transport).inc(self._deltas - self._delta_frames)
        latency = metrics.TOKEN_LATENCY_SECONDS.labels(self._transport)
        for waited_s in self._latencies:
            latency.observe(waited_s)
        self._latencies.clear()
        self._frames = self._deltas = self._delta_frames = 0


DELIVERIES = {transport: Deliveries(transport) for transport in ("websocket", "sse")}
"""By the transport of the readers of sessions."""


def tell_deliveries() -> None:
    """Count in the metrics what was sent since this was last called."""
    for deliveries in DELIVERIES.values():
        deliveries.tell()
