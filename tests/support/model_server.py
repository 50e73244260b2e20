"""A stand-in for both providers on 127.0.0.1, which streams what the model's name chooses: at `/v1/messages` as
Anthropic's API does, at `/v1/chat/completions` as OpenAI's.

    async with ModelServer() as server:
        server.scenarios["slow"] = Scenario([Text("Hello"), gate, Text(" world"), Stop()])
        ...  # point a client at server.url
        request = await server.next_request()
        await request.sent(1)

As a process it answers the names of `scenarios.faults()` with those, others with numbers at a steady rate:
`python -m tests.support.model_server --port 0 --rate 50 --tokens 1000` prints its URL on the first line.
"""

import argparse
import asyncio
import contextlib
import json
import signal
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, TypeAlias, assert_never

from tests.support import completions, tool_rounds
from tests.support.http_connection import Closing, HttpConnection, HttpRequest
from tests.support.scenarios import (
    BadJson,
    Cut,
    ErrorEvent,
    Gate,
    HttpError,
    KeepOpenAfterStop,
    Paced,
    Pause,
    Ping,
    PingsOnly,
    QuoteResults,
    Raw,
    Refusal,
    Reset,
    Scenario,
    Stall,
    Start,
    Step,
    Stop,
    Text,
    Thinking,
    ToolUse,
    Transcript,
    answer,
    error_body,
    faults,
)
from tests.support.tool_rounds import ToolMismatchError


class Wire(NamedTuple):
    """How one provider's API is spoken."""

    transcript: type[Transcript] | type[completions.Transcript]
    error_body: Callable[[str, str], bytes]
    tool_rounds: Callable[[list[dict[str, Any]]], int]
    quoted_results: Callable[[list[dict[str, Any]]], str]


WIRES = {
    "/v1/messages": Wire(Transcript, error_body, tool_rounds.tool_rounds, tool_rounds.quoted_results),
    "/v1/chat/completions": Wire(
        completions.Transcript, completions.error_body, completions.tool_rounds, completions.quoted_results
    ),
}

Ended: TypeAlias = Literal["open", "completed"] | Closing


class ModelRequest:
    """One request that was asked of the server, and how far the answer to it has come.

    Times are `time.monotonic()`, in seconds. `ended` says what ended the answer: `completed` when the HTTP
    response was sent to its end, `peer_closed` when the peer left before that (by FIN or RST), `cut` and
    `reset` when the scenario or the server's own end did it. `closed_at` is when the connection was seen
    closed; for a completed answer that may be much later, as clients keep connections. `tokens_sent` counts
    deltas handed to the kernel.
    """

    def __init__(self, body: dict[str, Any], headers: dict[str, str]) -> None:
        self.body = body
        self.headers = headers
        self.started_at = time.monotonic()
        self.headers_sent = False
        self.tokens_sent = 0
        self.last_content_at: float | None = None
        self.stopped_at: float | None = None
        self.ended: Ended = "open"
        self.closed_at: float | None = None
        self._changed = asyncio.Event()

    async def sent(self, tokens: int) -> None:
        """Return once so many tokens were sent. Safe to cancel.

        Raises:
            RuntimeError: the answer ended with fewer.
        """
        await self.until(lambda _: self.tokens_sent >= tokens or self.ended != "open")
        if self.tokens_sent < tokens:
            raise RuntimeError(f"answer ended ({self.ended}) after {self.tokens_sent} of {tokens} tokens")

    async def stopped(self) -> float:
        """Return `stopped_at` once `message_stop` was sent. Safe to cancel.

        Raises:
            RuntimeError: the answer ended without it.
        """
        await self.until(lambda _: self.stopped_at is not None or self.ended != "open")
        if self.stopped_at is None:
            raise RuntimeError(f"answer ended ({self.ended}) without message_stop")
        return self.stopped_at

    async def finished(self) -> Ended:
        """Return what ended the answer, once it has ended. Safe to cancel."""
        await self.until(lambda _: self.ended != "open")
        return self.ended

    async def closed(self) -> float:
        """Return `closed_at` once the connection is closed, by whichever side. Safe to cancel."""
        await self.until(lambda _: self.closed_at is not None)
        assert self.closed_at is not None
        return self.closed_at

    async def until(self, holds: Callable[["ModelRequest"], bool]) -> None:
        """Return once `holds` is true of this request; it is asked at each change. Safe to cancel."""
        while not holds(self):
            await self._changed.wait()

    def _note(self, **changes: object) -> None:
        for name, value in changes.items():
            setattr(self, name, value)
        self._changed.set()
        self._changed = asyncio.Event()

    def _end(self, ended: Ended) -> None:
        if self.ended == "open":
            self._note(ended=ended)

    def _close(self, how: Closing) -> None:
        self._end(how)
        self._note(closed_at=time.monotonic())


