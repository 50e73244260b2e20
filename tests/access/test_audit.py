"""The audit log: a line is one line, tells what it should, and never what it should not."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import msgspec
import pytest
from structlog.testing import capture_logs

from realtime import errors
from realtime.access.audit import REFUSALS, Access, Audit, hidden, tag_of
from realtime.errors import NotFound, RealtimeError
from realtime.observe import logs
from realtime.protocol import JSON
from tests.support.principals import known

MADE = "sess_" + "0a" * 16
ODD = [
    "sess_1",
    "anna-has-a-cold",
    'a"b',
    "a\nb",
    "a\r\nb",
    "\u2028",
    "\x00",
    "\x1b[31m",
    "é",
    "😀",
    "\ud800",
    "a b",
    "s" * 65,
    "../..",
    '{"a":1}',
    "",
]


@pytest.fixture
def restored() -> Iterator[None]:
    """The root logger as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def told(access: Access, *errors: RealtimeError | None) -> list[dict[str, object]]:
    """The lines that come of telling an access so often."""
    with capture_logs() as lines:
        for error in errors:
            access.tell(error)
    return [dict(line) for line in lines]


def test_an_access_is_told_once() -> None:
    """The first that is known of how it went counts."""
    audit = Audit(hides_sessions=False)
    access = Access(audit, "session.read", address="127.0.0.1", session_id=MADE)
    access.principal = known("ann")
    [line] = told(access, NotFound("x", "words"), None, NotFound("y", "words"))
    del line["log_level"]
    assert line == {
        "event": "session.read",
        "user": "ann",
        "session": MADE,
        "address": "127.0.0.1",
        "allowed": False,
        "code": "x",
    }


def test_who_is_not_known_is_nobody() -> None:
    """And no session is none."""
    [line] = told(Access(Audit(hides_sessions=True), "session.create", address="a"), None)
    assert (line["user"], line["session"], line["allowed"], line["code"]) == (None, None, True, None)


@pytest.mark.parametrize("kind", [kind for kind in vars(errors).values() if isinstance(kind, type)])
def test_what_refuses_is_told_from_what_fails(kind: type) -> None:
    """Not allowed is what says who may: not a fault, a clash, or a store that is away."""
    if issubclass(kind, RealtimeError):
        error = kind.__new__(kind)  # some make their code and words themselves
        RealtimeError.__init__(error, "code", "words")
        nobody, somebody = (Access(Audit(hides_sessions=True), "a", address="a") for _ in range(2))
        somebody.principal = known("ann")
        [line] = told(somebody, error)
        assert (line["allowed"], line["code"]) == (kind.type not in REFUSALS, "code")
        assert told(nobody, error)[0]["allowed"] is False
        assert "words" not in str(line)


def test_every_command_has_a_name() -> None:
    """The one by which clients know it."""
    for text in ('{"type":"session.close"}', '{"type":"auth.refresh","token":"t"}', '{"type":"response.create"}'):
        message = JSON.decode(text)
        assert tag_of(message) == msgspec.json.decode(text)["type"]  # type: ignore[arg-type]


def test_a_task_is_named_as_its_session_where_it_is_one() -> None:
    """Its id is a credential then; what can be no id is told neither."""
    access = Access(Audit(hides_sessions=True), "task.read", address="a", session_id="task_1")
    access.task_id = "task_1"
    access.response_id = "a b"
    [line] = told(access, None)
    assert line["task"] == line["session"] == hidden("task_1")
    assert line["response"] == hidden("a b")


@pytest.mark.parametrize("session_id", [MADE, *ODD])
def test_an_id_that_is_a_credential_is_never_told(session_id: str) -> None:
    """Only a hash, by which lines of one session are found."""
    audit = Audit(hides_sessions=True)
    assert audit.name_of(session_id).startswith("#")
    assert len(audit.name_of(session_id)) == 17
    assert audit.name_of(session_id) == audit.name_of(session_id) != audit.name_of(session_id + "x")


@pytest.mark.parametrize("session_id", ODD)
def test_what_a_client_has_thought_of_is_never_told(session_id: str) -> None:
    """Where ids are told, too: only those that are made by chance."""
    assert Audit(hides_sessions=False).name_of(session_id).startswith("#")


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
@pytest.mark.parametrize("odd", ODD)
def test_a_line_is_one_line(restored: None, capsys: pytest.CaptureFixture[str], level: str, odd: str) -> None:
    """Of JSON, whatever is in it, at any level."""
    logs.configure("json", level)
    access = Access(Audit(hides_sessions=False), "session.read", address="127.0.0.1", session_id=odd)
    access.principal = known(odd.replace("\ud800", ""))
    access.tell()
    written = capsys.readouterr().err
    assert written.count("\n") == 1
    assert written.splitlines()[0] == written.rstrip("\n")
    line = json.loads(written)
    assert (line["event"], line["user"]) == ("session.read", odd.replace("\ud800", "") or None)
