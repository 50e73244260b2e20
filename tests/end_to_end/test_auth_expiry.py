"""The end of tokens: what is told before, what replaces one, and how connections end with theirs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from realtime import connections
from realtime.protocol import timestamp_of
from tests.end_to_end import PATIENCE_S, echo, events_of, refused, until_closed
from tests.support.client import Client, Event, attached
from tests.support.event_stream import connections_of, http_client, streaming
from tests.support.sample_tasks import MODULE
from tests.support.server import RunningServer, running_server
from tests.support.tokens import SECRET, bearer, token

SUBPROTOCOLS = pytest.mark.parametrize("subprotocol", ["realtime.v1", "realtime.v1.msgpack"])


class Clock:
    """The clock by which connections end; `later` puts it forward."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def time(self) -> float:
        return time.time() + self.ahead_s

    def later(self, seconds: float) -> None:
        self.ahead_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(connections, "time", clock)
    return clock


@pytest.fixture
async def server() -> AsyncIterator[RunningServer]:
    async with running_server(echo, auth_secret=SECRET, tasks=(MODULE,)) as server:
        yield server


async def expiring(client: Client) -> Event:
    """The warning, once it comes."""
    async with asyncio.timeout(PATIENCE_S):
        return await client.until("auth.expiring")


async def refreshed(client: Client, shown: str) -> Event:
    """Show another token that is accepted."""
    await client.send("auth.refresh", token=shown, event_id="refresh")
    async with asyncio.timeout(PATIENCE_S):
        return await client.until("auth.refreshed")


def looks(server: RunningServer) -> asyncio.Event:
    """Set once the server has looked at every connection's token."""
    looked, held = asyncio.Event(), connections_of(server)
    drop = held._drop_expired

    def drop_and_tell(now: float) -> None:
        drop(now)
        looked.set()

    held._drop_expired = drop_and_tell  # type: ignore[method-assign]
    return looked


@SUBPROTOCOLS
async def test_a_client_is_told_a_minute_before(server: RunningServer, clock: Clock, subprotocol: str) -> None:
    """Once, and not before; then it ends with a fatal error and 4401."""
    looked = looks(server)
    async with attached(server, subprotocol=subprotocol, headers=bearer("ann", ttl_s=600)) as client:
        clock.later(530)
        looked.clear()
        await looked.wait()
        await refused(client, "response.cancel", response_id="x")
        assert not events_of(client, "auth.expiring")
        clock.later(20)
        await expiring(client)
        looked.clear()
        await looked.wait()
        assert await client.answer("it still works") == "it still works"
        clock.later(60)
        assert await until_closed(client) == 4401
    assert len(events_of(client, "auth.expiring")) == 1
    last = client.transcript.events[-1]
    assert (last["type"], last["error"]["code"], last["error"]["fatal"]) == ("error", "token_expired", True)


async def test_a_client_is_told_at_once_if_less_than_a_minute_is_left(server: RunningServer) -> None:
    """By when it ends."""
    before = int(time.time())
    async with attached(server, headers=bearer("ann", ttl_s=30)) as client:
        told = await expiring(client)
    assert told["expires_at"] in {timestamp_of(second + 30) for second in range(before, int(time.time()) + 1)}


async def test_a_token_that_is_not_replaced_ends_its_connection(server: RunningServer) -> None:
    """By the real clock, too."""
    async with attached(server, headers=bearer("ann", ttl_s=2)) as client:
        assert await until_closed(client) == 4401


@SUBPROTOCOLS
async def test_another_token_lets_the_connection_live_on(server: RunningServer, clock: Clock, subprotocol: str) -> None:
    """Until that one ends, of which it is told again."""
    async with attached(server, subprotocol=subprotocol, headers=bearer("ann", ttl_s=50)) as client:
        await expiring(client)
        told = await refreshed(client, token("ann", ttl_s=600))
        clock.later(300)
        looked = looks(server)
        await looked.wait()
        assert await client.answer("it still works") == "it still works"
        clock.later(270)
        assert (await expiring(client))["expires_at"] == told["expires_at"]
        clock.later(60)
        assert await until_closed(client) == 4401


