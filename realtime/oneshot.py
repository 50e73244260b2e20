"""One answer without a session: `/v1/stream` over server-sent events, `/v1/complete` as one body."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing, contextmanager, suppress
from functools import partial
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct
from starlette.types import Receive, Scope, Send

from realtime.access.admission import Admission
from realtime.access.audit import Access
from realtime.access.door import Action, Door
from realtime.access.principal import ONESHOT, Principal
from realtime.call import Call, ModelSettings
from realtime.connections import Connections
from realtime.conversation import Message, estimate_tokens, fit
from realtime.decoding import invalid
from realtime.endable import Endable
from realtime.errors import InvalidRequest, RealtimeError, ServerError, Unavailable
from realtime.http import STREAM_HEADERS, one_line, read_body, send_error, send_json, while_connected
from realtime.observe import logs
from realtime.protocol import Role, Tokens, Usage
from realtime.responders.base import Request
from realtime.session import Limits

STREAM = Action("oneshot.stream", ONESHOT)
COMPLETE = Action("oneshot.complete", ONESHOT)
MAX_MESSAGES = 2000
"""Each costs the event loop microseconds, however short it is."""


class _ReaderStalledError(Exception):
    """The client has taken nothing for `send_timeout_s`."""


class OneShotMessage(Struct, forbid_unknown_fields=True):
    """One message of a conversation that the client keeps itself."""

    role: Role
    content: str


class OneShot(Struct, kw_only=True, forbid_unknown_fields=True):
    """The body of a one-shot request: `prompt` or `messages`."""

    prompt: str | None = None
    messages: Annotated[list[OneShotMessage], Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    model: str | None = None
    max_tokens: Tokens | None = None
    instructions: str | None = None


class Completion(Struct):
    """The answer of `/v1/complete`."""

    text: str
    usage: Usage
    stop_reason: str
    model: str


class Done(Struct):
    """The last event of `/v1/stream`."""

    usage: Usage
    stop_reason: str


class _Turn(Endable):
    """One answer; `over` is set once the client was told all of it."""

    def __init__(self, call: Call, principal: Principal) -> None:
        super().__init__(principal)
        self.call = call
        self.over = asyncio.Event()


class OneShots:
    """The two endpoints. They are ASGI applications: `stream` and `complete`.

    While they are `draining` they refuse what is asked of them.
    """

    def __init__(
        self,
        model: ModelSettings,
        limits: Limits,
        door: Door,
        admission: Admission,
        connections: Connections,
        *,
        max_body_bytes: int,
        send_timeout_s: float,
    ) -> None:
        self._model = model
        self._door = door
        self._admission = admission
        self._connections = connections
        self._limits = limits
        self._max_body_bytes = max_body_bytes
        self._send_timeout_s = send_timeout_s
        self.draining = False
        self._running: set[_Turn] = set()

    async def finish_turns(self) -> None:
        """Return once no call runs."""
        while self._running:
            await next(iter(self._running)).over.wait()

    async def end_turns(self, error: RealtimeError) -> None:
        """End all calls with `error`; returns once their clients were told, however long that takes."""
        for turn in self._running:
            turn.end(error)
        await self.finish_turns()

    async def stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`POST /v1/stream`: the text as it comes, then how it ended; hanging up cancels the model call."""
        await self._door.answer(STREAM, scope, receive, send, partial(self._answer, self._stream))

    async def complete(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`POST /v1/complete`: the answer whole; hanging up cancels the model call."""
        await self._door.answer(COMPLETE, scope, receive, send, partial(self._answer, self._complete))

    async def _answer(
        self,
        tell: Callable[[_Turn, Send], Coroutine[Any, Any, None]],
        access: Access,
        _scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Answer what the body asks for, by `tell`. Raises the `RealtimeError` that refuses it."""
        self._check_open()
        limit = await self._admission.asked(access.principal)
        access.limits = [limit]
        request = self._request(await read_body(receive, self._max_body_bytes))
        most = request.most_tokens(self._model.context_tokens)
        admitted = await self._admission.paid(limit, access.principal, most)
        access.limits = admitted.limits
        turn = _Turn(Call(request, self._model, admitted.purse), access.principal)
        try:
            self._check_open()  # nobody waits for a call that begins now
            with self._connections.holding(turn), self._run(turn):
                access.tell()
                await while_connected(receive, tell(turn, send))
        finally:
            turn.call.settle()  # if it never came to a call, or that does not stop

    def _check_open(self) -> None:
        if self.draining:
            raise Unavailable("draining", "This instance is shutting down.", retry_after_ms=1000)

    @contextmanager
    def _run(self, turn: _Turn) -> Iterator[None]:
        self._running.add(turn)
        try:
            yield
        finally:
            self._running.discard(turn)
            turn.over.set()

    async def _stream(self, turn: _Turn, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        with suppress(_ReaderStalledError):  # the connection is of no use any more
            await self._tell(turn, send)
            await self._send_body(send, b"data: [DONE]\n\n", more=False)

    async def _tell(self, turn: _Turn, send: Send) -> None:
        """The text as it comes, and then how it ended."""
        try:
            async with turn.endable(), aclosing(turn.call.texts()) as texts:
                async for text in texts:
                    await self._send_event(send, {"text": text})
        except _ReaderStalledError:
            raise
        except Exception as error:  # told to the client, and where it is not ours to the log
            await self._send_event(send, _told(error).as_failure(), name="server_error")
        else:
            await self._send_event(send, Done(turn.call.usage(), turn.call.stop_reason), name="done")

    async def _complete(self, turn: _Turn, send: Send) -> None:
        try:
            async with turn.endable(), aclosing(turn.call.texts()) as texts:
                text = "".join([text async for text in texts])
        except Exception as error:  # as in `_tell`
            await send_error(send, _told(error))
            return
        call = turn.call
        await send_json(send, Completion(text, call.usage(), call.stop_reason, call.request.model))

    async def _send_event(self, send: Send, data: Any, *, name: str = "") -> None:
        event = f"event: {name}\n".encode() if name else b""
        await self._send_body(send, event + b"data: " + one_line(data) + b"\n\n")

    async def _send_body(self, send: Send, body: bytes, *, more: bool = True) -> None:
        try:
            async with asyncio.timeout(self._send_timeout_s):
                await send({"type": "http.response.body", "body": body, "more_body": more})
        except TimeoutError:
            raise _ReaderStalledError from None

    def _request(self, body: bytes) -> Request:
        asked = _decode(body)
        self._limits.check(asked.model, asked.max_tokens, tokens_param="max_tokens")
        max_tokens = asked.max_tokens or self._limits.max_output_tokens
        conversation = [Message(message.role, message.content) for message in asked.messages or ()]
        if asked.prompt is not None:
            conversation.append(Message("user", asked.prompt))
        room = self._model.context_tokens - max_tokens - estimate_tokens(asked.instructions or "")
        return Request(
            messages=fit(conversation, room_tokens=room, truncation=self._model.truncation),
            instructions=asked.instructions or "",
            model=asked.model or self._model.default_model,
            max_output_tokens=max_tokens,
        )


def _decode(body: bytes) -> OneShot:
    try:
        asked = msgspec.json.decode(body, type=OneShot)
    except msgspec.ValidationError as error:
        raise invalid(error) from None
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise InvalidRequest("invalid_json", "The body is not JSON.") from None
    if (asked.prompt is None) == (asked.messages is None):
        raise InvalidRequest("invalid_message", "Give either prompt or messages.", param="prompt")
    return asked


def _told(error: Exception) -> RealtimeError:
    if isinstance(error, RealtimeError):
        return error
    logs.report(error)
    return ServerError("responder_failed", "The responder failed.")
