"""What the Python client decides without a network."""

from __future__ import annotations

import random
from typing import Any

import pytest

from realtime.client.backoff import Backoff
from realtime.client.errors import MessageTooLarge, QueueFull
from realtime.client.events import UnknownEvent, typed
from realtime.client.outbox import Outbox
from realtime.client.refusals import end_of_stream, refusal, stranger
from realtime.client.state import State
from realtime.client.streams import EventQueue
from realtime.client.wire import Closed, Target, checked_url, message
from realtime.protocol import OutputTextDelta, Pong

TARGET = Target(url="http://h", session_id=None, query={}, token=None)


def delta(seq: int, text: str, **more: Any) -> dict[str, Any]:
    return {"type": "response.output_text.delta", "response_id": "resp_1", "seq": seq, "delta": text, **more}


# --- messages --------------------------------------------------------------------------------------------------------


def test_messages_are_structs() -> None:
    """Fields that a newer server adds are passed over."""
    assert typed({**delta(3, "a"), "new": 1}) == OutputTextDelta(response_id="resp_1", seq=3, delta="a")


@pytest.mark.parametrize("fields", [{"type": "made.up", "seq": 1}, {"type": "response.done", "status": "new"}])
def test_what_is_not_known_is_no_error(fields: dict[str, Any]) -> None:
    """Neither a kind, nor a value of one that is known."""
    assert typed(fields) == UnknownEvent(type=fields["type"], fields=fields)


# --- positions -------------------------------------------------------------------------------------------------------


def test_events_of_unknown_kinds_move_positions() -> None:
    """In whichever channel they are."""
    state = State("sess_1", "all")
    for event in ({"type": "a", "seq": 1}, {"type": "b", "task_id": "task_1", "seq": 4, "merged": 4}):
        assert state.advance(event)
        state.fold(event)
    assert state.resumption() == {"after": "session:1,task_1:4"}


@pytest.mark.parametrize("wrong", [delta(3, "c"), delta(2, "ab", merged=2), delta(1, "a")])
def test_a_gap_and_a_double_are_not_applied(wrong: dict[str, Any]) -> None:
    """The position stays where it was."""
    state = State("sess_1", "all")
    assert state.advance(delta(1, "a"))
    assert not state.advance(wrong)
    assert state.positions == {"resp_1": 1}


def test_a_reset_drops_what_is_there() -> None:
    """Of that channel alone."""
    state = State("sess_1", "all")
    for event in (delta(9, "shown", merged=9), delta(2, "stored", merged=2, reset=True)):
        assert state.advance(event)
        state.fold(event)
    assert (state.responses["resp_1"].text, state.positions["resp_1"]) == ("stored", 2)


# --- iterating -------------------------------------------------------------------------------------------------------


async def test_what_waits_is_joined_by_the_merge_rules() -> None:
    """Neighbours of one kind in one channel: deltas one after the other, of progress the newest."""
    queue = EventQueue()
    progress = {"type": "task.progress", "task_id": "task_1", "attempt": 1, "progress": 1}
    events = [delta(1, "a"), delta(3, "bc", merged=2), progress | {"seq": 2}, progress | {"seq": 3, "progress": 2}]
    for event in [*events, delta(4, "d", reset=True), {"type": "pong"}, {"type": "pong"}]:
        queue.push(event)
    queue.finish()
    taken = [event async for event in _all(queue)]
    assert [event.get("merged") for event in taken] == [3, 2, None, None, None]
    assert (taken[0]["delta"], taken[0]["seq"], taken[1]["progress"]) == ("abc", 3, 2)
    assert typed(taken[-1]) == Pong()


async def test_what_waits_is_put_together_once() -> None:
    """When it is taken: with each piece it would take the square of their number."""
    queue = EventQueue()
    text = Text("a")
    for seq in range(1, 6):
        queue.push({**delta(seq, ""), "delta": text})
    assert Text.added == 0
    queue.push({"type": "made.up.delta", "delta": {"of": "another kind"}})
    queue.finish()
    assert [event["delta"] async for event in _all(queue)] == ["aaaaa", {"of": "another kind"}]


class Text(str):
    """Counts how often one is added to another."""

    added = 0

    def __add__(self, other: str) -> str:
        Text.added += 1
        return Text(super().__add__(other))


async def _all(queue: EventQueue) -> Any:
    while (event := await queue.take()) is not None:
        yield event


# --- commands --------------------------------------------------------------------------------------------------------


def test_commands_wait_in_their_order_up_to_a_limit() -> None:
    """What is about one connection alone does not wait; a cancel is done with once its response is."""
    outbox = Outbox(2, 200)
    outbox.add({"type": "ping", "event_id": "1"})
    outbox.add({"type": "response.cancel", "response_id": "resp_1", "event_id": "2"})
    outbox.add({"type": "response.cancel", "response_id": "resp_1", "heard_chars": 3, "event_id": "3"})
    with pytest.raises(QueueFull):
        outbox.add({"type": "session.update", "event_id": "4"})
    outbox.settle_cancels("resp_1")
    assert [command["event_id"] for command in outbox.waiting] == ["3"]


def test_a_command_that_is_too_large_is_not_kept() -> None:
    """By its bytes, not its characters."""
    outbox = Outbox(2, 80)
    outbox.add({"type": "response.create", "input": "e" * 20, "event_id": "1"})
    with pytest.raises(MessageTooLarge):
        outbox.add({"type": "response.create", "input": "é" * 20, "event_id": "2"})
    assert [command["event_id"] for command in outbox.waiting] == ["1"]


