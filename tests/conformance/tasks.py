"""A task whose result is as large as its input says."""

from __future__ import annotations

from realtime.tasks.context import Context
from realtime.tasks.registry import task
from tests.support.sample_tasks import Number


@task()
async def repeat(ctx: Context, given: Number) -> str:
    """A long text."""
    return "long " * given.number