class ModelServer:
    """Answers `POST` at the paths of `WIRES` with the scenario registered for the request's model, else with `default`.

    Of a scenario that calls tools, requests that end with the results get what comes `then`. As the provider, it
    refuses a conversation in which calls and results don't go together.

    `scenarios` may be changed at any time; `received` holds every request in the order of arrival. Leaving
    the context closes all connections. A scenario that makes no sense fails the context's owner.
    """

    def __init__(self, *, default: Scenario | None = None, host: str = "127.0.0.1", port: int = 0) -> None:
        self.scenarios: dict[str, Scenario] = {}
        self.default = default or answer("Hello from the stand-in model.")
        self.received: list[ModelRequest] = []
        self.url = ""
        self._address = host, port
        self._unseen: asyncio.Queue[ModelRequest] = asyncio.Queue()
        self._attempts: Counter[Scenario] = Counter()
        self._connections: set[HttpConnection] = set()
        self._tasks = asyncio.TaskGroup()

    @property
    def active(self) -> list[ModelRequest]:
        """The requests whose answer has not ended, oldest first."""
        return [request for request in self.received if request.ended == "open"]

    @property
    def connections(self) -> int:
        """How many connections are open, with or without an answer going on."""
        return len(self._connections)

    async def next_request(self) -> ModelRequest:
        """The next request that no call of this has returned yet; waits for one. Safe to cancel."""
        return await self._unseen.get()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        loop = asyncio.get_running_loop()
        host, port = self._address
        self._listener = await loop.create_server(
            lambda: HttpConnection(self._begin, self._connections), host, port, backlog=4096
        )
        host, port = self._listener.sockets[0].getsockname()[:2]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listener.close()
        for _ in range(2):  # what was accepted a moment ago is a connection two turns of the loop later
            await asyncio.sleep(0)
        connections = list(self._connections)
        for connection in connections:
            connection.end("cut")
        try:
            await self._tasks.__aexit__(exc_type, exc, traceback)
        finally:
            for connection in connections:
                await connection.lost.wait()
            await self._listener.wait_closed()

    def _begin(self, connection: HttpConnection, request: HttpRequest) -> asyncio.Task[None]:
        """Start the answer to a request as a task of this server."""
        return self._tasks.create_task(self._respond(connection, request))

    async def _respond(self, connection: HttpConnection, http: HttpRequest) -> None:
        wire = WIRES.get(http.target.partition("?")[0])
        if http.method != "POST" or wire is None:
            await connection.respond(404, error_body("not_found_error", f"POST to {', '.join(WIRES)} is all there is"))
            return
        body = _as_stream_request(http.body)
        if body is None:
            await connection.respond(400, wire.error_body("invalid_request_error", "a JSON object with stream: true"))
            return
        try:
            rounds = wire.tool_rounds(body.get("messages", []))
        except ToolMismatchError as error:
            await connection.respond(400, wire.error_body("invalid_request_error", str(error)))
            return
        scenario = self.scenarios.get(body["model"], self.default).after(rounds)
        self._attempts[scenario] += 1
        request = ModelRequest(body, http.headers)
        connection.watchers.append(request._close)
        self.received.append(request)
        self._unseen.put_nowait(request)
        await _Answer(wire, connection, request, scenario, number=len(self.received)).play(self._attempts[scenario])