# --- coming back -----------------------------------------------------------------------------------------------------


def test_waits_double_with_jitter_until_a_connection_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a quarter of a second to ten; a connection that was dropped at once does not count."""
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    backoff = Backoff()
    assert [backoff.delay_s(0) for _ in range(7)] == [0.25, 0.5, 1, 2, 4, 8, 10]
    backoff.opened(10)
    assert backoff.delay_s(11) == 10
    backoff.opened(20)
    assert backoff.delay_s(26) == 0.25


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h:1", ("ws://h:1/v1/realtime?session_id=s&after=session%3A1", "http://h:1/v1/sessions")),
        (
            "wss://h/ai/v1/realtime",
            ("wss://h/ai/v1/realtime?session_id=s&after=session%3A1", "https://h/ai/v1/sessions"),
        ),
        (
            "wss://h/v1/realtime/",
            ("wss://h/v1/realtime?session_id=s&after=session%3A1", "https://h/v1/sessions"),
        ),
        ("https://h/ai/", ("wss://h/ai/v1/realtime?session_id=s&after=session%3A1", "https://h/ai/v1/sessions")),
    ],
)
def test_an_address_may_be_the_server_s_or_its_endpoint(url: str, expected: tuple[str, str]) -> None:
    """Also below a path."""
    target = Target(url=url, session_id="s", query={"after": "session:1"}, token=None)
    assert (target.websocket(), target.http("sessions")) == expected


@pytest.mark.parametrize("url", ["", "h:1", "localhost:8000", "ftp://h", "http://", "http://h:x", "http://h:99999"])
def test_what_is_no_address_is_refused(url: str) -> None:
    """Before a connection is tried."""
    with pytest.raises(ValueError, match=r"address|[Pp]ort"):
        checked_url(url)


def test_what_is_not_the_server_s_answer_is_no_refusal() -> None:
    """A proxy's page says nothing about the session."""
    for body in (b"<html>", b'{"error": "No."}', b'{"error": {"type": "t", "code": 5, "message": null}}'):
        assert refusal(403, body) is None
    refused = refusal(404, b'{"error": {"type": "not_found_error", "code": "session_not_found", "message": "No."}}')
    assert refused is not None
    assert refused.code == 4404


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        (429, {"retry-after": "3"}, (1013, "HTTP 429", 3)),
        (503, {"Retry-After": "86400"}, (1013, "HTTP 503", 60)),
        (503, {"Retry-After": "Sun, 06 Nov 1994 08:49:37 GMT"}, (1013, "HTTP 503", 0)),
        (502, {}, (1013, "HTTP 502", 0)),
        (301, {"Location": "https://h/"}, (1006, "HTTP 301, a redirect to 'https://h/'", 0)),
        (302, {"Location": "/\x1b[2J"}, (1006, "HTTP 302, a redirect to '/\\x1b[2J'", 0)),
    ],
)
def test_what_is_on_the_way_may_say_when_to_come_back(
    status: int, headers: dict[str, str], expected: tuple[int, str, float]
) -> None:
    """But keeps nobody away for more than a minute; and it is said where it redirects to."""
    closed = stranger(TARGET, status, headers.items())
    assert (closed.code, closed.reason, closed.retry_after_s) == expected


@pytest.mark.parametrize("data", [b"", b"<html>", b"\xff", b"null", b"[1]", b"{}", b'{"type": 1}', b'{"a":' * 9000])
def test_what_can_not_be_read_is_a_loss(data: bytes) -> None:
    """Of the connection: something on the way speaks in the server's place."""
    with pytest.raises(Closed) as closed:
        message(data)
    assert (closed.value.code, closed.value.reason) == (1006, "unreadable")


@pytest.mark.parametrize(
    ("environment", "url", "proxy"),
    [
        ({}, "http://h", None),
        ({"http_proxy": "http://p:1"}, "ws://h", "http://p:1"),
        ({"http_proxy": "p:1"}, "http://h", "http://p:1"),
        ({"http_proxy": "http://p:1"}, "wss://h", None),
        ({"https_proxy": "http://ann:secret@p:1"}, "wss://h", "http://ann:secret@p:1"),
        ({"http_proxy": "http://p:1", "no_proxy": "h,127.0.0.1"}, "http://h:8000", None),
    ],
)
def test_the_environment_names_a_proxy(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], url: str, proxy: str | None
) -> None:
    """By the scheme of the address over HTTP, for both transports; its password is told to nobody."""
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    target = Target(url=url, session_id=None, query={}, token=None)
    assert target.proxy == proxy
    told = target.told(f"{proxy} is away")
    assert told == ("http://p:1 is away, by way of the proxy http://p:1" if proxy else "None is away")


@pytest.mark.parametrize(
    ("last", "code"),
    [
        ({}, 1006),
        ({"type": "session.closed", "reason": "closed"}, 1000),
        ({"type": "error", "error": {"type": "not_found_error", "code": "session_deleted", "fatal": True}}, 4410),
        ({"type": "error", "error": {"type": "authentication_error", "code": "token_expired", "fatal": True}}, 4401),
        ({"type": "error", "error": {"type": "not_found_error", "code": "x", "fatal": False}}, 1006),
    ],
)
def test_the_end_of_a_stream_means_what_came_last(last: dict[str, Any], code: int) -> None:
    """In the WebSocket's close codes."""
    assert end_of_stream(last).code == code
