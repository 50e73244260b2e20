"""`realtime chat`: a terminal client that streams, stops on Ctrl-C, and comes back where it was."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
import unicodedata
from typing import Any, Literal
from urllib.parse import urlencode, urlsplit, urlunsplit

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from realtime.client.backoff import Backoff
from realtime.client.connection import RECONNECT_CODES
from realtime.keyboard import INTERRUPT, Keyboard
from realtime.log import format_positions
from realtime.protocol import JSON, SESSION_CHANNEL, CloseCode, new_id

GRACE_MS = 15_000
"""How long an answer waits for this client to come back from a lost connection."""
PROGRESS_CHARS = 78
"""The longest progress line: one that wraps could not be written over."""
CLEAR = "\r\x1b[K"
"""Goes back to the start of the line, and empties it."""
Event = dict[str, Any]


class ChatEnded(Exception):
    """The conversation can't go on; the text says why, for a person."""


class Chat:
    """What this client knows of the session: its positions, the response and the task it waits for, what it could not
    send yet.

    `apply` takes what the server sends and returns what to print; it does no I/O. Where `shows_progress`, that is for a
    terminal, in which the line that says how far a task is can be written over.
    """

    def __init__(self, session_id: str | None, *, shows_progress: bool = False) -> None:
        self.session_id = session_id
        self.positions: dict[str, int] = {}
        self.running: str | None = None
        self.task: str | None = None
        """The newest task that was asked for here, until it ends."""
        self.unsent: dict[str, Event] = {}
        """Commands by `event_id` that nobody has confirmed: sent again after a reconnect, carried out once."""
        self._names: dict[str, str] = {}
        """What the tasks are called that have not ended."""
        self._shows_progress = shows_progress
        self._open: Literal["", "text", "progress"] = ""
        """What the line holds that has not ended."""

    @property
    def idle(self) -> bool:
        """Whether no answer and no task of ours is coming, and nothing waits to be sent."""
        return self.running is None and self.task is None and not self.unsent

    def query(self) -> dict[str, str]:
        """The query parameters with which the next connection goes on."""
        query = {"session_id": self.session_id} if self.session_id else {}
        return {**query, "after": format_positions(self.positions)} if self.positions else query

    def typed(self, line: str) -> Event:
        """The command that a line means: `/task NAME {…}`, `/cancel` where there is a task, or something to say."""
        match line.split(maxsplit=2):
            case ["/task", name, *rest]:
                return self.start(name, "".join(rest) or "{}")
            case ["/cancel"] if self.task is not None:
                return self._command({"type": "task.cancel", "task_id": self.task})
            case _:
                return self.say(line)

    def start(self, name: str, text: str) -> Event:
        """The command that starts a task. What is no JSON is its input as it is: the server says what is wrong."""
        try:
            given = msgspec.json.decode(text)
        except (msgspec.DecodeError, RecursionError):
            given = text
        self.task = new_id("task")
        return self._command({"type": "task.create", "task_id": self.task, "name": name, "input": given})

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
        kinds = {command["type"]: command.get("response_id") for command in self.unsent.values()}
        response_id = kinds.get("response.create", self.running)
        if response_id is None or kinds.get("response.cancel") == response_id:
            return None
        return self._command({"type": "response.cancel", "response_id": response_id})

    def apply(self, event: Event) -> str:
        """Take an event; returns what it shows."""
        if event["type"] != "conversation.item.created":  # the answer to it is still to be created
            self.unsent.pop(event.get("for_event_id", ""), None)
        if "seq" in event:
            self.positions[event.get("response_id") or event.get("task_id") or SESSION_CHANNEL] = event["seq"]
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
            case "task.created":
                self.positions.setdefault(event["task"]["id"], 0)
                self._names[event["task"]["id"]] = event["task"]["name"]
            case "task.progress":
                return self._progress(event)
            case "task.done":
                return self._task_done(event)
            case "error":
                self._refused(event["error"].get("event_id", ""))
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

    def _refused(self, event_id: str) -> None:
        command = self.unsent.pop(event_id, {"type": ""})
        if command["type"] == "task.create" and command["task_id"] == self.task:
            self.task = None

    def _done(self, event: Event) -> str:
        self._ends(event["response_id"])
        if self.running == event["response_id"]:
            self.running = None
        note = "" if event["status"] == "completed" else f" [{event['status']}]"
        if "error" in event:
            note = f" [{event['error']['message']}]"
        return self._line(note, fresh=False)

    def _task_done(self, event: Event) -> str:
        self._ends(event["task_id"])
        if self.task == event["task_id"]:
            self.task = None
        end = f"[{self._names.pop(event['task_id'], 'task')} {event['status']}]"
        if "error" in event:
            end += f" [{event['error']['message']}]"
        if "result" in event:
            end += f"\n{msgspec.json.format(msgspec.json.encode(event['result'])).decode()}"
        if "result_url" in event:
            end += f" {event['result_url']}"
        return self._line(end)

    def _ends(self, channel: str) -> None:
        """Nothing comes of it any more, no answer to a late cancel either."""
        self.positions.pop(channel, None)
        for event_id, command in list(self.unsent.items()):
            ids = command.get("response_id"), command.get("task_id")
            if command["type"].endswith(".cancel") and channel in ids:
                del self.unsent[event_id]

    def _progress(self, event: Event) -> str:
        """How far a task is, in one line over the one before; not in the middle of an answer."""
        if not self._shows_progress or self._open == "text":
            return ""
        far = f"{event['progress']}" if event["total"] is None else f"{event['progress']}/{event['total']}"
        told = " ".join([self._names.get(event["task_id"], "task"), far, *(event["message"] or "").split()])
        self._open = "progress"
        return f"{CLEAR}[{_printable(told)[:PROGRESS_CHARS]}]"

    def _text(self, text: str) -> str:
        start = CLEAR if self._open == "progress" else ""
        self._open = "text"
        return start + _printable(text)

    def _line(self, text: str, *, fresh: bool = True) -> str:
        start = {"": "", "progress": CLEAR, "text": "\n" if fresh else ""}[self._open]
        self._open = ""
        return f"{start}{_printable(text)}\n"


