"""Tasks for tests with real workers (`REALTIME_TASKS=tests.support.sample_tasks`): what each does, its input says.

`expected()` is what has to come of one that nobody cancels, however often it is tried.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from msgspec import Struct

from realtime.tasks.context import Context
from realtime.tasks.registry import task

MODULE = __name__


class Steps(Struct, frozen=True):
    """So many steps, with a pause after each."""

    steps: int
    pause_s: float = 0.0


class Seconds(Struct, frozen=True):
    """So long."""

    seconds: float


class Number(Struct, frozen=True):
    """Any number."""

    number: int


class Words(Struct, frozen=True):
    """Some words."""

    text: str


class Outcome(Struct, frozen=True):
    """What comes of a task."""

    status: str
    result: Any = None
    text: str = ""
    code: str | None = None


@task()
async def count(ctx: Context, given: Steps) -> int:
    """Tell the progress of each step."""
    for number in range(1, given.steps + 1):
        await ctx.progress(number, given.steps, f"step {number}")
        await asyncio.sleep(given.pause_s)
    return given.steps


@task()
async def write_numbers(ctx: Context, given: Steps) -> int:
    """Write the numbers from 1 on, and tell the progress."""
    for number in range(1, given.steps + 1):
        await ctx.write(f"{number} ")
        await ctx.progress(number, given.steps)
        await asyncio.sleep(given.pause_s)
    return given.steps


@task()
async def sleep(ctx: Context, given: Seconds) -> float:
    """Wait."""
    await ctx.progress(0, given.seconds)
    await asyncio.sleep(given.seconds)
    return given.seconds


@task()
def compute(given: Seconds) -> float:
    """Use a processor for so long."""
    end = time.monotonic() + given.seconds
    while time.monotonic() < end:
        pass
    return given.seconds


@task(retries=1)
async def break_down(ctx: Context, given: Number) -> None:
    """Raise."""
    await ctx.write("before the fall")
    raise ValueError(f"nobody is to read {given.number}")


@task()
async def nothing(ctx: Context, given: Number) -> int:
    """Return at once."""
    return given.number


@task()
async def echo(ctx: Context, given: Words) -> str:
    """Write the words, tell them as progress, and return them in capitals."""
    await ctx.write(given.text)
    await ctx.progress(1, 1, given.text)
    return given.text.upper()


@task()
async def spill(ctx: Context, given: Words) -> None:
    """Tell the words as progress, leave behind what fails with them, and fail with them."""
    await ctx.progress(0, 1, given.text)
    left = asyncio.create_task(_fail(given.text))
    await asyncio.wait([left])
    del left
    await _fail(given.text)


async def _fail(text: str) -> None:
    raise ValueError(text)


def expected(name: str, given: dict[str, Any]) -> Outcome:
    """What has to come of a task."""
    match name:
        case "count":
            return Outcome("complete", given["steps"])
        case "write_numbers":
            return Outcome("complete", given["steps"], text=numbers(given["steps"]))
        case "break_down":
            return Outcome("failed", text="before the fall", code="task_failed")
        case "nothing":
            return Outcome("complete", given["number"])
        case "echo":
            return Outcome("complete", given["text"].upper(), text=given["text"])
        case _:
            return Outcome("complete", given["seconds"])


def numbers(steps: int) -> str:
    """The text that `write_numbers` writes."""
    return "".join(f"{number} " for number in range(1, steps + 1))
