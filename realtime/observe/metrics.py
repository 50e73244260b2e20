"""What is counted here, as Prometheus reads it.

Labels are names out of the code, so that there is a bounded number of them: never an id, a user, or anything that a
client sent. Every process counts for itself, and all of it is safe to call from any thread.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

REGISTRY = CollectorRegistry()
"""Ours alone: what a library registers for itself is not shown."""

LOOP_BLOCKS = Counter(
    "realtime_loop_blocks_total",
    "Times that the event loop did not turn for REALTIME_LOOP_BLOCK_MS.",
    registry=REGISTRY,
)

LIMITS_HIT = Counter(
    "realtime_limits_hit_total",
    "Times that somebody was refused, by what there was too much of.",
    ["limit"],
    registry=REGISTRY,
)

TOKENS = Counter(
    "realtime_tokens_total",
    "Tokens that model calls used, by their kind: input, output, cache_read, cache_write.",
    ["kind"],
    registry=REGISTRY,
)

COST_USD = Counter(
    "realtime_cost_usd_total",
    "What model calls cost, in dollars, as far as REALTIME_PRICES tells.",
    registry=REGISTRY,
)

TASKS_RUNNING = Gauge("realtime_tasks_running", "Tasks that run in this process now.", registry=REGISTRY)

TASKS_FINISHED = Counter(
    "realtime_tasks_finished_total",
    "Tasks whose end this process wrote, by the registered name and how they ended.",
    ["name", "status"],
    registry=REGISTRY,
)

TASK_ATTEMPTS = Counter(
    "realtime_task_attempts_total",
    "Attempts at tasks that began in this process, by the registered name.",
    ["name"],
    registry=REGISTRY,
)

TASK_SECONDS = Histogram(
    "realtime_task_seconds",
    "How long an attempt at a task took, by the registered name.",
    ["name"],
    buckets=(0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600),
    registry=REGISTRY,
)


def render() -> tuple[bytes, str]:
    """All of it as it is now in Prometheus's text format, and the content type that goes with it."""
    return generate_latest(REGISTRY), CONTENT_TYPE_PLAIN_0_0_4
