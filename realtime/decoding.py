"""Turns what a client sent into a message, or into the typed error that says what is wrong with it."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from msgspec import Struct

from realtime.errors import InvalidRequest
from realtime.protocol import MSGPACK, AnyClientMessage, Codec

MAX_PARAM_CHARS = 100
_PARAM = re.compile(r" - at `(?:key in )?\$\.?([^`]*)`$")


class _Envelope(Struct):
    event_id: str | None = None


def decode(codec: Codec, frame: str | bytes) -> AnyClientMessage:
    """The message in a frame. Raises `InvalidRequest`."""
    try:
        return codec.decode(frame)
    except msgspec.ValidationError as error:
        raise invalid(error) from None
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        name = "MessagePack" if codec is MSGPACK else "JSON"
        raise InvalidRequest(f"invalid_{name.lower()}", f"The message is not {name}.") from None


def event_id_of(codec: Codec, frame: str | bytes) -> str | None:
    """The `event_id` of a frame that could not be decoded as a message, where it has one."""
    decode_envelope: Any = msgspec.msgpack.decode if codec is MSGPACK else msgspec.json.decode
    try:
        event_id: str | None = decode_envelope(frame, type=_Envelope).event_id
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    return event_id if event_id and len(event_id) <= 64 else None


def field_of(error: BaseException) -> str | None:
    """The field that msgspec found wrong, by the names of our own structs; `None` where it says none."""
    found = _PARAM.search(str(error)) if isinstance(error, msgspec.ValidationError) else None
    return found[1][:MAX_PARAM_CHARS] if found else None


def invalid(error: msgspec.ValidationError) -> InvalidRequest:
    """What msgspec found wrong, as an error of the protocol: the field in `param`, the reason in `message`."""
    text = str(error)
    found = _PARAM.search(text)
    param = found[1][:MAX_PARAM_CHARS] if found else None
    reason = text[: found.start()] if found else text
    if param == "type" or "required field `type`" in reason:
        return InvalidRequest("unknown_type", "There is no such type of message.", param="type")
    if reason.startswith("Object contains unknown field"):
        field = reason.split("`")[1][:MAX_PARAM_CHARS]
        return InvalidRequest("unknown_field", "There is no such field.", param=f"{param}.{field}" if param else field)
    if reason.startswith("Invalid "):  # it repeats the value, which is the client's
        reason = "That value is not allowed"
    return InvalidRequest("invalid_message", f"{reason}.", param=param or None)