class _Answer:
    """One scenario being played to one request."""

    def __init__(
        self, wire: Wire, connection: HttpConnection, request: ModelRequest, scenario: Scenario, *, number: int
    ) -> None:
        self._wire = wire
        self._connection = connection
        self._request = request
        self._scenario = scenario
        self._id = f"{number:08d}"
        model = request.body["model"]
        self._transcript = wire.transcript(model=model, message_id=f"msg_{self._id}", usage=scenario.usage)

    async def play(self, attempt: int) -> None:
        """All steps, as the scenario's `attempt`th request (from 1) sees them."""
        for step in self._scenario.steps:
            if isinstance(step, HttpError):
                if step.times is None or attempt <= step.times:
                    await self._fail(step)
                attempt -= step.times or 0
            else:
                await self._perform(step)
            if self._request.ended != "open":
                return
        await self._send(b"")
        await self._connection.send(b"0\r\n\r\n")
        self._request._end("completed")

    async def _perform(self, step: Step) -> None:
        transcript = self._transcript
        match step:
            case Start():
                await self._send(transcript.start())
            case Text(text):
                await self._send_token(transcript.text(text))
            case Thinking(thinking, signature):
                await self._send_token(transcript.thinking(thinking, signature))
            case ToolUse():
                for data in transcript.tool_use(step):
                    await self._send_token(data)
            case QuoteResults():
                await self._send_token(transcript.text(self._wire.quoted_results(self._request.body["messages"])))
            case Paced(texts, rate_per_s):
                await self._pace(list(texts), rate_per_s)
            case Ping():
                await self._send(transcript.ping())
            case PingsOnly(interval_s):
                await self._ping_forever(interval_s)
            case Pause(seconds):
                await asyncio.sleep(seconds)
            case Gate():
                await step.passed()
            case Stall():
                await self._stall()
            case Raw(data):
                await self._send(data)
            case BadJson():
                await self._send(transcript.bad_json())
            case ErrorEvent():
                await self._send(transcript.error(step))
            case Stop() | Refusal():
                await self._stop(step)
            case KeepOpenAfterStop(stop):
                await self._stop(stop)
                await self._stall()
            case Cut():
                self._connection.end("cut")
            case Reset():
                self._connection.end("reset")
            case HttpError():
                await self._fail(step)
            case _:
                assert_never(step)

    async def _fail(self, error: HttpError) -> None:
        if self._request.headers_sent:
            raise ValueError("HttpError after the response's headers were sent")
        self._request._note(headers_sent=True)
        body = self._wire.error_body(error.type, error.message) if error.body is None else error.body
        await self._connection.respond(error.status, body, dict(error.headers))
        self._request._end("completed")

    async def _pace(self, texts: list[str], rate_per_s: float) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        for position, text in enumerate(texts):
            await asyncio.sleep(started + position / rate_per_s - loop.time())
            await self._send_token(self._transcript.text(text))

    async def _ping_forever(self, interval_s: float) -> None:
        while True:
            await self._send(self._transcript.ping())
            await asyncio.sleep(interval_s)

    async def _stall(self) -> None:
        await asyncio.get_running_loop().create_future()

    async def _stop(self, ending: Stop | Refusal) -> None:
        await self._send(self._transcript.stop(ending))
        self._request._note(stopped_at=time.monotonic())

    async def _send_token(self, data: bytes) -> None:
        await self._send(data)
        self._request._note(tokens_sent=self._request.tokens_sent + 1, last_content_at=time.monotonic())

    async def _send(self, data: bytes) -> None:
        """The headers if they are still due, then `data` as part of the body."""
        if not self._request.headers_sent:
            await self._connection.send(_STREAM_HEAD % self._id.encode())
            self._request._note(headers_sent=True)
        size = self._scenario.bytes_per_write or len(data)
        for start in range(0, len(data), size or 1):
            piece = data[start : start + size]
            await self._connection.send(b"%x\r\n%s\r\n" % (len(piece), piece))


_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\nrequest-id: req_%s\r\n\r\n"
)


def _as_stream_request(body: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError):
        request = json.loads(body)
        if isinstance(request, dict) and request.get("stream") is True and isinstance(request.get("model"), str):
            return request
    return None


async def _serve(port: int, rate_per_s: float, tokens: int) -> None:
    text = "".join(f"{number} " for number in range(1, tokens + 1))
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with ModelServer(port=port, default=answer(text, rate_per_s=rate_per_s)) as server:
        server.scenarios.update(faults())
        print(server.url, flush=True)
        await stop.wait()


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.model_server", description=main.__doc__)
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--rate", type=float, default=50.0, help="tokens a second, of each stream")
    parser.add_argument("--tokens", type=int, default=1000, help="tokens of an answer")
    options = parser.parse_args()
    asyncio.run(_serve(options.port, options.rate, options.tokens))


if __name__ == "__main__":
    main()
