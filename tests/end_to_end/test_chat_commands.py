"""What a line that is typed into `realtime chat` comes to, at a server, without a terminal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from realtime.chat_commands import Chat, NotACommand
from realtime.client import RealtimeError, ResponseStream, Session, TaskStream, connect
from realtime.protocol import ErrorBody, ErrorMessage, ResponseCreated, TaskCreated
from tests.end_to_end import Model
from tests.support.server import running_server

PATIENCE_S = 20.0
TASK = '/task summarise {"text": "A long document."}'


@asynccontextmanager
async def attached(model: Model) -> AsyncIterator[tuple[Chat, Session]]:
    """One that has just made a session."""
    async with running_server(model) as server, connect(server.url) as session, asyncio.timeout(PATIENCE_S):
        await session.opened()
        yield Chat(session), session


def said(chat: Chat, line: str) -> ResponseStream:
    stream = chat.typed(line)
    assert isinstance(stream, ResponseStream)
    return stream


def started(chat: Chat, line: str) -> TaskStream:
    stream = chat.typed(line)
    assert isinstance(stream, TaskStream)
    return stream


async def test_nothing_to_stop() -> None:
    """Without an answer whoever presses Ctrl-C wants to leave; so does who does it after the answer has ended."""
    model = Model()
    async with attached(model) as (chat, _):
        assert not chat.stop()
        answer = said(chat, "hello")
        (await model.turn()).end("hi")
        await answer.done()
        assert not chat.stop()


async def test_a_running_answer_is_stopped_once() -> None:
    """Who stops twice wants to leave."""
    model = Model()
    async with attached(model) as (chat, _):
        answer = said(chat, "hello")
        await model.turn()
        assert chat.stop()
        assert not chat.stop()
        assert (await answer.done()).status == "cancelled"


async def test_an_answer_that_was_asked_for_is_stopped_before_it_is_created() -> None:
    """The client knows its id already."""
    async with attached(Model()) as (chat, _):
        answer = said(chat, "hello")
        assert chat.stop()
        assert (await answer.done()).status == "cancelled"


async def test_the_answer_of_others_is_stopped_too() -> None:
    """It is the one on the screen."""
    model = Model()
    async with attached(model) as (chat, session):
        answer = session.respond("hello")
        await anext(event async for event in answer if isinstance(event, ResponseCreated))
        assert chat.stop()
        assert (await answer.done()).status == "cancelled"


async def test_the_newest_answer_is_the_one_to_stop() -> None:
    """The end of the one that it interrupted changes nothing about that."""
    model = Model()
    async with attached(model) as (chat, _):
        first = said(chat, "first")
        await model.turn()
        second = said(chat, "second")
        await model.turn()
        assert (await first.done()).status == "cancelled"
        assert chat.stop()
        assert (await second.done()).status == "cancelled"


def refusing(event_id: str) -> ErrorMessage:
    body = ErrorBody(type="invalid_request_error", code="c", message="No.", fatal=False, event_id=event_id)
    return ErrorMessage(error=body)


async def test_a_refused_command_leaves_nothing_to_stop() -> None:
    """Nor anything to cancel, nor anything that the server has not answered to."""
    async with attached(Model()) as (chat, session):
        task = started(chat, "/task nonsense")
        with pytest.raises(RealtimeError):
            await task.done()
        assert chat.unanswered == ["/task nonsense"]
        chat.heed(refusing(task.event_id))
        assert not chat.cancel_task()
        answer = said(chat, "hello")
        chat.heed(refusing(answer.event_id))
        assert not chat.stop()
        assert chat.unanswered == []
        session.cancel(answer.response_id)


async def test_what_has_come_to_be_is_answered() -> None:
    """Only what did not is lost with the session."""
    model = Model()
    async with attached(model) as (chat, session):
        events = aiter(session)
        pulled = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        said(chat, "hello")
        assert chat.unanswered == ["hello"]
        chat.heed(await pulled)
        assert chat.unanswered == []


async def test_to_leave_stops_what_was_asked_for_here() -> None:
    """And not the answers of others, who still look at them."""
    model = Model()
    async with attached(model) as (chat, session):
        theirs = session.respond("hello")
        await anext(event async for event in theirs if isinstance(event, ResponseCreated))
        chat.leave()
        (await model.turn()).end("hi")
        assert (await theirs.done()).status == "completed"
        ours = said(chat, "hello")
        chat.leave()
        assert (await ours.done()).status == "cancelled"


@pytest.mark.parametrize(("line", "given"), [("/task summarise", "text"), ("/task summarise {oops", "object")])
async def test_the_server_judges_the_input(line: str, given: str) -> None:
    """None is an empty object; what is no JSON is sent as it is. The refusal says what is wrong."""
    async with attached(Model()) as (chat, _):
        with pytest.raises(RealtimeError, match=given):
            await started(chat, line).done()


async def test_a_task_is_cancelled_and_is_none_of_the_answers() -> None:
    """Ctrl-C is for the answer, `/cancel` for the task; once that has ended, there is none to cancel."""
    model = Model()
    async with attached(model) as (chat, _):
        task = started(chat, TASK)
        await anext(event async for event in task if isinstance(event, TaskCreated))
        assert not chat.stop()
        assert chat.typed("/cancel") is None
        assert (await task.done()).status == "cancelled"
        with pytest.raises(NotACommand, match="no task"):
            chat.typed("/cancel")


@pytest.mark.parametrize("line", ["/cancel", "/cancel it", "/task", "/tasks are these", "/help", " /halp", "/"])
async def test_a_slash_that_is_no_command_is_refused(line: str) -> None:
    """And costs nothing."""
    model = Model()
    async with attached(model) as (chat, _):
        with pytest.raises(NotACommand):
            chat.typed(line)
        assert (chat.stop(), chat.unanswered, model.calls) == (False, [], 0)


@pytest.mark.parametrize(("line", "text"), [("//help", "/help"), ("///", "//"), ("1/2", "1/2"), ("a\n/b", "a\n/b")])
async def test_a_slash_can_be_said(line: str, text: str) -> None:
    """Behind another one, and anywhere but at the start."""
    model = Model()
    async with attached(model) as (chat, _):
        answer = said(chat, line)
        turn = await model.turn()
        turn.end("yes")
        await answer.done()
        assert turn.conversation == [("user", text)]


async def test_nothing_is_stopped_while_the_server_is_away() -> None:
    """Nobody could be told: whoever presses Ctrl-C leaves."""
    model, lost = Model(), asyncio.Event()
    async with (
        running_server(model) as server,
        connect(server.url, on_lost=lambda *_: lost.set()) as session,
        asyncio.timeout(PATIENCE_S),
    ):
        chat = Chat(session)
        said(chat, "hello")
        await model.turn()
        session.drop(reconnect_in_s=60)
        await lost.wait()
        assert not chat.stop()
