"""Whatever a client sends becomes a message or an `InvalidRequest`, in both encodings."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from realtime.decoding import decode, event_id_of
from realtime.errors import InvalidRequest
from realtime.protocol import (
    CODECS,
    JSON,
    MAX_FRAME_BYTES,
    MSGPACK,
    AnyClientMessage,
    Codec,
    ItemCreate,
    ItemTruncate,
    NewItem,
    Overrides,
    Ping,
    ResponseCancel,
    ResponseCreate,
    SessionClose,
    SessionUpdate,
)

MESSAGES: list[AnyClientMessage] = [
    SessionUpdate(event_id="e1", session=Overrides(instructions="", model="m", on_disconnect="continue")),
    SessionUpdate(session=Overrides(max_output_tokens=1, disconnect_grace_ms=0, multitask_strategy="enqueue")),
    ItemCreate(item=NewItem(role="user", content="שלום 🙂\x00\u2028", id="A-z_9")),
    ItemTruncate(response_id="r", heard_chars=0),
    ResponseCreate(event_id="e" * 64, response_id="r" * 64, input="", metadata={"a": 1, "b": None, "c": 0.5, "": True}),
    ResponseCreate(model="m", multitask_strategy="interrupt"),
    ResponseCancel(response_id="r", heard_chars=5),
    ResponseCancel(response_id="r"),
    SessionClose(event_id="e"),
    Ping(),
]


def frame(codec: Codec, value: Any) -> str | bytes:
    """A value as a frame of a codec."""
    return json.dumps(value) if codec is JSON else msgspec.msgpack.encode(value)


def refused(codec: Codec, sent: str | bytes) -> tuple[str, str | None]:
    """The code and the parameter of the error that refuses a frame."""
    with pytest.raises(InvalidRequest) as refusal:
        decode(codec, sent)
    assert refusal.value.message.endswith(".")
    assert "\n" not in refusal.value.message
    return refusal.value.code, refusal.value.param


both = pytest.mark.parametrize("codec", CODECS.values(), ids=lambda codec: codec.subprotocol)


@both
@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_message_is_understood(codec: Codec, message: AnyClientMessage) -> None:
    """What is encoded is decoded to the same."""
    assert decode(codec, codec.encode(message)) == message  # type: ignore[arg-type]


@both
def test_the_type_may_stand_anywhere(codec: Codec) -> None:
    """The order of fields means nothing."""
    assert decode(codec, frame(codec, {"event_id": "e", "type": "ping"})) == Ping(event_id="e")


@both
def test_null_means_not_given(codec: Codec) -> None:
    """An optional field may be sent as `null`."""
    sent = {"type": "response.create", "input": None, "model": None, "event_id": None}
    assert decode(codec, frame(codec, sent)) == ResponseCreate()


@both
@pytest.mark.parametrize("value", [[], None, 1, "ping", True, [{"type": "ping"}]])
def test_what_is_no_object_is_refused(codec: Codec, value: Any) -> None:
    """A message is an object."""
    assert refused(codec, frame(codec, value)) == ("invalid_message", None)


@both
@pytest.mark.parametrize(
    "value", [{}, {"type": "nope"}, {"type": 1}, {"type": None}, {"type": ["ping"]}, {"Type": "ping"}]
)
def test_an_unknown_type_is_refused(codec: Codec, value: Any) -> None:
    """So is none, and one that is no text."""
    assert refused(codec, frame(codec, value)) == ("unknown_type", "type")


@both
@pytest.mark.parametrize(
    ("value", "param"),
    [
        ({"type": "ping", "x": 1}, "x"),
        ({"type": "session.update", "session": {"x": 1}}, "session.x"),
        ({"type": "session.update", "session": {"type": "ping"}}, "session.type"),
        ({"type": "conversation.item.create", "item": {"role": "user", "content": "", "x": 1}}, "item.x"),
        ({"type": "response.create", "session": {}}, "session"),
    ],
)
def test_an_unknown_field_is_refused(codec: Codec, value: Any, param: str) -> None:
    """By its name and place."""
    assert refused(codec, frame(codec, value)) == ("unknown_field", param)


@both
@pytest.mark.parametrize(
    ("value", "param"),
    [
        ({"type": "ping", "event_id": 1}, "event_id"),
        ({"type": "ping", "event_id": ""}, "event_id"),
        ({"type": "ping", "event_id": "e" * 65}, "event_id"),
        ({"type": "response.create", "input": ["x"]}, "input"),
        ({"type": "response.create", "response_id": ""}, "response_id"),
        ({"type": "response.create", "response_id": "r" * 65}, "response_id"),
        ({"type": "response.create", "response_id": "a b"}, "response_id"),
        ({"type": "response.create", "response_id": "ab\n"}, "response_id"),
        ({"type": "response.create", "response_id": "é"}, "response_id"),
        ({"type": "response.create", "max_output_tokens": 0}, "max_output_tokens"),
        ({"type": "response.create", "max_output_tokens": "9"}, "max_output_tokens"),
        ({"type": "response.create", "disconnect_grace_ms": -1}, "disconnect_grace_ms"),
        ({"type": "response.create", "disconnect_grace_ms": 3_600_001}, "disconnect_grace_ms"),
        ({"type": "response.create", "metadata": []}, "metadata"),
        ({"type": "response.create", "metadata": {"a": []}}, "metadata[...]"),
        ({"type": "response.create", "metadata": {"a": {}}}, "metadata[...]"),
        ({"type": "response.create", "multitask_strategy": "x"}, "multitask_strategy"),
        ({"type": "session.update", "session": {"on_disconnect": "x"}}, "session.on_disconnect"),
        ({"type": "session.update", "session": {"model": 1}}, "session.model"),
        ({"type": "session.update", "session": None}, "session"),
        ({"type": "conversation.item.create", "item": {"role": "tool", "content": ""}}, "item.role"),
        ({"type": "conversation.item.create", "item": {"role": "user", "content": None}}, "item.content"),
        ({"type": "conversation.item.create", "item": {"role": "user", "content": "", "id": "é"}}, "item.id"),
        ({"type": "conversation.item.truncate", "response_id": "r", "heard_chars": -1}, "heard_chars"),
        ({"type": "conversation.item.truncate", "response_id": "r", "heard_chars": 1.5}, "heard_chars"),
        ({"type": "conversation.item.truncate", "response_id": "r", "heard_chars": True}, "heard_chars"),
        ({"type": "response.cancel", "response_id": None}, "response_id"),
    ],
)
def test_a_wrong_value_is_refused(codec: Codec, value: Any, param: str) -> None:
    """By the place of the field."""
    assert refused(codec, frame(codec, value)) == ("invalid_message", param)


@both
@pytest.mark.parametrize(
    "value", [{"type": "session.update"}, {"type": "response.cancel"}, {"type": "conversation.item.create", "item": {}}]
)
def test_a_missing_field_is_refused(codec: Codec, value: Any) -> None:
    """What a message needs it has to have."""
    assert refused(codec, frame(codec, value))[0] == "invalid_message"


BAD_JSON = ["", " ", "x", "{", '{"type":"ping"', '{"type":"ping"} x', '{"type":"ping"}{}', "{'type':'ping'}", "\x00"]
BAD_JSON_TEXT = [f'{{"type":"ping","event_id":"{text}"}}' for text in ("\\ud800", "\ud800", "\x00")]
BAD_JSON_NUMBERS = ['{"type":"response.create","metadata":{"a":NaN}}', '{"type":"response.create","metadata":{"a":01}}']


@pytest.mark.parametrize("sent", BAD_JSON + BAD_JSON_TEXT + BAD_JSON_NUMBERS)
def test_what_is_no_json_is_refused(sent: str) -> None:
    """Cut short, doubled, lone surrogates (escaped or not), raw control characters, numbers that JSON has not."""
    assert refused(JSON, sent) == ("invalid_json", None)
    assert event_id_of(JSON, sent) in (None, "")


@pytest.mark.parametrize("field", ["heard_chars", "event_id"])
def test_a_huge_number_is_refused(field: str) -> None:
    """More digits than any number needs are an error, not a minute of work."""
    values = {"type": "conversation.item.truncate", "response_id": "r", field: 1}
    sent = json.dumps(values).replace(": 1", ": 1" + "0" * 60_000)
    with pytest.raises(InvalidRequest):
        decode(JSON, sent)


@both
@pytest.mark.parametrize("depth", [100, 100_000])
def test_deep_nesting_is_refused(codec: Codec, depth: int) -> None:
    """Wherever it stands, and however deep."""
    opening, closing = ('{"a":', "1" + "}" * depth) if codec is JSON else (b"\x81\xa1a", b"\x01")
    nested = opening * depth + closing  # type: ignore[operator]
    head = '{"type":"response.create","metadata":' if codec is JSON else b"\x82\xa4type\xafresponse.create\xa8metadata"
    for sent in (nested, head + nested + ("}" if codec is JSON else b"")):  # type: ignore[operator]
        with pytest.raises(InvalidRequest):
            decode(codec, sent)
        assert event_id_of(codec, sent) is None


PING = msgspec.msgpack.encode({"type": "ping", "event_id": "x"})
BAD_MSGPACK = [
    b"",
    b"\xc1",
    PING[:-1],
    PING + b"\x00",
    PING.replace(b"\xa1x", b"\xa1\xff"),
    b"\xdf\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xffabc",
    PING.replace(b"\xa1x", b"\xdb\xff\xff\xff\xffx"),
]


@pytest.mark.parametrize("sent", BAD_MSGPACK, ids=repr)
def test_what_is_no_messagepack_is_refused(sent: bytes) -> None:
    """Empty, reserved bytes, cut short, followed by more, not UTF-8, lengths that nothing follows."""
    assert refused(MSGPACK, sent) == ("invalid_messagepack", None)


@pytest.mark.parametrize("value", [b"x", msgspec.msgpack.Ext(5, b"x"), datetime.now(UTC)], ids=["bytes", "ext", "time"])
def test_what_json_has_not_is_refused(value: Any) -> None:
    """Bytes, extensions and times, as values or keys."""
    assert refused(MSGPACK, frame(MSGPACK, {"type": "ping", "event_id": value})) == ("invalid_message", "event_id")
    sent = {"type": "response.create", "metadata": {"a": value}}
    assert refused(MSGPACK, frame(MSGPACK, sent)) == ("invalid_message", "metadata[...]")


@pytest.mark.parametrize("key", [1, None, b"type"])
def test_keys_are_text(key: Any) -> None:
    """A map of MessagePack may have other keys; a message may not."""
    assert refused(MSGPACK, frame(MSGPACK, {key: "ping"})) == ("invalid_message", None)


@both
@pytest.mark.parametrize(
    "value",
    [
        {"type": "response.create", "multitask_strategy": "SECRET"},
        {"type": "conversation.item.create", "item": {"role": "SECRET", "content": "SECRET"}},
        {"type": "conversation.item.create", "item": {"role": "user", "content": ["SECRET"]}},
        {"type": "response.create", "response_id": "SECRET SECRET"},
        {"type": "SECRET"},
    ],
)
def test_an_error_s_words_hold_nothing_that_was_sent(codec: Codec, value: Any) -> None:
    """Messages of errors reach logs; what a user said must not."""
    with pytest.raises(InvalidRequest) as refusal:
        decode(codec, frame(codec, value))
    assert "SECRET" not in refusal.value.message


@both
def test_an_error_stays_small(codec: Codec) -> None:
    """A field's name, however long, is told in part."""
    for value in ({"type": "ping", "x" * 10_000: 1}, {"type": "session.update", "session": {"x" * 10_000: 1}}):
        assert len(str(refused(codec, frame(codec, value))[1])) <= 200


