"""The connections of a process: who is let in, who is dropped, and how all of them are told to go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from realtime.connections import MAX_LOOK_S, Connections
from realtime.errors import Unavailable
from realtime.feed import Closing, Feed
from realtime.opening import Opening
from realtime.protocol import JSON, CloseCode, SessionGoingAway
from tests.support.clock import advancing_clock
from tests.support.principals import known
from tests.support.sdk import turns


class Noted(Feed):
    """A feed that keeps what is done to it."""

    def __init__(self) -> None:
        super().__init__(Opening(JSON), known("ann"), transport="websocket")
        self.sent_away: list[SessionGoingAway] = []
        self.dropped: list[Closing] = []

    def send_away(self, message: SessionGoingAway) -> None:
        self.sent_away.append(message)
        super().send_away(message)

    def drop(self, closing: Closing) -> None:
        self.dropped.append(closing)
        super().drop(closing)


@pytest.fixture
def connections() -> Connections:
    """Room for two, and 30 s to take a message."""
    return Connections(max_connections=2, send_timeout_s=30)


def refusal(check: Callable[[], None]) -> str:
    """The code with which somebody is refused."""
    with pytest.raises(Unavailable) as refused:
        check()
    assert refused.value.status == 503
    assert refused.value.retry_after_ms
    return refused.value.code


async def test_as_many_are_let_in_as_there_may_be(connections: Connections) -> None:
    """Who leaves, in whatever way, makes room."""
    with ExitStack() as others:
        for number in range(2):
            assert len(connections) == number
            connections.admit()
            others.enter_context(connections.holding(Noted()))
        assert refusal(connections.admit) == "too_many_connections"
        connections.check_open()
    assert len(connections) == 0
    with pytest.raises(KeyError), connections.holding(Noted()):
        raise KeyError
    assert len(connections) == 0
    connections.admit()


async def test_nobody_is_let_in_while_it_drains(connections: Connections) -> None:
    """However much room there is."""
    connections.draining = True
    assert refusal(connections.admit) == "draining"
    assert refusal(connections.check_open) == "draining"


async def test_empty_returns_once_nobody_is_left(connections: Connections) -> None:
    """At once where nobody was; and not for a moment without anybody, if another came."""
    await connections.empty()
    one, two = connections.holding(Noted()), connections.holding(Noted())
    one.__enter__()
    emptied = [asyncio.ensure_future(connections.empty()) for _ in range(2)]
    await turns()
    one.__exit__(None, None, None)
    two.__enter__()
    await turns()
    assert not any(task.done() for task in emptied)
    two.__exit__(None, None, None)
    async with asyncio.timeout(20):
        await asyncio.gather(*emptied)


async def test_who_takes_nothing_for_too_long_is_dropped(
    connections: Connections,
) -> None:
    """Once, and nobody else."""
    stalled, slow, idle = Noted(), Noted(), Noted()
    loop = asyncio.get_running_loop()
    with advancing_clock() as advance, ExitStack() as held:
        for feed in (stalled, slow, idle):
            held.enter_context(connections.holding(feed))
        watching = asyncio.create_task(connections.watch())
        await turns()
        stalled.sending_since = loop.time()
        slow.sending_since = loop.time() + 10
        for _ in range(29):
            advance(MAX_LOOK_S)
            await turns()
        assert stalled.dropped == []
        for _ in range(3):
            advance(MAX_LOOK_S)
            await turns()
        watching.cancel()
        await asyncio.wait([watching])
    [closing] = stalled.dropped
    assert (closing.code, closing.by_server) == (CloseCode.SLOW_READER, True)
    assert slow.dropped == idle.dropped == []


async def test_everybody_is_told_to_go_and_to_come_back_at_a_time_of_its_own() -> None:
    """Spread over the time that is given."""
    connections = Connections(max_connections=1000, send_timeout_s=30)
    feeds = [Noted() for _ in range(200)]
    with ExitStack() as held:
        for feed in feeds:
            held.enter_context(connections.holding(feed))
        connections.say_goodbye(20, 10)
    told = [feed.sent_away[0] for feed in feeds]
    assert {message.time_left_ms for message in told} == {20_000}
    after_ms = [message.reconnect_after_ms for message in told]
    assert 0 <= min(after_ms) < 1000
    assert 9000 < max(after_ms) <= 10_000
    assert len(set(after_ms)) > 150


async def test_one_that_can_not_be_dropped_keeps_no_other_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether their tokens were taken back or have expired, or they read nothing."""

    class Broken(Noted):
        def drop(self, closing: Closing) -> None:
            raise RuntimeError("broken")

    reports: list[BaseException] = []
    monkeypatch.setattr("realtime.observe.logs.report", reports.append)
    revoked: set[str] = set()
    connections = Connections(
        max_connections=10, send_timeout_s=30, is_revoked=lambda principal, _session_id: principal.user in revoked
    )
    others = [Noted(), Noted()]
    with connections.holding(others[0]), connections.holding(Broken()), connections.holding(others[1]):
        revoked.add("ann")
        connections.drop_revoked()
        connections._drop_stalled(float("inf"))
        connections._drop_expired(float("inf"))
    assert [len(one.dropped) for one in others] == [3, 3]
    assert [str(error) for error in reports] == ["broken"] * 3
