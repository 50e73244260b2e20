"""One model turn: claims a response, streams its answer into the log, and writes its one end, however it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, assert_never

import msgspec
from msgspec import Struct, field

from realtime.access.audit import hidden, told
from realtime.access.prices import Prices, weighted_tokens
from realtime.access.till import Till, count
from realtime.call import BUDGET_EXCEEDED
from realtime.conversation import Message, ToolCall, ToolResult, fit, messages
from realtime.errors import BudgetError, ConflictError, RealtimeError, ServerError, StoreError
from realtime.journal import Journal, Tail
from realtime.live import RETRY_S, LiveSession
from realtime.log import Deltas, Entry, length
from realtime.observe import logs, metrics, traces
from realtime.pace import Breath, Pace
from realtime.protocol import (
    MAX_FRAME_CHARS,
    Delta,
    OutputTextDelta,
    ReasoningDelta,
    ResponseDone,
    ResponseInProgress,
    ResponseStatus,
    Session,
    Usage,
)
from realtime.responders.answering import answering, checked
from realtime.responders.base import Finish, Reasoning, Request, Responder, Text, TokenCount, ToolInput
from realtime.session import ResponseState
from realtime.store.base import PositionConflict, Write
from realtime.tasks.tools import TaskTools
from realtime.usage import Meter, status_of
from realtime.view import View

MAX_MODEL_CALLS = 20
"""How often one response may call the model: each call but the first follows tool calls of the one before."""
STOP_TIMEOUT_S = 1.0
"""How long a responder that is stopped may take before its response is ended without it."""


class End(Struct, frozen=True, kw_only=True):
    """How a response ends. `for_event_id` is the command's that asked for it, if one did."""

    status: ResponseStatus
    stop_reason: str | None = None
    error: RealtimeError | None = None
    for_event_id: str | None = None

    @classmethod
    def failed(cls, error: RealtimeError) -> End:
        """The end of a response that failed."""
        return cls(status="failed", error=error)


OUT_OF_BUDGET = End(status="incomplete", stop_reason=BUDGET_EXCEEDED)


class Turns(Struct, frozen=True):
    """What turns need and share. `report` takes the errors that are not ours, for the log."""

    instance: str
    responder: Responder
    journal: Journal
    pace: Pace
    idle_timeout_s: float
    context_tokens: int
    truncation: str
    report: Callable[[BaseException], None]
    tools: TaskTools
    till: Till
    prices: Prices
    name_of: Callable[[str], str] = hidden
    """What a session is called in the log."""
    abandoned: set[asyncio.Task[None]] = field(default_factory=set)
    """Responders that were stopped and have not ended yet."""


