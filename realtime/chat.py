"""`realtime chat`: a terminal client that streams, stops on Ctrl-C, and comes back where it was."""

from __future__ import annotations

import asyncio
import codecs
import os
import random
import signal
import sys
import threading
import unicodedata
from typing import Any
from urllib.parse import urlencode, urlsplit, urlunsplit

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from realtime.log import format_positions
from realtime.protocol import JSON, SESSION_CHANNEL, new_id

RECONNECT_CODES = frozenset({1001, 1005, 1006, 1011, 1012, 1013, 4408, 4429})
FIRST_DELAY_S = 0.25
MAX_DELAY_S = 10.0
GRACE_MS = 15_000
"""How long an answer waits for this client to come back from a lost connection."""
Event = dict[str, Any]


class ChatEnded(Exception):
    """The conversation can't go on; the text says why, for a person."""


class Chat:
    """What this client knows of the session: its positions, the response it waits for, what it could not send yet.

    `apply` takes what the server sends and returns what to print; it does no I/O.
    """

    def __init__(self, session_id: str | None) -> None:
        self.session_id = session_id
        self.positions: dict[str, int] = {}
        self.running: str | None = None
        self.unsent: dict[str, Event] = {}
        """Commands by `event_id` that nobody has confirmed: sent again after a reconnect, carried out once."""
        self._column = 0

    @property
    def idle(self) -> bool:
        """Whether no answer is coming and nothing waits to be sent."""
        return self.running is None and not self.unsent

    def query(self) -> dict[str, str]:
        """The query parameters with which the next connection goes on."""
        query = {"session_id": self.session_id} if self.session_id else {}
        return {**query, "after": format_positions(self.positions)} if self.positions else query

    def say(self, text: str) -> Event:
        """The command that asks for an answer to `text`; it interrupts one that is coming."""
        return self._command(
            {
                "type": "response.create",
                "input": text,
                "response_id": new_id("resp"),
                "multitask_strategy": "interrupt",
                "disconnect_grace_ms": GRACE_MS,
            }
        )

    def stop(self) -> Event | None:
        """The command that stops the answer that is coming or was asked for; `None` if there is none, or it was
        sent already and nobody has confirmed it."""
        kinds = {command["type"]: command["response_id"] for command in self.unsent.values()}
        response_id = kinds.get("response.create", self.running)
        if response_id is None or kinds.get("response.cancel") == response_id:
            return None
        return self._command({"type": "response.cancel", "response_id": response_id})

    def apply(self, event: Event) -> str:
        """Take an event; returns what it shows."""
        if event["type"] != "conversation.item.created":  # the answer to it is still to be created
            self.unsent.pop(event.get("for_event_id", ""), None)
        if "seq" in event:
            self.positions[event.get("response_id") or SESSION_CHANNEL] = event["seq"]
        match event["type"]:
            case "session.created" | "session.resumed":
                return self._attach(event)
            case "conversation.item.created":
                return self._line(f"{event['item']['user']}> {event['item']['content']}") if event.get("replay") else ""
            case "response.created":
                self.positions.setdefault(event["response"]["id"], 0)
                self.running = event["response"]["id"]
            case "response.output_text.delta":
                return self._text(event["delta"])
            case "response.done":
                return self._done(event)
            case "error":
                self.unsent.pop(event["error"].get("event_id", ""), None)
                return self._line(f"[{event['error']['message']}]")
            case "session.closed":
                return self._line(f"[the session was {event['reason']}]")
            case _:
                pass
        return ""

    def _command(self, message: Event) -> Event:
        event_id = new_id("event")
        self.unsent[event_id] = {**message, "event_id": event_id}
        return self.unsent[event_id]

    def _attach(self, event: Event) -> str:
        self.positions.setdefault(SESSION_CHANNEL, 0)
        known, self.session_id = self.session_id, event["session"]["id"]
        return "" if known else self._line(f"[session {self.session_id}; Ctrl-C stops an answer, Ctrl-D leaves]")

    def _done(self, event: Event) -> str:
        self.positions.pop(event["response_id"], None)
        if self.running == event["response_id"]:
            self.running = None
        note = "" if event["status"] == "completed" else f" [{event['status']}]"
        if "error" in event:
            note = f" [{event['error']['message']}]"
        return self._line(note, fresh=False)

    def _text(self, text: str) -> str:
        self._column = 1
        return _printable(text)

    def _line(self, text: str, *, fresh: bool = True) -> str:
        start = "\n" if fresh and self._column else ""
        self._column = 0
        return f"{start}{_printable(text)}\n"


def _printable(text: str) -> str:
    """Text without control characters: a model's words must not steer the terminal."""
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")


