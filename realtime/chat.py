"""`realtime chat`: a terminal client that streams, stops on Ctrl-C, and comes back where it was."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager

from realtime.absence import PATIENCE_S, Absence, ChatEnded
from realtime.chat_commands import Chat, NotACommand
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
    is_token,
)
from realtime.keyboard import INTERRUPT, Keyboard
from realtime.printing import discard_output, last_words, prepare_streams, standard_paper
from realtime.protocol import CloseCode, ErrorMessage, SessionCreated, SessionResumed
from realtime.protocol import SessionClosed as SessionOver
from realtime.screen import Screen, printable


def run(url: str, session_id: str | None, token: str | None = None) -> int:
    """Talk until the user leaves or the session ends. Returns the exit status, as a shell counts signals."""
    prepare_streams()
    try:
        return asyncio.run(_run(url, session_id, token))
    except ChatEnded as ended:
        last_words(str(ended))
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # whoever reads has seen enough
        discard_output()
        return 128 + signal.SIGPIPE
    except OSError as error:
        last_words(f"The output can't be written: {error.strerror}")
        discard_output()
        return 1


async def _run(url: str, session_id: str | None, token: str | None) -> int:
    if token is not None and not is_token(token):
        raise ChatEnded("That is no token; `realtime token` makes one.")
    screen = Screen(standard_paper())
    absence = Absence(screen.note) if sys.stdin.isatty() else Absence(screen.note, patience_s=PATIENCE_S)
    with _ending_signals() as caught:
        try:
            async with AsyncExitStack() as stack:
                keyboard = stack.enter_context(Keyboard())
                connecting = connect(url, session_id=session_id, token=token, open_timeout_s=None, on_lost=absence.lost)
                try:
                    session = await stack.enter_async_context(connecting)
                except ValueError:
                    raise ChatEnded(f"{url} is no address of a server; it looks like http://127.0.0.1:8000") from None
                return await _talk(session, keyboard, screen, absence)
        except SessionClosed as closed:
            raise ChatEnded(_end_of(closed)) from None
        except asyncio.CancelledError:
            if not caught:
                raise
            return 128 + caught[0]


@contextmanager
def _ending_signals() -> Iterator[list[int]]:
    """Cancel on what ends a process, as asyncio does on Ctrl-C, unless it is ignored; gives what came. A second one
    ends it at once: the first is not seen while a reader keeps us waiting."""
    loop, task, caught = asyncio.get_running_loop(), asyncio.current_task(), list[int]()
    assert task is not None

    def end(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        caught.append(number)
        loop.call_soon_threadsafe(task.cancel)

    numbers = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, end)
    try:
        yield caught
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _end_of(closed: SessionClosed, told: str = "") -> str:
    """Why it is over, for a person; `told` is what the server has said of it."""
    if closed.close_code == CloseCode.UNAUTHENTICATED:
        return "The server asks for a token, or does not accept this one any more (--token)."
    return told or f"The server has ended the session (close code {closed.close_code})."


async def _talk(session: Session, keyboard: Keyboard, screen: Screen, absence: Absence) -> int:
    """Do what is typed and show what comes, until the user leaves; returns the exit status. Whatever ends it, what was
    asked for here is stopped. Raises `ChatEnded` and `SessionClosed` where the server ends it, and `OSError`."""
    chat = Chat(session)
    do_all = _do_all if sys.stdin.isatty() else _do_script
    showing = asyncio.create_task(_show_all(session, screen, chat, absence))
    typing = asyncio.create_task(do_all(session, screen, chat, keyboard))
    try:
        await asyncio.wait({showing, typing}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        typing.cancel()
        await asyncio.wait({typing})
        chat.leave()
        session.close()
        await asyncio.wait({showing})
    showing.result()
    if typing.cancelled():
        await session.opened()  # raises why it is closed
    return typing.result()


async def _show_all(session: Session, screen: Screen, chat: Chat, absence: Absence) -> None:
    """Show what comes, until the session is over. Raises `ChatEnded` where the server ends it, and `OSError`."""
    told = ""
    try:
        async for event in session:
            chat.heed(event)
            if isinstance(event, SessionCreated | SessionResumed):
                absence.attached()
            told = _told_of_the_end(event)
            if not told and chat.shows(event):
                screen.show(event)
    except SessionClosed as closed:
        for line in chat.unanswered:
            screen.note(f"not delivered: {line}")
        raise ChatEnded(_end_of(closed, told)) from None
    if told:
        raise ChatEnded(told)


def _told_of_the_end(event: Event) -> str:
    """What a message says of why the connection ends; after most it does not."""
    match event:
        case ErrorMessage() if event.error.fatal:
            return printable(event.error.message)
        case SessionOver():
            return printable(f"The session was {event.reason}.")
        case _:
            return ""


async def _do_all(_session: Session, screen: Screen, chat: Chat, keyboard: Keyboard) -> int:
    """Do what a person types, until they leave."""
    while (line := await keyboard.line()) is not None:
        if line != INTERRUPT:
            _do(line, screen, chat)
        elif not chat.stop():
            break
    return 0


async def _do_script(session: Session, screen: Screen, chat: Chat, keyboard: Keyboard) -> int:
    """Do what a script says, each line once what comes of the last one has ended. Returns how the last one ended."""
    await session.opened()
    succeeded = True
    try:
        while (line := await keyboard.line()) is not None:
            coming = _do(line, screen, chat)
            succeeded = coming is not None and await _succeeds(coming)
    except asyncio.CancelledError:
        chat.cancel_task()  # nobody waits for it any more
        raise
    return 0 if succeeded else 1


def _do(line: str, screen: Screen, chat: Chat) -> ResponseStream | TaskStream | None:
    try:
        return chat.typed(line)
    except (NotACommand, QueueFull, MessageTooLarge) as error:
        screen.note(str(error))
        return None


async def _succeeds(coming: ResponseStream | TaskStream) -> bool:
    try:
        return (await coming.done()).error is None
    except SessionClosed:
        raise
    except RealtimeError:  # it was refused, as is shown
        return False
