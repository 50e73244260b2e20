"""What clients were sent, counted so that a token pays next to nothing for it: summed up here, told once a second.

A counter of prometheus-client costs half a microsecond, and several times that where processes count together.
"""

from __future__ import annotations

from collections.abc import Callable

from realtime.observe import metrics, traces
from realtime.protocol import ChannelEvent, OutputTextDelta, ReasoningDelta, ServerMessage, TaskOutputTextDelta

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


class DeliverySpans:
    """The spans of one reader: from the first frame of a response that it was sent to the last one. What is only
    replayed is none. `traceparent_of` tells what has made a response."""

    def __init__(self, traceparent_of: Callable[[str], str | None]) -> None:
        self._traceparent_of = traceparent_of
        self._open: dict[str, _Delivery] = {}

    def sent(self, message: ServerMessage | None) -> None:
        """A message was written."""
        response_id: str | None = getattr(message, "response_id", None)
        if response_id is None or not isinstance(message, ChannelEvent) or message.replay:
            return
        delivery = self._open.get(response_id)
        if delivery is None:
            delivery = self._open[response_id] = _Delivery(self._traceparent_of(response_id))
        delivery.frames += 1
        delivery.events += message.merged
        if message.ends_channel:
            self._open.pop(response_id).end(whole=True)

    def close(self) -> None:
        """The reader is gone."""
        for delivery in self._open.values():
            delivery.end(whole=False)
        self._open.clear()


class _Delivery:
    def __init__(self, traceparent: str | None) -> None:
        self.frames = self.events = 0
        self._span = traces.start("deliver", parent=traceparent)

    def end(self, *, whole: bool) -> None:
        self._span.set(
            {
                "realtime.delivery.frames": self.frames,
                "realtime.delivery.events": self.events,
                "realtime.delivery.whole": whole,
            }
        )
        self._span.end()


DELIVERIES = {transport: Deliveries(transport) for transport in ("websocket", "sse")}
"""By the transport of the readers of sessions."""


def tell_deliveries() -> None:
    """Count in the metrics what was sent since this was last called."""
    for deliveries in DELIVERIES.values():
        deliveries.tell()
