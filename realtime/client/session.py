"""One session, over a connection that comes back by itself.

What makes that safe are `positions`: the number of the last message applied, per channel. After any loss of the
connection they alone say where to go on, so an answer continues at the character where it was cut, and a command that
was under way is carried out once, because it is sent again under the same id.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from realtime.client.connection import Connection, ConnectionState, Options, Token, Transport, TransportName
from realtime.client.errors import RealtimeError, SessionClosed
from realtime.client.events import Event, Fields, typed
from realtime.client.outbox import Outbox
from realtime.client.refusals import Refused
from realtime.client.state import Answer, History, State, Task
from realtime.client.streams import EventQueue, ResponseStream, TaskStream
from realtime.client.wire import LOST, Closed, Left, checked_url, decoded
from realtime.protocol import (
    ClientMessage,
    CloseCode,
    ErrorBody,
    ResponseCancel,
    ResponseCreate,
    TaskCancel,
    TaskCreate,
    new_id,
    utf16_length,
)

MAX_UNANSWERED = 1000
"""The server remembers so many command ids: to repeat an older command could carry it out twice."""
MAX_MESSAGE_BYTES = 65_536
"""What a server takes that was not told otherwise."""

Lost = Callable[[int, str, float], None]


@asynccontextmanager
async def connect(
    url: str,
    *,
    session_id: str | None = None,
    token: Token | None = None,
    history: History = "all",
    transport: Transport = "auto",
    delta_interval_ms: int = 0,
    max_unanswered: int = MAX_UNANSWERED,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    open_timeout_s: float | None = 20.0,
    on_lost: Lost | None = None,
) -> AsyncIterator[Session]:
    """A session that is kept connected until the block ends; it lives on at the server.

    What was sent over an open connection still goes out at the end of the block, for 2 s at most; who is cancelled
    meanwhile does not wait for it.

    The block begins before it is attached, so that no event is missed: commands wait for that, and `Session.opened`
    does. `url` is the server's address, or its WebSocket endpoint. `session_id` is the session to go on with; without
    it a new one is made. `token` is a bearer token, or a function, perhaps a coroutine's, that gets a fresh one: it is
    called for each connection, and before a token expires. `history` says whether a first attach replays the session.
    By `transport` "auto" it is server-sent events where WebSockets are blocked. `delta_interval_ms` is the shortest
    time between two messages of one answer. `max_unanswered` commands may wait for an answer, 1000 at most, each of at
    most `max_message_bytes` as JSON, which is what the server takes. A server that can't be reached for
    `open_timeout_s` ends the session; `None`: never. `on_lost` is called with code, reason and seconds whenever the
    connection is lost and will be back; to raise from it is to give up: that ends the session, and the block by it.
    Raises `ValueError` for a `url` that can't be one. What `token` or `on_lost` raised, or what the client failed of,
    is the cause of `SessionClosed`.
    """
    options = Options(url=checked_url(url), token=token, transport=transport, delta_interval_ms=delta_interval_ms)
    outbox = Outbox(min(max_unanswered, MAX_UNANSWERED), max_message_bytes)
    session = Session(options, session_id, history, outbox, on_lost)
    keeping = asyncio.create_task(session._keep(open_timeout_s))
    try:
        yield session
    finally:
        session.close()
        try:
            await asyncio.wait({keeping})
        finally:
            keeping.cancel()
        keeping.result()


class Session:
    """What `connect` gives. To iterate it yields all messages from then on, until it is closed; where another code than
    1000 closes it the loop raises `SessionClosed`."""

    def __init__(
        self, options: Options, session_id: str | None, history: History, outbox: Outbox, on_lost: Lost | None
    ) -> None:
        self._state = State(session_id, history)
        self._outbox = outbox
        self._connection = Connection(options, _Ear(self))
        self._on_lost = on_lost
        self._streams: dict[str, ResponseStream | TaskStream] = {}
        self._queues: set[EventQueue] = set()
        self._silenced: set[str] = set()
        self._closed: SessionClosed | None = None
        self._opened = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()
        self._last_loss = Closed(LOST, "no answer")
        self._giving_up: asyncio.TimerHandle | None = None

    @property
    def session_id(self) -> str | None:
        """The session's id."""
        return self._state.session_id

    @property
    def state(self) -> ConnectionState:
        """How the connection stands."""
        return "closed" if self._closed is not None else self._connection.state

    @property
    def transport(self) -> TransportName | None:
        """What carries the connection, or did last."""
        return self._connection.transport

    @property
    def positions(self) -> dict[str, int]:
        """The last message applied, of the session and of every channel that has not ended."""
        return self._state.positions

    @property
    def responses(self) -> dict[str, Answer]:
        """The answers, by id."""
        return self._state.responses

    @property
    def tasks(self) -> dict[str, Task]:
        """The background tasks, by id."""
        return self._state.tasks

    @property
    def participants(self) -> dict[str, Fields]:
        """Who looks at the session now, by connection id."""
        return self._state.participants

    @property
    def unfinished(self) -> list[Answer]:
        """The answers that wait or run."""
        return [answer for answer in self.responses.values() if answer.id in self.positions]

    async def opened(self) -> None:
        """Return once it was attached. Raises `SessionClosed` where it has ended. Safe to cancel."""
        await self._opened.wait()
        if self._closed is not None:
            raise self._closed

    def send(self, message: ClientMessage | ResponseCreate | Mapping[str, Any]) -> str:
        """Send a command now, or after the reconnect; it is carried out once either way.

        Returns its `event_id`, which its effects name as `for_event_id`. Raises `QueueFull` where too many wait
        already, `MessageTooLarge`, and `SessionClosed`; `ValueError` where it has no `type`.
        """
        if self._closed is not None:
            raise self._closed
        command: Fields = {"event_id": new_id("evt"), **msgspec.to_builtins(message)}
        if not isinstance(command.get("type"), str):
            raise ValueError("a message has a type, such as session.update")
        self._outbox.add(command)
        self._connection.send(command)
        return str(command["event_id"])

    def respond(self, text: str, **options: Any) -> ResponseStream:
        """Say something as the user and ask for an answer, which can be iterated.

        `options` are other fields of `response.create`, such as `multitask_strategy`. Raises as `send` does.
        """
        response_id = options.pop("response_id", None) or new_id("resp")
        event_id = self.send(ResponseCreate(response_id=response_id, input=text, **options))
        stream = ResponseStream(event_id, response_id, self.responses, self.cancel)
        self._streams[response_id] = stream
        return stream

    def cancel(self, response_id: str, heard_chars: int | None = None) -> None:
        """Stop an answer. Of one that is voiced the conversation keeps what was heard.

        That is `heard_chars`, in UTF-16 code units, or else what `heard` was told last. Does nothing where the answer
        has ended and nothing is known to be heard of it.
        """
        answer = self.responses.get(response_id)
        if heard_chars is None and answer is not None:
            heard_chars = answer.heard_chars
        if answer is not None and response_id not in self.positions and heard_chars is None:
            return
        if heard_chars is not None:
            self._silenced.add(response_id)
        self.send(ResponseCancel(response_id=response_id, heard_chars=heard_chars))

    def heard(self, response_id: str, chars: int) -> None:
        """Note that the listener has heard the answer up to here, in UTF-16 code units from its start; sends nothing.

        What comes after the answer was stopped is void.
        """
        answer = self.responses.get(response_id)
        if answer is not None and response_id not in self._silenced:
            answer.heard_chars = max(chars, answer.heard_chars or 0)

    def interrupt(self) -> None:
        """Stop whatever is being written or voiced: every answer that has not ended, or was not heard to its end."""
        for answer in list(self.responses.values()):
            heard = answer.heard_chars
            is_voiced = heard is not None and answer.id not in self._silenced and heard < utf16_length(answer.text)
            if answer.id in self.positions or is_voiced:
                self.cancel(answer.id)

    def create_task(self, name: str, input: Any) -> TaskStream:
        """Start a background task, whose messages can be iterated; what its input has to be it says itself. Raises as
        `send` does."""
        task_id = new_id("task")
        event_id = self.send(TaskCreate(task_id=task_id, name=name, input=input))
        stream = TaskStream(event_id, task_id, self.cancel_task, self.fetch_result)
        self._streams[task_id] = stream
        return stream

    def cancel_task(self, task_id: str) -> None:
        """Stop a task."""
        if task_id not in self.tasks or task_id in self.positions:
            self.send(TaskCancel(task_id=task_id))

    async def fetch_result(self, result_url: str) -> Any:
        """Get a result that is too large for a message. Raises `RealtimeError`."""
        module = await asyncio.to_thread(__import__, "realtime.client.event_stream", fromlist=["fetch"])
        target = await self._connection.target()
        try:
            return decoded(await module.fetch(target, target.http(result_url.removeprefix("/v1/"))), object)
        except Refused as refused:
            raise RealtimeError.told(msgspec.convert({"fatal": False, **refused.error}, ErrorBody)) from None
        except Closed as closed:
            raise RealtimeError("unreachable", closed.reason) from None

    def drop(self, reconnect_in_s: float = 0.0) -> None:
        """Cut the connection as a lost network would, and come back after a while."""
        self._connection.leave(Closed(LOST, "dropped", reconnect_in_s=reconnect_in_s))

    def close(self) -> None:
        """Leave the session for good, after what was sent; the end of `connect`'s block does that. Idempotent."""
        left = Left(CloseCode.NORMAL, "left")
        self._end(left)
        self._connection.leave(left)

    async def __aiter__(self) -> AsyncIterator[Event]:
        queue = EventQueue()
        self._queues.add(queue)
        try:
            if self._closed is not None:
                queue.finish(self._error_of_loops())
            while (event := await queue.take()) is not None:
                yield typed(event)
        finally:
            self._queues.discard(queue)

    async def _keep(self, open_timeout_s: float | None) -> None:
        closed = Closed(LOST, "the client failed")
        if open_timeout_s is not None:
            self._giving_up = asyncio.get_running_loop().call_later(open_timeout_s, self._give_up)
        try:
            closed = await self._connection.run()
        except Exception as error:
            closed.__cause__ = error
            raise
        finally:
            self._end(closed)
            for task in self._background:
                task.cancel()

    def _give_up(self) -> None:
        left = Left(self._last_loss.code, self._last_loss.reason)
        left.__cause__ = self._last_loss.__cause__
        self._connection.leave(left)

    def _receive(self, event: Fields) -> None:
        if not self._state.advance(event):
            raise Closed(LOST, "gap")
        self._outbox.settle(event.get("for_event_id"))
        self._state.fold(event)
        self._heed(event)
        for queue in self._queues:
            queue.push(event)

    def _heed(self, event: Fields) -> None:
        """What a message has the client do beside what it tells."""
        match event["type"]:
            case "session.created" | "session.resumed":
                self._connection.attached(self._outbox.waiting)
                self._settled()
            case "session.going_away":  # the next instance goes on where this one is
                moving = Closed(1001, "going away", reconnect_in_s=0.0)
                self._connection.leave_in(event["reconnect_after_ms"] / 1000, moving)
            case "auth.expiring":
                self._start(self._connection.refresh())
            case "error":
                self._refused(event["error"])
            case "response.created":
                self._pass_on(event["response"]["id"], event)
            case "task.created":
                self._pass_on(event["task"]["id"], event)
            case "response.done":
                self._channel_ended(event["response_id"], event)
            case "task.done":
                self._channel_ended(event["task_id"], event)
            case _:
                self._pass_on(event.get("response_id") or event.get("task_id") or "", event)

    def _pass_on(self, channel: str, event: Fields) -> None:
        if stream := self._streams.get(channel):
            stream._take(event, is_end=False)

    def _channel_ended(self, channel: str, event: Fields) -> None:
        self._outbox.settle_cancels(channel)
        if stream := self._streams.pop(channel, None):
            stream._take(event, is_end=True)

    def _refused(self, error: Fields) -> None:
        event_id = error.get("event_id")
        self._outbox.settle(event_id)
        self._connection.retry_after_s = error.get("retry_after_ms", 0) / 1000
        for channel, stream in list(self._streams.items()):
            if stream.event_id == event_id:
                stream._fail(RealtimeError.told(msgspec.convert(error, ErrorBody)))
                del self._streams[channel]

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _lost(self, closed: Closed, reconnect_in_s: float) -> None:
        self._last_loss = closed
        if self._on_lost is not None:
            self._on_lost(closed.code, closed.reason, reconnect_in_s)

    def _end(self, closed: Closed) -> None:
        """The first end counts."""
        if self._closed is not None:
            return
        self._closed = SessionClosed(closed.code, closed.reason)
        self._closed.__cause__ = closed.__cause__
        for stream in self._streams.values():
            stream._fail(self._closed)
        for queue in self._queues:
            queue.finish(self._error_of_loops())
        self._streams.clear()
        self._settled()

    def _settled(self) -> None:
        """It has been attached, or never will be."""
        self._opened.set()
        if self._giving_up is not None:
            self._giving_up.cancel()

    def _error_of_loops(self) -> SessionClosed | None:
        is_plain = self._closed is not None and self._closed.close_code == CloseCode.NORMAL
        return None if is_plain else self._closed


class _Ear:
    """The session as its connection sees it."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def resumption(self) -> tuple[str | None, dict[str, str]]:
        return self._session._state.session_id, self._session._state.resumption()

    def event(self, event: Fields) -> None:
        self._session._receive(event)

    def settled(self, event_id: str) -> None:
        self._session._outbox.settle(event_id)

    def lost(self, closed: Closed, reconnect_in_s: float) -> None:
        self._session._lost(closed, reconnect_in_s)
