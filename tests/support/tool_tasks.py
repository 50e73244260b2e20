"""Tasks that a model may call (`tasks=("tests.support.tool_tasks",)`)."""

from __future__ import annotations

import asyncio

from msgspec import Struct

from realtime.errors import TaskError
from realtime.tasks.context import Context
from realtime.tasks.registry import task

MODULE = __name__


class Place(Struct):
    """Where."""

    city: str


@task(tool=True)
async def weather(ctx: Context, place: Place) -> dict[str, str]:
    """The weather of a city."""
    await ctx.progress(1, 1, "looked out of the window")
    return {"city": place.city, "sky": "rain"}


@task(tool=True)
async def broken(ctx: Context, place: Place) -> None:
    """A tool that fails."""
    raise TaskError("no_window", "There is no window.")


@task(tool=True)
async def endless(ctx: Context, place: Place) -> None:
    """A tool that never comes to an end."""
    await asyncio.Event().wait()


@task()
async def hidden(ctx: Context, place: Place) -> None:
    """A task that no model is told of."""
