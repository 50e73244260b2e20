"""One model call outside of a session's turns: its text as it comes, and what it has used."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import assert_never

from msgspec import Struct

from realtime.access.prices import UNKNOWN, Prices
from realtime.access.till import Purse, count
from realtime.errors import UpstreamError
from realtime.protocol import Usage
from realtime.responders.answering import answering, checked
from realtime.responders.base import Finish, Reasoning, Request, Responder, Text, TokenCount, ToolCall, ToolInput
from realtime.usage import Meter

BUDGET_EXCEEDED = "budget_exceeded"
"""The stop reason of a call that has cost what there was."""


class ModelSettings(Struct, frozen=True, kw_only=True):
    """How a server's model is called. `truncation` is what happens to a prompt that the model can't hold."""

    responder: Responder
    default_model: str
    max_output_tokens: int
    context_tokens: int
    truncation: str
    idle_timeout_s: float
    prices: Prices = UNKNOWN


class Call:
    """One call. `texts` makes it; `meter` and `stop_reason` are final at its end. The `purse` is settled then."""

    def __init__(self, request: Request, settings: ModelSettings, purse: Purse) -> None:
        self.request = request
        self._purse = purse
        self._has_begun = False
        self.stop_reason = "end_turn"
        self.meter = Meter(request.estimated_tokens())
        self._settings = settings

    async def texts(self) -> AsyncGenerator[str, None]:
        """The answer, piece by piece; closing it closes the call. While a piece is being used the model may be silent.

        Raises `UpstreamError`, or whatever else the responder raises.
        """
        self._has_begun = True
        try:
            async with aclosing(self._texts()) as texts:
                async for text in texts:
                    yield text
        finally:
            self.settle()
            count(self.usage())

    def settle(self) -> None:
        """Pay for what it has used so far: nothing, if it was never made. For a call that nobody waits for any more."""
        self._purse.settle(self.usage() if self._has_begun else None)

    def usage(self) -> Usage:
        """What it has used so far, and what that cost."""
        return self._settings.prices.priced(self.request.model, self.meter.usage())

    async def _texts(self) -> AsyncGenerator[str, None]:
        settings = self._settings
        async with answering(settings.responder, self.request, idle_s=settings.idle_timeout_s) as answer:
            async for event in answer.events:
                match event:
                    case Text(text="") | Reasoning(text="") | "":
                        continue
                    case Text() | str():
                        text = event.text if isinstance(event, Text) else checked(event)
                        self.meter.said(text)
                        answer.pause()
                        yield text
                        answer.progress()
                        if not await self._affords():
                            return
                    case Reasoning(text=text) | ToolInput(text=text):
                        self.meter.thought(text)
                        answer.progress()
                        if not await self._affords():
                            return
                    case TokenCount():
                        self.meter.counted(event)
                    case ToolCall():
                        raise UpstreamError("upstream_error", "The model has called a tool that it was not offered.")
                    case Finish():
                        answer.finished(event)
                        self.meter.finished(event)
                        self.stop_reason = event.stop_reason
                        return
                    case _:
                        assert_never(event)

    async def _affords(self) -> bool:
        """Whether the purse has more than was used so far."""
        if self._purse.is_limited and not await self._purse.affords(self.meter.usage()):
            self.stop_reason = BUDGET_EXCEEDED
            return False
        return True