# --- the event_id of what is refused -------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    "value",
    [
        {"type": "nope", "event_id": "e1"},
        {"event_id": "e1"},
        {"type": "ping", "x": [[1]], "event_id": "e1"},
        {"type": "response.create", "metadata": {"event_id": "inner"}, "input": 1, "event_id": "e1"},
    ],
)
def test_the_event_id_of_a_refused_message_is_found(codec: Codec, value: Any) -> None:
    """Wherever it stands among fields that are wrong."""
    sent = frame(codec, value)
    refused(codec, sent)
    assert event_id_of(codec, sent) == "e1"


@both
@pytest.mark.parametrize("event_id", [None, "", 1, ["e1"], "e" * 65])
def test_an_event_id_that_is_none_is_not_found(codec: Codec, event_id: Any) -> None:
    """What no client may choose is not told back to it."""
    assert event_id_of(codec, frame(codec, {"type": "nope", "event_id": event_id})) is None


@both
def test_there_may_be_no_event_id(codec: Codec) -> None:
    """Nor anything to have one."""
    values: list[Any] = [{"type": "nope"}, [], None, 1]
    for value in values:
        assert event_id_of(codec, frame(codec, value)) is None


# --- fuzz ----------------------------------------------------------------------------------------------------------

FUZZ = settings(max_examples=150, deadline=None, phases=set(Phase) - {Phase.explain})
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = sorted({name for message in MESSAGES for name in (*message.__struct_fields__, "role", "content", "id", "type")})


