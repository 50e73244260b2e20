"""What a token says, once its signature has been checked."""

from __future__ import annotations

import time
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from realtime.access.principal import ADMIN, DEFAULT_SCOPES, LEEWAY_S, METRICS
from realtime.errors import AuthenticationError
from realtime.protocol import Id

SCOPES = DEFAULT_SCOPES | {ADMIN, METRICS}
"""The words that count in a token's `scope`; others are passed over."""
LAST_S = 253_402_300_799
"""The last second of the year 9999: whoever writes a later one has written milliseconds, or worse."""

User = Annotated[str, Meta(max_length=256, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+\Z")]
Time = Annotated[float, Meta(ge=0, le=LAST_S)]


class Claims(Struct, frozen=True, kw_only=True):
    """Who a token is for, and what it allows. Times are seconds since the epoch.

    `session_id` is the only session that it is good for, `None`: any. `issued_at` is `None` where it does not tell.
    """

    user: str
    session_id: str | None
    scopes: frozenset[str]
    issued_at: float | None
    expires_at: float


class Payload(Struct, frozen=True, kw_only=True):
    """The claims that count, as they stand in a token. What is there has to be of its type; `null` is none."""

    sub: User
    exp: Time
    iat: Time | UnsetType = UNSET
    nbf: Time | UnsetType = UNSET
    session_id: Id | UnsetType = UNSET
    scope: str | UnsetType = UNSET


def read_claims(decoded: Any) -> Claims:
    """The claims in the decoded JSON of a token. Raises `AuthenticationError`, which says nothing of it."""
    try:
        payload = msgspec.convert(decoded, Payload)
    except msgspec.ValidationError:
        raise invalid_token() from None
    if payload.exp + LEEWAY_S <= time.time():
        raise AuthenticationError("token_expired", "The token has expired.")
    return Claims(
        user=payload.sub,
        session_id=None if payload.session_id is UNSET else payload.session_id,
        scopes=DEFAULT_SCOPES if payload.scope is UNSET else SCOPES & set(payload.scope.split()),
        issued_at=None if payload.iat is UNSET else payload.iat,
        expires_at=payload.exp,
    )


def invalid_token() -> AuthenticationError:
    """What is wrong is not told: it would help whoever makes one up."""
    return AuthenticationError("invalid_token", "The token is not valid.")
