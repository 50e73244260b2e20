"""What the terminal client makes of the server's events, without a terminal or a server."""

from __future__ import annotations

from typing import Any

import pytest

from realtime.chat import Chat
from realtime.log import parse_positions

Event = dict[str, Any]


def first_frame(session_id: str = "sess_1") -> Event:
    """The first frame of a connection, as far as this client reads it."""
    return {"type": "session.created", "session": {"id": session_id}, "positions": {"session": 0}}


def attached() -> Chat:
    """A client that has just made a session."""
    chat = Chat(None)
    chat.apply(first_frame())
    return chat


def created(response_id: str, seq: int, **fields: Any) -> Event:
    return {"type": "response.created", "seq": seq, "response": {"id": response_id}, **fields}


def delta(response_id: str, seq: int, text: str, **fields: Any) -> Event:
    kind = "response.output_text.delta"
    return {"type": kind, "response_id": response_id, "seq": seq, "delta": text, **fields}


def done(response_id: str, seq: int, status: str = "completed", **fields: Any) -> Event:
    return {"type": "response.done", "response_id": response_id, "seq": seq, "status": status, **fields}


def item(seq: int, content: str, **fields: Any) -> Event:
    said = {"user": "anonymous", "content": content}
    return {"type": "conversation.item.created", "seq": seq, "item": said, **fields}


def running() -> Chat:
    """A client whose answer has begun: it has shown `one `."""
    chat = attached()
    chat.apply(created("resp_1", 1))
    chat.apply({"type": "response.in_progress", "response_id": "resp_1", "seq": 1})
    assert chat.apply(delta("resp_1", 2, "one ")) == "one "
    return chat


def task_created(task_id: str, seq: int, **fields: Any) -> Event:
    return {"type": "task.created", "seq": seq, "task": {"id": task_id, "name": "count"}, **fields}


def progress(task_id: str, seq: int, done: float, total: float | None, message: str | None = None) -> Event:
    told = {"progress": done, "total": total, "message": message, "attempt": 1}
    return {"type": "task.progress", "task_id": task_id, "seq": seq, **told}


def task_done(task_id: str, seq: int, status: str = "complete", **fields: Any) -> Event:
    return {"type": "task.done", "task_id": task_id, "seq": seq, "status": status, **fields}


def watching() -> Chat:
    """A client in a terminal that looks at a session in which a task runs."""
    chat = Chat(None, shows_progress=True)
    chat.apply(first_frame())
    chat.apply(task_created("task_1", 1))
    chat.apply({"type": "task.started", "task_id": "task_1", "seq": 1, "attempt": 1})
    return chat


# --- positions -------------------------------------------------------------------------------------------------------


def test_a_new_client_asks_for_a_new_session() -> None:
    """Nothing is known: nothing is asked for."""
    assert Chat(None).query() == {}


def test_a_known_session_is_read_from_its_start() -> None:
    """A session that the user names is attached to, with all of its history."""
    assert Chat("sess_9").query() == {"session_id": "sess_9"}


def test_the_session_that_was_made_is_gone_on_with() -> None:
    """After the first frame a reconnect names the session, even if nothing came yet."""
    assert attached().query() == {"session_id": "sess_1", "after": "session:0"}


def test_positions_follow_what_was_applied() -> None:
    """The session, and the answer that has not ended."""
    chat = running()
    assert chat.query()["after"] == "session:1,resp_1:2"
    chat.apply(delta("resp_1", 7, "two three", merged=5))
    assert parse_positions(chat.query()["after"]) == {"session": 1, "resp_1": 7}


def test_an_answer_of_which_nothing_came_is_named_at_zero() -> None:
    """Or it would not be replayed: the session's position covers its creation."""
    chat = attached()
    chat.apply(created("resp_1", 1))
    assert parse_positions(chat.query()["after"]) == {"session": 1, "resp_1": 0}


