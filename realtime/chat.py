"""`realtime chat`: a terminal client that streams, stops on Ctrl-C, and comes back where it was."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

import msgspec

from realtime.client import (
    Event,
    MessageTooLarge,
    QueueFull,
    RealtimeError,
    ResponseStream,
    Session,
    SessionClosed,
    TaskStream,
    connect,
)
from realtime.client.connection import TOKEN
from realtime.client.wire import LOST, checked_url
from realtime.keyboard import INTERRUPT, Keyboard
from realtime.protocol import CloseCode, ErrorMessage, ItemCreated
from realtime.screen import Screen

GRACE_MS = 15_000
"""How long an answer waits for this client to come back from a lost connection."""


class ChatEnded(Exception):
    """The conversation can't go on; the text says why, for a person."""


class Chat:
    """What was typed, as commands, and what of it there is to stop."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._answer: ResponseStream | None = None
        """The newest answer that was asked for here, unless that was refused."""
        self._task: TaskStream | None = None
        """The same of a task."""
        self._stopped: str | None = None
        self._said: set[str] = set()
        """The `event_id`s of what was said here."""

    def typed(self, line: str) -> ResponseStream | TaskStream | None:
        """Do what a line means: `/task NAME {…}`, `/cancel` where there is a task, or something to say. Returns what
        will come of it. Raises `QueueFull`, `MessageTooLarge` and `SessionClosed`."""
        match line.split(maxsplit=2):
            case ["/task", name, *rest]:
                self._task = self._session.create_task(name, _input("".join(rest) or "{}"))
                return self._task
            case ["/cancel"] if self._task is not None and not self._has_ended(self._task):
                self._task.cancel()
                return None
            case _:
                self._answer = self._session.respond(line, multitask_strategy="interrupt", disconnect_grace_ms=GRACE_MS)
                self._said.add(self._answer.event_id)
                return self._answer

    def stop(self) -> bool:
        """Stop the answer that is coming or was asked for; `False` if there is none, or it was told to already, or the
        server can't be told."""
        coming = self._coming()
        if coming is None or coming == self._stopped or self._session.state != "open":
            return False
        self._stopped = coming
        self._session.cancel(coming)
        return True

    def shows(self, event: Event) -> bool:
        """Whether the screen lacks it: what was typed here stands there, also where a replay tells it."""
        return not (isinstance(event, ItemCreated) and event.for_event_id in self._said)

    def refused(self, event_id: str | None) -> None:
        """Nothing comes of this command."""
        if self._answer is not None and self._answer.event_id == event_id:
            self._answer = None
        if self._task is not None and self._task.event_id == event_id:
            self._task = None

    def _coming(self) -> str | None:
        if self._answer is not None and self._answer.response_id not in self._session.responses:
            return self._answer.response_id
        unfinished = self._session.unfinished
        return unfinished[-1].id if unfinished else None

    def _has_ended(self, task: TaskStream) -> bool:
        return task.task_id in self._session.tasks and task.task_id not in self._session.positions


def _input(text: str) -> Any:
    """A task's input. What is no JSON is its input as it is: the server says what is wrong."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text


def run(url: str, session_id: str | None, token: str | None = None) -> int:
    """Talk until the user leaves or the session ends. Returns the exit status."""
    try:
        asyncio.run(_run(_checked_url(url), session_id, _checked_token(token)))
    except ChatEnded as ended:
        print(ended, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _checked_url(url: str) -> str:
    try:
        return checked_url(url)
    except ValueError:
        raise ChatEnded(f"{url} is no address of a server; it looks like http://127.0.0.1:8000") from None


def _checked_token(token: str | None) -> str | None:
    """The same. Raises `ChatEnded`, which does not repeat it."""
    if token is not None and not TOKEN.fullmatch(token):
        raise ChatEnded("That is no token; `realtime token` makes one.")
    return token


async def _run(url: str, session_id: str | None, token: str | None) -> None:
    def lost(code: int, reason: str, _reconnect_in_s: float) -> None:
        if code == LOST and not session.positions:  # it was never attached
            raise ChatEnded(f"There is no server there: {reason}")
        # Not to standard output: what a pipe gets has no seam.
        print("[connection lost, coming back]" if session.positions else "[no answer, trying again]", file=sys.stderr)

    try:
        with Keyboard() as keyboard:
            async with connect(url, session_id=session_id, token=token, open_timeout_s=None, on_lost=lost) as session:
                await _talk(session, keyboard)
    except SessionClosed as closed:
        if closed.close_code == CloseCode.UNAUTHENTICATED:
            raise ChatEnded("The server asks for a token, or does not accept this one any more (--token).") from None
        raise ChatEnded(f"The server has ended the session (close code {closed.close_code}).") from None


async def _talk(session: Session, keyboard: Keyboard) -> None:
    """Do what is typed and show what comes, until the user leaves. Raises `SessionClosed` where the server ends it."""
    chat, screen = Chat(session), Screen(shows_progress=sys.stdout.isatty())
    showing = asyncio.create_task(_show_all(session, screen, chat))
    typing = asyncio.create_task(_do_all(session, screen, chat, keyboard))
    try:
        await asyncio.wait({showing, typing}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        typing.cancel()
        session.close()
        await asyncio.gather(showing, typing, return_exceptions=True)
    if typing.cancelled():
        await session.opened()  # raises why it is closed
    showing.result()
    typing.result()


async def _show_all(session: Session, screen: Screen, chat: Chat) -> None:
    """Show what comes, until the session is over."""
    async for event in session:
        if isinstance(event, ErrorMessage):
            chat.refused(event.error.event_id)
        if chat.shows(event):
            _write(screen.shown(event))


async def _do_all(session: Session, screen: Screen, chat: Chat, keyboard: Keyboard) -> None:
    """Do what is typed, until the user leaves. A script's next line waits for what comes of the last one."""
    is_script = not sys.stdin.isatty()
    if is_script:
        await session.opened()
    while (line := await keyboard.line()) is not None:
        if line == INTERRUPT:
            if not chat.stop():
                return
            continue
        try:
            coming = chat.typed(line)
        except (QueueFull, MessageTooLarge) as error:
            _write(screen.line(f"[{error}]"))
            continue
        if coming is not None and is_script:
            await _ended(coming)
    chat.stop()


async def _ended(coming: ResponseStream | TaskStream) -> None:
    try:
        await coming.done()
    except SessionClosed:
        raise
    except RealtimeError:  # it was refused, as is shown
        return


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
