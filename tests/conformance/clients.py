"""The clients under test, each driven by the same calls.

async with javascript() as open_session:
    session = await open_session("http://127.0.0.1:8000", transport="sse")
    response_id = await session.call("respond", "Hello", {})
    assert await session.call("text", response_id) == "…"
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from realtime.client import RealtimeError, Session, SessionClosed, connect
from tests.end_to_end import PATIENCE_S
from tests.support.client import Event, Transcript
from tests.support.programs import bound, program

DRIVER = Path(__file__).resolve().parents[1] / "node" / "session.mjs"
LONGEST_LINE_BYTES = 8 * 1024 * 1024
Told = dict[str, Any]


class Refused(Exception):
    """A call was refused, under a code."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class Driven:
    """A session of a client. Whatever it yields goes through `transcript`, which finds every gap and every double.

    `told` are the ends of its connections (`disconnect`), and that of the loop over it (`end`), with its error.
    """

    def __init__(self) -> None:
        self.transcript = Transcript()
        self.told: list[Told] = []
        self._changed = asyncio.Event()

    async def call(self, name: str, *arguments: Any) -> Any:
        """Call it. Raises `Refused`."""
        raise NotImplementedError

    async def until(self, kind: str, **fields: Any) -> Event:
        """An event of that type with those fields, once there is one."""
        return await self._first(lambda: self.transcript.events, {"type": kind, **fields})

    async def until_told(self, kind: str, **fields: Any) -> Told:
        """Likewise of what it tells."""
        return await self._first(lambda: self.told, {"told": kind, **fields})

    async def until_open(self, times: int = 1) -> None:
        """Return once it was attached so often."""
        await self._until(lambda: len(self.attached) >= times)

    async def until_text(self, response_id: str, text: str) -> None:
        """Return once an answer has come to that, so far."""
        await self._until(lambda: self.transcript.texts[response_id] == text)

    @property
    def attached(self) -> list[Event]:
        """The first events of its connections."""
        kinds = {"session.created", "session.resumed"}
        return [event for event in self.transcript.events if event["type"] in kinds]

    @property
    def session_id(self) -> str:
        """The session's."""
        return str(self.attached[0]["session"]["id"])

    def take(self, event: Event) -> None:
        """It has yielded this."""
        self.transcript.apply(event)
        self._notify()

    def note(self, told: Told) -> None:
        """It has told this."""
        self.told.append(told)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _first(self, seen: Callable[[], list[Event]], fields: dict[str, Any]) -> Event:
        def found() -> Event | None:
            return next((one for one in seen() if fields.items() <= one.items()), None)

        await self._until(lambda: found() is not None)
        return found() or {}

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await self._changed.wait()


Open = Callable[..., Awaitable[Driven]]
"""Opens a session at a URL; options are those of `connect`, with `tokens` in the place of a function that gets them."""


class PythonSession(Driven):
    """A session of `realtime.client`."""

    def __init__(self) -> None:
        super().__init__()
        self.session: Session
        self.following: asyncio.Task[None]
        self.followed = asyncio.Event()
        self._streams: dict[str, Any] = {}

    async def call(self, name: str, *arguments: Any) -> Any:
        """See `Driven`."""
        try:
            result = getattr(self, f"_{name}")(*arguments)
            return await result if asyncio.iscoroutine(result) else result
        except RealtimeError as error:
            raise Refused(error.code) from None

    async def follow(self) -> None:
        """Take in what it yields."""
        try:
            async for event in self.session:
                self.take(fields_of(event))
            self.note({"told": "end"})
        except SessionClosed as closed:
            self.note({"told": "end", "error": closed.code, "code": closed.close_code, "reason": closed.reason})
        finally:
            self.followed.set()

    def _respond(self, text: str, options: dict[str, Any]) -> str:
        stream = self.session.respond(text, **options)
        self._streams[stream.response_id] = stream
        return stream.response_id

    def _create_task(self, name: str, given: Any) -> str:
        stream = self.session.create_task(name, given)
        self._streams[stream.task_id] = stream
        return stream.task_id

    async def _iterate(self, one: str) -> list[Event]:
        return [fields_of(event) async for event in self._streams[one]]

    async def _text(self, one: str) -> Any:
        return await self._streams[one].text()

    async def _result(self, one: str) -> Any:
        return await self._streams[one].result()

    def _cancel(self, one: str, heard_chars: int | None = None) -> None:
        self.session.cancel(one, heard_chars)

    def _cancel_task(self, one: str) -> None:
        self.session.cancel_task(one)

    def _heard(self, one: str, chars: int) -> None:
        self.session.heard(one, chars)

    def _interrupt(self) -> None:
        self.session.interrupt()

    def _send(self, message: Event) -> str:
        return self.session.send(message)

    def _drop(self, seconds: float) -> None:
        self.session.drop(seconds)

    def _close(self) -> None:
        self.session.close()

    def _leave_with(self, messages: list[Event]) -> None:
        for message in messages:
            self.session.send(message)
        self.session.close()

    def _set_position(self, channel: str, position: int) -> None:
        self.session.positions[channel] = position

    def _show(self) -> Told:
        session = self.session
        known: list[Any] = [*session.responses.values(), *session.tasks.values()]
        return {
            "state": session.state,
            "transport": session.transport,
            "session_id": session.session_id,
            "positions": session.positions,
            "texts": {one.id: one.text for one in known},
            "statuses": {one.id: one.status for one in known},
            "participants": len(session.participants),
        }


