"""What a span is here, whoever makes it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol

Value = str | int | float | bool | list[str] | None
Attributes = Mapping[str, Value]
"""What is told of a span; what is `None` is not."""
Kind = Literal["INTERNAL", "SERVER", "CLIENT", "CONSUMER"]


class Span:
    """A span, or where traces are off nothing. Safe to end twice."""

    traceparent: str | None = None
    """What names it to other processes, as W3C's Trace Context has it; `None` for nothing."""

    def set(self, attributes: Attributes) -> None:
        """Tell more of it."""

    def fail(self, code: str) -> None:
        """It has come to an error of that code."""

    def end(self) -> None:
        """It is over."""

    def current(self) -> AbstractContextManager[None]:
        """A block in which it is the parent of what begins."""
        return nullcontext()


class Tracer(Protocol):
    """Where spans come from."""

    def start(self, name: str, kind: Kind, parent: str | None, link: str | None, attributes: Attributes) -> Span:
        """A span that begins now: a child of `parent`, else of the current one, else the first of a trace, which then
        points to `link`."""

    def current(self) -> str | None:
        """What names the current span."""

    def close(self) -> None:
        """Send what is left. Blocks."""
