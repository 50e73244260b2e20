"""What an upgrade request asks for, and what it is refused for."""

from __future__ import annotations

import pytest
from starlette.types import Scope

from realtime.errors import InvalidRequest
from realtime.opening import Opening, read_opening, read_stream_opening
from realtime.protocol import JSON, MSGPACK


def scope(query: str | bytes = "", *subprotocols: str) -> Scope:
    return {"query_string": query.encode() if isinstance(query, str) else query, "subprotocols": list(subprotocols)}


def refused(query: str | bytes, *subprotocols: str) -> tuple[str, str | None]:
    """The code and the parameter of the error that refuses a request."""
    with pytest.raises(InvalidRequest) as refusal:
        read_opening(scope(query, *subprotocols))
    return refusal.value.code, refusal.value.param


def test_nothing_asked_for_is_a_new_session() -> None:
    """With all history, JSON, and no least interval."""
    assert read_opening(scope()) == Opening(JSON)


def test_everything_asked_for() -> None:
    """Each parameter has its place."""
    opening = read_opening(scope("session_id=s&after=session:4,r:0&delta_interval_ms=250", "realtime.v1.msgpack"))
    assert opening == Opening(MSGPACK, session_id="s", after={"session": 4, "r": 0}, delta_interval_s=0.25)


def test_after_may_be_percent_encoded() -> None:
    """As URL libraries write colons and commas."""
    assert read_opening(scope("session_id=s&after=session%3A4%2Cr%3A0")).after == {"session": 4, "r": 0}


def test_a_new_session_has_nothing_to_go_on_from() -> None:
    """Without a session's id, positions mean nothing; what can't be read is refused nevertheless."""
    assert read_opening(scope("after=session:4")).after is None
    assert refused("after=x") == ("invalid_positions", "after")


def test_the_last_of_several_counts() -> None:
    """A parameter that comes twice."""
    assert read_opening(scope("session_id=a&session_id=b")).session_id == "b"


def test_other_parameters_are_passed_over() -> None:
    """They may be a proxy's."""
    assert read_opening(scope("utm=1&x=")) == Opening(JSON)


@pytest.mark.parametrize(("query", "history"), [("history=all", True), ("history=none", False), ("", True)])
def test_history_is_all_or_none(query: str, history: bool) -> None:
    """All, where nothing is said."""
    assert read_opening(scope(query)).history is history


def test_after_has_precedence_over_history() -> None:
    """Who says what it has is sent the rest."""
    assert read_opening(scope("after=session:1&history=none")).history


@pytest.mark.parametrize(("ms", "seconds"), [("0", 0.0), ("1", 0.001), ("1000", 1.0), ("0050", 0.05)])
def test_an_interval_is_in_ms(ms: str, seconds: float) -> None:
    """From 0 to 1000."""
    assert read_opening(scope(f"delta_interval_ms={ms}")).delta_interval_s == seconds


@pytest.mark.parametrize("ms", ["", "-1", "1001", "99999", "1.5", "x", "1e2", "%D9%A3", "+1"])
def test_another_interval_is_refused(ms: str) -> None:
    """By its name."""
    assert refused(f"delta_interval_ms={ms}") == ("invalid_query", "delta_interval_ms")


@pytest.mark.parametrize(
    ("query", "refusal"),
    [
        ("session_id=", ("invalid_query", "session_id")),
        ("history=some", ("invalid_query", "history")),
        ("history=", ("invalid_query", "history")),
        ("after=", ("invalid_positions", "after")),
        ("after=session", ("invalid_positions", "after")),
        ("session_id=%ff", ("invalid_query", None)),
        ("&".join(["x=1"] * 101), ("invalid_query", None)),
        (b"session_id=\xc3\xa9", ("invalid_query", None)),
    ],
)
def test_a_bad_query_is_refused(query: str | bytes, refusal: tuple[str, str | None]) -> None:
    """By the parameter, where there is one to blame."""
    assert refused(query) == refusal


@pytest.mark.parametrize(
    ("offered", "codec"),
    [
        (["realtime.v1"], JSON),
        (["realtime.v1.msgpack"], MSGPACK),
        (["realtime.v1.msgpack", "realtime.v1"], MSGPACK),
        (["realtime.v1", "realtime.v1.msgpack"], JSON),
        (["other", "bearer.abc", "realtime.v1.msgpack"], MSGPACK),
    ],
)
def test_the_first_known_subprotocol_counts(offered: list[str], codec: object) -> None:
    """Among whatever else is offered."""
    assert read_opening(scope("", *offered)).codec is codec


@pytest.mark.parametrize("offered", [["other"], ["bearer.abc"], ["realtime.v2", "REALTIME.V1"]])
def test_unknown_subprotocols_alone_are_refused(offered: list[str]) -> None:
    """The client would not understand what it is sent."""
    assert refused("", *offered) == ("unknown_subprotocol", None)


# --- a stream of events ----------------------------------------------------------------------------------------------


def stream_scope(query: str = "", last_event_id: str | None = None) -> Scope:
    headers = [(b"last-event-id", last_event_id.encode())] if last_event_id is not None else []
    return {"query_string": query.encode(), "headers": headers}


def test_a_stream_opens_as_a_websocket_does() -> None:
    """The same parameters, but for the session's id, which its path has."""
    opening = read_stream_opening(stream_scope("after=session:4,r:0&delta_interval_ms=250&session_id=other"), "s")
    assert opening == Opening(JSON, session_id="s", after={"session": 4, "r": 0}, delta_interval_s=0.25)
    assert read_stream_opening(stream_scope("history=none"), "s") == Opening(JSON, session_id="s", history=False)


@pytest.mark.parametrize("query", ["", "after=session:1", "after=nonsense", "history=none"])
def test_last_event_id_wins(query: str) -> None:
    """An `EventSource` that comes back repeats the query that it began with."""
    opening = read_stream_opening(stream_scope(query, "session:41,r:512"), "s")
    assert opening == Opening(JSON, session_id="s", after={"session": 41, "r": 512}, comes_back=True)


def test_an_empty_last_event_id_is_none() -> None:
    """An `EventSource` that has seen nothing begins."""
    assert read_stream_opening(stream_scope("after=session:1", ""), "s") == Opening(
        JSON, session_id="s", after={"session": 1}
    )


@pytest.mark.parametrize(
    "last_event_id", ["x", "session:", "session:1,", "session:-1", "session:1é", "session:" + "9" * 16]
)
def test_a_last_event_id_that_is_none_of_ours_is_refused(last_event_id: str) -> None:
    """By its name."""
    with pytest.raises(InvalidRequest) as refusal:
        read_stream_opening(stream_scope("", last_event_id), "s")
    assert (refusal.value.code, refusal.value.param) == ("invalid_positions", "Last-Event-ID")