def test_an_answer_that_has_ended_is_not_named() -> None:
    """It would be told anew."""
    chat = running()
    chat.apply(done("resp_1", 3))
    assert parse_positions(chat.query()["after"]) == {"session": 1}


def test_a_task_is_named_until_it_has_ended() -> None:
    """From its creation on, even if nothing came of it yet."""
    chat = attached()
    chat.apply(task_created("task_1", 1))
    assert parse_positions(chat.query()["after"]) == {"session": 1, "task_1": 0}
    chat.apply(progress("task_1", 3, 1, 2))
    assert parse_positions(chat.query()["after"]) == {"session": 1, "task_1": 3}
    chat.apply(task_done("task_1", 4))
    assert parse_positions(chat.query()["after"]) == {"session": 1}


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_the_session_is_told_once() -> None:
    """At the first connection, and not again after a reconnect."""
    chat = Chat(None)
    assert "sess_1" in chat.apply(first_frame())
    assert chat.apply({**first_frame(), "type": "session.resumed"}) == ""


def test_an_answer_is_shown_as_it_comes() -> None:
    """Its pieces one after the other, and the end of the line at its end."""
    chat = running()
    assert chat.apply(delta("resp_1", 3, "two")) == "two"
    assert chat.apply(done("resp_1", 4)) == "\n"


@pytest.mark.parametrize("status", ["cancelled", "incomplete"])
def test_an_answer_that_is_not_whole_says_so(status: str) -> None:
    """How it ended stands behind it."""
    assert running().apply(done("resp_1", 3, status)) == f" [{status}]\n"


def test_a_failure_is_told_in_its_words() -> None:
    """Not by the bare status."""
    error = {"type": "upstream_error", "code": "upstream_overloaded", "message": "The model is overloaded."}
    assert running().apply(done("resp_1", 3, "failed", error=error)) == " [The model is overloaded.]\n"


def test_an_error_begins_a_line_of_its_own() -> None:
    """Also in the middle of an answer."""
    error = {"type": "error", "error": {"message": "No.", "code": "c", "fatal": False}}
    assert running().apply(error) == "\n[No.]\n"
    assert attached().apply(error) == "[No.]\n"


def test_what_was_said_is_shown_in_a_replay_alone() -> None:
    """What the user types stands on the screen already."""
    assert attached().apply(item(1, "hello")) == ""
    assert attached().apply(item(1, "hello", replay=True)) == "anonymous> hello\n"


def test_progress_is_one_line_that_is_written_over() -> None:
    """And makes way for whatever comes next."""
    chat = watching()
    assert chat.apply(progress("task_1", 2, 1, 3, "read page 1")) == "\r\x1b[K[count 1/3 read page 1]"
    assert chat.apply(progress("task_1", 3, 1.5, None)) == "\r\x1b[K[count 1.5]"
    assert chat.apply({"type": "error", "error": {"message": "No."}}) == "\r\x1b[K[No.]\n"
    assert chat.apply(progress("task_1", 4, 2, 3)) == "\r\x1b[K[count 2/3]"
    chat.apply(created("resp_1", 2))
    assert chat.apply(delta("resp_1", 1, "one ")) == "\r\x1b[Kone "


def test_progress_does_not_break_into_an_answer() -> None:
    """It is shown again after it."""
    chat = watching()
    chat.apply(created("resp_1", 2))
    chat.apply(delta("resp_1", 1, "one "))
    assert chat.apply(progress("task_1", 2, 1, 3)) == ""
    assert chat.apply(done("resp_1", 2)) == "\n"
    assert chat.apply(progress("task_1", 3, 2, 3)) == "\r\x1b[K[count 2/3]"


def test_progress_never_wraps() -> None:
    """Nor has it lines of its own, or words that steer the terminal."""
    shown = watching().apply(progress("task_1", 2, 1, 3, "a\n\x1b[2J" + "b" * 500))
    assert shown.startswith("\r\x1b[K[count 1/3 a [2Jb")
    assert len(shown) <= len("\r\x1b[K") + 80
    assert "\n" not in shown


