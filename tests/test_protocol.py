"""The small rules of the wire: lengths of text, ids, times, and both encodings of what the server sends."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realtime.protocol import (
    CODECS,
    JSON,
    MSGPACK,
    ChannelEvent,
    ErrorBody,
    ErrorMessage,
    OutputTextDelta,
    Overrides,
    ParticipantJoined,
    Pong,
    ResponseDone,
    ServerMessage,
    SessionCreated,
    cut_utf16,
    new_id,
    timestamp,
    utf16_length,
)
from realtime.protocol import (
    given as given_settings,
)
from tests.contract import begun, closed, created, done, item, participant, session


@pytest.mark.parametrize(
    ("text", "units"),
    [("", 0), ("abc", 3), ("é", 1), ("🙂", 2), ("a🙂b", 4), ("e\u0301", 2), ("\x00", 1), ("👩\u200d👧", 5)],
)
def test_lengths_are_utf16_code_units(text: str, units: int) -> None:
    """As `String.length` counts them in JavaScript."""
    assert utf16_length(text) == units


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20), st.integers(0, 45))
def test_a_cut_is_the_longest_prefix_that_fits(text: str, units: int) -> None:
    """It has at most so many units, and one more character would be too many."""
    cut = cut_utf16(text, units)
    assert text.startswith(cut)
    assert utf16_length(cut) <= units
    assert cut == text or utf16_length(text[: len(cut) + 1]) > units


def test_an_id_has_128_random_bits() -> None:
    """Behind its prefix, in characters that any id may have."""
    ids = {new_id("sess") for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch(r"sess_[0-9a-f]{32}", made) for made in ids)


def test_a_timestamp_is_utc() -> None:
    """RFC 3339 with microseconds and a Z, also for a time that is to come."""
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", timestamp())
    ahead = datetime.fromisoformat(timestamp(in_s=3600)) - datetime.now(UTC)
    assert 3590 < ahead.total_seconds() <= 3600


def test_given_are_the_settings_that_are_not_none() -> None:
    """An empty text and a 0 are given."""
    overrides = Overrides(instructions="", disconnect_grace_ms=0)
    assert given_settings(overrides) == {"instructions": "", "disconnect_grace_ms": 0}
    assert given_settings(Overrides()) == {}


def test_settings_are_updated_by_name() -> None:
    """What is not given stays."""
    assert session().updated(Overrides(model="m2")) == session(model="m2")
    assert session().updated(Overrides()) == session()


MESSAGES: list[ServerMessage] = [
    SessionCreated(session=session(), connection_id="c", positions={"session": 1}, participants=[participant("c")]),
    ParticipantJoined(participant=participant("c")),
    ErrorMessage(error=ErrorBody(type="t", code="c", message="m", fatal=False)),
    Pong(event_id="e"),
    item("🙂\u2028\x00"),
    created("r"),
    begun("r"),
    OutputTextDelta(response_id="r", delta="\r\nשלמה", seq=7, merged=3, replay=True, reset=True),
    done("r"),
    closed(),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_both_encodings_say_the_same(message: ServerMessage) -> None:
    """JSON and MessagePack hold the same structures, told apart by `type`."""
    text, packed = JSON.encode(message), MSGPACK.encode(message)
    assert isinstance(text, str)
    assert isinstance(packed, bytes)
    plain = json.loads(text)
    assert plain == msgspec.msgpack.decode(packed)
    assert plain["type"] == type(message).__struct_config__.tag


def test_what_a_live_event_need_not_say_is_left_out() -> None:
    """`merged` 1, no replay and no reset are not written; `seq` is."""
    delta = OutputTextDelta(response_id="r", delta="", seq=1)
    assert JSON.encode(delta) == '{"type":"response.output_text.delta","seq":1,"response_id":"r","delta":""}'


def test_an_error_says_whether_it_is_fatal() -> None:
    """Always; what it does not have it leaves out."""
    error = ErrorMessage(error=ErrorBody(type="t", code="c", message="m", fatal=False))
    assert JSON.encode(error) == '{"type":"error","error":{"type":"t","code":"c","message":"m","fatal":false}}'


def test_a_response_s_end_always_has_a_stop_reason() -> None:
    """Also where there was none: `null`."""
    end = msgspec.structs.replace(done("r"), stop_reason=None)
    assert json.loads(str(JSON.encode(end)))["stop_reason"] is None
    assert "error" not in json.loads(str(JSON.encode(end)))


@pytest.mark.parametrize("event", [created("r", Overrides(instructions="secret")), begun("r", "inst_secret")])
def test_what_only_servers_need_is_not_for_clients(event: ChannelEvent) -> None:
    """A response's overrides, and which instance runs it, in either encoding."""
    for codec in (JSON, MSGPACK):
        assert "secret" in str(codec.encode(event))
        assert "secret" not in str(codec.encode(event.for_clients()))
    assert event.for_clients() in (created("r"), begun("r"))


def test_what_clients_may_know_is_for_them() -> None:
    """All of any other event."""
    for event in (item("x"), done("r"), closed(), OutputTextDelta(response_id="r", delta="x", seq=3)):
        assert event.for_clients() is event


def test_ends_end_their_channels() -> None:
    """A response's and the session's, and nothing else."""
    assert ResponseDone.ends_channel
    assert closed().ends_channel
    assert not any(event.ends_channel for event in (begun("r"), created("r"), item("")))


def test_subprotocols_have_codecs() -> None:
    """One each, with its kind of frame."""
    assert {name: codec.frame for name, codec in CODECS.items()} == {
        "realtime.v1": "text",
        "realtime.v1.msgpack": "bytes",
    }
