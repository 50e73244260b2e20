"""What a reader is sent next, without a transport: the order, the ends, and a store that is away for a while."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any
from unittest import mock

import msgspec
import pytest

from realtime.asides import MAX_WAITING
from realtime.errors import NotFound, ServerError, StoreError
from realtime.feed import Closing, Feed
from realtime.live import RETRY_S, LiveSession
from realtime.opening import Opening
from realtime.protocol import (
    JSON,
    ChannelEvent,
    CloseCode,
    ParticipantJoined,
    Pong,
    ServerMessage,
    Session,
    SessionCreated,
    SessionGoingAway,
    SessionResumed,
)
from realtime.store.base import Viewer, Write
from realtime.viewers import SERVER_ENDED_FLOOR_S
from tests.contract import begun, closed, created, done, item, participant, session, spoken
from tests.support.clock import advancing_clock
from tests.support.ears import Ears
from tests.support.principals import known
from tests.support.sdk import turns
from tests.support.stores import Faulty

SESSION = "sess_1"
GOING = SessionGoingAway(reason="shutdown", time_left_ms=1, reconnect_after_ms=1)


@pytest.fixture
async def store() -> Faulty:
    """A store with a session."""
    store = Faulty()
    await store.create(session(SESSION))
    return store


@pytest.fixture
async def live(store: Faulty) -> AsyncIterator[LiveSession]:
    """The session, open here."""
    ears = Ears()
    live = LiveSession(SESSION, store, ears)
    await live.open()
    yield live
    live.close()
    await ears.settled()


def reader(live: LiveSession, **opening: Any) -> Feed:
    """A feed that is told when something is new."""
    feed = Feed(Opening(JSON, **{"session_id": SESSION, **opening}), known("ann"), transport="websocket")
    live.readers.add(feed)
    return feed


async def begun_reader(live: LiveSession, **opening: Any) -> Feed:
    """One that has its first message."""
    feed = reader(live, **opening)
    await feed.begin(live, describe)
    return feed


def describe(live: LiveSession) -> Session:
    return live.state.session


async def append(live: LiveSession, channel: str, *entries: Any) -> None:
    await live.store.append(SESSION, [Write(channel, entries)])


async def waiting(feed: Feed) -> list[str]:
    """The types of what waits for a reader, which then has it."""
    found = []
    while (message := await soon(feed)) is not None:
        found.append(str(message.__struct_config__.tag))
    return found


async def soon(feed: Feed) -> ServerMessage | None:
    """The next message, if there is one."""
    try:
        async with asyncio.timeout(0.01):
            return await feed.next()
    except TimeoutError:
        return None


# --- what comes, and in which order ----------------------------------------------------------------------------------


async def test_the_first_message_tells_of_the_session_and_its_audience(live: LiveSession) -> None:
    """As one that was resumed, or made by this connection."""
    await live.store.join(SESSION, Viewer(participant("conn_1"), "inst_1"))
    await append(live, "session", created("resp_1"))
    for opening, kind in (({}, SessionResumed), ({"session_id": None}, SessionCreated)):
        feed = reader(live, **opening)
        first = await feed.begin(live, describe)
        assert isinstance(first, kind)
        assert msgspec.structs.asdict(first) == {
            "session": live.state.session,
            "connection_id": feed.participant.connection_id,
            "positions": {"session": 1, "resp_1": 0},
            "participants": [participant("conn_1")],
        }


async def test_history_comes_and_then_what_happens(live: LiveSession) -> None:
    """Each event once, with the positions that its reader has then."""
    await append(live, "session", item("hello"), created("resp_1"))
    feed = await begun_reader(live)
    assert feed.positions == {"session": 0}
    assert await waiting(feed) == ["conversation.item.created", "response.created"]
    assert feed.positions == {"session": 2, "resp_1": 0}
    assert feed.follows("resp_1")
    await append(live, "resp_1", begun("resp_1"), spoken("resp_1", "a", "b"), done("resp_1"))
    assert await waiting(feed) == ["response.in_progress", "response.output_text.delta", "response.done"]
    assert feed.positions == {"session": 2}
    assert not feed.follows("resp_1")


async def test_reader_goes_on_from_where_it_was_or_from_now(live: LiveSession) -> None:
    """As its opening says."""
    await append(live, "session", item("one"), item("two", "item_2"))
    assert len(await waiting(await begun_reader(live, after={"session": 1}))) == 1
    feed = await begun_reader(live, history=False)
    assert feed.positions == {"session": 2}
    assert await waiting(feed) == []


async def test_answers_and_arrivals_overtake_what_streams(live: LiveSession) -> None:
    """What belongs to no log comes first."""
    feed = await begun_reader(live)
    await append(live, "session", item("hello"))
    await live.store.join(SESSION, Viewer(participant("conn_1"), "inst_1"))
    feed.tell(GOING)
    await feed.reply(Pong(event_id="1"))
    first = [await feed.next() for _ in range(3)]
    assert first == [GOING, Pong(event_id="1"), ParticipantJoined(participant=participant("conn_1"))]
    assert isinstance(await feed.next(), ChannelEvent)


async def test_who_waits_is_woken(live: LiveSession) -> None:
    """By what is appended, and by what is told."""
    feed = await begun_reader(live)
    coming = asyncio.ensure_future(feed.next())
    await turns()
    assert not coming.done()
    await append(live, "session", item("hello"))
    assert isinstance(await coming, ChannelEvent)
    coming = asyncio.ensure_future(feed.next())
    await turns()
    feed.tell(GOING)
    assert await coming is GOING


async def test_nothing_comes_until_the_time_that_was_given(live: LiveSession) -> None:
    """Then `None`, also where much waits."""
    feed = await begun_reader(live)
    loop = asyncio.get_running_loop()
    with advancing_clock() as advance:
        coming = asyncio.ensure_future(feed.next(loop.time() + 10))
        await turns()
        advance(9)
        await turns()
        assert not coming.done()
        advance(1)
        assert await coming is None
    await append(live, "session", item("hello"))
    assert await feed.next(loop.time()) is None
    assert await feed.next(loop.time() + 1) is not None


async def test_who_replies_waits_while_too_much_waits(live: LiveSession) -> None:
    """Until some of it was taken, or nobody takes any more."""
    feed = await begun_reader(live)
    for _ in range(MAX_WAITING - 1):
        await feed.reply(Pong())
    replies = [asyncio.ensure_future(feed.reply(Pong())) for _ in range(2)]
    await turns()
    assert not any(reply.done() for reply in replies)
    feed.close()
    await asyncio.gather(*replies)


# --- ends ------------------------------------------------------------------------------------------------------------


async def test_the_sessions_end_is_the_last_message(live: LiveSession) -> None:
    """Nothing overtakes it, and what is told after it is told to nobody."""
    feed = await begun_reader(live)
    await append(live, "session", closed())
    assert await feed.next() == msgspec.structs.replace(closed(), seq=1)
    feed.tell(GOING)
    with pytest.raises(Closing) as ended:
        await feed.next()
    assert (ended.value.code, ended.value.error) == (CloseCode.NORMAL, None)


async def test_who_has_seen_the_end_is_not_told_again(live: LiveSession) -> None:
    """There is a first message, and then the end."""
    await append(live, "session", closed())
    feed = await begun_reader(live, after={"session": 1})
    with pytest.raises(Closing) as ended:
        await feed.next()
    assert ended.value.code == CloseCode.NORMAL


async def test_a_session_that_is_gone_ends_its_feeds(live: LiveSession, store: Faulty) -> None:
    """With an error that says so."""
    feed = await begun_reader(live)
    coming = asyncio.ensure_future(feed.next())
    await turns()
    await store.erase(SESSION)
    with pytest.raises(Closing) as ended:
        await coming
    assert ended.value.error is not None
    assert (ended.value.code, ended.value.error.code) == (CloseCode.DELETED, "session_deleted")


async def test_a_session_that_the_store_lost_ends(live: LiveSession, store: Faulty) -> None:
    """Who looks at it is told that there is nothing to come back for."""
    feed = await begun_reader(live)
    with mock.patch.object(store, "_clock", return_value=math.inf):
        store.sweep()
    with pytest.raises(Closing) as ended:
        await feed.next()
    assert ended.value.error is not None
    assert (ended.value.code, ended.value.error.code) == (CloseCode.NOT_FOUND, "store_lost")


async def test_reader_that_has_more_than_the_session_is_refused(live: LiveSession) -> None:
    """Before its first message."""
    with pytest.raises(NotFound) as refusal:
        await begun_reader(live, after={"session": 9})
    assert refusal.value.code == "store_lost"


# --- a store that is away --------------------------------------------------------------------------------------------


async def test_store_that_is_away_refuses_who_begins(live: LiveSession, store: Faulty) -> None:
    """There is nothing to wait for yet."""
    store.is_down = True
    with pytest.raises(StoreError):
        await begun_reader(live)


async def test_reader_waits_for_a_store_that_is_away(live: LiveSession, store: Faulty) -> None:
    """It asks twice a second, however much happens meanwhile, and goes on without seam."""
    await append(live, "session", item("hello"))
    feed = await begun_reader(live)
    live.views["session"].log.drop(1)
    store.is_down = True
    with mock.patch.object(store, "read", wraps=store.read) as read, advancing_clock() as advance:
        coming = asyncio.ensure_future(feed.next())
        for _ in range(3):
            await turns()
            feed.wake()
        assert (coming.done(), read.call_count) == (False, 1)
        advance(RETRY_S)
        await turns()
        assert (coming.done(), read.call_count) == (False, 2)
        store.is_down = False
        advance(RETRY_S)
        assert isinstance(await coming, ChannelEvent)


# --- run -------------------------------------------------------------------------------------------------------------


class Client:
    """Takes what it is sent, while it is `open`."""

    def __init__(self) -> None:
        self.taken: list[ServerMessage | None] = []
        self.open = asyncio.Event()
        self.open.set()

    async def take(self, message: ServerMessage | None) -> None:
        await self.open.wait()
        self.taken.append(message)


def running(feed: Feed, live: LiveSession, client: Client, **options: Any) -> asyncio.Task[Any]:
    return asyncio.ensure_future(feed.run(live, describe, client.take, **options))


async def ended(run: asyncio.Task[Any]) -> Closing:
    with pytest.raises(Closing) as closing:
        await run
    return closing.value


async def test_run_sends_everything_until_the_end(live: LiveSession) -> None:
    """The first message, then the rest; the end is raised."""
    client = Client()
    run = running(reader(live), live, client)
    await append(live, "session", item("hello"))
    await turns()
    await append(live, "session", closed())
    assert (await ended(run)).code == CloseCode.NORMAL
    assert [message.__struct_config__.tag for message in client.taken if message] == [
        "session.resumed",
        "conversation.item.created",
        "session.closed",
    ]


async def test_run_tells_of_a_refusal(live: LiveSession) -> None:
    """Before anything was sent."""
    client = Client()
    closing = await ended(running(reader(live, after={"session": 9}), live, client))
    assert (closing.code, client.taken) == (CloseCode.NOT_FOUND, [])


async def test_run_beats(live: LiveSession) -> None:
    """`None` goes out every so often, whatever else does."""
    client = Client()
    with advancing_clock() as advance:
        run = running(reader(live), live, client, beat_s=10)
        await turns()
        for number in range(6):
            advance(5)
            await append(live, "session", item("hello", f"item_{number}"))
            await turns()
        assert [index for index, message in enumerate(client.taken) if message is None] == [2, 5, 8]
        run.cancel()
        await asyncio.wait([run])


async def test_it_is_seen_since_when_a_client_takes_nothing(live: LiveSession) -> None:
    """While a message, or a beat, is with the transport; not while there is nothing to send."""
    client, feed, loop = Client(), reader(live), asyncio.get_running_loop()
    assert feed.sending_since == math.inf
    with advancing_clock() as advance:
        run = running(feed, live, client, beat_s=100)
        await turns()
        assert feed.sending_since == math.inf
        for event, wait_s in ((item("hello"), 1), (None, 99)):
            client.open.clear()
            before = loop.time()
            if event is not None:
                await append(live, "session", event)
            advance(wait_s)
            await turns()
            assert before <= feed.sending_since <= loop.time()
            client.open.set()
            await turns()
            assert feed.sending_since == math.inf
        run.cancel()
        await asyncio.wait([run])


async def test_drop_ends_a_run_whatever_it_waits_for(live: LiveSession) -> None:
    """A client that takes nothing, or something to send; and there is nobody to be dropped again."""
    slow = Closing(CloseCode.SLOW_READER, by_server=True)
    for stalls in (True, False):
        client, feed = Client(), reader(live)
        if stalls:
            client.open.clear()
        run = running(feed, live, client)
        await turns()
        feed.drop(slow)
        assert feed.sending_since == math.inf
        assert await ended(run) is slow


async def test_drop_before_a_run_ends_it_at_once(live: LiveSession) -> None:
    """A connection may be attaching still."""
    client, feed = Client(), reader(live)
    slow = Closing(CloseCode.SLOW_READER, by_server=True)
    feed.drop(slow)
    assert await ended(running(feed, live, client)) is slow
    assert client.taken == []


async def test_cancelled_run_is_cancelled(live: LiveSession) -> None:
    """It is no end that anybody is told."""
    run = running(reader(live), live, Client())
    await turns()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run


async def test_fault_of_the_transport_comes_out(live: LiveSession) -> None:
    """It is the transport's own."""

    async def fail(message: ServerMessage | None) -> None:
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        await reader(live).run(live, describe, fail)


# --- what the end deserves -------------------------------------------------------------------------------------------


async def test_who_was_told_to_go_has_time_to_come_back(live: LiveSession) -> None:
    """However it then leaves: it was the server's doing."""
    feed = reader(live)
    feed.left(5.0)
    assert feed.floor_s == 5.0
    feed.send_away(GOING)
    feed.left(0.0)
    assert feed.floor_s == SERVER_ENDED_FLOOR_S


def test_closing_of_an_error_has_its_code() -> None:
    """And is the client's to know."""
    error = ServerError("internal_error", "Something went wrong here.")
    closing = Closing.told(error)
    assert (closing.code, closing.error, closing.by_server) == (CloseCode.INTERNAL_ERROR, error, False)