def _printable(text: str) -> str:
    """Text without control characters: a model's words must not steer the terminal."""
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")


def run(url: str, session_id: str | None, token: str | None = None) -> int:
    """Talk until the user leaves or the session ends. Returns the exit status."""
    try:
        chat = Chat(session_id, shows_progress=sys.stdout.isatty())
        return asyncio.run(_run(_address(url), _authorization(token), chat))
    except ChatEnded as ended:
        print(ended, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


async def _run(address: str, headers: dict[str, str], chat: Chat) -> int:
    with Keyboard() as keyboard:
        backoff, clock = Backoff(), asyncio.get_running_loop().time
        while True:
            try:
                async with _connected(address, headers, chat) as socket:
                    backoff.opened(clock())
                    if await _talk(socket, chat, keyboard):
                        return 0
            except (OSError, InvalidHandshake, ConnectionClosed) as error:
                _raise_if_final(error, chat)
            _show("[connection lost, coming back]\n" if chat.positions else "[no answer, trying again]\n")
            if await keyboard.interrupted_within(backoff.delay_s(clock())):
                return 0


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


def _authorization(token: str | None) -> dict[str, str]:
    """The header that says who the user is. Raises `ChatEnded`, which does not repeat it."""
    if token is None:
        return {}
    if not re.fullmatch(r"[\w.~+/=-]+", token, re.ASCII):
        raise ChatEnded("That is no token; `realtime token` makes one.")
    return {"Authorization": f"Bearer {token}"}


def _connected(address: str, headers: dict[str, str], chat: Chat) -> connect:
    uri = f"{address}?{urlencode(chat.query())}"
    subprotocols = [Subprotocol(JSON.subprotocol)]
    return connect(uri, subprotocols=subprotocols, additional_headers=headers, compression=None, max_size=None)


async def _talk(socket: ClientConnection, chat: Chat, keyboard: Keyboard) -> bool:
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


async def _send_all(socket: ClientConnection, chat: Chat, idle: asyncio.Event, keyboard: Keyboard) -> bool:
    """Send what is typed; returns when the user leaves. A script's next line waits for the answer to the last one."""
    is_script = not sys.stdin.isatty()
    for unsent in list(chat.unsent.values()):
        await socket.send(msgspec.json.encode(unsent).decode())
    while True:
        if is_script and not chat.idle:
            idle.clear()
            await idle.wait()
        line = await keyboard.line()
        command = chat.stop() if line in {INTERRUPT, None} else chat.typed(line)
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
        if code == CloseCode.UNAUTHENTICATED:
            raise ChatEnded("The server asks for a token, or does not accept this one any more (--token).") from None
        if code not in RECONNECT_CODES:
            raise ChatEnded(f"The server has ended the session (close code {code}).") from None
    elif not chat.positions:  # it was never attached
        raise ChatEnded(f"There is no server there: {error}") from None


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
