"""What the terminal client shows of a session's messages, without a terminal or a server."""

from __future__ import annotations

from typing import Any

import pytest

from realtime.client import Event, UnknownEvent
from realtime.protocol import (
    ErrorBody,
    ErrorMessage,
    Failure,
    Item,
    ItemCreated,
    OutputTextDelta,
    ReasoningDelta,
    ResponseDone,
    Session,
    SessionClosed,
    SessionCreated,
    SessionResumed,
    Task,
    TaskCreated,
    TaskDone,
    TaskProgress,
    Usage,
)
from realtime.screen import Screen

NOW = "2026-11-01T12:00:00Z"
USAGE = Usage(input_tokens=1, output_tokens=1, total_tokens=2, estimated=False)
SESSION = Session(
    id="sess_1",
    owner="anonymous",
    created_at=NOW,
    expires_at=NOW,
    instructions="",
    model="demo",
    max_output_tokens=1000,
    on_disconnect="cancel",
    disconnect_grace_ms=0,
    multitask_strategy="reject",
)
FIRST: dict[str, Any] = {"session": SESSION, "connection_id": "conn_1", "positions": {}, "participants": []}


def attached() -> Screen:
    """One that has told its session."""
    screen = Screen()
    screen.shown(SessionCreated(**FIRST))
    return screen


def delta(text: str, **fields: Any) -> Event:
    return OutputTextDelta(response_id="resp_1", delta=text, **fields)


def done(status: Any = "completed", **fields: Any) -> Event:
    return ResponseDone(response_id="resp_1", status=status, stop_reason=None, usage=USAGE, output_chars=1, **fields)


def item(content: str, **fields: Any) -> Event:
    said = Item(id="item_1", role="user", content=content, user="anonymous", created_at=NOW)
    return ItemCreated(item=said, **fields)


def refusal(message: str) -> Event:
    return ErrorMessage(error=ErrorBody(type="invalid_request_error", code="c", message=message, fatal=False))


def failure(message: str) -> Failure:
    return Failure(type="server_error", code="c", message=message)


def running() -> Screen:
    """One in the middle of an answer: it has shown `one `."""
    screen = attached()
    assert screen.shown(delta("one ")) == "one "
    return screen


def progress(done: float, total: float | None, message: str | None = None) -> Event:
    return TaskProgress(task_id="task_1", attempt=1, progress=done, total=total, message=message)


def task_done(status: Any = "complete", **fields: Any) -> Event:
    return TaskDone(task_id="task_1", status=status, **fields)


def watching() -> Screen:
    """A terminal, with a session in which a task runs."""
    screen = Screen(shows_progress=True)
    screen.shown(SessionCreated(**FIRST))
    screen.shown(TaskCreated(task=Task(id="task_1", name="count", status="pending", created_at=NOW)))
    return screen


def test_the_session_is_told_once() -> None:
    """At the first connection, and not again after a reconnect."""
    screen = Screen()
    assert "sess_1" in screen.shown(SessionCreated(**FIRST))
    assert screen.shown(SessionResumed(**FIRST)) == ""


def test_an_answer_is_shown_as_it_comes() -> None:
    """Its pieces one after the other, and the end of the line at its end."""
    screen = running()
    assert screen.shown(delta("two")) == "two"
    assert screen.shown(done()) == "\n"


def test_an_answer_that_begins_anew_says_so() -> None:
    """What was shown of it is void; what is written in a terminal can't be taken back."""
    screen = running()
    assert screen.shown(delta("one", reset=True)) == " [a part of this was lost; the answer once more:]\none"
    assert attached().shown(delta("one", reset=True)) == "one"


@pytest.mark.parametrize("status", ["cancelled", "incomplete"])
def test_an_answer_that_is_not_whole_says_so(status: str) -> None:
    """How it ended stands behind it."""
    assert running().shown(done(status)) == f" [{status}]\n"


def test_a_failure_is_told_in_its_words() -> None:
    """Not by the bare status."""
    assert running().shown(done("failed", error=failure("It is overloaded."))) == " [It is overloaded.]\n"


def test_an_error_begins_a_line_of_its_own() -> None:
    """Also in the middle of an answer."""
    assert running().shown(refusal("No.")) == "\n[No.]\n"
    assert attached().shown(refusal("No.")) == "[No.]\n"


def test_what_was_said_is_shown_in_a_replay_alone() -> None:
    """What the user types stands on the screen already."""
    assert attached().shown(item("hello")) == ""
    assert attached().shown(item("hello", replay=True)) == "anonymous> hello\n"


def test_progress_is_one_line_that_is_written_over() -> None:
    """And makes way for whatever comes next."""
    screen = watching()
    assert screen.shown(progress(1, 3, "read page 1")) == "\r\x1b[K[count 1/3 read page 1]"
    assert screen.shown(progress(1.5, None)) == "\r\x1b[K[count 1.5]"
    assert screen.shown(refusal("No.")) == "\r\x1b[K[No.]\n"
    assert screen.shown(progress(2, 3)) == "\r\x1b[K[count 2/3]"
    assert screen.shown(delta("one ")) == "\r\x1b[Kone "


def test_progress_does_not_break_into_an_answer() -> None:
    """It is shown again after it."""
    screen = watching()
    screen.shown(delta("one "))
    assert screen.shown(progress(1, 3)) == ""
    assert screen.shown(done()) == "\n"
    assert screen.shown(progress(2, 3)) == "\r\x1b[K[count 2/3]"


def test_progress_never_wraps() -> None:
    """Nor has it lines of its own, or words that steer the terminal."""
    shown = watching().shown(progress(1, 3, "a\n\x1b[2J" + "b" * 500))
    assert shown.startswith("\r\x1b[K[count 1/3 a [2Jb")
    assert len(shown) <= len("\r\x1b[K") + 80
    assert "\n" not in shown


def test_outside_of_a_terminal_there_is_no_progress() -> None:
    """A line that is written over would be many lines in a file."""
    assert attached().shown(progress(1, 3)) == ""


def test_the_end_of_a_task_is_shown_with_what_it_came_to() -> None:
    """Its result, where that is to be had, or why there is none."""
    assert watching().shown(task_done(result={"n": 3})) == '[count complete]\n{\n  "n": 3\n}\n'
    assert watching().shown(task_done(result_url="/v1/x")) == "[count complete] /v1/x\n"
    assert watching().shown(task_done("cancelled")) == "[count cancelled]\n"
    assert watching().shown(task_done("failed", error=failure("It raised."))) == "[count failed] [It raised.]\n"


def test_reasoning_and_unknown_events_are_not_shown() -> None:
    """A newer server may send what this client does not know."""
    assert running().shown(ReasoningDelta(response_id="resp_1", delta="hm")) == ""
    assert running().shown(UnknownEvent(type="something.new", fields={})) == ""


CONTROLS = "".join(map(chr, [*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0)]))


@pytest.mark.parametrize("text", [CONTROLS, "\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\r"])
def test_a_model_can_not_steer_the_terminal(text: str) -> None:
    """Control characters are removed from whatever others said; line ends and tabs stay."""
    shown = (
        running().shown(delta(f"a{text}\n\tb")),
        attached().shown(item(f"a{text}b", replay=True)),
        attached().shown(refusal(f"{text}x")),
        attached().shown(SessionClosed(reason=text)),
        running().shown(done("failed", error=failure(text))),
        watching().shown(task_done("failed", error=failure(text), result=text)).removeprefix("\r\x1b[K"),
    )
    for line in shown:
        assert not set(line) & set(CONTROLS), repr(line)
    assert shown[0].startswith("a")
    assert shown[0].endswith("\n\tb")
