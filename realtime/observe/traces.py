"""Traces: from what a client has asked for, by way of the model, to the last frame of the answer.

Nothing of OpenTelemetry is loaded unless traces are on; then `realtime/observe/otel.py` is. Where they are off a span
is `NOTHING`, which does nothing. Spans hold the ids that log records do, and never any content: of an error its code.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar

from realtime.errors import RealtimeError
from realtime.extras import require
from realtime.observe import logs
from realtime.observe.spans import Attributes, Kind, Span, Tracer

Headers = Iterable[tuple[bytes, bytes]]

CLOSE_S = 1.0
"""How long the last spans may take to be sent when the process ends."""
EXPORT_VARIABLES = ("OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""Whoever sets one of these wants traces."""


NOTHING = Span()
_tracer: Tracer | None = None
_link: ContextVar[str | None] = ContextVar("realtime_link", default=None)


def is_on() -> bool:
    """Whether anybody wants spans."""
    return _tracer is not None


def start(
    name: str, *, kind: Kind = "INTERNAL", parent: str | None = None, attributes: Attributes | None = None
) -> Span:
    """A span that begins now and is to be ended. `parent` names one, maybe of another process; without it the current
    one is the parent. Its `attributes` are joined by the ids that log records hold here."""
    if _tracer is None:
        return NOTHING
    ids = {f"realtime.{name}.id": str(value) for name, value in logs.ids().items() if name != "trace"}
    return _tracer.start(name, kind, parent, _link.get(), {**ids, **(attributes or {})})


@contextmanager
def span(
    name: str, *, kind: Kind = "INTERNAL", parent: str | None = None, attributes: Attributes | None = None
) -> Iterator[Span]:
    """A span that lasts as long as the block, and is the parent of what begins in it."""
    one = start(name, kind=kind, parent=parent, attributes=attributes)
    try:
        with one.current():
            yield one
    except Exception as error:
        one.fail(code_of(error))
        raise
    finally:
        one.end()


def code_of(error: BaseException) -> str:
    """What a span says of an error: never its text."""
    return error.code if isinstance(error, RealtimeError) else type(error).__qualname__


def current() -> str | None:
    """What names the current span to other processes; `None` if there is none."""
    return _tracer.current() if _tracer else None


def named_in(headers: Headers) -> str | None:
    """The span that a request says it is a part of, if traces are on."""
    if _tracer is None:
        return None
    return next((value.decode("latin-1") for name, value in headers if name == b"traceparent"), None)


def link(traceparent: str | None) -> None:
    """From here on to the end of this asyncio task, the first span of each trace points to that one, which is too old
    to be its parent."""
    if traceparent is not None:
        _link.set(traceparent)


def are_wanted(setting: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `REALTIME_TRACES` and the variables of OpenTelemetry ask for traces."""
    if setting != "auto":
        return setting == "on"
    is_off = environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    is_none = environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() == "none"
    return not (is_off or is_none) and any(environ.get(name) for name in EXPORT_VARIABLES)


@asynccontextmanager
async def tracing(setting: str) -> AsyncIterator[None]:
    """Have spans made and sent for as long as the block lasts, where they are wanted. Raises `SettingsError`."""
    if not are_wanted(setting):
        yield
        return
    tracer = await asyncio.to_thread(_load, setting)
    use(tracer)
    try:
        yield
    finally:
        use(None)
        await _closed(tracer)


def use(tracer: Tracer | None) -> None:
    """Take all spans from there from now on, or make none."""
    global _tracer
    _tracer = tracer


def check(setting: str) -> None:
    """Raise `SettingsError` where traces are wanted and can't be had."""
    if are_wanted(setting):
        _load(setting).close()


def _load(setting: str) -> Tracer:
    require("otel", "REALTIME_TRACES" if setting == "on" else next(filter(os.environ.get, EXPORT_VARIABLES)))
    from realtime.observe import otel

    return otel.load()


async def _closed(tracer: Tracer) -> None:
    """Close it; one that can't send what is left holds up nobody."""
    loop, closed = asyncio.get_running_loop(), asyncio.Event()

    def close() -> None:
        tracer.close()
        loop.call_soon_threadsafe(closed.set)

    threading.Thread(target=close, name="traces", daemon=True).start()
    try:
        async with asyncio.timeout(CLOSE_S):
            await closed.wait()
    except TimeoutError:
        logs.warning("the last traces could not be sent")
