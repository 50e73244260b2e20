"""Lets requests in: who asks, by which token, whether they may at all; and each of them is told in the audit log."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable

from msgspec import Struct
from starlette.types import Message, Receive, Scope, Send

from realtime.access.addresses import client_address
from realtime.access.admission import Admission
from realtime.access.audit import Access, Audit
from realtime.access.claims import Claims
from realtime.access.origins import is_from_page
from realtime.access.principal import LEEWAY_S, SESSION, Principal
from realtime.access.revocations import Revocations
from realtime.access.rules import check_no_guest, check_scope
from realtime.access.tokens import Verifier
from realtime.errors import AuthenticationError, InvalidRequest, RateLimited, RealtimeError, ServerError
from realtime.http import Headers, send_error
from realtime.observe import logs
from realtime.protocol import RateLimit

COOKIE = "realtime_token"
_COOKIE = re.compile(rb"(?:^|;)[ \t]*%b=([^;\s]*)" % COOKIE.encode())
"""Finds it among others, of which strangers may send kilobytes: to take them all apart costs a millisecond."""
TOO_OFTEN_S = 0.1
"""How long who has asked too often is kept waiting: a client that asks again at once is slowed down."""
BEARER_PROTOCOL = "bearer."
"""What comes before the token where it is offered as a subprotocol, because a browser can set no header."""


class Action(Struct, frozen=True):
    """What is asked for over HTTP: its name in the audit log, the scope that it needs (`None`: any token will do), and
    whether a guest of a session may."""

    name: str
    scope: str | None = SESSION
    guests: bool = False


class Door:
    """Where every request comes in, told in `audit`. Without a `verifier` everybody is anonymous, and a token counts
    for nothing. `admission` knows how often who may come."""

    def __init__(self, verifier: Verifier | None, revocations: Revocations, audit: Audit, admission: Admission) -> None:
        self.audit = audit
        self._admission = admission
        self._verifier = verifier
        self._revocations = revocations
        self.checks_tokens = verifier is not None

    def access(self, action: str, scope: Scope, session_id: str | None = None) -> Access:
        """An access that begins, to be told in the audit log."""
        return Access(self.audit, action, address=client_address(scope), session_id=session_id)

    async def identify(self, scope: Scope) -> Principal:
        """Who sends a request. Raises `AuthenticationError`, and `Unavailable` where that can't be found out now.

        Of revocations only the user's count here: one of a session is told to those alone who may see that.
        """
        address = client_address(scope)
        if self._verifier is None:
            return Principal(address=address)
        token = token_in(scope)
        if token is None:
            raise AuthenticationError("token_required", "A token is needed: as a bearer, a subprotocol or a cookie.")
        principal = _principal(await self._verifier.verify(token), address)
        self._revocations.check(principal, None)
        return principal

    def _checking(self, receive: Receive, principal: Principal) -> Receive:
        """The same; it raises `AuthenticationError` at the end of a body that has taken its time, if the token of who
        sent it counts no more by then."""

        async def receive_checked() -> Message:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body"):
                self._revocations.check(principal, None)
                if principal.expires_at is not None and principal.expires_at <= time.time():
                    raise AuthenticationError("token_expired", "The token has expired.")
            return message

        return receive_checked

    async def refresh(self, principal: Principal, token: str, session_id: str) -> Principal:
        """The principal of a connection once it has another token, which must not widen what it may do.

        Raises `AuthenticationError`, `PermissionDenied` for one that could not have connected, `InvalidRequest` where
        tokens count for nothing, and `Unavailable`.
        """
        if self._verifier is None:
            raise InvalidRequest("no_authentication", "This server knows no tokens.")
        fresh = _principal(await self._verifier.verify(token), principal.address)
        self._revocations.check(fresh, session_id)
        if fresh.user != principal.user:
            raise AuthenticationError("token_widens", "The token is another user's.", param="token")
        if fresh.session_id != principal.session_id and (principal.session_id or fresh.session_id != session_id):
            raise AuthenticationError("token_widens", "The token is for another session.", param="token")
        if not fresh.scopes <= principal.scopes:
            raise AuthenticationError(
                "token_widens", "The token has scopes that the one before had not.", param="token"
            )
        check_scope(fresh, SESSION)
        return fresh

    async def answer(
        self,
        action: Action,
        scope: Scope,
        receive: Receive,
        send: Send,
        work: Callable[[Access, Scope, Receive, Send], Awaitable[None]],
    ) -> None:
        """Answer an HTTP request by `work`, or with the error that refuses it; tell the access in the audit log."""
        session_id = scope.get("path_params", {}).get("session_id")
        access = self.access(action.name, scope, session_id)
        send = _with_limits(send, access)
        if session_id is not None:
            logs.bind(session=self.audit.name_of(session_id))
        try:
            access.principal = await self.identify(scope)
            await self._admission.request(access.principal)
            if action.scope is not None:
                check_scope(access.principal, action.scope)
            if not action.guests:
                check_no_guest(access.principal)
            await work(access, scope, self._checking(receive, access.principal), send)
        except RealtimeError as error:
            access.tell(error)
            if isinstance(error, RateLimited):
                await asyncio.sleep(TOO_OFTEN_S)
            access.limits = list(getattr(error, "limits", ())) or access.limits
            await send_error(send, error)
        except Exception:
            access.tell(ServerError("internal_error", "Something went wrong here."))
            raise
        finally:
            access.tell()


def token_in(scope: Scope) -> str | None:
    """The token that comes with a request: of the header, else the subprotocol, else the cookie. Raises
    `AuthenticationError` for a header that is none."""
    headers: list[str] = [value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"]
    if headers:
        kind, _, token = headers[0].partition(" ")
        if len(headers) > 1 or kind.lower() != "bearer" or not token.strip():
            raise AuthenticationError("invalid_token", "The Authorization header has to be: Bearer, and a token.")
        return token.strip()
    offered: list[str] = [one for one in scope.get("subprotocols", ()) if one.startswith(BEARER_PROTOCOL)]
    if offered:
        return offered[0].removeprefix(BEARER_PROTOCOL)
    return _cookie_in(scope) if is_from_page(scope) else None


def _cookie_in(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"cookie" and (found := _COOKIE.findall(value)):
            token: str = found[-1].decode("latin-1")
            return token
    return None


def _principal(claims: Claims, address: str) -> Principal:
    """Who a token makes of a client; one that counts only by the leeway ends with it."""
    is_over = claims.expires_at <= time.time()
    return Principal(
        user=claims.user,
        address=address,
        scopes=claims.scopes,
        session_id=claims.session_id,
        issued_at=claims.issued_at,
        expires_at=claims.expires_at + LEEWAY_S if is_over else claims.expires_at,
    )


def _with_limits(send: Send, access: Access) -> Send:
    """The same, with what is left of limits in the answer's head."""

    async def send_with_limits(message: Message) -> None:
        if message["type"] == "http.response.start" and access.limits:
            message = {**message, "headers": [*message["headers"], *limit_headers(access.limits)]}
        await send(message)

    return send_with_limits


def limit_headers(limits: list[RateLimit]) -> Headers:
    """Limits as draft-ietf-httpapi-ratelimit-headers-10 has them, of the IETF's working group on HTTP APIs."""
    policies = ", ".join(f'"{one.name}";q={one.limit}' for one in limits)
    left = ", ".join(f'"{one.name}";r={one.remaining};t={round(one.reset_s)}' for one in limits)
    return [(b"ratelimit-policy", policies.encode()), (b"ratelimit", left.encode())]
