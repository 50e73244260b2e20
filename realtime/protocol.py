"""The wire protocol, version 1: every message that a client or the server may send.

Client messages are decoded into these structs at the edge, so nothing behind it sees a raw dictionary. Server
messages that belong to a channel are `ChannelEvent`s; they are also what the logs hold, and get their `seq` only
when they are sent. Lengths of text are UTF-16 code units, times are RFC 3339 in UTC.
"""

from __future__ import annotations

import enum
import secrets
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
from msgspec import Meta, Struct

SESSION_CHANNEL = "session"
CONTROL_CHANNEL = "control"
RESERVED_IDS = frozenset({SESSION_CHANNEL, CONTROL_CHANNEL})

MAX_FRAME_BYTES = 256 * 1024
MAX_FRAME_CHARS = 40_000
"""The most characters that deltas are joined to: encoded they stay under `MAX_FRAME_BYTES` even if each one is a
control character, which JSON writes with six bytes."""
MAX_UNFINISHED_CHANNELS = 64

Id = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z")]
EventId = Annotated[str, Meta(min_length=1, max_length=64)]
Chars = Annotated[int, Meta(ge=0)]
Tokens = Annotated[int, Meta(ge=1)]
GraceMs = Annotated[int, Meta(ge=0, le=3_600_000)]
Scalar = str | int | float | bool | None

Role = Literal["user", "assistant", "system"]
OnDisconnect = Literal["cancel", "continue"]
MultitaskStrategy = Literal["reject", "interrupt", "enqueue"]
ResponseStatus = Literal["completed", "cancelled", "failed", "incomplete"]
TaskEnd = Literal["complete", "failed", "cancelled"]


class CloseCode(enum.IntEnum):
    """Why a WebSocket is closed."""

    NORMAL = 1000
    UNSUPPORTED_DATA = 1003
    INTERNAL_ERROR = 1011
    TRY_AGAIN_LATER = 1013
    TOO_MANY_MALFORMED = 4400
    UNAUTHENTICATED = 4401
    FORBIDDEN = 4403
    NOT_FOUND = 4404
    SLOW_READER = 4408
    DELETED = 4410
    LIMITED = 4429


class Merge(enum.Enum):
    """What several waiting neighbours of one kind in one channel become when they are sent."""

    KEEP = "keep"
    CONCATENATE = "concatenate"
    LATEST = "latest wins"


def new_id(prefix: str) -> str:
    """An id that the server makes: the prefix and 128 random bits."""
    return f"{prefix}_{secrets.token_hex(16)}"


def is_task_id(session_id: str) -> bool:
    """Whether a session is the hidden one of a task that was made without a session, whose id is the task's."""
    return session_id.startswith("task_")


def timestamp(*, in_s: float = 0.0) -> str:
    """The time `in_s` seconds from now, as RFC 3339 in UTC with microseconds."""
    return _rfc3339(datetime.now(UTC) + timedelta(seconds=in_s))


def timestamp_of(epoch_s: float) -> str:
    """A time in seconds since the epoch, in the same form."""
    return _rfc3339(datetime.fromtimestamp(epoch_s, UTC))


