"""Tokens: how the settings say they are checked, and made. PyJWT does the work, imported only where there is a key."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Protocol

import msgspec

from realtime.access.claims import Claims, Payload
from realtime.settings import Settings, SettingsError, variable

__all__ = ["Claims", "Verifier", "is_configured", "make_verifier", "sign"]


class Verifier(Protocol):
    """Knows good tokens from bad ones. One that is an `AbstractAsyncContextManager` has to be entered before."""

    async def verify(self, token: str) -> Claims:
        """What `token` says.

        Raises `AuthenticationError`: `token_expired` where only its time is over, else `invalid_token`; and
        `Unavailable` where that can't be found out now. To cancel it is safe.
        """


def is_configured(settings: Settings) -> bool:
    """Whether clients have to show a token."""
    return bool(_keys(settings))


def make_verifier(settings: Settings) -> Verifier | None:
    """What checks tokens, or `None` where nobody has to show one. Raises `SettingsError`."""
    match _keys(settings):
        case []:
            return None
        case [name]:
            return _verifier(settings, name)
        case names:
            listed = ", ".join(variable(name) for name in names)
            raise SettingsError(f"{listed} are set together: tokens are checked in one way only")


def sign(
    settings: Settings,
    *,
    user: str,
    session_id: str | None = None,
    ttl_s: float,
    scopes: Iterable[str] | None = None,
) -> str:
    """A token for `user` that is good for `ttl_s` seconds from now, signed with the settings' secret.

    Without `session_id` it is good for any session; without `scopes` it names none, and so has the default ones. Raises
    `SettingsError` where there is no secret, and for what a token can't say.
    """
    if not settings.auth_secret:
        raise SettingsError(f"{variable('auth_secret')} is not set: there is nothing to sign a token with")
    now = int(time.time())
    given = {
        "aud": settings.auth_audience or None,
        "iss": settings.auth_issuer or None,
        "session_id": session_id,
        "scope": None if scopes is None else " ".join(sorted(scopes)),
    }
    payload: dict[str, Any] = {"sub": user, "iat": now, "exp": now + ttl_s}
    payload |= {name: value for name, value in given.items() if value is not None}
    try:
        msgspec.convert(payload, Payload)
    except msgspec.ValidationError as error:
        raise SettingsError(f"no token can say that: {error}") from None
    import jwt

    return jwt.encode(payload, settings.auth_secret, "HS256")


def _keys(settings: Settings) -> list[str]:
    """The settings that say how tokens are checked, as far as they are set."""
    names = ("auth_secret", "auth_public_key", "auth_jwks_url")
    return [name for name in names if getattr(settings, name)]


def _verifier(settings: Settings, name: str) -> Verifier:
    from realtime.access import keys, verifiers
    from realtime.access.jwks import Jwks

    rules = verifiers.Rules(audience=settings.auth_audience, issuer=settings.auth_issuer)
    try:
        match name:
            case "auth_secret":
                return verifiers.KeyVerifier(keys.secret_key(settings.auth_secret), rules)
            case "auth_public_key":
                return verifiers.KeyVerifier(keys.pem_key(settings.auth_public_key), rules)
            case _ if settings.auth_jwks_url.startswith("https://"):
                return verifiers.JwksVerifier(Jwks(settings.auth_jwks_url), rules)
        raise ValueError("expected https://…")
    except ValueError as error:
        raise SettingsError(f"{variable(name)} is not allowed: {error}") from None
