"""Messages to iterate: of one answer, of one task, or of the whole session."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Generic, TypeVar, cast

from realtime.client.errors import RealtimeError
from realtime.client.events import Fields, ResponseEvent, TaskEvent, channel_of, typed
from realtime.client.state import Answer
from realtime.protocol import ResponseDone, TaskDone

E = TypeVar("E")
End = TypeVar("End")


class EventQueue:
    """Messages that wait to be iterated.

    Neighbours are joined by the protocol's merge rules, as the server does for a slow reader, so what nobody takes is
    not more than what it says.
    """

    def __init__(self) -> None:
        self._runs: deque[_Run] = deque()
        self._ended = False
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    def push(self, event: Fields) -> None:
        """Add a message; does nothing after the end."""
        if self._ended:
            return
        if not self._runs or not self._runs[-1].joined(event):
            self._runs.append(_Run(event))
        self._changed.set()

    def finish(self, error: Exception | None = None) -> None:
        """Nothing more comes: what is here can still be taken, then `error` is raised. Idempotent."""
        if not self._ended:
            self._ended, self._error = True, error
        self._changed.set()

    async def take(self) -> Fields | None:
        """The next message; `None` at the end. Safe to cancel. Raises what it was finished with."""
        while not self._runs and not self._ended:
            self._changed.clear()
            await self._changed.wait()
        if self._runs:
            return self._runs.popleft().whole()
        if self._error is not None:
            raise self._error
        return None


class _Run:
    """Neighbours that are taken as one. Their pieces are put together then: to do so with each is quadratic."""

    def __init__(self, first: Fields) -> None:
        self._event = first
        self._pieces = [first.get("delta", "")]

    def joined(self, new: Fields) -> bool:
        """Whether their kind has one join them; if so, it is done."""
        last = self._event
        same = ("type", "attempt", "replay")
        is_pair = [last.get(name) for name in same] == [new.get(name) for name in same] and not new.get("reset")
        is_text = new["type"].endswith(".delta") and isinstance(new.get("delta"), str)
        if not is_pair or not (is_text or new["type"] == "task.progress") or channel_of(last) != channel_of(new):
            return False
        self._event = {**last, **new, "merged": last.get("merged", 1) + new.get("merged", 1)}
        self._pieces.append(new.get("delta", ""))
        return True

    def whole(self) -> Fields:
        """All of them as one message."""
        is_text = len(self._pieces) > 1 and "delta" in self._event
        return {**self._event, "delta": "".join(self._pieces)} if is_text else self._event


class Outcome(Generic[E, End]):
    """What comes of one command: its messages, to be iterated once, up to and with the one that ends it.

    To leave the loop early stops nothing. It raises `RealtimeError` where the command is refused, and `SessionClosed`
    where the session's connection ends for good before. `event_id` is the command's.
    """

    def __init__(self, event_id: str) -> None:
        self.event_id = event_id
        self._queue = EventQueue()
        self._over = asyncio.Event()
        self._end: Any = None
        self._error: Exception | None = None

    async def done(self) -> End:
        """The message that ends it; raises what the loop raises. Safe to cancel."""
        await self._over.wait()
        if self._error is not None:
            raise self._error
        return cast(End, typed(self._end))

    async def __aiter__(self) -> AsyncIterator[E]:
        while (event := await self._queue.take()) is not None:
            yield cast(E, typed(event))

    def _take(self, event: Fields, *, is_end: bool) -> None:
        self._queue.push(event)
        if is_end:
            self._end = event
            self._queue.finish()
            self._over.set()

    def _fail(self, error: Exception) -> None:
        self._error = error
        self._queue.finish(error)
        self._over.set()


class ResponseStream(Outcome[ResponseEvent, ResponseDone]):
    """An answer as it comes: `ResponseCreated`, its deltas, and `ResponseDone`."""

    def __init__(
        self, event_id: str, response_id: str, answers: dict[str, Answer], cancel: Callable[[str, int | None], None]
    ) -> None:
        super().__init__(event_id)
        self.response_id = response_id
        self._answers = answers
        self._cancel = cancel

    async def text(self) -> str:
        """The whole text, once it has ended; of one that was stopped what there is. Raises where it failed."""
        end = await self.done()
        if end.error is not None:
            raise RealtimeError.told(end.error)
        return self._answers[self.response_id].text

    def cancel(self, heard_chars: int | None = None) -> None:
        """Stop it, as `Session.cancel` does."""
        self._cancel(self.response_id, heard_chars)


class TaskStream(Outcome[TaskEvent, TaskDone]):
    """A background task as it comes: `TaskCreated`, its progress and text, and `TaskDone`."""

    def __init__(
        self,
        event_id: str,
        task_id: str,
        cancel: Callable[[str], None],
        fetch: Callable[[str], Awaitable[Any]],
    ) -> None:
        super().__init__(event_id)
        self.task_id = task_id
        self._cancel = cancel
        self._fetch = fetch

    async def result(self) -> Any:
        """What it came to, once it has ended; a large one is fetched. Raises where it failed or was cancelled."""
        end = await self.done()
        if end.error is not None:
            raise RealtimeError.told(end.error)
        if end.status != "complete":
            raise RealtimeError("cancelled", "The task was cancelled.")
        return await self._fetch(end.result_url) if end.result_url else end.result

    def cancel(self) -> None:
        """Stop it."""
        self._cancel(self.task_id)
