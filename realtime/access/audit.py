"""The audit log: one line for each access, of who, which session, what, from where, and whether it was allowed."""

from __future__ import annotations

import hashlib
import re

from starlette.types import Scope

from realtime.access.addresses import client_address
from realtime.access.principal import Principal
from realtime.errors import RealtimeError
from realtime.observe import logs
from realtime.protocol import AuthRefresh, Command, RateLimit
from realtime.store.base import Made

REQUEST = "request"
"""The action that a request is of which nobody has looked what it asks for."""
COMMAND = "session.command"
"""The action that a message is of which nobody knows what it asks for."""
MADE_ID = re.compile(r"[a-z]{1,8}_[0-9a-f]{32}")
"""An id as this server and its clients make them: chance, and no word of anybody's."""
REFUSALS = frozenset(
    {"authentication_error", "permission_error", "not_found_error", "rate_limit_error", "budget_error"}
)
"""The types of errors that mean: not allowed. After any other the access was allowed, and came to nothing."""


def tag_of(message: Command | AuthRefresh) -> str:
    """The type by which a client names a message."""
    return str(message.__struct_config__.tag)


def tell_refused(scope: Scope, error: RealtimeError) -> None:
    """Say in the audit log that a request was refused before anybody looked who asks, and for what."""
    Access(Audit(hides_sessions=True), REQUEST, address=client_address(scope)).tell(error)


def hidden(session_id: str) -> str:
    """What a session is called in logs whose id is a credential."""
    return "#" + hashlib.blake2b(session_id.encode(errors="replace"), digest_size=8).hexdigest()


def told(an_id: str) -> str:
    """What something is called in logs whose id is no credential. One that a client has thought of may mean something,
    and is never told as it is."""
    return an_id if MADE_ID.fullmatch(an_id) else hidden(an_id)


class Audit:
    """Where accesses are told. With `hides_sessions` a session's id is told as a hash: it is a credential itself."""

    def __init__(self, *, hides_sessions: bool) -> None:
        self._hides_sessions = hides_sessions

    def name_of(self, session_id: str) -> str:
        """What a session is called in all logs."""
        return hidden(session_id) if self._hides_sessions else told(session_id)


class Access:
    """One access, which is told once. Who asks, and about which session, response or task, may become known on the way.

    `limits` is how much of what was asked for is left, for the client to be told. `of_user` is whom it is about, where
    that is somebody else.
    """

    __slots__ = (
        "_address",
        "_audit",
        "_is_told",
        "action",
        "limits",
        "of_user",
        "principal",
        "response_id",
        "session_id",
        "task_id",
    )

    def __init__(self, audit: Audit, action: str, *, address: str, session_id: str | None = None) -> None:
        self.action = action
        self.principal = Principal(user="", address=address)
        self.session_id = session_id
        self.response_id: str | None = None
        self.task_id: str | None = None
        self.limits: list[RateLimit] = []
        self.of_user: str | None = None
        self._audit = audit
        self._address = address
        self._is_told = False

    @classmethod
    def of_message(cls, audit: Audit, message: Command | AuthRefresh, principal: Principal, session_id: str) -> Access:
        """The access that a client's message to its session is."""
        access = cls(audit, tag_of(message), address=principal.address, session_id=session_id)
        access.principal = principal
        access.concerns(message)
        return access

    def concerns(self, what: Command | AuthRefresh | Made) -> None:
        """It is about the response or the task that a message names, or that came of it."""
        self.response_id = getattr(what, "response_id", None) or self.response_id
        self.task_id = getattr(what, "task_id", None) or self.task_id

    def tell(self, error: RealtimeError | None = None) -> None:
        """Say in the audit log that it was allowed, or that `error` has refused it. The first call counts."""
        if not self._is_told:
            self._is_told = True
            logs.audit(
                self.action,
                user=self.principal.user or None,
                session=self._audit.name_of(self.session_id) if self.session_id else None,
                **self._details(),
                address=self._address,
                allowed=error is None or (bool(self.principal.user) and error.type not in REFUSALS),
                code=error.code if error else None,
            )

    def _details(self) -> dict[str, str]:
        """What only some accesses are about. A task that is a session of its own has a credential for its id."""
        details = {"of_user": self.of_user} if self.of_user else {}
        if self.response_id:
            details["response"] = told(self.response_id)
        if self.task_id:
            is_session = self.task_id == self.session_id
            details["task"] = self._audit.name_of(self.task_id) if is_session else told(self.task_id)
        return details
