"""The server's settings: read once from the environment, frozen, each with its unit in its name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

T = TypeVar("T")
PREFIX = "REALTIME_"

Port = Annotated[int, Meta(ge=0, le=65535)]
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
GraceMs = Annotated[int, Meta(ge=0, le=3_600_000)]
Seconds = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]

SECRETS = frozenset({"auth_secret", "redis_url", "queue_redis_url", "seal_keys"})
"""Settings whose values may hold a password or a key, and are never shown."""


CLIENT_VARIABLES = frozenset({"REALTIME_TOKEN"})
"""What `realtime chat` reads, and no server."""


class SettingsError(Exception):
    """A setting is wrong. The text is one line: the setting, its value, what is allowed."""


RATE = r"^\d{1,9}/(second|minute|hour|day)\Z"
BUDGET = r"^(\d{1,12}/(hour|day))?\Z"
ROOT_PATH = r"^(/[A-Za-z0-9._~-]+)*\Z"
JWKS_URL = r"^(https://\S+)?\Z"
REDIS_URL = r"^(rediss?://([^@/]*@)?(\[[0-9a-fA-F:.]+\]|[^:@/?\[\]]+)(:\d{1,5})?(/\d{0,4})?(\?.*)?)?\Z"


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every setting with its default. A field `name` is read from the variable `REALTIME_NAME`."""

    host: str = "127.0.0.1"
    """The address that the server binds to."""
    port: Port = 8000
    """The port that it binds to; 0 takes a free one."""
    root_path: Annotated[str, Meta(pattern=ROOT_PATH)] = ""
    """The path under which a proxy serves the server, and which it takes off: `/ai`."""
    responder: Literal["auto", "anthropic", "openai", "demo"] = "auto"
    """Who answers: `auto` is `anthropic` where its key is set, else `openai` where its is, else `demo`."""
    model: str = ""
    """The default model; empty: the responder's own default."""
    allowed_models: tuple[str, ...] = ()
    """Which models a client may ask for beside the default one; `*` allows any."""
    model_context_tokens: Positive = 200_000
    """How many tokens of conversation and answer the model can hold."""
    truncation: Literal["auto", "error"] = "auto"
    """When the conversation outgrows the model: `auto` leaves out the oldest items, `error` refuses."""
    max_output_tokens: Positive = 4096
    """The most that a response may ask for, and the default."""
    thinking: Literal["off", "adaptive"] = "off"
    """Whether the model is asked to think; its reasoning is then streamed as `response.reasoning.delta`."""
    redis_url: Annotated[str, Meta(pattern=REDIS_URL)] = ""
    """Where sessions are kept: `redis://…` or `rediss://…`, a server or a node of a cluster; empty: in this process."""
    queue_redis_url: Annotated[str, Meta(pattern=REDIS_URL)] = ""
    """Where tasks queue for workers, a single server; empty: where sessions are kept."""
    seal_keys: tuple[str, ...] = ()
    """Keys that all content in Redis is sealed with, as `name:key`, a key being 32 bytes in base64: the first one
    seals, each of them opens. None: content stands in Redis as it is."""
    session_ttl_s: Seconds = 3600
    """How long a session is kept after its last use."""
    tasks: tuple[str, ...] = ()
    """Modules whose tasks are offered beside the built-in ones: `package.module`."""
    task_ttl_s: Seconds = 3600
    """How long a task is kept after its last use."""
    worker_slots: Positive = 10
    """Tasks at once in one process."""
    worker_metrics_port: Port = 0
    """Where on 127.0.0.1 a `realtime worker` shows its metrics; 0: nowhere."""
    on_disconnect: Literal["cancel", "continue"] = "cancel"
    """What a response does when its last viewer leaves."""
    disconnect_grace_ms: GraceMs = 0
    """How long a response waits for a viewer to come back."""
    auth_secret: Annotated[str, Meta(min_length=32)] = ""
    """The secret of HS256 tokens, at least 32 bytes. Without any `auth_` key everybody is `anonymous`."""
    auth_public_key: str = ""
    """The public key, in PEM, of RS256, ES256 or EdDSA tokens: the kind of the key says which."""
    auth_jwks_url: Annotated[str, Meta(pattern=JWKS_URL)] = ""
    """Where the public keys of such tokens are found: `https://…`."""
    auth_audience: str = ""
    """What tokens have to be made for; empty: anything."""
    auth_issuer: str = ""
    """Who has to have made them; empty: anybody."""
    auth_revocation_s: Seconds = 86_400
    """How long a revocation is remembered: at least as long as the longest life of a token."""
    allowed_hosts: tuple[str, ...] = ()
    """Names by which the server may be asked, beside the loopback names and `host`; `*` allows any."""
    allowed_origins: tuple[str, ...] = ()
    """Origins whose pages may use the server, beside its own: `https://app.example.org`."""
    trusted_proxies: tuple[str, ...] = ("127.0.0.1",)
    """Addresses and networks whose `X-Forwarded-For` and `X-Forwarded-Proto` count."""
    max_message_bytes: Positive = 65_536
    """The largest client message."""
    max_body_bytes: Positive = 2 * 1024 * 1024
    """The largest body of a one-shot request."""
    max_session_bytes: Positive = 8 * 1024 * 1024
    """The most that a session's logs may hold; past it `session_full`."""
    max_connections: Positive = 10_000
    """Connections at once, on this instance."""
    max_connections_per_user: Positive = 20
    """Connections of one user at once, over all instances; of one address where users are anonymous."""
    max_connections_per_address: Positive = 200
    """Connections from one address at once, over all instances."""
    max_responses_per_user: Positive = 4
    """Responses and one-shot calls of one user at once, waiting ones too; of one address where users are anonymous."""
    max_tasks_per_user: Positive = 30
    """Tasks of one user that run or wait, over all instances; of one address where users are anonymous."""
    rate_responses: Annotated[str, Meta(pattern=RATE)] = "10/minute"
    """How many responses a user may ask for; an address where users are anonymous. So with the next three."""
    rate_oneshots: Annotated[str, Meta(pattern=RATE)] = "30/minute"
    """How many one-shot calls."""
    rate_tasks: Annotated[str, Meta(pattern=RATE)] = "30/minute"
    """How many tasks."""
    rate_sessions: Annotated[str, Meta(pattern=RATE)] = "2000/minute"
    """How many sessions a user may make."""
    rate_messages: Annotated[str, Meta(pattern=RATE)] = "50/second"
    """How many messages one connection may send."""
    rate_connections: Annotated[str, Meta(pattern=RATE)] = "50/second"
    """How many new connections of one address an instance reads; more of them wait. Those of proxies don't."""
    token_budget: Annotated[str, Meta(pattern=BUDGET)] = ""
    """How many tokens, input and output together, a user may use: `200000/day`; empty: any number."""
    session_token_budget: Count = 0
    """How many tokens may be used in one session; 0: any number."""
    prices: tuple[str, ...] = ()
    """What models cost, in dollars for a million tokens: `model=input/output`, `*` for all others."""
    send_timeout_s: Seconds = 30
    """A reader that takes nothing for so long is closed with 4408."""
    lease_s: Seconds = 10
    """How long after its last sign of life an instance counts as lost."""
    ping_interval_s: Seconds = 10
    """How often a WebSocket is pinged; one that does not answer for so long again is gone."""
    upstream_idle_timeout_s: Seconds = 60
    """A model that says nothing for so long has failed."""
    upstream_retry_s: Seconds = 30
    """How long a model call may be retried before its first byte, in all."""
    upstream_max_connections: Positive = 10_000
    """Model calls at once, on this instance."""
    journal_interval_ms: Positive = 50
    """How often running responses are written to the store."""
    drain_s: Seconds = 20
    """How long a shutdown may take."""
    loop_block_ms: Positive = 100
    """An event loop that has not turned for so long is blocked: the log names the code that blocks it."""
    traces: Literal["auto", "on", "off"] = "auto"
    """Whether spans are sent: `auto` where OpenTelemetry's variables say where to."""
    log_format: Literal["auto", "console", "json"] = "auto"
    """`auto` is `console` on a terminal, else `json`."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is logged."""