def test_outside_of_a_terminal_there_is_no_progress() -> None:
    """A line that is written over would be many lines in a file."""
    chat = attached()
    chat.apply(task_created("task_1", 1))
    assert chat.apply(progress("task_1", 1, 1, 3)) == ""


def test_the_end_of_a_task_is_shown_with_what_it_came_to() -> None:
    """Its result, where that is to be had, or why there is none."""
    assert watching().apply(task_done("task_1", 2, result={"n": 3})) == '[count complete]\n{\n  "n": 3\n}\n'
    assert watching().apply(task_done("task_1", 2, result_url="/v1/x")) == "[count complete] /v1/x\n"
    assert watching().apply(task_done("task_1", 2, "cancelled")) == "[count cancelled]\n"
    error = {"type": "server_error", "code": "task_failed", "message": "It raised."}
    assert watching().apply(task_done("task_1", 2, "failed", error=error)) == "[count failed] [It raised.]\n"


def test_reasoning_and_unknown_events_are_not_shown() -> None:
    """They move the positions on, and nothing else."""
    chat = running()
    reasoning = {"type": "response.reasoning.delta", "response_id": "resp_1", "seq": 3, "delta": "hm"}
    assert chat.apply(reasoning) == ""
    assert chat.apply({"type": "something.new", "seq": 2}) == ""
    assert parse_positions(chat.query()["after"]) == {"session": 2, "resp_1": 3}


CONTROLS = "".join(map(chr, [*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0)]))


@pytest.mark.parametrize("text", [CONTROLS, "\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\r"])
def test_a_model_can_not_steer_the_terminal(text: str) -> None:
    """Control characters are removed from whatever others said; line ends and tabs stay."""
    error = {"message": f"{text}x", "code": "c", "fatal": False}
    shown = (
        running().apply(delta("resp_1", 3, f"a{text}\n\tb")),
        attached().apply(item(1, f"a{text}b", replay=True)),
        attached().apply({"type": "error", "error": error}),
        attached().apply({"type": "session.closed", "seq": 1, "reason": text}),
        running().apply(done("resp_1", 3, "failed", error=error)),
        watching().apply(task_done("task_1", 2, "failed", error=error, result=text)),
    )
    for line in shown:
        assert not set(line) & set(CONTROLS), repr(line)
    assert shown[0].startswith("a")
    assert shown[0].endswith("\n\tb")


# --- commands --------------------------------------------------------------------------------------------------------


def test_saying_something_asks_for_an_answer() -> None:
    """Under ids of the client's own, so that it can be sent twice."""
    one, other = attached().say("hello"), attached().say("hello")
    assert one["type"] == "response.create"
    assert one["input"] == "hello"
    assert one["event_id"] != other["event_id"]
    assert one["response_id"] != other["response_id"]


def test_what_nobody_confirmed_is_kept() -> None:
    """In its order, to be sent again as it was."""
    chat = attached()
    said = [chat.say("first"), chat.say("second")]
    assert list(chat.unsent.values()) == said
    chat.apply({**first_frame(), "type": "session.resumed"})
    assert list(chat.unsent.values()) == said


def test_a_created_answer_confirms_the_command() -> None:
    """It is not sent again, and the answer is waited for."""
    chat = attached()
    command = chat.say("hello")
    chat.apply(item(1, "hello", for_event_id=command["event_id"]))
    assert not chat.idle
    chat.apply(created(command["response_id"], 2, for_event_id=command["event_id"]))
    assert not chat.unsent
    assert not chat.idle
    chat.apply(done(command["response_id"], 1))
    assert chat.idle


