"""Users of tests that have shown a token."""

from __future__ import annotations

import time

from realtime.access.principal import Principal


def known(user: str) -> Principal:
    """A user with the usual rights, whose token is good for an hour."""
    return Principal(user=user, address="127.0.0.1", issued_at=time.time(), expires_at=time.time() + 3600)