@st.composite
def altered(draw: st.DrawFn) -> Any:
    """A valid message with some fields replaced, added or left out."""
    message: Any = msgspec.to_builtins(draw(st.sampled_from(MESSAGES)))
    for _ in range(draw(st.integers(0, 3))):
        target = draw(st.sampled_from([message, *(part for part in message.values() if isinstance(part, dict))]))
        name = draw(st.sampled_from(NAMES))
        if draw(st.booleans()):
            target[name] = draw(JSON_VALUES)
        else:
            target.pop(name, None)
    return message


@st.composite
def damaged(draw: st.DrawFn, codec: Codec) -> Any:
    """The frame of such a message, with some characters or bytes replaced, put in or left out."""
    value = draw(altered())
    sent: Any
    try:
        sent = frame(codec, value)
    except (OverflowError, msgspec.MsgspecError):  # an integer that this encoding does not have
        return draw(st.text() if codec is JSON else st.binary())
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(sent)))
        to = at + draw(st.integers(0, 3))
        put: Any = draw(st.text(max_size=3) if codec is JSON else st.binary(max_size=3))
        sent = sent[:at] + put + sent[to:]
    return sent


def check(codec: Codec, sent: str | bytes) -> None:
    """A frame becomes a message that encodes again, or an error that can be told."""
    event_id = event_id_of(codec, sent)
    try:
        message: Any = decode(codec, sent)
    except InvalidRequest as error:
        told = codec.encode(error.as_message(event_id=event_id))
        assert len(told) <= MAX_FRAME_BYTES
        return
    again: Any = decode(codec, codec.encode(message))
    assert codec.encode(again) == codec.encode(message)


@FUZZ
@given(damaged(JSON))
@example('{"type":"response.create","metadata":{"a":1180591620717411303424}}')
def test_any_json_is_a_message_or_an_error(sent: str) -> None:
    """Mutated valid messages: `InvalidRequest`, or a message that encodes again."""
    check(JSON, sent)


@FUZZ
@given(damaged(MSGPACK))
@example(frame(MSGPACK, {"type": "response.create", "metadata": {"a": float("nan")}}))
def test_any_messagepack_is_a_message_or_an_error(sent: bytes) -> None:
    """The same for MessagePack."""
    check(MSGPACK, sent)


@FUZZ
@given(st.binary(max_size=40))
def test_any_bytes_are_a_message_or_an_error(sent: bytes) -> None:
    """And for what never was a message."""
    check(MSGPACK, sent)
    check(JSON, sent)