def run(url: str, session_id: str | None) -> int:
    """Talk until the user leaves or the session ends. Returns the exit status."""
    try:
        return asyncio.run(_run(_address(url), Chat(session_id)))
    except ChatEnded as ended:
        print(ended, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


async def _run(address: str, chat: Chat) -> int:
    with _Keyboard() as keyboard:
        delay_s = FIRST_DELAY_S
        while True:
            try:
                async with _connected(address, chat) as socket:
                    delay_s = FIRST_DELAY_S
                    if await _talk(socket, chat, keyboard):
                        return 0
            except (OSError, InvalidHandshake, ConnectionClosed) as error:
                _raise_if_final(error, chat)
            _show("[connection lost, coming back]\n" if chat.positions else "[no answer, trying again]\n")
            if await keyboard.interrupted_within(delay_s * random.uniform(0.5, 1.0)):
                return 0
            delay_s = min(delay_s * 2, MAX_DELAY_S)


def _address(url: str) -> str:
    """The WebSocket endpoint of the server at `url`. Raises `ChatEnded`."""
    try:
        parts = urlsplit(url)
        scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
        address = urlunsplit((scheme, parts.netloc, parts.path.rstrip("/") + "/v1/realtime", "", ""))
        parse_uri(address)
    except (InvalidURI, ValueError):
        raise ChatEnded(f"{url} is no address of a server; it looks like http://127.0.0.1:8000") from None
    return address


def _connected(address: str, chat: Chat) -> connect:
    uri = f"{address}?{urlencode(chat.query())}"
    return connect(uri, subprotocols=[Subprotocol(JSON.subprotocol)], compression=None, max_size=None)


async def _talk(socket: ClientConnection, chat: Chat, keyboard: _Keyboard) -> bool:
    """Send what is typed and show what comes, until the user leaves (`True`) or the connection ends."""
    idle = asyncio.Event()
    tasks = [
        asyncio.create_task(_show_all(socket, chat, idle)),
        asyncio.create_task(_send_all(socket, chat, idle, keyboard)),
    ]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return any(task.result() for task in tasks if task.done())
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _show_all(socket: ClientConnection, chat: Chat, idle: asyncio.Event) -> bool:
    """Show what comes, for ever; `idle` is set whenever no answer is coming."""
    while True:
        _show(chat.apply(msgspec.json.decode(await socket.recv())))
        if chat.idle:
            idle.set()
        else:
            idle.clear()


async def _send_all(socket: ClientConnection, chat: Chat, idle: asyncio.Event, keyboard: _Keyboard) -> bool:
    """Send what is typed; returns when the user leaves. A script's next line waits for the answer to the last one."""
    is_script = not sys.stdin.isatty()
    for unsent in list(chat.unsent.values()):
        await socket.send(msgspec.json.encode(unsent).decode())
    while True:
        if is_script and not chat.idle:
            idle.clear()
            await idle.wait()
        line = await keyboard.line()
        command = chat.stop() if line in {_INTERRUPT, None} else chat.say(line)
        if command is not None:
            await socket.send(msgspec.json.encode(command).decode())
        if line is None or command is None:  # the end of the input, or Ctrl-C with nothing to stop
            return True


def _raise_if_final(error: Exception, chat: Chat) -> None:
    """Raise `ChatEnded` unless coming back may help."""
    if isinstance(error, InvalidStatus):
        status = error.response.status_code
        if status != 503:
            raise ChatEnded(f"The server refused the connection (HTTP {status}).") from None
    elif isinstance(error, ConnectionClosed):
        code = error.rcvd.code if error.rcvd else 1006
        if code not in RECONNECT_CODES:
            raise ChatEnded(f"The server has ended the session (close code {code}).") from None
    elif not chat.positions:  # it was never attached
        raise ChatEnded(f"There is no server there: {error}") from None


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


_INTERRUPT = "\x03"


class _Keyboard:
    """Lines from standard input, and Ctrl-C, in the order in which they came. To be used by `with`, in a loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lines: asyncio.Queue[str | None] = asyncio.Queue()
        self._interrupted = asyncio.Event()

    def __enter__(self) -> _Keyboard:
        if sys.stdin.isatty():  # else Ctrl-C ends the script
            self._loop.add_signal_handler(signal.SIGINT, self._interrupt)
        # A daemon that reads the descriptor itself: it can't be cancelled, and must not hold sys.stdin's lock at exit.
        threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.remove_signal_handler(signal.SIGINT)

    async def line(self) -> str | None:
        """The next line that is not empty, `_INTERRUPT` for a Ctrl-C, `None` at the end of the input."""
        while (line := await self._lines.get()) is not None and not line.strip():
            pass
        if line == _INTERRUPT:
            self._interrupted.clear()
        return line

    async def interrupted_within(self, timeout_s: float) -> bool:
        """Wait so long for a Ctrl-C; whether one came, now or before, that `line` has not returned."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._interrupted.wait()
        except TimeoutError:
            return False
        return True

    def _interrupt(self) -> None:
        self._interrupted.set()
        self._lines.put_nowait(_INTERRUPT)

    def _read(self) -> None:
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        rest = ""
        while data := os.read(sys.stdin.fileno(), 65536):
            *lines, rest = (rest + decode(data)).split("\n")
            for line in lines:
                self._put(line)
        if rest:
            self._put(rest)
        self._put(None)

    def _put(self, line: str | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._lines.put_nowait, line)
        except RuntimeError:  # the loop has ended: nobody reads any more
            return