def seconds_since(at: str) -> float:
    """How long a time of that form was ago, by this machine's clock."""
    return (datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds()


def _rfc3339(at: datetime) -> str:
    return at.isoformat(timespec="microseconds").replace("+00:00", "Z")


def utf16_length(text: str) -> int:
    """The length of `text` in UTF-16 code units: what `String.length` counts in JavaScript."""
    return len(text) if text.isascii() else len(text.encode("utf-16-le")) // 2


def cut_utf16(text: str, units: int) -> str:
    """The longest prefix of `text` of at most `units` UTF-16 code units that splits no character."""
    if text.isascii():
        return text[:units]
    return text.encode("utf-16-le")[: units * 2].decode("utf-16-le", errors="ignore")


# --- what a client sends -------------------------------------------------------------------------------------------


class Overrides(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A session's settings as a client may set them; `None` means: not given. Empty `instructions` clear them."""

    instructions: str | None = None
    model: str | None = None
    max_output_tokens: Tokens | None = None
    on_disconnect: OnDisconnect | None = None
    disconnect_grace_ms: GraceMs | None = None
    multitask_strategy: MultitaskStrategy | None = None


class ClientMessage(
    Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag_field="type"
):
    """One frame from a client."""

    event_id: EventId | None = None


class SessionUpdate(ClientMessage, kw_only=True, frozen=True, tag="session.update"):
    """Changes the session's settings. Owner only."""

    session: Overrides


class NewItem(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A conversation item as a client gives it."""

    role: Role
    content: str
    id: Id | None = None


class ItemCreate(ClientMessage, kw_only=True, frozen=True, tag="conversation.item.create"):
    """Adds an item to the conversation."""

    item: NewItem


class ItemTruncate(ClientMessage, kw_only=True, frozen=True, tag="conversation.item.truncate"):
    """The listener heard only so much of that answer: the conversation keeps that much."""

    response_id: Id
    heard_chars: Chars


class ResponseCreate(Overrides, kw_only=True, frozen=True, tag_field="type", tag="response.create"):
    """Starts a response, with `input` as a user item before it where given."""

    event_id: EventId | None = None
    response_id: Id | None = None
    input: str | None = None
    metadata: dict[str, Scalar] | None = None


class ResponseCancel(ClientMessage, kw_only=True, frozen=True, tag="response.cancel"):
    """Stops a response; with `heard_chars` also truncates it."""

    response_id: Id
    heard_chars: Chars | None = None


class TaskCreate(ClientMessage, kw_only=True, frozen=True, tag="task.create"):
    """Starts a background task; what its `input` must be, the task of that `name` says."""

    task_id: Id | None = None
    name: str
    input: Any


class TaskCancel(ClientMessage, kw_only=True, frozen=True, tag="task.cancel"):
    """Stops a task."""

    task_id: Id


class SessionClose(ClientMessage, kw_only=True, frozen=True, tag="session.close"):
    """Ends the session for everyone. Owner only."""


class AuthRefresh(ClientMessage, kw_only=True, frozen=True, tag="auth.refresh"):
    """Replaces the connection's token before it expires."""

    token: str


class Ping(ClientMessage, kw_only=True, frozen=True, tag="ping"):
    """Asks for a `pong`."""


Command = (
    SessionUpdate | ItemCreate | ItemTruncate | ResponseCreate | ResponseCancel | TaskCreate | TaskCancel | SessionClose
)
AnyClientMessage = Command | AuthRefresh | Ping


# --- objects inside server messages --------------------------------------------------------------------------------


class Session(Struct, kw_only=True, frozen=True):
    """A session as clients see it: who owns it, how long it lives, its settings."""

    id: str
    owner: str
    created_at: str
    expires_at: str
    instructions: str
    model: str
    max_output_tokens: int
    on_disconnect: OnDisconnect
    disconnect_grace_ms: int
    multitask_strategy: MultitaskStrategy

    def updated(self, overrides: Overrides) -> Session:
        """This session with the settings that `overrides` gives."""
        return msgspec.structs.replace(self, **given(overrides))


def given(overrides: Overrides) -> dict[str, Any]:
    """The settings that `overrides` gives, by name."""
    names = Overrides.__struct_fields__
    return {name: value for name in names if (value := getattr(overrides, name)) is not None}


class Participant(Struct, kw_only=True, frozen=True):
    """One connection that looks at the session."""

    user: str
    connection_id: str
    since: str


class Item(Struct, kw_only=True, frozen=True):
    """An item of the conversation."""

    id: str
    role: Role
    content: str
    user: str
    created_at: str


class Truncation(Struct, kw_only=True, frozen=True):
    """How much of an answer was heard, in UTF-16 code units."""

    response_id: str
    heard_chars: int


class Response(Struct, kw_only=True, frozen=True):
    """A response at its creation."""

    id: str
    status: Literal["queued", "in_progress"]
    model: str
    created_at: str
    metadata: dict[str, Scalar]
    user: str


class Task(Struct, kw_only=True, frozen=True, omit_defaults=True):
    """A task at its creation; `response_id` names the response whose tool call made it."""

    id: str
    name: str
    status: Literal["pending"]
    created_at: str
    response_id: str | None = None


class Usage(Struct, kw_only=True, frozen=True, omit_defaults=True):
    """Tokens of a response or a task; `estimated` where the provider gave no final count and they were counted here."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    estimated: bool
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cost_usd: float | None = None


class RateLimit(Struct, kw_only=True, frozen=True):
    """How much of something is left, and in how many seconds all of it will be again."""

    name: str
    limit: int
    remaining: int
    reset_s: float


class ErrorBody(Struct, kw_only=True, frozen=True, omit_defaults=True):
    """An error in words and codes; `fatal` means that the connection is closed after it."""

    type: str
    code: str
    message: str
    fatal: bool
    param: str | None = None
    event_id: str | None = None
    retry_after_ms: int | None = None


class Failure(Struct, kw_only=True, frozen=True):
    """Why a response or a task failed."""

    type: str
    code: str
    message: str


# --- what the server sends -----------------------------------------------------------------------------------------


class ServerMessage(Struct, kw_only=True, frozen=True, omit_defaults=True, tag_field="type"):
    """One frame to a client."""


class Attached(ServerMessage, kw_only=True, frozen=True):
    """The first frame of a connection."""

    session: Session
    connection_id: str
    positions: dict[str, int]
    participants: list[Participant]


class SessionCreated(Attached, kw_only=True, frozen=True, tag="session.created"):
    """The first frame of the connection that made the session."""


class SessionResumed(Attached, kw_only=True, frozen=True, tag="session.resumed"):
    """The first frame of a connection to a session that was there before."""


class SessionGoingAway(ServerMessage, kw_only=True, frozen=True, tag="session.going_away"):
    """The instance is shutting down: its connections end in `time_left_ms`; reconnect after `reconnect_after_ms`."""

    reason: str
    time_left_ms: int
    reconnect_after_ms: int


class ParticipantJoined(ServerMessage, kw_only=True, frozen=True, tag="participant.joined"):
    """Another connection looks at the session."""

    participant: Participant


class ParticipantLeft(ServerMessage, kw_only=True, frozen=True, tag="participant.left"):
    """Another connection is gone."""

    participant: Participant


class RateLimitsUpdated(ServerMessage, kw_only=True, frozen=True, tag="rate_limits.updated"):
    """What this client may still do."""

    rate_limits: list[RateLimit]


class AuthExpiring(ServerMessage, kw_only=True, frozen=True, tag="auth.expiring"):
    """The connection's token expires soon, and the connection with it."""

    expires_at: str


class AuthRefreshed(ServerMessage, kw_only=True, frozen=True, tag="auth.refreshed"):
    """The connection has a new token."""

    expires_at: str


class ErrorMessage(ServerMessage, kw_only=True, frozen=True, tag="error"):
    """Something was refused or went wrong; the connection lives on unless `error.fatal`."""

    error: ErrorBody


class Pong(ServerMessage, kw_only=True, frozen=True, tag="pong"):
    """The answer to a `ping`."""

    event_id: str | None = None


class ChannelEvent(ServerMessage, kw_only=True, frozen=True):
    """An event of a channel's log. `seq`, `merged`, `replay` and `reset` are set when it is sent, not in the log."""

    merge: ClassVar[Merge] = Merge.KEEP
    ends_channel: ClassVar[bool] = False

    seq: int = 0
    merged: int = 1
    replay: bool = False
    reset: bool = False
    for_event_id: str | None = None

    def for_clients(self) -> Self:
        """The event without what only servers need."""
        return self


class SessionUpdated(ChannelEvent, kw_only=True, frozen=True, tag="session.updated"):
    """The session's settings changed."""

    session: Session


class SessionClosed(ChannelEvent, kw_only=True, frozen=True, tag="session.closed"):
    """The session is over; nothing comes after this."""

    ends_channel: ClassVar[bool] = True

    reason: str


class ItemCreated(ChannelEvent, kw_only=True, frozen=True, tag="conversation.item.created"):
    """The conversation has a new item."""

    item: Item


class ItemTruncated(ChannelEvent, kw_only=True, frozen=True, tag="conversation.item.truncated"):
    """The conversation keeps only what was heard of an answer."""

    item: Truncation


class Bill(Struct, kw_only=True, frozen=True):
    """Who pays for a response: whose limits and budget count, under which id it is held there, how many tokens were
    reserved, when, in seconds since the epoch, and whether the model may make `tasks` for them."""

    payer: str
    hold_id: str
    tokens: int
    made_at: float
    tasks: bool = True


class ResponseCreated(ChannelEvent, kw_only=True, frozen=True, tag="response.created"):
    """A response was accepted. Its `overrides`, its `bill`, and the `traceparent` of what has made it stay in the log
    and are not sent."""

    response: Response
    overrides: Overrides | None = None
    bill: Bill | None = None
    traceparent: str | None = None

    def for_clients(self) -> Self:
        """Without what only servers need."""
        return msgspec.structs.replace(self, overrides=None, bill=None, traceparent=None)


class ResponseInProgress(ChannelEvent, kw_only=True, frozen=True, tag="response.in_progress"):
    """The response runs now. Appended with `expect=0` it is the claim to run it, by an `instance` that clients are not
    told."""

    response_id: str
    instance: str | None = None

    def for_clients(self) -> Self:
        """Without the instance."""
        return msgspec.structs.replace(self, instance=None)


class OutputTextDelta(ChannelEvent, kw_only=True, frozen=True, tag="response.output_text.delta", gc=False):
    """The next piece of the answer."""

    merge: ClassVar[Merge] = Merge.CONCATENATE

    response_id: str
    delta: str


class ReasoningDelta(ChannelEvent, kw_only=True, frozen=True, tag="response.reasoning.delta", gc=False):
    """The next piece of the model's reasoning."""

    merge: ClassVar[Merge] = Merge.CONCATENATE

    response_id: str
    delta: str


class ResponseDone(ChannelEvent, kw_only=True, frozen=True, tag="response.done"):
    """The response's one end. `output_chars` and `heard_chars` are UTF-16 code units."""

    ends_channel: ClassVar[bool] = True

    response_id: str
    status: ResponseStatus
    stop_reason: str | None
    usage: Usage
    output_chars: int
    error: Failure | None = None
    heard_chars: int | None = None


class TaskCreated(ChannelEvent, kw_only=True, frozen=True, tag="task.created"):
    """A task was accepted. Its `input`, as JSON, the `user` who asked for it, the `payer` whose limits count, and the
    `traceparent` of what has made it stay in the log and are not sent."""

    task: Task
    input: str | None = None
    user: str | None = None
    payer: str | None = None
    traceparent: str | None = None

    def for_clients(self) -> Self:
        """Without what only servers need."""
        return msgspec.structs.replace(self, input=None, user=None, payer=None, traceparent=None)


class TaskStarted(ChannelEvent, kw_only=True, frozen=True, tag="task.started"):
    """An attempt at the task runs now: what earlier ones told is void. It is the claim to run it, by an `instance`
    that clients are not told; nor are they told, of this and what follows, `at` what time it was."""

    task_id: str
    attempt: int
    instance: str | None = None
    at: str | None = None

    def for_clients(self) -> Self:
        """Without the instance and the time."""
        return msgspec.structs.replace(self, instance=None, at=None)


class TaskProgress(ChannelEvent, kw_only=True, frozen=True, tag="task.progress"):
    """How far the attempt is: `progress` of `total`, in units of the task's own; `total` is `null` if nobody knows."""

    merge: ClassVar[Merge] = Merge.LATEST

    task_id: str
    attempt: int
    progress: int | float
    total: int | float | None
    message: str | None
    at: str | None = None

    def for_clients(self) -> Self:
        """Without the time."""
        return msgspec.structs.replace(self, at=None)


class TaskOutputTextDelta(ChannelEvent, kw_only=True, frozen=True, tag="task.output_text.delta", gc=False):
    """The next piece of the text that the task writes."""

    merge: ClassVar[Merge] = Merge.CONCATENATE

    task_id: str
    attempt: int
    delta: str


class TaskDone(ChannelEvent, kw_only=True, frozen=True, tag="task.done"):
    """The task's one end. A result of up to 128 KiB is in it, a larger one at `result_url`; in the log it stands as
    `result_json`, which is not sent."""

    ends_channel: ClassVar[bool] = True

    task_id: str
    status: TaskEnd
    result: Any = msgspec.UNSET
    result_url: str | None = None
    error: Failure | None = None
    result_json: str | None = None
    at: str | None = None

    def for_clients(self) -> Self:
        """With the result as clients are told it."""
        has_result = self.result_json is not None and self.result_url is None
        result = msgspec.json.decode(self.result_json or "") if has_result else msgspec.UNSET
        return msgspec.structs.replace(self, result_json=None, at=None, result=result)


Delta = OutputTextDelta | ReasoningDelta | TaskOutputTextDelta


# --- encoding ------------------------------------------------------------------------------------------------------


class Codec(Struct, frozen=True):
    """One of the two encodings of the protocol, chosen by the WebSocket subprotocol."""

    subprotocol: str
    frame: Literal["text", "bytes"]
    """The key of an ASGI message that holds such a frame."""
    encode: Callable[[ServerMessage], str | bytes]
    decode: Callable[[str | bytes], AnyClientMessage]
    """Raises `msgspec.DecodeError`, `msgspec.ValidationError`, `UnicodeError` or `RecursionError`."""


_json_encoder = msgspec.json.Encoder()


def _encode_json(message: ServerMessage) -> str:
    return _json_encoder.encode(message).decode()


JSON = Codec("realtime.v1", "text", _encode_json, msgspec.json.Decoder(AnyClientMessage).decode)
MSGPACK = Codec(
    "realtime.v1.msgpack",
    "bytes",
    msgspec.msgpack.Encoder().encode,
    msgspec.msgpack.Decoder(AnyClientMessage).decode,  # type: ignore[arg-type]
)
CODECS = {codec.subprotocol: codec for codec in (JSON, MSGPACK)}
