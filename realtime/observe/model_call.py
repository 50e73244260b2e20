"""One call of a model, as it is seen from outside: counted, timed, and a span by the conventions for generative AI."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from realtime.errors import UpstreamError
from realtime.observe import logs, metrics, traces
from realtime.observe.spans import Value


class ModelCall:
    """A call that lasts as long as the `with` block. `first` is to be called once, when it has said something."""

    __slots__ = ("_attributes", "_began_at", "_span")

    def __init__(self, *, provider: str, model: str, max_tokens: int) -> None:
        self._attributes: dict[str, Value] = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": provider,
            "gen_ai.request.model": model,
            "gen_ai.request.max_tokens": max_tokens,
            "gen_ai.request.stream": True,
        }

    def first(self) -> None:
        """The first piece of its answer is there."""
        waited_s = time.monotonic() - self._began_at
        metrics.FIRST_TOKEN_SECONDS.observe(waited_s)
        self._span.set({"gen_ai.response.time_to_first_chunk": waited_s})

    def finished(self, stop_reason: str, *, read: int = 0, written: int = 0, said: int = 0, heard: int = 0) -> None:
        """The answer is whole. Tokens are the provider's count: `heard` of the input, beside those that its cache has
        `read` and `written`, and `said`."""
        counted = heard + read + written
        self._span.set(
            {
                "gen_ai.response.finish_reasons": [stop_reason],
                "gen_ai.usage.input_tokens": counted or None,
                "gen_ai.usage.output_tokens": said if counted or said else None,
                "gen_ai.usage.cache_read.input_tokens": read or None,
                "gen_ai.usage.cache_creation.input_tokens": written or None,
            }
        )

    def __enter__(self) -> Self:
        self._began_at = time.monotonic()
        told = {**self._attributes, "gen_ai.conversation.id": logs.ids().get("session")}
        self._span = traces.start(f"chat {told['gen_ai.request.model']}", kind="CLIENT", attributes=told)
        metrics.MODEL_CALLS.inc()
        metrics.MODEL_CALLS_RUNNING.inc()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        metrics.MODEL_CALLS_RUNNING.dec()
        if isinstance(error, UpstreamError):
            metrics.UPSTREAM_ERRORS.labels(error.code).inc()
            self._tell(error)
        if isinstance(error, Exception):
            self._span.fail(traces.code_of(error))
        self._span.end()

    def _tell(self, error: UpstreamError) -> None:
        """Log why the provider, or the way to it, has failed: never in its own words."""
        told = {
            "code": error.code,
            "provider": self._attributes["gen_ai.provider.name"],
            "model": self._attributes["gen_ai.request.model"],
            "answered": error.answered,
            "field": error.field,
            "cause": type(error.__cause__).__qualname__ if error.__cause__ else None,
        }
        logs.warning("model call failed", **{name: value for name, value in told.items() if value is not None})
