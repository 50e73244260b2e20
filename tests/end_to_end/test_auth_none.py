"""Without authentication: everybody is anonymous, tokens count for nothing, and others must not get there."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest

from tests.end_to_end import echo
from tests.support.client import attached
from tests.support.event_stream import http_client
from tests.support.instance import START_S, environment, process
from tests.support.server import running_server
from tests.support.tokens import bearer


@pytest.mark.parametrize("headers", [{}, bearer("ann"), {"Authorization": "Bearer garbage"}, {"Authorization": "x"}])
async def test_everybody_is_anonymous(headers: dict[str, str]) -> None:
    """Whatever they show; who knows a session's id may attach, and ask for all that is in it."""
    async with running_server(echo) as server, attached(server, headers=headers) as client:
        assert client.first["session"]["owner"] == "anonymous"
        assert await client.answer("hello") == "hello"
        async with attached(server, client.session_id, headers=bearer("bob")) as other:
            await other.send("session.update", session={"instructions": "of anybody"})
            await other.until("session.updated")


@pytest.mark.parametrize("headers", [{}, bearer("ann", scope="admin")])
async def test_nothing_is_revoked_and_no_cookie_is_made(headers: dict[str, str]) -> None:
    """Nobody has the scope for the one, and there is no token for the other."""
    async with running_server(echo) as server, http_client(base_url=server.url) as http:
        revoked = await http.post("/v1/admin/revoke", json={"user": "anonymous"}, headers=headers)
        assert (revoked.status_code, revoked.json()["error"]["code"]) == (403, "scope_missing")
        cookie = await http.post("/v1/auth/cookie", headers=headers)
        assert (cookie.status_code, cookie.json()["error"]["code"]) == (400, "no_authentication")
        assert "set-cookie" not in cookie.headers


@pytest.mark.parametrize("variables", [{}, {"REALTIME_AUTH_SECRET": " "}, {"REALTIME_HOST": "::"}])
async def test_a_server_that_others_can_reach_does_not_start(variables: dict[str, Any]) -> None:
    """It says what to do."""
    arguments = () if "REALTIME_HOST" in variables else ("--host", "0.0.0.0")
    command = (sys.executable, "-m", "realtime", "serve", "--port", "0", *arguments)
    async with process(command, environment(variables)) as server, asyncio.timeout(START_S):
        assert await server.exit_status() == 1
        assert "--insecure-no-auth" in "\n".join(server.log)
