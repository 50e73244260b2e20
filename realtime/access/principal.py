"""Who asks: what a verified token, or the lack of authentication, makes of a client."""

from __future__ import annotations

from msgspec import Struct

ANONYMOUS = "anonymous"
"""The user that everybody is where no authentication is configured."""
SESSION, TASK, ONESHOT, ADMIN, METRICS = "session", "task", "oneshot", "admin", "metrics"
"""The scopes that a token may name."""
LEEWAY_S = 60
"""How far the clock of whoever makes tokens may be off, either way."""
DEFAULT_SCOPES = frozenset({SESSION, TASK, ONESHOT})
"""What a token may do that names none."""


class Principal(Struct, frozen=True, kw_only=True):
    """Who asks, from which address, and what they may do.

    Times are seconds since the epoch; `issued_at` is `None` where a token does not tell, `expires_at` where there is
    no token. A principal with a `session_id` is a guest of that session, and of nothing else.
    """

    user: str = ANONYMOUS
    address: str = ""
    scopes: frozenset[str] = DEFAULT_SCOPES
    session_id: str | None = None
    issued_at: float | None = None
    expires_at: float | None = None

    @property
    def is_anonymous(self) -> bool:
        """Whether nobody knows who it is: there was no token."""
        return self.expires_at is None

    @property
    def payer(self) -> str:
        """Whose limits and budget count: the user's, or where that is everybody, the address's."""
        return f"address:{self.address}" if self.is_anonymous else f"user:{self.user}"
