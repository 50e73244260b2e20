"""What instances ask of each other about a session: events of its control channel, which clients never see."""

from __future__ import annotations

from realtime.protocol import ChannelEvent


class CancelResponse(ChannelEvent, kw_only=True, frozen=True, tag="control.cancel_response"):
    """Whoever runs this response stops it, for `reason`."""

    response_id: str
    reason: str


class CancelTask(ChannelEvent, kw_only=True, frozen=True, tag="control.cancel_task"):
    """Whoever runs this task stops it, and whoever would run it does not."""

    task_id: str
