"""Checks tokens: with one key, or with those that a provider shows. Importing this imports PyJWT and cryptography."""

from __future__ import annotations

import re
from types import TracebackType
from typing import Any, Self

import jwt

from realtime.access.claims import Claims, invalid_token, read_claims
from realtime.access.jwks import Jwks
from realtime.access.keys import Key
from realtime.access.principal import LEEWAY_S

MAX_TOKEN_BYTES = 8192
TOKEN = re.compile(r"[\w-]+\.[\w-]+\.[\w-]+", re.ASCII)
"""A signed token in its one spelling: PyJWT would let padding pass."""


class Rules:
    """What every token has to keep, whatever it is signed with. Empty: any audience, any issuer."""

    def __init__(self, *, audience: str, issuer: str) -> None:
        self._expected: dict[str, Any] = {
            "audience": audience or None,
            "issuer": issuer or None,
            # The expiry is the last thing to be looked at: only what is right beside it has "expired".
            "options": {"verify_aud": bool(audience), "verify_exp": False},
            "leeway": LEEWAY_S,
        }

    def claims(self, token: str, key: Key) -> Claims:
        """What a token says that `key` has signed. Raises `AuthenticationError`."""
        try:
            decoded = jwt.decode(token, key.value, [key.algorithm], **self._expected)
        except jwt.PyJWTError:
            raise invalid_token() from None
        return read_claims(decoded)


class KeyVerifier:
    """See `realtime.access.tokens.Verifier`."""

    def __init__(self, key: Key, rules: Rules) -> None:
        self._key = key
        self._rules = rules

    async def verify(self, token: str) -> Claims:
        """As the interface."""
        _check_form(token)
        return self._rules.claims(token, self._key)


class JwksVerifier:
    """See `realtime.access.tokens.Verifier`. `async with` owns what fetches the keys."""

    def __init__(self, keys: Jwks, rules: Rules) -> None:
        self._keys = keys
        self._rules = rules

    async def __aenter__(self) -> Self:
        await self._keys.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._keys.__aexit__(kind, error, trace)

    async def verify(self, token: str) -> Claims:
        """As the interface. Raises `Unavailable` too, where the keys can't be had."""
        _check_form(token)
        return self._rules.claims(token, await self._keys.key(_key_id(token)))


def _check_form(token: str) -> None:
    if len(token) > MAX_TOKEN_BYTES or not TOKEN.fullmatch(token):
        raise invalid_token()


def _key_id(token: str) -> str | None:
    """The id of the key that a token says it was signed with; nobody has checked it."""
    try:
        return jwt.get_unverified_header(token).get("kid")
    except jwt.PyJWTError:
        raise invalid_token() from None
