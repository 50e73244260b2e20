"""Runs a responder under the rules that hold for each: it is closed whatever happens, and silence ends it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from realtime.errors import ServerError, UpstreamError
from realtime.idle import IdleTimeout
from realtime.responders.base import Request, Responder, ResponderEvent


class Answer:
    """An answer that is coming in: iterate over `events`, call `progress` for each that has content, and `pause` before
    a wait that is not the model's."""

    __slots__ = ("events", "pause", "progress")

    def __init__(self, events: AsyncIterator[ResponderEvent], idle: IdleTimeout) -> None:
        self.events = events
        self.pause = idle.pause
        self.progress = idle.progress


@asynccontextmanager
async def answering(responder: Responder, request: Request, *, idle_s: float) -> AsyncIterator[Answer]:
    """Have `responder` answer. Leaving the block closes the responder, and with it the model call.

    Raises `UpstreamError` (`upstream_stalled`) out of the block after `idle_s` seconds without progress.
    """
    idle = IdleTimeout(idle_s)
    try:
        async with idle:
            events = responder(request)
            try:
                yield Answer(events, idle)
            finally:
                await _close(events)
    except TimeoutError:
        if not idle.expired:
            raise
        raise UpstreamError("upstream_stalled", "The model has said nothing for too long.") from None


def checked(text: str) -> str:
    """A responder's own text; raises `ServerError` where UTF-8 can't hold it (lone surrogates)."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ServerError("responder_failed", "The responder said something that is not text.") from None
    return text


async def _close(events: AsyncIterator[ResponderEvent]) -> None:
    close = getattr(events, "aclose", None)  # an iterator that is no generator may have none
    if close is not None:
        await close()
