"""A context for tasks: its model says what a test wants, and it remembers what was asked and what was reported."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable
from typing import Any

from msgspec import Struct, field

from realtime.call import ModelSettings
from realtime.conversation import Message
from realtime.responders.base import Finish, Request, Responder
from realtime.tasks.context import Context, Model, TaskSession
from tests.support.tills import open_till

Answer = Callable[[Request], str | list[str]]


class Script:
    """A responder: `answer` gives each answer, whole or in pieces, or raises. `running` calls are open now, and at most
    `most` were at once.

    With `hold` no call says anything: all wait for ever, and `full` is set once there are so many.
    """

    def __init__(
        self, answer: Answer = lambda _: "", *, hold: int | None = None, stop_reason: str = "end_turn"
    ) -> None:
        self.requests: list[Request] = []
        self.running = self.most = 0
        self.full = asyncio.Event()
        self._answer = answer
        self._hold = hold
        self._stop_reason = stop_reason

    async def __call__(self, request: Request) -> AsyncGenerator[str | Finish, None]:
        self.requests.append(request)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if self._hold is not None:
                await self._wait_for_ever(self._hold)
            pieces = self._answer(request)
            for piece in [pieces] if isinstance(pieces, str) else pieces:
                await asyncio.sleep(0)
                yield piece
            yield Finish(self._stop_reason)
        finally:
            self.running -= 1

    async def _wait_for_ever(self, hold: int) -> None:
        if self.running == hold:
            self.full.set()
        await asyncio.Event().wait()


class Reports(Struct):
    """What a task has reported, in order."""

    told: list[tuple[float, float | None, str | None] | str] = field(default_factory=list)

    async def progress(self, progress: int | float, total: int | float | None, message: str | None) -> None:
        self.told.append((progress, total, message))

    async def write(self, text: str) -> None:
        self.told.append(text)

    @property
    def text(self) -> str:
        return "".join(told for told in self.told if isinstance(told, str))

    @property
    def steps(self) -> list[tuple[float, float | None, str | None]]:
        return [told for told in self.told if not isinstance(told, str)]


def model_of(script: Responder, *, context_tokens: int = 200_000) -> Model:
    return Model(
        ModelSettings(
            responder=script,
            default_model="scripted",
            max_output_tokens=4096,
            context_tokens=context_tokens,
            truncation="auto",
            idle_timeout_s=60.0,
        ),
        open_till(),
        "user:ann",
    )


def context_of(
    script: Responder, *, session: list[Message] | None = None, context_tokens: int = 200_000
) -> tuple[Context, Reports]:
    """A context, and what is reported through it; with `session` it is of a session with that conversation."""
    reports = Reports()
    context = Context(
        task_id="task_1",
        attempt=1,
        session=None if session is None else task_session(session),
        model=model_of(script, context_tokens=context_tokens),
        reporter=reports,
    )
    return context, reports


def task_session(conversation: list[Message]) -> TaskSession:
    async def read() -> list[Message]:
        return conversation

    return TaskSession("sess_1", read)


def quotes_in(request: Request, kind: str) -> list[str]:
    """The texts of a kind that a model was shown in the one message of a request."""
    [message] = request.messages
    return [found[2] for found in re.finditer(rf"<{kind} (\w{{16}})>\n(.*?)\n</{kind} \1>", message.content, re.DOTALL)]


class Offloaded:
    """Stands in for `offload`: computes here, and remembers what."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    async def __call__(self, fn: Callable[..., Any], /, *args: Any) -> Any:
        self.calls.append((fn, args))
        return fn(*args)
