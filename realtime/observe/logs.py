"""Logs: one record a line, with the ids of what it is about, and never any content.

Whoever begins to work for a connection, a response or a task binds its ids, and every record from there on holds them,
also those of libraries. What is started for everybody starts without any: see `Background`.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
from collections.abc import MutableMapping
from contextlib import AbstractContextManager
from typing import Any

import structlog

_log: Any = structlog.get_logger("realtime")
_audit: Any = structlog.wrap_logger(
    logging.getLogger("realtime.audit"), wrapper_class=structlog.make_filtering_bound_logger(logging.INFO)
)

_HELD = re.compile(r"^(Exception in callback [^(]*\(|Executing <).*(\)|> took)")
"""What asyncio says of a callback that failed, or in its debug mode of one that was slow: with all that it held."""


def configure(log_format: str, log_level: str) -> None:
    """Send every record, the libraries' too, to standard error as JSON lines or, for a person, in colours."""
    as_json = log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())
    renderer: Any = structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer()
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, log_level.upper())),
    )
    stderr = logging.StreamHandler(sys.stderr)
    stderr.setFormatter(
        structlog.stdlib.ProcessorFormatter(processor=renderer, foreign_pre_chain=[_without_content, *shared])
    )
    root = logging.getLogger()
    root.handlers[:] = [stderr]
    root.setLevel(logging.WARNING)
    logging.getLogger("realtime").setLevel(log_level.upper())
    logging.getLogger("realtime.audit").setLevel(logging.INFO)


def bound(**ids: str) -> AbstractContextManager[None]:
    """A block whose records hold these ids. A session's has to be what the audit log calls it: see `Audit.name_of`."""
    return structlog.contextvars.bound_contextvars(**ids)


def bind(**ids: str) -> None:
    """From here on to the end of this asyncio task, records hold these ids: the same for a task that has no others."""
    structlog.contextvars.bind_contextvars(**ids)


def ids() -> dict[str, Any]:
    """The ids that records hold here."""
    return structlog.contextvars.get_contextvars()


def info(event: str, **fields: Any) -> None:
    """Log what happened."""
    _log.info(event, **fields)


def warning(event: str, **fields: Any) -> None:
    """Log what an operator should look at."""
    _log.warning(event, **fields)


def audit(action: str, **fields: Any) -> None:
    """Log an access, on a logger of its own, whatever the least is that is logged."""
    _audit.info(action, **fields)


def report(error: BaseException) -> None:
    """Log an error with the places that it came through, and without its text, which may hold content."""
    _log.error("error", error=type(error).__qualname__, at=places(error))


def places(error: BaseException) -> list[str]:
    """Where an error came through, the innermost place first, as `file:line function`: if it came out of another
    process, there first."""
    elsewhere = getattr(error.__cause__, "places", ())
    frames = traceback.extract_tb(error.__traceback__)
    return [*elsewhere, *(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames))][:20]


def _without_content(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A library's record keeps its first line, and of an exception the kind and the places: the rest may hold content.

    asyncio tells of an exception that nobody has asked for with the whole task, and that with what it raised.
    """
    record: logging.LogRecord = event["_record"]
    event["event"] = _HELD.sub(r"\1…\2", str(event["event"]).partition("\n")[0])
    if record.exc_info and record.exc_info[1] is not None:
        event["error"] = type(record.exc_info[1]).__qualname__
        event["at"] = places(record.exc_info[1])
    record.exc_info = record.exc_text = None
    event.pop("exc_info", None)  # structlog has taken it from the record already
    return event
