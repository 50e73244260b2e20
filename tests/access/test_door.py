"""Where a request's token is looked for, who it makes of a client, and what may replace it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from realtime.access.audit import Audit
from realtime.access.door import COOKIE, Door, token_in
from realtime.access.principal import LEEWAY_S, SESSION, TASK, Principal
from realtime.access.revocations import MemoryRegister, Revocations
from realtime.access.tokens import make_verifier
from realtime.errors import AuthenticationError, InvalidRequest, PermissionDenied
from realtime.settings import Settings
from tests.support.tills import open_admission
from tests.support.tokens import SECRET, token


def scope(*headers: tuple[str, str], subprotocols: tuple[str, ...] = (), from_page: bool = False) -> dict[str, Any]:
    """A request."""
    return {
        "type": "websocket",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in headers],
        "subprotocols": list(subprotocols),
        "client": ("127.0.0.1", 1),
        "query_string": b"token=q&access_token=q",
        "realtime.from_page": from_page,
    }


def shown(claimed: str) -> dict[str, Any]:
    """A request with that token."""
    return scope(("authorization", f"Bearer {claimed}"))


@pytest.fixture
def revocations() -> Revocations:
    return Revocations(MemoryRegister(keep_s=60), lambda: None)


@pytest.fixture
def door(revocations: Revocations) -> Door:
    return Door(make_verifier(Settings(auth_secret=SECRET)), revocations, Audit(hides_sessions=False), open_admission())


@pytest.mark.parametrize("value", ["Bearer t", "bearer t", "BEARER t", "Bearer   t  "])
def test_a_token_of_the_header(value: str) -> None:
    """However its kind is written."""
    assert token_in(scope(("authorization", value))) == "t"


@pytest.mark.parametrize("values", [["t"], ["Bearer"], ["Bearer "], ["Basic t"], [""], ["Bearer t", "Bearer t"]])
def test_a_header_that_is_none(values: list[str]) -> None:
    """It is not passed over for something else."""
    headers = [("authorization", value) for value in values] + [("cookie", f"{COOKIE}=c")]
    with pytest.raises(AuthenticationError) as refused:
        token_in(scope(*headers, subprotocols=("bearer.s",), from_page=True))
    assert refused.value.code == "invalid_token"


def test_the_header_comes_before_the_subprotocol_and_that_before_the_cookie() -> None:
    """One is looked at."""
    cookie = ("cookie", f"{COOKIE}=c")
    offered = ("realtime.v1", "bearer.s", "bearer.other")
    assert token_in(scope(("authorization", "Bearer h"), cookie, subprotocols=offered, from_page=True)) == "h"
    assert token_in(scope(cookie, subprotocols=offered, from_page=True)) == "s"
    assert token_in(scope(cookie, from_page=True)) == "c"
    assert token_in(scope(cookie)) is None
    assert token_in(scope(from_page=True)) is None


@pytest.mark.parametrize("text", [f"{COOKIE}=", f"x{COOKIE}=c", f"{COOKIE}x=c", COOKIE, "", ";;=;"])
def test_a_cookie_that_holds_no_token(text: str) -> None:
    """Or that is another one."""
    assert not token_in(scope(("cookie", text), from_page=True))


@pytest.mark.parametrize(
    "before", ["", "a=b; ", ";;", "a" * 20_000 + "; ", ";" * 20_000, " ;" * 10_000 + " \t", "a=b=c; "]
)
@pytest.mark.parametrize("after", ["", "; a=b", " ;", ";" * 20_000])
def test_a_cookie_among_others(before: str, after: str) -> None:
    """However many, and however they are written."""
    assert token_in(scope(("cookie", f"{before}{COOKIE}=c.d-e_f{after}"), from_page=True)) == "c.d-e_f"


async def test_a_token_says_who(door: Door) -> None:
    """And from where they ask is the request's to say."""
    principal = await door.identify(shown(token("ann", session_id="sess_1", scope="session admin")))
    assert (principal.user, principal.session_id, principal.address) == ("ann", "sess_1", "127.0.0.1")
    assert principal.scopes == {"session", "admin"}
    assert not principal.is_anonymous


async def test_a_token_that_counts_by_the_leeway_ends_with_it(door: Door) -> None:
    """It has no minute more on top of that."""
    before = time.time()
    late = await door.identify(shown(token("ann", ttl_s=-5)))
    fresh = await door.identify(shown(token("ann", ttl_s=5)))
    assert before < (late.expires_at or 0) <= time.time() + LEEWAY_S - 4
    assert before < (fresh.expires_at or 0) <= time.time() + 5


async def test_without_keys_everybody_is_anonymous(revocations: Revocations) -> None:
    """A token counts for nothing, a bad one neither."""
    door = Door(None, revocations, Audit(hides_sessions=True), open_admission())
    for request in (scope(), shown("garbage"), shown(token("ann"))):
        principal = await door.identify(request)
        assert (principal.user, principal.is_anonymous) == ("anonymous", True)
    with pytest.raises(InvalidRequest, match="no tokens"):
        await door.refresh(Principal(), token("ann"), "sess_1")


@pytest.mark.parametrize(
    ("before", "after", "code"),
    [
        ({}, {}, None),
        ({}, {"session_id": "sess_1"}, None),
        ({}, {"scope": "session"}, None),
        ({"session_id": "sess_1"}, {"session_id": "sess_1"}, None),
        ({}, {"session_id": "sess_2"}, "token_widens"),
        ({"session_id": "sess_1"}, {}, "token_widens"),
        ({"session_id": "sess_1"}, {"session_id": "sess_2"}, "token_widens"),
        ({"scope": "session"}, {}, "token_widens"),
        ({}, {"scope": "session admin"}, "token_widens"),
        ({}, {"scope": "task oneshot"}, "scope_missing"),
    ],
)
async def test_what_may_replace_a_token(door: Door, before: Any, after: Any, code: str | None) -> None:
    """What allows no more, and what is needed to be there at all."""
    principal = await door.identify(shown(token("ann", **before)))
    if code is None:
        fresh = await door.refresh(principal, token("ann", **after), "sess_1")
        assert fresh.scopes <= principal.scopes
        return
    with pytest.raises((AuthenticationError, PermissionDenied)) as refused:
        await door.refresh(principal, token("ann", **after), "sess_1")
    assert refused.value.code == code


async def test_a_token_that_was_taken_back_replaces_none(door: Door, revocations: Revocations) -> None:
    """For the user, and for the session that is looked at."""
    principal = await door.identify(shown(token("ann")))
    await revocations.revoke(session_id="sess_1")
    with pytest.raises(AuthenticationError) as refused:
        await door.refresh(principal, token("ann"), "sess_1")
    assert refused.value.code == "token_revoked"
    assert (await door.refresh(principal, token("ann"), "sess_2")).scopes >= {SESSION, TASK}
    await revocations.revoke(user="ann")
    with pytest.raises(AuthenticationError):
        await door.identify(shown(token("ann")))
