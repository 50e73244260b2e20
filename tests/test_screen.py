"""What the terminal client shows of a session's messages, without a terminal or a server."""

from __future__ import annotations

import io
from typing import Any

import pytest

from realtime.client import Event, UnknownEvent
from realtime.printing import Paper, PipePaper, TerminalPaper
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


class Shown:
    """A screen, and what each message writes."""

    def __init__(self, paper: Paper, *files: io.StringIO) -> None:
        self._screen = Screen(paper)
        self._files = files

    def shown(self, event: Event) -> str:
        """What this message writes; where there are two places, what goes to the second stands behind a `|`."""
        self._screen.show(event)
        texts = [file.getvalue() for file in self._files]
        for file in self._files:
            file.seek(0)
            file.truncate()
        return "|".join(texts)


def new() -> Shown:
    """A terminal."""
    out = io.StringIO()
    return Shown(TerminalPaper(out), out)


def attached() -> Shown:
    """One that has told its session."""
    screen = new()
    screen.shown(SessionCreated(**FIRST))
    return screen


def piped() -> Shown:
    """The same in a pipe."""
    out, notes = io.StringIO(), io.StringIO()
    screen = Shown(PipePaper(out, notes), out, notes)
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


def running() -> Shown:
    """One in the middle of an answer: it has shown `one `."""
    screen = attached()
    assert screen.shown(delta("one ")) == "one "
    return screen


def progress(done: float, total: float | None, message: str | None = None) -> Event:
    return TaskProgress(task_id="task_1", attempt=1, progress=done, total=total, message=message)


def task_done(status: Any = "complete", **fields: Any) -> Event:
    return TaskDone(task_id="task_1", status=status, **fields)


def watching() -> Shown:
    """One with a session in which a task runs."""
    screen = attached()
    screen.shown(TaskCreated(task=Task(id="task_1", name="count", status="pending", created_at=NOW)))
    return screen


def test_the_session_is_told_once() -> None:
    """At the first connection, and not again after a reconnect."""
    screen = new()
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


def test_what_others_say_is_shown() -> None:
    """As it comes, and in a replay; on a line of its own."""
    assert attached().shown(item("hello")) == "anonymous> hello\n"
    assert running().shown(item("hello", replay=True)) == "\nanonymous> hello\n"


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


def test_a_pipe_gets_what_was_said_alone() -> None:
    """Remarks go to the other place. A line that is written over would be many lines in a file."""
    screen = piped()
    assert screen.shown(progress(1, 3)) == "|"
    assert screen.shown(item("hello")) == "anonymous> hello\n|"
    assert screen.shown(delta("one ")) == "one |"
    assert screen.shown(refusal("No.")) == "|[No.]\n"
    assert screen.shown(delta("two")) == "two|"
    assert screen.shown(done("cancelled")) == "\n|[cancelled]\n"
    assert screen.shown(done("failed", error=failure("It is overloaded."))) == "|[It is overloaded.]\n"
    assert screen.shown(task_done(result="short")) == "short\n|[task complete]\n"


def test_a_pipe_says_elsewhere_that_an_answer_begins_anew() -> None:
    """It gets the answer once more, on a line of its own."""
    screen = piped()
    screen.shown(delta("one"))
    assert screen.shown(delta("one", reset=True)) == "\none|[a part of the answer was lost; it comes once more]\n"


def test_the_end_of_a_task_is_shown_with_what_it_came_to() -> None:
    """Its result, where that is to be had, or why there is none."""
    assert watching().shown(task_done(result={"n": 3})) == "[count complete]\nn: 3\n"
    assert watching().shown(task_done(result_url="/v1/x")) == "[count complete]\n/v1/x\n"
    assert watching().shown(task_done("cancelled")) == "[count cancelled]\n"
    assert watching().shown(task_done("failed", error=failure("It raised."))) == "[count failed: It raised.]\n"


def test_the_texts_of_a_result_are_shown_as_they_are() -> None:
    """With their lines; what is no text as JSON."""
    note = {"text": "Plan:\n- rest", "sections": {"plan": "rest", "none": ""}, "codes": ["a", {"n": None}], "n": 1.5}
    lines = [
        "text:",
        "  Plan:",
        "  - rest",
        "sections:",
        "  plan: rest",
        "  none: ",
        "codes:",
        "  - a",
        "  -",
        "    n: null",
        "n: 1.5",
    ]
    assert watching().shown(task_done(result=note)) == "\n".join(["[count complete]", *lines, ""])
    assert watching().shown(task_done(result="a\nb")) == "[count complete]\na\nb\n"


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
        running().shown(done("failed", error=failure(text))),
        watching().shown(task_done("failed", error=failure(text), result=text)).removeprefix("\r\x1b[K"),
    )
    for line in shown:
        assert not set(line) & set(CONTROLS), repr(line)
    assert shown[0].startswith("a")
    assert shown[0].endswith("\n\tb")


@pytest.mark.parametrize("char", ["\u202e", "\u202a", "\u2066", "\u2069", "\ufeff", "\u200b", "\u00ad"])
def test_nor_turn_the_direction_of_what_follows(char: str) -> None:
    """Overrides and isolates, and what can't be seen."""
    assert running().shown(delta(f"a{char}b")) == "ab"


@pytest.mark.parametrize(
    "text",
    [
        "\U0001f469\u200d\U0001f52c",
        "\u0646\u0645\u06cc\u200c",
        "\U0001f3f4\U000e0067\U000e007f",
        "\u200f\u05d0",
        "\u06dd\u0661",
    ],
)
def test_what_scripts_and_emoji_need_stays(text: str) -> None:
    """A scientist, a Persian word, the flag of a region, a Hebrew letter, the end of a verse."""
    assert running().shown(delta(text)) == text