def load_settings(environ: Mapping[str, str] = os.environ, **overrides: Any) -> Settings:
    """The settings of an environment, with `overrides` (from the command line) on top.

    Raises `SettingsError` with one line for the first setting that is wrong.
    """
    values: dict[str, Any] = {}
    for field, hint in get_type_hints(Settings, include_extras=True).items():
        if field in overrides:
            values[field] = _convert(field, overrides[field], hint)
        elif (text := environ.get(variable(field))) is not None and text.strip() != "":
            values[field] = _convert(field, text.strip(), hint)
    return Settings(**values)


def unknown_settings(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Variables that look like settings but are none: a typing error, or from another version."""
    known = {variable(field) for field in Settings.__struct_fields__} | CLIENT_VARIABLES
    return sorted(name for name in environ if name.startswith(PREFIX) and name not in known)


def parsed(settings: Settings, name: str, parse: Callable[[Any], T]) -> T:
    """What a setting means, by `parse`. Raises `SettingsError`, which names it."""
    try:
        return parse(getattr(settings, name))
    except SettingsError as error:
        raise SettingsError(f"{variable(name)} is not allowed: {error}") from None


def variable(field: str) -> str:
    """The environment variable of a field."""
    return PREFIX + field.upper()


def _convert(field: str, value: Any, hint: Any) -> Any:
    if isinstance(value, str) and hint == tuple[str, ...]:
        value = tuple(part.strip() for part in value.split(",") if part.strip())
    try:
        converted = msgspec.convert(value, hint, strict=False)
    except msgspec.ValidationError as error:
        shown = "…" if field in SECRETS else repr(value)
        raise SettingsError(f"{variable(field)}={shown} is not allowed: {_allowed(hint) or error}") from None
    if isinstance(converted, float) and not 0 < converted < 1e9:
        raise SettingsError(f"{variable(field)}={value!r} is not allowed: expected seconds above 0 and below 1e9")
    return converted


def _allowed(hint: Any) -> str:
    """What a setting may be, where that can be said better than by its type."""
    if hint == Annotated[str, Meta(pattern=REDIS_URL)]:
        return "expected redis://HOST:PORT/DATABASE or rediss://…"
    if hint == Annotated[str, Meta(pattern=RATE)]:
        return "expected for example 10/minute: a number for each second, minute, hour or day"
    if hint == Annotated[str, Meta(pattern=BUDGET)]:
        return "expected for example 200000/day: a number for each hour or day"
    if hint == Annotated[str, Meta(pattern=ROOT_PATH)]:
        return "expected for example /ai: a path without a slash at its end"
    if hint == Annotated[str, Meta(pattern=JWKS_URL)]:
        return "expected https://…"
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    return f"expected one of {', '.join(choices)}" if choices else ""
