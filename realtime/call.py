"""One model call outside of a session's turns: its text as it comes, and what it has used."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import assert_never

from msgspec import Struct

from realtime.conversation import estimate_tokens
from realtime.errors import UpstreamError
from realtime.responders.answering import answering, checked
from realtime.responders.base import Finish, Reasoning, Request, Responder, Text, TokenCount, ToolCall, ToolInput
from realtime.usage import Meter


class ModelSettings(Struct, frozen=True, kw_only=True):
    """How a server's model is called. `truncation` is what happens to a prompt that the model can't hold."""

    responder: Responder
    default_model: str
    max_output_tokens: int
    context_tokens: int
    truncation: str
    idle_timeout_s: float


class Call:
    """One call. `texts` makes it; `meter` and `stop_reason` are final at its end."""

    def __init__(self, request: Request, settings: ModelSettings) -> None:
        self.request = request
        self.stop_reason = "end_turn"
        self.meter = Meter(estimate_tokens(request.instructions, *(message.content for message in request.messages)))
        self._settings = settings

    async def texts(self) -> AsyncGenerator[str, None]:
        """The answer, piece by piece; closing it closes the call. While a piece is being used the model may be silent.

        Raises `UpstreamError`, or whatever else the responder raises.
        """
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
                    case Reasoning(text=text) | ToolInput(text=text):
                        self.meter.thought(text)
                        answer.progress()
                    case TokenCount():
                        self.meter.counted(event)
                    case ToolCall():
                        raise UpstreamError("upstream_error", "The model has called a tool that it was not offered.")
                    case Finish():
                        self.meter.finished(event)
                        self.stop_reason = event.stop_reason
                        return
                    case _:
                        assert_never(event)