def test_a_refused_command_is_not_sent_again() -> None:
    """Its error confirms it, and nothing is waited for."""
    chat = attached()
    command = chat.say("hello")
    error = {"message": "No.", "code": "c", "fatal": False, "event_id": command["event_id"]}
    chat.apply({"type": "error", "error": error})
    assert not chat.unsent
    assert chat.idle


def test_nothing_to_stop() -> None:
    """Without an answer there is no command."""
    assert attached().stop() is None


def test_a_running_answer_is_stopped() -> None:
    """By its id; its end confirms the command."""
    chat = running()
    command = chat.stop()
    assert command is not None
    assert (command["type"], command["response_id"]) == ("response.cancel", "resp_1")
    chat.apply(done("resp_1", 3, "cancelled", for_event_id=command["event_id"]))
    assert chat.idle
    assert chat.stop() is None


def test_an_answer_that_was_asked_for_is_stopped_before_it_is_created() -> None:
    """The client knows its id already."""
    chat = attached()
    said = chat.say("hello")
    command = chat.stop()
    assert command is not None
    assert command["response_id"] == said["response_id"]


def test_who_stops_twice_wants_to_leave() -> None:
    """A stop that nobody confirms is not repeated."""
    chat = running()
    assert chat.stop() is not None
    assert chat.stop() is None


def test_the_end_of_an_interrupted_answer_leaves_the_new_one_running() -> None:
    """It comes after the new one was created."""
    chat = running()
    chat.apply(created("resp_2", 2))
    chat.apply(done("resp_1", 3, "cancelled"))
    assert not chat.idle
    chat.apply(done("resp_2", 1))
    assert chat.idle


# --- tasks -----------------------------------------------------------------------------------------------------------


def test_a_line_may_start_a_task() -> None:
    """With its input as JSON, under an id of the client's own; until it ends there is something to wait for."""
    chat = attached()
    command = chat.typed('/task count {"to": [1, 2]}')
    assert (command["type"], command["name"], command["input"]) == ("task.create", "count", {"to": [1, 2]})
    chat.apply(task_created(command["task_id"], 1, for_event_id=command["event_id"]))
    assert not chat.unsent
    assert not chat.idle
    chat.apply(task_done(command["task_id"], 1))
    assert chat.idle


@pytest.mark.parametrize(
    ("line", "given"), [("/task count", {}), ("/task count {oops", "{oops"), ("/task count two words", "two words")]
)
def test_the_server_judges_the_input(line: str, given: object) -> None:
    """What is no JSON is sent as it is; the refusal says what is wrong, and nothing is waited for."""
    chat = attached()
    command = chat.typed(line)
    assert command["input"] == given
    chat.apply({"type": "error", "error": {"message": "No.", "event_id": command["event_id"]}})
    assert chat.idle


@pytest.mark.parametrize("by_itself", [False, True])
def test_a_task_is_cancelled(by_itself: bool) -> None:
    """Its end confirms that, also if it came by itself."""
    chat = attached()
    started = chat.typed("/task count")
    chat.apply(task_created(started["task_id"], 1, for_event_id=started["event_id"]))
    command = chat.typed("/cancel")
    assert (command["type"], command["task_id"]) == ("task.cancel", started["task_id"])
    chat.apply(task_done(started["task_id"], 1, **({} if by_itself else {"for_event_id": command["event_id"]})))
    assert chat.idle


def test_without_a_task_there_is_nothing_to_cancel() -> None:
    """So it is said, as any other line is."""
    assert attached().typed("/cancel")["type"] == "response.create"
    assert attached().typed("/tasks are these")["input"] == "/tasks are these"
    assert attached().typed("/task")["input"] == "/task"


def test_a_task_of_others_is_not_waited_for() -> None:
    """A script would never end."""
    assert watching().idle


def test_a_task_is_not_stopped_with_an_answer() -> None:
    """Ctrl-C is for the answer."""
    chat = attached()
    chat.typed("/task count")
    assert chat.stop() is None
