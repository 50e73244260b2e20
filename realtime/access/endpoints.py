"""`/v1/auth/cookie`, `/v1/admin/revoke`, `/metrics`: the token as a cookie, what takes tokens back, what is counted."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated
from urllib.parse import quote

import msgspec
from msgspec import Meta, Struct
from starlette.types import Receive, Scope, Send

from realtime.access.addresses import is_loopback
from realtime.access.audit import Access
from realtime.access.door import COOKIE, Action, Door, token_in
from realtime.access.principal import ADMIN, METRICS
from realtime.access.revocations import Revocations
from realtime.access.rules import check_scope
from realtime.decoding import invalid
from realtime.errors import InvalidRequest
from realtime.http import read_body, send_answer, send_nothing
from realtime.observe import metrics
from realtime.observe.delivery import tell_deliveries
from realtime.protocol import Id

MAX_BODY_BYTES = 4096
FORGET_COOKIE = "auth.forget"
SET_COOKIE = Action("auth.cookie", scope=None, guests=True)
REVOKE = Action("admin.revoke", ADMIN)
SHOW_METRICS = Action("metrics", scope=None)


class Revocation(Struct, forbid_unknown_fields=True):
    """Whose tokens count no more: a user's, or all for one session."""

    user: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    session_id: Id | None = None


class AccessEndpoints:
    """The endpoints, each of them an ASGI application."""

    def __init__(self, door: Door, revocations: Revocations) -> None:
        self._door = door
        self._revocations = revocations

    async def cookie(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`POST` makes a cookie of the request's token, `DELETE` forgets it."""
        if scope["method"] == "DELETE":
            self._door.access(FORGET_COOKIE, scope).tell()
            await send_nothing(send, headers=[_cookie(scope, "", 0)])
        else:
            await self._door.answer(SET_COOKIE, scope, receive, send, self._set_cookie)

    async def revoke(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`POST` takes tokens back: their connections are closed on every instance."""
        await self._door.answer(REVOKE, scope, receive, send, self._revoke)

    async def metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`GET` shows what is counted: where tokens are checked, to this machine and to who has one of the scope
        `metrics` or `admin`."""
        if is_loopback(scope) or not self._door.checks_tokens:
            await _show_metrics(send)
        else:
            await self._door.answer(SHOW_METRICS, scope, receive, send, self._metrics)

    async def _metrics(self, access: Access, _scope: Scope, _receive: Receive, send: Send) -> None:
        check_scope(access.principal, METRICS, ADMIN)
        await _show_metrics(send)

    async def _set_cookie(self, access: Access, scope: Scope, _receive: Receive, send: Send) -> None:
        token = token_in(scope)
        expires_at = access.principal.expires_at
        if token is None or expires_at is None:
            raise InvalidRequest("no_authentication", "This server knows no tokens.")
        await send_nothing(send, headers=[_cookie(scope, token, max(0, int(expires_at - time.time())))])

    async def _revoke(self, access: Access, _scope: Scope, receive: Receive, send: Send) -> None:
        asked = _decoded(await read_body(receive, MAX_BODY_BYTES))
        access.session_id, access.of_user = asked.session_id, asked.user
        await self._revocations.revoke(user=asked.user, session_id=asked.session_id)
        await send_nothing(send)


async def _show_metrics(send: Send) -> None:
    tell_deliveries()
    body, content_type = await asyncio.to_thread(metrics.render)
    await send_answer(send, 200, [(b"content-type", content_type.encode())], body)


def _cookie(scope: Scope, token: str, max_age_s: int) -> tuple[bytes, bytes]:
    secure = "; Secure" if scope.get("scheme") == "https" else ""
    path = quote(scope.get("root_path", "")) or "/"  # where the server is mounted: others' paths need not see it
    text = f"{COOKIE}={token}; Path={path}; Max-Age={max_age_s}; HttpOnly; SameSite=Strict{secure}"
    return b"set-cookie", text.encode("latin-1")


def _decoded(body: bytes) -> Revocation:
    try:
        asked = msgspec.json.decode(body, type=Revocation)
    except msgspec.ValidationError as error:
        raise invalid(error) from None
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise InvalidRequest("invalid_json", "The body is not JSON.") from None
    if (asked.user is None) == (asked.session_id is None):
        raise InvalidRequest("invalid_message", "Give either user or session_id.", param="user")
    return asked