def widening(session_id: str) -> dict[str, tuple[str, str]]:
    """Tokens that a guest with the scope `session` may not go on with, and the codes that tell so."""
    same: dict[str, Any] = {"session_id": session_id, "scope": "session"}
    return {
        "another user": (token("bob", **same), "token_widens"),
        "another session": (token("ann", **{**same, "session_id": "sess_x"}), "token_widens"),
        "no session": (token("ann", scope="session"), "token_widens"),
        "more scopes": (token("ann", **{**same, "scope": "session task"}), "token_widens"),
        "admin": (token("ann", **{**same, "scope": "session admin"}), "token_widens"),
        "the default scopes": (token("ann", session_id=session_id), "token_widens"),
        "no scope": (token("ann", **{**same, "scope": ""}), "scope_missing"),
        "expired": (token("ann", ttl_s=-3600, **same), "token_expired"),
        "another secret": (token("ann", secret="another secret that is long enough", **same), "invalid_token"),
        "garbage": ("garbage", "invalid_token"),
        "nothing": ("", "invalid_token"),
        "odd": ("\u0000ü.x.y", "invalid_token"),
    }


@pytest.mark.parametrize("name", widening("s"))
async def test_a_token_that_widens_is_refused(server: RunningServer, clock: Clock, name: str) -> None:
    """The connection lives on, by the token that it had, and ends with that one."""
    async with attached(server, headers=bearer("ann")) as owner:
        claims = {"session_id": owner.session_id, "scope": "session", "ttl_s": 600}
        async with attached(server, owner.session_id, headers=bearer("ann", **claims)) as guest:
            shown, code = widening(owner.session_id)[name]
            assert (await refused(guest, "auth.refresh", token=shown, event_id="r"))["code"] == code
            assert (await refused(guest, "session.close"))["code"] == "owner_only"
            clock.later(601)
            assert await until_closed(guest) == 4401


async def test_a_token_may_narrow(server: RunningServer) -> None:
    """An owner may go on as a guest with fewer scopes; the way back is closed."""
    async with attached(server, headers=bearer("ann")) as client:
        await refreshed(client, token("ann", session_id=client.session_id, scope="session"))
        assert (await refused(client, "session.update", session={}))["code"] == "owner_only"
        assert (await refused(client, "auth.refresh", token=token("ann")))["code"] == "token_widens"


async def test_a_bad_token_is_not_told_to_anybody(server: RunningServer) -> None:
    """Neither it nor what is wrong with it is in the answer."""
    shown = token("ann", secret="another secret that is long enough")
    async with attached(server, headers=bearer("ann")) as client:
        error = await refused(client, "auth.refresh", token=shown)
    assert shown not in str(error)
    assert error["message"] == "The token is not valid."


async def test_a_stream_ends_with_its_token(server: RunningServer, clock: Clock) -> None:
    """Told by its last event; it can be gone on with by another one."""
    async with attached(server, headers=bearer("ann")) as client:
        url = f"{server.url}/v1/sessions/{client.session_id}/events"
        async with streaming(url, headers=bearer("ann", ttl_s=600)) as stream:
            clock.later(601)
            async with asyncio.timeout(PATIENCE_S):
                await stream.until_end()
        [error] = [event["error"] for event in stream.transcript.events if event["type"] == "error"]
        assert (error["code"], error["fatal"]) == ("token_expired", True)
        again = streaming(url, headers=bearer("ann"), last_event_id=stream.last_event_id, transcript=stream.transcript)
        async with again:
            pass


@pytest.mark.parametrize("where", ["/v1", "/v1/sessions/{}"])
async def test_a_tasks_stream_ends_with_its_token(server: RunningServer, clock: Clock, where: str) -> None:
    """Likewise."""
    async with attached(server, headers=bearer("ann")) as client, http_client(base_url=server.url) as http:
        if where == "/v1":
            made = await http.post("/v1/tasks/sleep", json={"seconds": 60}, headers=bearer("ann"))
            task_id = made.json()["task_id"]
        else:
            await client.send("task.create", name="sleep", input={"seconds": 60})
            task_id = (await client.until("task.created"))["task"]["id"]
        url = f"{where.format(client.session_id)}/tasks/{task_id}"
        async with http.stream("GET", f"{url}/events", headers=bearer("ann", ttl_s=600)) as stream:
            lines = stream.aiter_lines()
            while "task.started" not in await anext(lines):
                pass
            clock.later(601)
            async with asyncio.timeout(PATIENCE_S):
                rest = [line async for line in lines]
        assert any("token_expired" in line for line in rest)
        assert (await http.delete(url, headers=bearer("ann"))).status_code == 202


async def test_without_authentication_there_is_nothing_to_refresh() -> None:
    """A typed error, and the connection lives on."""
    async with running_server(echo) as server, attached(server) as client:
        error = await refused(client, "auth.refresh", token=token("ann"))
        assert (error["type"], error["code"]) == ("invalid_request_error", "no_authentication")
