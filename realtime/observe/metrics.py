"""What is counted here, as Prometheus reads it.

Labels are names out of the code, so that there is a bounded number of them: never an id, a user, or anything that a
client sent. All of it is safe to call from any thread. A process counts for itself; where `PROMETHEUS_MULTIPROC_DIR` is
set, as by `realtime serve --workers`, any of them tells what all have counted.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from realtime.protocol import ResponseDone

SHARED_DIR = "PROMETHEUS_MULTIPROC_DIR"
"""The variable that names the folder through which processes on one port count together; read before this module is
imported, by prometheus-client itself."""
REGISTRY = CollectorRegistry()
"""Ours alone: what a library registers for itself is not shown."""

FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
"""Bounds of times in this process, in seconds."""
SLOW = (0.05, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 60)
"""Bounds of waits for a model."""
LONG = (0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
"""Bounds of what tasks take."""


disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each, which several processes lack

LABELS: dict[str, tuple[str, ...]] = {}
"""The names of all metrics, with those of their labels."""


def _counter(name: str, text: str, *labels: str) -> Counter:
    LABELS[name] = labels
    return Counter(name, text, labels, registry=REGISTRY)


def _gauge(name: str, text: str, *labels: str, together: Literal["livesum", "livemostrecent"] = "livesum") -> Gauge:
    """`together` is what several processes make of it that count together: only those that live count."""
    LABELS[name] = labels
    return Gauge(name, text, labels, registry=REGISTRY, multiprocess_mode=together)


def _histogram(name: str, text: str, bounds: tuple[float, ...], *labels: str) -> Histogram:
    LABELS[name] = labels
    return Histogram(name, text, labels, buckets=bounds, registry=REGISTRY)


CONNECTIONS = _gauge("realtime_connections", "Connections that are open now, by transport.", "transport")
CONNECTIONS_OPENED = _counter("realtime_connections_opened_total", "Connections that were let in.", "transport")
SLOW_READERS = _counter("realtime_slow_readers_total", "Connections closed because their client took nothing.")
SESSIONS = _gauge(
    "realtime_sessions",
    "Sessions open in this process: somebody looks at them, or something of theirs runs here.",
)
SESSIONS_CREATED = _counter("realtime_sessions_created_total", "Sessions that were made here.")

RESPONSES_RUNNING = _gauge("realtime_responses_running", "Responses that run in this process now.")
RESPONSES = _counter(
    "realtime_responses_total",
    "Responses whose end this process wrote: how they ended, and why (an error's code, or who cancelled).",
    "status",
    "cause",
)
UNUSED_TOKENS = _counter(
    "realtime_cancelled_unused_tokens_total",
    "Output tokens that cancelled responses were still allowed: max_output_tokens less what they had used. "
    "An upper bound of what cancelling has saved: most answers would have ended earlier.",
    "cause",
)

MODEL_CALLS = _counter("realtime_model_calls_total", "Model calls that began in this process.")
MODEL_CALLS_RUNNING = _gauge("realtime_model_calls_running", "Model calls that run in this process now.")
FIRST_TOKEN_SECONDS = _histogram(
    "realtime_first_token_seconds", "From the begin of a model call to the first piece of its answer.", SLOW
)
UPSTREAM_ERRORS = _counter(
    "realtime_upstream_errors_total", "Model calls that the provider, or the way to it, has failed.", "code"
)
TOKENS = _counter(
    "realtime_tokens_total",
    "Tokens that model calls used, by their kind: input, output, cache_read, cache_write.",
    "kind",
)
COST_USD = _counter("realtime_cost_usd_total", "What model calls cost, in dollars, as far as REALTIME_PRICES tells.")

FRAMES = _counter("realtime_frames_total", "Messages that were written to clients.", "transport")
DELTAS = _counter("realtime_deltas_total", "Pieces of answers in those messages, counted for each reader.", "transport")
DELTAS_MERGED = _counter(
    "realtime_deltas_merged_total", "Those of the pieces that shared a message with an earlier one.", "transport"
)
TOKEN_LATENCY_SECONDS = _histogram(
    "realtime_token_latency_seconds",
    "From when a piece of an answer was read from upstream (or, of an answer that runs elsewhere, from the store) to "
    "when its message was written to a client's socket. Of every eighth message; the oldest piece in it counts.",
    FAST,
    "transport",
)

STORE_SECONDS = _histogram(
    "realtime_store_seconds", "How long callers waited for Redis, those that it did not answer too.", FAST
)
STORE_ERRORS = _counter(
    "realtime_store_errors_total", "Calls to Redis that came to nothing: timeout, unreachable, refused.", "kind"
)
JOURNAL_LAG_SECONDS = _histogram(
    "realtime_journal_lag_seconds",
    "How old the oldest thing said here and not stored yet was, at the end of each attempt to store it.",
    (*FAST, 10.0, 30.0),
)

TASKS_RUNNING = _gauge("realtime_tasks_running", "Tasks that run in this process now.")
TASKS_UNFINISHED = _gauge(
    "realtime_tasks_unfinished",
    "Tasks that have not ended, waiting ones too, over all processes at one store: not to be summed up.",
    together="livemostrecent",
)
TASKS_FINISHED = _counter(
    "realtime_tasks_finished_total",
    "Tasks whose end this process wrote, by the registered name and how they ended.",
    "name",
    "status",
)
TASK_ATTEMPTS = _counter(
    "realtime_task_attempts_total", "Attempts at tasks that began in this process, by the registered name.", "name"
)
TASK_SECONDS = _histogram(
    "realtime_task_seconds", "How long an attempt at a task took, by the registered name.", LONG, "name"
)
TASK_WAIT_SECONDS = _histogram(
    "realtime_task_wait_seconds",
    "From when a task was made to its first attempt, by the registered name and the clocks of two processes.",
    LONG,
    "name",
)

LIMITS_HIT = _counter(
    "realtime_limits_hit_total", "Times that somebody was refused, by what there was too much of.", "limit"
)
LOOP_BLOCKS = _counter(
    "realtime_loop_blocks_total", "Times that the event loop did not turn for REALTIME_LOOP_BLOCK_MS."
)
LOOP_LAG_SECONDS = _histogram("realtime_loop_lag_seconds", "How late a timer of the event loop fired.", FAST)


CAUSES = ("cancelled", "interrupted", "disconnected", "session_closed", "session_deleted", "session_lost")
"""Why responses are cancelled."""


def _show_from_the_start() -> None:
    """Have what may come be shown as 0: where a series begins with its first 1, Prometheus sees no increase."""
    for transport in ("websocket", "sse", "oneshot", "task"):
        CONNECTIONS.labels(transport)
        CONNECTIONS_OPENED.labels(transport)
    for status in ("completed", "incomplete"):
        RESPONSES.labels(status, "")
    for cause in CAUSES:
        RESPONSES.labels("cancelled", cause)
        UNUSED_TOKENS.labels(cause)
    for kind in ("timeout", "unreachable", "refused"):
        STORE_ERRORS.labels(kind)


_show_from_the_start()


def expect_tasks(names: Iterable[str]) -> None:
    """The same for what tasks of these names may come to, in a process that runs them."""
    for name in names:
        TASK_ATTEMPTS.labels(name)
        TASK_SECONDS.labels(name)
        TASK_WAIT_SECONDS.labels(name)
        for status in ("complete", "failed", "cancelled"):
            TASKS_FINISHED.labels(name, status)


def response_ended(done: ResponseDone, max_output_tokens: int) -> None:
    """Count a response's end, and what it might have used beyond it where somebody has cancelled it."""
    cause = done.error.code if done.error else done.stop_reason if done.status == "cancelled" else None
    RESPONSES.labels(done.status, cause or "").inc()
    if done.status == "cancelled":
        UNUSED_TOKENS.labels(cause or "").inc(max(0, max_output_tokens - done.usage.output_tokens))


def render() -> tuple[bytes, str]:
    """All of it as it is now in Prometheus's text format, and the content type that goes with it. Reads files where
    several processes count together: to be called in a thread."""
    registry = REGISTRY
    if SHARED_DIR in os.environ:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4


def forget(pid: int, folder: str) -> None:
    """Take what is there only while its process lives out of what processes count together: that one has ended."""
    mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]
