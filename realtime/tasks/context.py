"""What a running task is given beside its input: ways to report, the shared model, its session's conversation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Protocol

from msgspec import Struct

from realtime.access.prices import COST_DIGITS
from realtime.access.till import SLOT_WAIT_MS, Purse, Till
from realtime.call import BUDGET_EXCEEDED, Call, ModelSettings
from realtime.conversation import Message, estimate_tokens, fit
from realtime.errors import BudgetError
from realtime.protocol import Usage
from realtime.responders.base import Request

SIBLINGS_S = 0.2
"""How often a call looks whether another one of its task has ended, and has left it what it needs."""


class Reporter(Protocol):
    """Where a task's reports go."""

    async def progress(self, progress: int | float, total: int | float | None, message: str | None) -> None:
        """Report how far it is. Waits while too much of what was reported is not stored yet."""

    async def write(self, text: str) -> None:
        """Report the next piece of its text. Waits as above."""


class Model:
    """The model that sessions talk to, for one task: the same client, the same limits. `usage` is what it has used.

    `payer` is whose budget its calls are paid from at the `till`, with that of the session, if it is one's task.
    """

    def __init__(self, settings: ModelSettings, till: Till, payer: str, session_id: str | None = None) -> None:
        self._settings = settings
        self._till = till
        self._payer = payer
        self._session_id = session_id
        self._calls: list[Call] = []
        self._newest: Call | None = None
        self._running = 0

    async def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        instructions: str = "",
        model: str | None = None,
        max_output_tokens: int | None = None,
    ) -> AsyncGenerator[str, None]:
        """The answer to a prompt, or to a conversation, piece by piece. Use it in `aclosing`, or to its end: closing it
        closes the call, as cancelling does.

        Raises `UpstreamError`, `InvalidRequest` for a prompt that is too long, and `BudgetError` where it may cost more
        than is left of the budget, or has.
        """
        settings = self._settings
        most = min(max_output_tokens or settings.max_output_tokens, settings.max_output_tokens)
        conversation = [Message("user", prompt)] if isinstance(prompt, str) else prompt
        room = settings.context_tokens - most - estimate_tokens(instructions)
        request = Request(
            messages=fit(conversation, room_tokens=room, truncation=settings.truncation),
            instructions=instructions,
            model=model or settings.default_model,
            max_output_tokens=most,
        )
        call = Call(request, settings, await self._purse(request.most_tokens(settings.context_tokens)))
        self._calls.append(call)
        self._newest = call
        self._running += 1
        try:
            async with aclosing(call.texts()) as texts:
                async for text in texts:
                    yield text
        finally:
            self._running -= 1
        if call.stop_reason == BUDGET_EXCEEDED:
            raise BudgetError(BUDGET_EXCEEDED, "The model has said all that the budget pays for.")

    async def complete(
        self,
        prompt: str | Sequence[Message],
        *,
        instructions: str = "",
        model: str | None = None,
        max_output_tokens: int | None = None,
    ) -> str:
        """The whole answer. As `stream`."""
        stream = self.stream(prompt, instructions=instructions, model=model, max_output_tokens=max_output_tokens)
        async with aclosing(stream) as texts:
            return "".join([text async for text in texts])

    async def _purse(self, tokens: int) -> Purse:
        """A purse for one more call. Where only what this task's other calls hold is in the way it waits for them."""
        while True:
            try:
                bill = self._till.bill(self._payer, tokens)
                return await self._till.open(bill, session_id=self._session_id, slot=False)
            except BudgetError as error:
                if error.retry_after_ms != SLOT_WAIT_MS or not self._running:
                    raise
            await asyncio.sleep(SIBLINGS_S)

    @property
    def stop_reason(self) -> str:
        """Why the newest call has stopped; for calls that are made one after the other. Raises `ValueError` before the
        first one."""
        if self._newest is None:
            raise ValueError("the model was not called yet")
        return self._newest.stop_reason

    @property
    def usage(self) -> Usage:
        """The sum over all calls so far; `estimated` where any part of it is."""
        return total_usage([call.usage() for call in self._calls])


class TaskSession:
    """The session that a task belongs to. `id` is its id."""

    def __init__(self, session_id: str, read: Callable[[], Awaitable[list[Message]]]) -> None:
        self.id = session_id
        self.messages = read
        """The conversation so far, oldest first: what was said and answered, as the model is told it."""


class Context(Struct, frozen=True, kw_only=True):
    """One attempt at a task. `attempt` counts from 1; `session` is `None` for a task that was made over HTTP.

    A task that is cancelled, or has run out of time, gets a `CancelledError` where it waits, and should let it pass.
    """

    task_id: str
    attempt: int
    session: TaskSession | None
    model: Model
    reporter: Reporter

    async def progress(
        self, progress: int | float, total: int | float | None = None, message: str | None = None
    ) -> None:
        """Tell how far the task is, in units of its own. Within an attempt it never goes backwards: less than was told
        before counts as that."""
        await self.reporter.progress(progress, total, message)

    async def write(self, text: str) -> None:
        """Tell the next piece of the text that the task writes."""
        await self.reporter.write(text)


def total_usage(usages: Sequence[Usage]) -> Usage:
    """Usages added up."""
    read = [usage.cache_read_input_tokens for usage in usages if usage.cache_read_input_tokens is not None]
    created = [usage.cache_creation_input_tokens for usage in usages if usage.cache_creation_input_tokens is not None]
    costs = [usage.cost_usd for usage in usages if usage.cost_usd is not None]
    return Usage(
        input_tokens=sum(usage.input_tokens for usage in usages),
        output_tokens=sum(usage.output_tokens for usage in usages),
        total_tokens=sum(usage.total_tokens for usage in usages),
        estimated=any(usage.estimated for usage in usages),
        cache_read_input_tokens=sum(read) if read else None,
        cache_creation_input_tokens=sum(created) if created else None,
        cost_usd=round(sum(costs), COST_DIGITS) if costs else None,
    )