class Turn:
    """One response of a live session, from its claim to its end.

    `run` is its life; `stop` ends it early. Whichever end comes first counts, and there is exactly one, unless
    somebody else has ended the response in the store: then this turn stops and says nothing more.
    """

    __slots__ = (
        "_answering",
        "_decided",
        "_end",
        "_is_ours",
        "_live",
        "_meter",
        "_purse",
        "_reasoning",
        "_response",
        "_said",
        "_span",
        "_tail",
        "_text",
        "_turns",
        "_view",
    )

    def __init__(self, live: LiveSession, response: ResponseState, turns: Turns) -> None:
        self._live = live
        self._response = response
        self._turns = turns
        self._view = live.views.get(response.id) or View()
        self._tail = Tail(live.id, response.id, self._view, lost=self._lose)
        self._text = OutputTextDelta(response_id=response.id, delta="")
        self._reasoning = ReasoningDelta(response_id=response.id, delta="")
        self._purse = turns.till.adopt(response.bill, session_id=live.id)
        self._span = traces.NOTHING
        self._is_ours = False
        """Whether it was claimed or ended here, so that what it has used is settled here."""
        self._meter = Meter(0)
        self._said: list[str] = []
        """What the present model call has said, where it may call a tool after it."""
        self._answering: asyncio.Task[None] | None = None
        self._decided: asyncio.Future[None] | None = None
        self._end: End | None = None

    async def run(self) -> None:
        """Claim the response, answer it, end it. Returns when the store has the end, or has refused it."""
        with logs.bound(session=self._turns.name_of(self._live.id), response=told(self._response.id)):
            with traces.span("response", parent=self._response.traceparent) as self._span:
                await self._run()

    async def _run(self) -> None:
        try:
            await self._begin()
            if not self._response.done:
                await self._put_end(await self._until_end())
        except PositionConflict:
            pass  # somebody else has claimed or ended it: it is theirs now
        except RealtimeError as error:
            if error.code != "session_not_found":
                self._turns.report(error)
        finally:
            self._pay()
        if not self._response.done:
            self._live.doubt()  # whoever has ended it, or will, this was not told yet

    async def bury(self, error: RealtimeError) -> None:
        """End, because of `error`, a response that nobody runs any more, as far as the store has it.

        Raises `PositionConflict` if somebody does.
        """
        try:
            await self._bury(error)
            self._is_ours = True
        finally:
            self._pay()

    async def _bury(self, error: RealtimeError) -> None:
        entries = await self._live.stored(self._response.id)
        stored = await self._metered(entries)
        if self._is_ours:
            self._meter.chars = stored.chars  # what was used is known here, however much of it the store has lost
        else:
            self._meter = stored
        done = self._done(End.failed(error))
        write = Write(self._response.id, [done], expect=sum(map(length, entries)))
        await self._live.store.append(self._live.id, [write])
        self._ended(done)

    async def _metered(self, entries: Sequence[Entry]) -> Meter:
        """What a response has used, as far as its log shows."""
        meter = Meter(0)
        with suppress(RealtimeError):  # an estimate of what its input was is better than none
            meter = Meter((await self._request()).estimated_tokens())
        for entry in entries:
            if isinstance(entry, Deltas):
                said = meter.said if isinstance(entry.template, OutputTextDelta) else meter.thought
                said("".join(entry.texts))
        return meter

    def stop(self, end: End) -> None:
        """End the response with `end`, unless it is ending already. The model call is closed at once."""
        if self._decide(end) and self._answering is not None:
            self._answering.cancel()

    def lose(self) -> None:
        """Somebody else has ended the response: stop. Whatever its end would have been, nobody is told."""
        self._lose(PositionConflict())

    async def _begin(self) -> None:
        """Claim the response. What was stopped while it waited, or has no room in its session, is not claimed: its end
        is its only event.
        """
        if self._end is None or not self._response.queued:
            try:
                await self._open(ResponseInProgress(response_id=self._response.id, instance=self._turns.instance))
                return
            except ConflictError as error:  # the session is full: it takes the end alone
                self._decide(End.failed(error))
        assert self._end is not None
        done = self._done(self._end)
        await self._open(done)
        self._ended(done)

    async def _open(self, first: ResponseInProgress | ResponseDone) -> None:
        """Append the channel's first event, unless somebody has. Raises `PositionConflict` where another instance runs
        it."""
        while not (self._response.running or self._response.done):
            try:
                await self._live.store.append(self._live.id, [Write(self._response.id, [first], expect=0)])
                self._is_ours = True
            except StoreError:
                await asyncio.sleep(RETRY_S)
            except PositionConflict:
                await self._look()
        if self._response.running and self._response.instance != self._turns.instance:
            raise PositionConflict
        self._is_ours = True

    async def _look(self) -> None:
        """See who was first: it may have been this instance, by a call that was not answered."""
        try:
            await self._live.refresh()
        except StoreError:
            await asyncio.sleep(RETRY_S)

    async def _put_end(self, end: End) -> None:
        done = self._done(end)
        try:
            await self._turns.journal.finish(self._tail, done)
        except StoreError as error:  # a part of what it would follow is lost, and it must not be taken for whole
            await self._bury(error)
        else:
            self._ended(done)

    async def _until_end(self) -> End:
        """Answer until the answer, an error or `stop` ends it."""
        if self._end is None:
            self._decided = asyncio.get_running_loop().create_future()
            answering = self._answering = asyncio.create_task(self._answer())
            either: list[asyncio.Future[Any]] = [answering, self._decided]
            try:
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                await asyncio.wait([answering], timeout=STOP_TIMEOUT_S)
            finally:
                self._leave(answering)
        return self._end or self._outcome()

    def _decide(self, end: End) -> bool:
        """Let `end` be the response's, if it has none yet; returns whether it is. From here on the rest is bounded."""
        if self._end is not None:
            return False
        self._end = end
        if self._decided is not None and not self._decided.done():
            self._decided.set_result(None)
        return True

    def _leave(self, answering: asyncio.Task[None]) -> None:
        """Let go of the responder, which may take its time, or may not want to stop at all: that holds up nobody."""
        if not answering.done():
            answering.cancel()
            self._turns.abandoned.add(answering)
            answering.add_done_callback(self._turns.abandoned.discard)
        answering.add_done_callback(_forget_outcome)

    def _outcome(self) -> End:
        assert self._answering is not None
        if self._answering.cancelled():  # by the responder itself: nobody has stopped it
            return End.failed(ServerError("responder_failed", "The responder failed."))
        match error := self._answering.exception():
            case RealtimeError():
                return End.failed(error)
            case _:  # the responder is somebody else's code: whatever it raises ends this turn only
                assert error is not None, "an answer that ended by itself has decided its end"
                self._turns.report(error)
                return End.failed(ServerError("responder_failed", "The responder failed."))

    async def _answer(self) -> None:
        request = await self._request_at_last()
        if self._is_decided():
            return
        await self._cover(request.most_tokens(self._turns.context_tokens))
        self._meter = Meter(request.estimated_tokens())
        for calls_left in reversed(range(MAX_MODEL_CALLS)):
            calls, finish = await self._call(request)
            if self._is_decided():
                return
            if not (calls and finish.stop_reason == "tool_use" and calls_left):
                self._finish(finish)
                return
            self._meter.finished(finish)
            results = await self._carry_out(calls)
            request = self._continued(request, calls, results, finish.raw)
            if not await self._affords(request):
                return
            self._meter.next_call(request.estimated_tokens())

    async def _affords(self, request: Request) -> bool:
        """Whether the purse holds another model call, after what was used. Where it does not the answer ends so."""
        most = request.most_tokens(self._turns.context_tokens)
        try:
            await self._cover(weighted_tokens(self._meter.usage()) + most)
        except BudgetError:
            self._decide(OUT_OF_BUDGET)
        return not self._is_decided()

    async def _cover(self, tokens: int) -> None:
        """Have the purse hold so much, however long the ledger takes to say so. Raises `BudgetError`."""
        while True:
            try:
                return await self._purse.cover(tokens)
            except StoreError:
                await asyncio.sleep(RETRY_S)

    def _pay(self) -> None:
        """Settle what was used; whoever has claimed or ended the response elsewhere does that there."""
        if self._is_ours:
            usage = self._usage()
            self._purse.settle(usage)
            count(usage)
        else:
            self._purse.drop()

    def _ended(self, done: ResponseDone) -> None:
        """The store has the end that was written here."""
        metrics.response_ended(done, self._live.state.settings_of(self._response).max_output_tokens)
        self._span.set({"realtime.response.status": done.status, "realtime.response.stop_reason": done.stop_reason})
        if done.error is not None:
            self._span.fail(done.error.code)

    def _usage(self) -> Usage:
        return self._turns.prices.priced(self._response.model, self._meter.usage())

    async def _call(self, request: Request) -> tuple[list[ToolCall], Finish]:
        """One model call: show what it says. Returns the tools that it calls, and how it ends."""
        breath = Breath(self._turns.pace)
        calls: list[ToolCall] = []
        self._said.clear()
        async with answering(self._turns.responder, request, idle_s=self._turns.idle_timeout_s) as answer:
            async for event in answer.events:
                if self._is_decided():
                    break
                if isinstance(event, Finish):
                    answer.finished(event)
                    return calls, event
                if isinstance(event, ToolCall):
                    calls.append(event)
                    answer.progress()
                elif self._take(event):
                    answer.progress()
                if self._purse.is_limited and not await self._purse.affords(self._meter.usage()):
                    self._decide(OUT_OF_BUDGET)
                    break
                await breath.take()
        return calls, Finish("end_turn")

    async def _carry_out(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        return await asyncio.gather(*(self._turns.tools.call(self._live, self._response, call) for call in calls))

    def _continued(
        self, request: Request, calls: Sequence[ToolCall], results: Sequence[ToolResult], raw: Sequence[Any]
    ) -> Request:
        """The request that goes on from the results of tool calls."""
        asked = Message("assistant", "".join(self._said), tool_calls=tuple(calls), raw=tuple(raw))
        told = Message("user", "", tool_results=tuple(results))
        request = msgspec.structs.replace(request, messages=[*request.messages, asked, told])
        return self._fitted(request)

    def _fitted(self, request: Request) -> Request:
        """The request with what the model can hold of its conversation. Raises `InvalidRequest`."""
        room = self._turns.context_tokens - request.max_output_tokens - request.estimated_frame_tokens()
        fitting = fit(request.messages, room_tokens=room, truncation=self._turns.truncation)
        return msgspec.structs.replace(request, messages=fitting)

    def _request_of(self, settings: Session, conversation: Sequence[Message]) -> Request:
        request = request_of(settings, conversation, self._turns.tools, response_id=self._response.id)
        may_make_tasks = self._response.bill is None or self._response.bill.tasks
        return request if may_make_tasks else msgspec.structs.replace(request, tools=())

    def _is_decided(self) -> bool:
        return self._end is not None

    def _finish(self, finish: Finish) -> None:
        if self._decide(End(status=status_of(finish.stop_reason), stop_reason=finish.stop_reason)):
            self._meter.finished(finish)

    def _take(self, event: str | Text | Reasoning | ToolInput | TokenCount) -> bool:
        """Show what the responder says; returns whether it said something."""
        match event:
            case Text() | str():
                text = event.text if isinstance(event, Text) else checked(event)
                self._meter.said(text)
                if self._turns.tools.definitions:
                    self._said.append(text)
                return self._show(self._text, text)
            case ToolInput(text=text):
                self._meter.thought(text)
                return bool(text)
            case Reasoning(text=text):
                self._meter.thought(text)
                return self._show(self._reasoning, text)
            case TokenCount():
                self._meter.counted(event)
                return False
            case _:
                assert_never(event)

    def _show(self, template: Delta, text: str) -> bool:
        for start in range(0, len(text), MAX_FRAME_CHARS):
            self._view.append_delta(template, text[start : start + MAX_FRAME_CHARS])
        if text:
            self._turns.journal.mark(self._tail)
            self._live.wake()
        return bool(text)

    async def _request_at_last(self) -> Request:
        """The request; a store that does not tell the conversation is asked again until it does."""
        while True:
            try:
                return await self._request()
            except StoreError:
                await asyncio.sleep(RETRY_S)

    async def _request(self) -> Request:
        settings = self._live.state.settings_of(self._response)
        conversation = messages(self._live.state, await answers(self._live), upto=self._response)
        return self._fitted(self._request_of(settings, conversation))

    def _lose(self, error: Exception) -> None:
        """The store refused what this turn said: it stops, and whether its end is taken is up to the store."""
        lost = ServerError("response_lost", "The response was ended elsewhere.")
        self.stop(End.failed(error if isinstance(error, RealtimeError) else lost))

    def _done(self, end: End) -> ResponseDone:
        return ResponseDone(
            response_id=self._response.id,
            status=end.status,
            stop_reason=end.stop_reason,
            usage=self._usage(),
            output_chars=self._meter.chars,
            error=end.error.as_failure() if end.error else None,
            heard_chars=self._live.state.heard.get(self._response.id),
            for_event_id=end.for_event_id,
        )


def request_of(
    settings: Session, conversation: Sequence[Message], tools: TaskTools, *, response_id: str = ""
) -> Request:
    """The model call that a session's settings mean."""
    return Request(
        messages=conversation,
        instructions=settings.instructions,
        model=settings.model,
        max_output_tokens=settings.max_output_tokens,
        session_id=settings.id,
        response_id=response_id,
        tools=tools.definitions,
    )


async def answers(live: LiveSession) -> dict[str, str]:
    """The texts of a session's responses, as far as they have come."""
    return {response_id: await answer_text(live, response_id) for response_id in list(live.state.responses)}


async def answer_text(live: LiveSession, response_id: str) -> str:
    """The text of a response as far as it has come; empty for one that is unknown or has said nothing."""
    runs = [entry for entry in await live.entries(response_id) if isinstance(entry, Deltas)]
    return "".join("".join(run.texts) for run in runs if isinstance(run.template, OutputTextDelta))


def _forget_outcome(answering: asyncio.Task[None]) -> None:
    """Take note of an error that nobody needs, so that asyncio does not tell of it."""
    if not answering.cancelled():
        answering.exception()
