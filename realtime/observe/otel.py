"""Spans of OpenTelemetry. Imported only where traces are on: it comes with the extra `otel`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.trace import Link, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from realtime.observe import logs
from realtime.observe.spans import Attributes, Kind, Span
from realtime.settings import SettingsError

_CONTEXTS = TraceContextTextMapPropagator()


class OtelSpan(Span):
    """One of OpenTelemetry's."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        self.traceparent = _name_of(span)

    def set(self, attributes: Attributes) -> None:
        """Tell more of it."""
        self._span.set_attributes({name: value for name, value in attributes.items() if value is not None})

    def fail(self, code: str) -> None:
        """It has come to an error of that code."""
        self._span.set_status(Status(StatusCode.ERROR))
        self._span.set_attribute("error.type", code)

    def end(self) -> None:
        """It is over."""
        if self._span.is_recording():  # the SDK warns of a second time
            self._span.end()

    @contextmanager
    def current(self) -> Iterator[None]:
        """A block in which it is the parent of what begins, and log records name its trace."""
        trace_id = trace.format_trace_id(self._span.get_span_context().trace_id)
        using = trace.use_span(self._span, record_exception=False, set_status_on_exception=False)
        with using, logs.bound(trace=trace_id):
            yield


class OtelTracer:
    """Makes spans with a provider, which it closes if that `is_ours`."""

    def __init__(self, provider: trace.TracerProvider, *, is_ours: bool) -> None:
        self._provider = provider
        self._is_ours = is_ours
        self._tracer = provider.get_tracer("realtime")

    def start(self, name: str, kind: Kind, parent: str | None, link: str | None, attributes: Attributes) -> Span:
        """A span that begins now."""
        within = _context_of(parent) if parent else None
        is_first = not trace.get_current_span(within).get_span_context().is_valid
        links = [Link(trace.get_current_span(_context_of(link)).get_span_context())] if link and is_first else []
        told = {name: value for name, value in attributes.items() if value is not None}
        return OtelSpan(
            self._tracer.start_span(name, context=within, kind=SpanKind[kind], attributes=told, links=links)
        )

    def current(self) -> str | None:
        """What names the current span."""
        return _name_of(trace.get_current_span())

    def close(self) -> None:
        """Send what is left. Blocks."""
        if self._is_ours and isinstance(self._provider, TracerProvider):
            self._provider.shutdown()


def load() -> OtelTracer:
    """Spans for whom the application has set up, or else for whom OpenTelemetry's variables name.

    Raises `SettingsError`.
    """
    theirs = trace.get_tracer_provider()
    if isinstance(theirs, TracerProvider):
        return OtelTracer(theirs, is_ours=False)
    provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(_exporter()))
    return OtelTracer(provider, is_ours=True)


def _exporter() -> SpanExporter:
    match os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() or "otlp":
        case "otlp":
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            return OTLPSpanExporter()
        case "console":
            return ConsoleSpanExporter(out=sys.stderr)
        case other:
            raise SettingsError(f"OTEL_TRACES_EXPORTER={other!r} is not allowed: expected otlp, console or none")


def _resource() -> Resource:
    found = Resource.create()
    if str(found.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        return found.merge(Resource({SERVICE_NAME: "realtime"}))
    return found


def _context_of(traceparent: str) -> Context:
    """What a span's name means; nothing at all if it can't be read."""
    return _CONTEXTS.extract({"traceparent": traceparent}, context=Context())


def _name_of(span: trace.Span) -> str | None:
    carrier: dict[str, str] = {}
    _CONTEXTS.inject(carrier, context=trace.set_span_in_context(span))
    return carrier.get("traceparent")