def fields_of(event: Any) -> Event:
    """An event as it came, as far as the client keeps it."""
    fields: Event = msgspec.to_builtins(event)
    return fields


@asynccontextmanager
async def python() -> AsyncIterator[Open]:
    """Opens sessions of `realtime.client`."""
    async with AsyncExitStack() as stack:

        async def opened(url: str, *, tokens: list[str] | None = None, **options: Any) -> Driven:
            driven = PythonSession()
            left = list(tokens or [])
            token = (lambda: left.pop(0) if len(left) > 1 else left[0]) if tokens else options.pop("token", None)

            def lost(code: int, _reason: str, reconnect_in_s: float) -> None:
                driven.note({"told": "disconnect", "code": code, "reconnectInMs": reconnect_in_s * 1000})

            stack.push_async_callback(driven.followed.wait)  # after the session, which ends the loop
            driven.session = await stack.enter_async_context(connect(url, token=token, on_lost=lost, **options))
            driven.following = asyncio.create_task(driven.follow())
            return driven

        yield opened


@asynccontextmanager
async def javascript() -> AsyncIterator[Open]:
    """Opens sessions of the JavaScript client, all of them in one Node. Node 20 has WebSockets where it is asked to."""
    command = [program("node"), "--experimental-websocket", "--no-warnings", str(DRIVER)]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*bound(command), stdin=pipe, stdout=pipe, limit=LONGEST_LINE_BYTES)
    node = Node(process)
    reading = asyncio.create_task(node.read())
    try:
        yield node.open
    finally:
        assert process.stdin is not None
        process.kill()
        await process.wait()
        await reading
        process.stdin.close()


class Node:
    """The process: calls go in, answers and events come out."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._sessions: dict[str, NodeSession] = {}
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()

    async def open(self, url: str, **options: Any) -> Driven:
        """See `Open`."""
        name = f"session-{next(self._numbers)}"
        self._sessions[name] = driven = NodeSession(self, name)
        await self.call(name, "open", {"url": url, **options})
        return driven

    async def call(self, session: str, name: str, *arguments: Any) -> Any:
        """What a call returns. Raises `Refused`."""
        assert self._process.stdin is not None
        number = next(self._numbers)
        self._answers[number] = answer = asyncio.get_running_loop().create_future()
        message = {"id": number, "session": session, "call": name, "arguments": arguments}
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        return await answer

    async def read(self) -> None:
        """Take what comes until it ends."""
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            self._take(json.loads(line))

    def _take(self, told: Told) -> None:
        if "id" in told:
            answer = self._answers.pop(told["id"])
            if not answer.done():
                answer.set_exception(Refused(told["error"])) if "error" in told else answer.set_result(told["result"])
        elif "event" in told:
            self._sessions[told["session"]].take(told["event"])
        else:
            self._sessions[told["session"]].note(told)


class NodeSession(Driven):
    """A session of the JavaScript client."""

    def __init__(self, node: Node, name: str) -> None:
        super().__init__()
        self._node = node
        self._name = name

    async def call(self, name: str, *arguments: Any) -> Any:
        """See `Driven`."""
        return await self._node.call(self._name, name, *arguments)
