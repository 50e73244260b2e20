"""Limits that no test reaches that is not about them."""

from __future__ import annotations

from typing import Any

MANY = 1_000_000
GENEROUS: dict[str, Any] = {
    "rate_responses": f"{MANY}/second",
    "rate_oneshots": f"{MANY}/second",
    "rate_tasks": f"{MANY}/second",
    "rate_sessions": f"{MANY}/second",
    "rate_connections": f"{MANY}/second",
    "rate_messages": f"{MANY}/second",
    "max_responses_per_user": MANY,
    "max_tasks_per_user": MANY,
    "max_connections_per_user": MANY,
    "max_connections_per_address": MANY,
}
"""Settings, to be overridden where it is about them."""
