"""Tokens for tests, and how clients show them."""

from __future__ import annotations

from typing import Any

from realtime.access import tokens
from realtime.settings import Settings

SECRET = "a secret for tests, and for nothing else"


def token(
    user: str, *, session_id: str | None = None, scope: str | None = None, ttl_s: float = 3600, secret: str = SECRET
) -> str:
    """A token for a user; `scope` is what it allows, as in its claim."""
    settings = Settings(auth_secret=secret)
    scopes = None if scope is None else scope.split()
    return tokens.sign(settings, user=user, session_id=session_id, ttl_s=ttl_s, scopes=scopes)


def bearer(user: str, **claims: Any) -> dict[str, str]:
    """The header that shows a token of theirs."""
    return {"Authorization": f"Bearer {token(user, **claims)}"}
