"""Runs a responder under the rules that hold for each: it is closed whatever happens, and silence ends it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from realtime.errors import ServerError, UpstreamError
from realtime.idle import IdleTimeout
from realtime.observe.model_call import ModelCall
from realtime.responders.base import Finish, Request, Responder, ResponderEvent, TokenCount


class Answer:
    """An answer that is coming in: iterate over `events`, call `progress` for each that has content, and `pause` before
    a wait that is not the model's, and `finished` with its end."""

    __slots__ = ("_call", "_idle", "events", "pause", "progress")

    def __init__(self, events: AsyncIterator[ResponderEvent], idle: IdleTimeout, call: ModelCall) -> None:
        self.events = events
        self.pause: Callable[[], None] = self._first_pause
        self.progress: Callable[[], None] = self._first_progress
        self._idle = idle
        self._call = call

    def finished(self, finish: Finish) -> None:
        """The answer is whole."""
        count = finish.count or TokenCount(input_tokens=0, output_tokens=0)
        self._call.finished(
            finish.stop_reason,
            heard=count.input_tokens,
            said=count.output_tokens,
            read=count.cache_read_input_tokens or 0,
            written=count.cache_creation_input_tokens or 0,
        )

    def _first_pause(self) -> None:
        self._begin()
        self.pause()

    def _first_progress(self) -> None:
        self._begin()
        self.progress()

    def _begin(self) -> None:
        """It has said something; nobody looks from here on."""
        self._call.first()
        self.pause, self.progress = self._idle.pause, self._idle.progress


@asynccontextmanager
async def answering(responder: Responder, request: Request, *, idle_s: float) -> AsyncIterator[Answer]:
    """Have `responder` answer. Leaving the block closes the responder, and with it the model call.

    Raises `UpstreamError` (`upstream_stalled`) out of the block after `idle_s` seconds without progress.
    """
    model, most = request.model, request.max_output_tokens
    with ModelCall(provider=_provider_of(responder), model=model, max_tokens=most) as call:
        async with _talking(idle := IdleTimeout(idle_s)):
            events = responder(request)
            try:
                yield Answer(events, idle, call)
            finally:
                await _close(events)


@asynccontextmanager
async def _talking(idle: IdleTimeout) -> AsyncIterator[None]:
    """A block that silence ends. Raises `UpstreamError`."""
    try:
        async with idle:
            yield
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


def _provider_of(responder: Responder) -> str:
    """Who answers, by its own word or else by its name in the code."""
    named: str | None = getattr(responder, "provider", None) or getattr(responder, "__name__", None)
    return named or type(responder).__name__


async def _close(events: AsyncIterator[ResponderEvent]) -> None:
    close = getattr(events, "aclose", None)  # an iterator that is no generator may have none
    if close is not None:
        await close()
