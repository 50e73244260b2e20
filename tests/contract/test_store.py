"""What every store promises: each sentence of `realtime.store.base` is a test, run over each implementation.

To plug one in, add it to the parameters of `implementation`: it needs a store with sessions that live for `TTL_S` and
hold `MAX_BYTES`, and a way to let its time pass.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from msgspec.structs import replace

from realtime.control import CancelResponse, CancelTask
from realtime.errors import ConflictError, NotFound
from realtime.log import Deltas, Entry
from realtime.protocol import CONTROL_CHANNEL, SESSION_CHANNEL, ChannelEvent, Failure, Overrides, ReasoningDelta
from realtime.store.base import (
    Appended,
    Batch,
    CommandRecord,
    CommandSeen,
    Gone,
    Head,
    Made,
    Notice,
    PositionConflict,
    Standing,
    Store,
    TaskRef,
    Unwatch,
    Viewer,
    ViewerJoined,
    ViewerLeft,
    Write,
)
from realtime.store.memory import MemoryStore
from realtime.store.sealing import AesGcm
from tests.contract import (
    begun,
    closed,
    created,
    done,
    flat,
    item,
    participant,
    session,
    spoken,
    task_begun,
    task_done,
    task_made,
    task_told,
    task_wrote,
)
from tests.contract.redis_subject import redis_store, restricted_cluster, restricted_server, running

TTL_S = 100.0
LEASE_S = 10.0
MAX_BYTES = 200_000
LIMITS: dict[str, Any] = {"session_ttl_s": TTL_S, "task_ttl_s": TTL_S / 2, "max_session_bytes": MAX_BYTES}
ALL = 1_000_000
"""More characters than any channel here has."""
PATIENCE_S = 20.0
SESSION = "sess_1"
DELTA = [Write("resp_1", [spoken("resp_1", "a")])]
MARGIN_S = TTL_S / 20 + 1
"""A use moves a session's end at most so much less than its time to live: not every use moves it."""
SHORT_S = 20.0
"""What sessions live that have a shorter time to live than the store's."""


@dataclass
class Subject:
    """A store under test. `advance` lets seconds pass, and what is due in them happen."""

    store: Store
    advance: Callable[[float], Awaitable[None]]


@asynccontextmanager
async def memory() -> AsyncIterator[Subject]:
    """The store in this process, on a clock of its own."""
    now = 0.0

    async def advance(seconds: float) -> None:
        nonlocal now
        now += seconds
        in_process.sweep()  # the first sweep after a jump takes it for a process that stood still
        in_process.sweep()

    in_process = MemoryStore(**LIMITS, clock=lambda: now)
    async with in_process:
        yield Subject(in_process, advance)


@asynccontextmanager
async def in_redis(ports: list[int], **settings: Any) -> AsyncIterator[Subject]:
    """The store in Redis, whose keys grow older at a word."""
    async with redis_store(ports, **LIMITS, **settings) as (store, advance):
        yield Subject(store, advance)


@pytest.fixture(scope="module")
def redis_ports() -> Iterator[list[int]]:
    """The port of a Redis."""
    with running(restricted_server()) as ports:
        yield ports


@pytest.fixture(scope="module")
def cluster_ports() -> Iterator[list[int]]:
    """The ports of a cluster's nodes."""
    with running(restricted_cluster()) as ports:
        yield ports


@pytest.fixture(params=["memory", "redis", "cluster"])
def implementation(
    request: pytest.FixtureRequest, redis_ports: list[int], cluster_ports: list[int]
) -> AbstractAsyncContextManager[Subject]:
    """One of the stores."""
    if request.param == "memory":
        return memory()
    # Sealed over a single server and clear over a cluster: both go through every test, and no third run is needed.
    # What sealing changes, the bytes of values and fields, goes the same way in both; the scripts don't know of it.
    if request.param == "redis":
        return in_redis(redis_ports, sealer=AesGcm({"new": b"n" * 32, "old": b"o" * 32}))
    return in_redis(cluster_ports)


@pytest.fixture
async def subject(implementation: AbstractAsyncContextManager[Subject]) -> AsyncIterator[Subject]:
    """A store in which the session `SESSION` was just made."""
    async with implementation as subject:
        await subject.store.create(session(SESSION))
        yield subject


@pytest.fixture
def store(subject: Subject) -> Store:
    """The same, where time does not matter."""
    return subject.store


class Told:
    """What a watcher of a session was told, in order. A store may tell it a while after the call."""

    def __init__(self) -> None:
        self.notices: list[Notice] = []
        self.end: Unwatch
        self._news = asyncio.Event()

    def listen(self, notice: Notice) -> None:
        self.notices.append(notice)
        self._news.set()

    async def until(self, enough: Callable[[list[Notice]], object]) -> list[Notice]:
        """Wait until `enough` is true of the notices; returns them."""
        async with asyncio.timeout(PATIENCE_S):
            while not enough(self.notices):
                self._news.clear()
                await self._news.wait()
        return self.notices

    def positions(self, channel: str) -> list[ChannelEvent]:
        """The events of a channel that were told, one a position."""
        return flat(entry for notice in self.appended(channel) for entry in notice.entries)

    def appended(self, channel: str) -> list[Appended]:
        """What was told of a channel."""
        return [notice for notice in self.notices if isinstance(notice, Appended) and notice.channel == channel]


async def watching(store: Store, *channels: str) -> Told:
    """Somebody who watches the session, and follows these channels of it."""
    told = Told()
    told.end = await store.watch(SESSION, told.listen)
    for channel in channels:
        await store.follow(SESSION, channel, told.listen)
    return told


def viewer(connection_id: str, user: str = "ann", instance: str = "inst_1") -> Viewer:
    return Viewer(participant(connection_id, user), instance)


def record(event_id: str, *, user: str = "ann", digest: bytes = b"d") -> CommandRecord:
    return CommandRecord(user, event_id, digest)


async def append(store: Store, channel: str, *entries: Entry, expect: int | None = None) -> None:
    await store.append(SESSION, [Write(channel, entries, expect)])


async def whole(store: Store, channel: str, max_chars: int = ALL) -> list[ChannelEvent]:
    """A channel from its start, read until nothing more comes."""
    events: list[ChannelEvent] = []
    while found := flat(await store.read(SESSION, channel, len(events), max_chars)):
        events += found
    return events


async def heads(store: Store) -> dict[str, Head]:
    return (await store.load(SESSION)).heads


# --- create and load -----------------------------------------------------------------------------------------------


async def test_a_new_session_is_known(store: Store) -> None:
    """A session that was made is loaded as it was given."""
    made = session("sess_2", instructions="Be brief 🙂", max_output_tokens=7)
    await store.create(made)
    snapshot = await store.load("sess_2")
    assert snapshot.session == made


async def test_a_new_session_has_an_empty_channel_of_its_own(store: Store) -> None:
    """The session's channel stands at 0 from the start, so that a reader who claims more is found out."""
    assert await heads(store) == {SESSION_CHANNEL: Head(0, finished=False)}


async def test_load_tells_how_long_the_session_lives(store: Store) -> None:
    """`expires_in_s` is about the whole time of a session that was just made."""
    assert TTL_S * 0.95 - 1 <= (await store.load(SESSION)).expires_in_s <= TTL_S


async def test_load_tells_where_channels_stand(store: Store) -> None:
    """Heads have each channel's position, and whether its last event ended it."""
    await append(store, SESSION_CHANNEL, item("hi"), created("resp_1"), created("resp_2"))
    await append(store, "resp_1", begun("resp_1"), spoken("resp_1", "a", "b"), done("resp_1"))
    await append(store, "resp_2", begun("resp_2"))
    assert await heads(store) == {
        SESSION_CHANNEL: Head(3, finished=False),
        "resp_1": Head(4, finished=True),
        "resp_2": Head(1, finished=False),
    }


async def test_the_session_s_end_finishes_its_channel(store: Store) -> None:
    """The session's own channel is finished once it is closed."""
    await append(store, SESSION_CHANNEL, closed())
    assert await heads(store) == {SESSION_CHANNEL: Head(1, finished=True)}


async def test_load_tells_the_size(store: Store) -> None:
    """The size grows at least by the UTF-8 bytes of what is appended, items and deltas alike."""
    before = (await store.load(SESSION)).size_bytes
    await append(store, SESSION_CHANNEL, item("é" * 100))
    between = (await store.load(SESSION)).size_bytes
    await append(store, "resp_1", spoken("resp_1", "é" * 100))
    after = (await store.load(SESSION)).size_bytes
    assert between - before >= 200
    assert after - between >= 200


async def test_sessions_are_apart(store: Store) -> None:
    """What is appended to one session stands in no other."""
    await store.create(session("sess_2"))
    await append(store, SESSION_CHANNEL, item("hi"))
    assert await store.read("sess_2", SESSION_CHANNEL, 0, ALL) == []


async def test_the_store_answers(store: Store) -> None:
    """`ping` returns."""
    await store.ping()


# --- append and read -----------------------------------------------------------------------------------------------

ODD = ["", "\x00", "\r\n", "\u2028", "e", "\u0301", "👩", "\u200d", "👩", "שלום", '"\\', "\U0010ffff", "\ufeff"]


async def test_what_is_appended_is_read(store: Store) -> None:
    """Events come back equal, in order, whatever the characters."""
    entries: list[Entry] = [begun("resp_1"), spoken("resp_1", *ODD), done("resp_1")]
    await append(store, "resp_1", *entries)
    assert await whole(store, "resp_1") == flat(entries)


async def test_an_event_keeps_its_optional_fields(store: Store) -> None:
    """What clients never see is kept as well: a response's overrides, the command that caused an event."""
    overrides = Overrides(instructions="", model="m2", max_output_tokens=5)
    full = replace(created("resp_1", overrides), for_event_id="e1")
    await append(store, SESSION_CHANNEL, full)
    assert await whole(store, SESSION_CHANNEL) == [full]


async def test_kinds_of_deltas_stay_apart(store: Store) -> None:
    """Reasoning and text, interleaved in one channel, come back each as what it was."""
    entries: list[Entry] = [
        Deltas(ReasoningDelta(response_id="resp_1", delta=""), ["hm", "mm"]),
        spoken("resp_1", "a"),
        Deltas(ReasoningDelta(response_id="resp_1", delta=""), ["…"]),
        spoken("resp_1", "b"),
    ]
    await append(store, "resp_1", *entries)
    assert await whole(store, "resp_1") == flat(entries)


async def test_tasks_are_told_in_channels_too(store: Store) -> None:
    """Each kind of event comes back as it was, with what clients never see, and each attempt's text as its own."""
    made = replace(task_made("t", task_input='{"ü": "\\u0000"}'), for_event_id="e1")
    odd = replace(task_told("t", 2), progress=1.5, total=2**62, message="page \x00 of 👩", attempt=2)
    failure = Failure(type="server_error", code="c", message="m")
    ends = [
        task_done("t"),
        replace(task_done("t"), result_json='{"ü": [1, null]}', result_url="/there"),
        replace(task_done("t"), status="failed", result_json=None, error=failure, for_event_id="e2"),
    ]
    await append(store, SESSION_CHANNEL, made)
    assert await whole(store, SESSION_CHANNEL) == [made]
    for number, end in enumerate(ends):
        entries: list[Entry] = [
            task_begun("t", 1, "inst_1"),
            task_told("t", 1),
            task_wrote("t", *ODD),
            task_begun("t", 2, "inst_2"),
            odd,
            task_wrote("t", "a", "b", attempt=2),
            end,
        ]
        channel = f"t{number}"
        await append(store, channel, *[_of(channel, entry) for entry in entries])
        assert await whole(store, channel) == flat([_of(channel, entry) for entry in entries])
        assert (await store.load(SESSION)).heads[channel].finished


def _of(task_id: str, entry: Any) -> Entry:
    if isinstance(entry, Deltas):
        return Deltas(replace(entry.template, task_id=task_id), entry.texts)
    renamed: ChannelEvent = replace(entry, task_id=task_id)
    return renamed


async def test_the_control_channel_is_a_channel(store: Store) -> None:
    """Requests to a response's or a task's owner are logged like anything else."""
    requests = [
        CancelResponse(response_id="resp_1", reason="cancelled"),
        CancelTask(task_id="task_1", for_event_id="e1"),
    ]
    await append(store, CONTROL_CHANNEL, *requests)
    assert await whole(store, CONTROL_CHANNEL) == requests


async def test_a_channel_that_nobody_wrote_is_empty(store: Store) -> None:
    """Reading it finds nothing, and is no error."""
    assert await store.read(SESSION, "resp_1", 0, ALL) == []


async def test_reading_past_the_end_finds_nothing(store: Store) -> None:
    """A reader that is at the end, or ahead of the store, gets nothing."""
    await append(store, "resp_1", spoken("resp_1", "a", "b"))
    assert await store.read(SESSION, "resp_1", 2, ALL) == []
    assert await store.read(SESSION, "resp_1", 99, ALL) == []


async def test_a_read_splits_at_any_position(store: Store) -> None:
    """After whatever position, inside a run of deltas or between, exactly the rest is read."""
    written: list[Entry] = [begun("resp_1"), spoken("resp_1", *map(str, range(150))), done("resp_1")]
    await append(store, "resp_1", *written[:1])
    await append(store, "resp_1", *written[1:])
    everything = flat(written)
    for after in range(len(everything) + 1):
        assert flat(await store.read(SESSION, "resp_1", after, ALL)) == everything[after:]


async def test_a_read_is_bounded(store: Store) -> None:
    """Of more than `max_chars` about so many come at once, at least one entry each time, and all in the end."""
    texts = ["x" * 10] * 1000
    for start in range(0, 1000, 25):
        await append(store, "resp_1", spoken("resp_1", *texts[start : start + 25]))
    found = flat(await store.read(SESSION, "resp_1", 0, 1000))
    assert 500 <= 10 * len(found) <= 2000
    assert len(await whole(store, "resp_1", max_chars=1000)) == 1000


async def test_the_smallest_read_makes_progress(store: Store) -> None:
    """With a limit below the size of an entry one comes nevertheless."""
    written: list[Entry] = [begun("resp_1"), spoken("resp_1", "long enough"), done("resp_1")]
    await append(store, "resp_1", *written)
    assert await whole(store, "resp_1", max_chars=1) == flat(written)


async def test_a_read_of_many_items_is_bounded(store: Store) -> None:
    """The limit holds for events that are not deltas as well, roughly."""
    for number in range(150):
        await append(store, SESSION_CHANNEL, item("x" * 10, f"item_{number}"))
    assert 1 <= len(await store.read(SESSION, SESSION_CHANNEL, 0, 640)) < 100
    assert len(await whole(store, SESSION_CHANNEL, max_chars=640)) == 150


async def test_an_append_may_expect_a_position(store: Store) -> None:
    """A write whose `expect` is where the channel stands is carried out."""
    await append(store, "resp_1", begun("resp_1"), expect=0)
    await append(store, "resp_1", spoken("resp_1", "a", "b"), expect=1)
    await append(store, "resp_1", done("resp_1"), expect=3)
    assert (await heads(store))["resp_1"] == Head(4, finished=True)


@pytest.mark.parametrize("expect", [0, 1, 3, 99])
async def test_another_position_is_a_conflict(store: Store, expect: int) -> None:
    """A write that expects less or more than there is raises, and nothing is written."""
    await append(store, "resp_1", spoken("resp_1", "a", "b"))
    with pytest.raises(PositionConflict):
        await append(store, "resp_1", done("resp_1"), expect=expect)
    assert (await heads(store))["resp_1"] == Head(2, finished=False)


@pytest.mark.parametrize("expect", [None, 3])
async def test_nothing_follows_an_end(store: Store, expect: int | None) -> None:
    """A channel that has ended takes no more, whatever the writer expects."""
    await append(store, "resp_1", begun("resp_1"), spoken("resp_1", "a"), done("resp_1"))
    with pytest.raises(PositionConflict):
        await append(store, "resp_1", spoken("resp_1", "b"), expect=expect)
    assert (await heads(store))["resp_1"] == Head(3, finished=True)


async def test_one_claim_wins(store: Store) -> None:
    """Of many that append to an empty channel at once, each expecting it to be empty, one succeeds."""

    async def claim() -> bool:
        try:
            await append(store, "resp_1", begun("resp_1"), expect=0)
        except PositionConflict:
            return False
        return True

    assert sum(await asyncio.gather(*(claim() for _ in range(10)))) == 1
    assert await whole(store, "resp_1") == [begun("resp_1")]


@pytest.mark.parametrize("stale", [0, 1])
async def test_two_channels_are_one_step(store: Store, stale: int) -> None:
    """Where one of two writes conflicts, whichever it is, neither is carried out."""
    writes = [Write(SESSION_CHANNEL, [item("hi")], expect=0), Write("resp_1", [begun("resp_1")], expect=0)]
    writes[stale] = Write(writes[stale].channel, writes[stale].entries, expect=5)
    with pytest.raises(PositionConflict):
        await store.append(SESSION, writes)
    assert await whole(store, SESSION_CHANNEL) == []
    assert await whole(store, "resp_1") == []


async def test_two_channels_are_both_written(store: Store) -> None:
    """An append over two channels puts each write where it belongs."""
    await store.append(SESSION, [Write(SESSION_CHANNEL, [item("hi")]), Write("resp_1", [begun("resp_1")])])
    assert await whole(store, SESSION_CHANNEL) == [item("hi")]
    assert await whole(store, "resp_1") == [begun("resp_1")]


async def test_a_refused_append_tells_nobody(store: Store) -> None:
    """Watchers hear nothing of what was not written."""
    told = await watching(store)
    with pytest.raises(PositionConflict):
        await store.append(SESSION, [Write(SESSION_CHANNEL, [item("hi")]), Write("resp_1", [begun("resp_1")], 5)])
    await append(store, "resp_2", begun("resp_2"))
    assert await told.until(len) == [Appended("resp_2", 1, told.appended("resp_2")[0].entries)]


async def test_a_cancelled_append_is_whole_or_absent(store: Store) -> None:
    """Cancelled after any number of turns, both channels and the command are there, or none of them."""
    for turns in range(6):
        before = len(await whole(store, SESSION_CHANNEL))
        name = f"resp_{turns}"
        writes = [Write(SESSION_CHANNEL, [item("hi")]), Write(name, [begun(name)])]
        task = asyncio.ensure_future(store.append(SESSION, writes, record(name)))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        effects = {
            len(await whole(store, SESSION_CHANNEL)) - before,
            len(await whole(store, name)),
            int(await store.find_command(SESSION, "ann", name) is not None),
        }
        assert effects in ({0}, {1})


# --- commands ------------------------------------------------------------------------------------------------------


async def test_a_command_is_recorded_with_its_effect(store: Store) -> None:
    """What was recorded is found again, digest and all."""
    await store.append(SESSION, [Write(SESSION_CHANNEL, [item("hi")])], record("e1", digest=b"\x00\xff"))
    assert await store.find_command(SESSION, "ann", "e1") == record("e1", digest=b"\x00\xff")


async def test_a_command_s_record_tells_what_it_made(store: Store) -> None:
    """The ids come back with it; a command without an effect is recorded as well."""
    made = replace(record("e1"), made=Made(response_id="resp_1", item_id="item_1"))
    await store.append(SESSION, [Write(SESSION_CHANNEL, [item("hi")])], made)
    await store.append(SESSION, [], record("e2"))
    assert await store.find_command(SESSION, "ann", "e1") == made
    assert await store.find_command(SESSION, "ann", "e2") == record("e2")


async def test_a_command_that_never_came_is_not_found(store: Store) -> None:
    """Another `event_id`, another user and another session have no record of it."""
    await store.create(session("sess_2"))
    await store.append(SESSION, [Write(SESSION_CHANNEL, [item("hi")])], record("e1"))
    assert await store.find_command(SESSION, "ann", "e2") is None
    assert await store.find_command(SESSION, "bob", "e1") is None
    assert await store.find_command("sess_2", "ann", "e1") is None


async def test_a_command_is_carried_out_once(store: Store) -> None:
    """The second append of a command raises and writes nothing, whatever it would have written."""
    await store.append(SESSION, [Write(SESSION_CHANNEL, [item("hi")])], record("e1"))
    with pytest.raises(CommandSeen):
        await store.append(SESSION, [Write(SESSION_CHANNEL, [item("again")])], record("e1", digest=b"other"))
    assert await whole(store, SESSION_CHANNEL) == [item("hi")]


async def test_a_command_that_comes_twice_at_once_is_carried_out_once(store: Store) -> None:
    """Of two appends of one command that run together, one is refused."""
    twice = [store.append(SESSION, [Write(SESSION_CHANNEL, [item("hi")])], record("e1")) for _ in range(2)]
    results = await asyncio.gather(*twice, return_exceptions=True)
    assert [type(result) for result in results if result is not None] == [CommandSeen]
    assert await whole(store, SESSION_CHANNEL) == [item("hi")]


async def test_users_have_event_ids_of_their_own(store: Store) -> None:
    """The same `event_id` from another user is another command."""
    for user in ("ann", "bob"):
        await store.append(SESSION, [Write(SESSION_CHANNEL, [item("hi")])], record("e1", user=user))
    assert len(await whole(store, SESSION_CHANNEL)) == 2


async def test_ids_that_join_to_the_same_are_not_the_same(store: Store) -> None:
    """A user's name that runs into an `event_id` is not taken for another user's."""
    await store.append(SESSION, [Write(SESSION_CHANNEL, [item("hi")])], record("b:c", user="a"))
    assert await store.find_command(SESSION, "a:b", "c") is None
    assert await store.find_command(SESSION, "a", "b:c") is not None


async def test_a_refused_command_may_be_tried_again(store: Store) -> None:
    """A conflict records nothing, so the same command can succeed later."""
    with pytest.raises(PositionConflict):
        await store.append(SESSION, [Write(SESSION_CHANNEL, [item("hi")], expect=7)], record("e1"))
    assert await store.find_command(SESSION, "ann", "e1") is None
    await store.append(SESSION, [Write(SESSION_CHANNEL, [item("hi")], expect=0)], record("e1"))


async def test_the_newest_1000_commands_are_kept(store: Store) -> None:
    """After a thousand commands the first is still known, and refused."""
    writes = [Write("resp_1", [spoken("resp_1", "a")])]
    for number in range(1000):
        await store.append(SESSION, writes, record(f"e{number}"))
    assert await store.find_command(SESSION, "ann", "e0") == record("e0")
    with pytest.raises(CommandSeen):
        await store.append(SESSION, writes, record("e0"))


# --- a session that is full ----------------------------------------------------------------------------------------


async def fill(store: Store) -> None:
    await append(store, SESSION_CHANNEL, created("resp_1"))
    await append(store, "resp_1", begun("resp_1"), spoken("resp_1", "x" * MAX_BYTES))


async def test_a_full_session_takes_no_more(store: Store) -> None:
    """`session_full` refuses items and deltas, and nothing of them is written."""
    await fill(store)
    for channel, entry in ((SESSION_CHANNEL, item("hi")), ("resp_1", spoken("resp_1", "y"))):
        with pytest.raises(ConflictError) as refusal:
            await append(store, channel, entry)
        assert refusal.value.code == "session_full"
    assert await heads(store) == {SESSION_CHANNEL: Head(1, finished=False), "resp_1": Head(2, finished=False)}


async def test_a_full_session_takes_ends(store: Store) -> None:
    """What runs in a full session can end, with its last words, and so can the session."""
    await fill(store)
    await append(store, "resp_1", spoken("resp_1", "y"), done("resp_1"), expect=2)
    await append(store, SESSION_CHANNEL, closed())
    assert await heads(store) == {SESSION_CHANNEL: Head(2, finished=True), "resp_1": Head(4, finished=True)}


async def test_a_full_session_can_be_told_to_stop(store: Store) -> None:
    """A request to cancel is no content: without it nobody could stop what runs in a full session."""
    await fill(store)
    await append(store, CONTROL_CHANNEL, CancelResponse(response_id="resp_1", reason="cancelled"))


async def test_a_full_session_takes_no_content_beside_a_request_to_stop(store: Store) -> None:
    """What is free opens the session to nothing else: an interrupting response brings its item along."""
    await fill(store)
    stop = Write(CONTROL_CHANNEL, [CancelResponse(response_id="resp_1", reason="interrupted")])
    with pytest.raises(ConflictError) as refusal:
        await store.append(SESSION, [Write(SESSION_CHANNEL, [item("hi")]), stop])
    assert refusal.value.code == "session_full"


async def test_a_command_refused_by_a_full_session_is_not_recorded(store: Store) -> None:
    """It may be tried again."""
    await fill(store)
    with pytest.raises(ConflictError):
        await store.append(SESSION, [Write(SESSION_CHANNEL, [item("hi")])], record("e1"))
    assert await store.find_command(SESSION, "ann", "e1") is None


# --- append_all ----------------------------------------------------------------------------------------------------


async def test_append_all_writes_to_many_sessions(store: Store) -> None:
    """Each batch lands in its session, and no error is returned."""
    await store.create(session("sess_2"))
    batches = [Batch(name, [Write("resp_1", [spoken("resp_1", name)], expect=0)]) for name in (SESSION, "sess_2")]
    assert await store.append_all(batches) == [None, None]
    for name in (SESSION, "sess_2"):
        assert flat(await store.read(name, "resp_1", 0, ALL)) == flat([spoken("resp_1", name)])


async def test_append_all_keeps_errors_apart(store: Store) -> None:
    """A conflict, an unknown and a full session are told in their places, and the others succeed."""
    await store.create(session("sess_full"))
    full = [Write("resp_1", [spoken("resp_1", "x" * MAX_BYTES)])]
    assert await store.append_all([Batch("sess_full", full)]) == [None]
    write = Write("resp_1", [spoken("resp_1", "a")], expect=0)
    results = await store.append_all(
        [
            Batch("sess_none", [write]),
            Batch(SESSION, [Write("resp_1", [spoken("resp_1", "a")], expect=3)]),
            Batch("sess_full", full),
            Batch(SESSION, [write]),
        ]
    )
    assert [type(result) for result in results] == [NotFound, PositionConflict, ConflictError, type(None)]
    assert await whole(store, "resp_1") == flat([spoken("resp_1", "a")])


async def test_append_all_keeps_the_order_of_one_session(store: Store) -> None:
    """Batches for one session are carried out in their order."""
    batches = [Batch(SESSION, [Write("resp_1", [spoken("resp_1", str(n))], expect=n)]) for n in range(5)]
    assert await store.append_all(batches) == [None] * 5
    assert await whole(store, "resp_1") == flat([spoken("resp_1", *"01234")])


async def test_append_all_keeps_sessions(subject: Subject) -> None:
    """Each for as long as its batch says."""
    store = subject.store
    for name in ("sess_kept", "sess_short"):
        await store.create(session(name), SHORT_S)
    batches = [Batch("sess_kept", DELTA, keep_s=TTL_S), Batch("sess_short", DELTA)]
    assert await store.append_all(batches) == [None, None]
    await subject.advance(TTL_S - MARGIN_S)
    assert await store.standings(["sess_kept", "sess_short"]) == [Standing(0, 0, 0), None]


async def test_append_all_of_nothing(store: Store) -> None:
    """No batches, no errors."""
    assert await store.append_all([]) == []


async def test_append_all_tells_watchers(store: Store) -> None:
    """A flush is told like an append."""
    told = await watching(store, "resp_1")
    await store.append_all([Batch(SESSION, [Write("resp_1", [spoken("resp_1", "a", "b")])])])
    await told.until(len)
    assert told.positions("resp_1") == flat([spoken("resp_1", "a", "b")])


# --- watch ---------------------------------------------------------------------------------------------------------


async def test_watchers_are_told_in_order(store: Store) -> None:
    """Each append is told with the position of its first entry, in the order of the appends."""
    told = await watching(store, "resp_1")
    await append(store, SESSION_CHANNEL, item("hi"), created("resp_1"))
    await append(store, "resp_1", begun("resp_1"))
    await append(store, "resp_1", spoken("resp_1", "a", "b"))
    await append(store, "resp_1", done("resp_1"))
    await told.until(lambda notices: len(notices) == 4)
    assert [(notice.channel, notice.first) for notice in told.notices if isinstance(notice, Appended)] == [
        (SESSION_CHANNEL, 1),
        ("resp_1", 1),
        ("resp_1", 2),
        ("resp_1", 4),
    ]
    assert told.positions("resp_1") == await whole(store, "resp_1")


async def test_one_append_over_two_channels_is_told_in_its_order(store: Store) -> None:
    """The writes of an append are told in the order in which they were given."""
    told = await watching(store)
    await store.append(SESSION, [Write(SESSION_CHANNEL, [created("resp_1")]), Write("resp_1", [begun("resp_1")])])
    await told.until(lambda notices: len(notices) == 2)
    assert [notice.channel for notice in told.notices if isinstance(notice, Appended)] == [SESSION_CHANNEL, "resp_1"]


async def test_deltas_are_told_to_followers_alone(store: Store) -> None:
    """Who only watches hears of what is more than deltas, and of its place after them."""
    told, following = await watching(store), await watching(store, "resp_1")
    await append(store, "resp_1", begun("resp_1"))
    await append(store, "resp_1", spoken("resp_1", "a", "b"))
    await append(store, "resp_2", spoken("resp_2", "x"))
    await append(store, "resp_1", spoken("resp_1", "c"), done("resp_1"))
    await following.until(lambda notices: len(notices) == 3)
    await told.until(lambda notices: len(notices) == 2)
    assert [notice.first for notice in told.appended("resp_1")] == [1, 4]
    assert following.positions("resp_1") == await whole(store, "resp_1")


async def test_a_writer_that_follows_hears_its_own_deltas(store: Store) -> None:
    """It is told before its append returns, one by one or of many at once, and of what else it says as a watcher."""
    told = await watching(store, "task_1")
    await append(store, "task_1", begun("task_1"))
    await append(store, "task_1", spoken("task_1", "a", "b"))
    assert [notice.first for notice in told.appended("task_1")] == [1, 2]
    batches = [Batch(SESSION, [Write("task_1", [spoken("task_1", text)])]) for text in "cd"]
    assert await store.append_all(batches) == [None, None]
    assert [notice.first for notice in told.appended("task_1")] == [1, 2, 4, 5]
    await append(store, "task_1", spoken("task_1", "e"), done("task_1"))
    assert told.positions("task_1") == await whole(store, "task_1")


async def test_a_writer_that_only_watches_hears_no_deltas(store: Store) -> None:
    """Who shows what it says by itself is not told of it once more."""
    told, other = await watching(store), await watching(store, "resp_2")
    await append(store, "resp_1", spoken("resp_1", "a"))
    await store.append_all([Batch(SESSION, [Write("resp_1", [spoken("resp_1", "b")])])])
    await append(store, "resp_1", done("resp_1"))
    for one in (told, other):
        await one.until(len)
        assert [notice.first for notice in one.appended("resp_1")] == [3]


async def test_every_watcher_is_told(store: Store) -> None:
    """Two watchers of one session hear the same."""
    one, other = await watching(store), await watching(store)
    await append(store, "resp_1", begun("resp_1"))
    assert await one.until(len) == await other.until(len)


async def test_a_watcher_hears_of_its_session_only(store: Store) -> None:
    """What happens to another session is not told."""
    await store.create(session("sess_2"))
    told = await watching(store)
    await store.append("sess_2", [Write("resp_2", [begun("resp_2")])])
    await append(store, "resp_1", begun("resp_1"))
    await told.until(len)
    assert [notice.channel for notice in told.notices if isinstance(notice, Appended)] == ["resp_1"]


async def test_a_watch_ends(store: Store) -> None:
    """After its end a watcher is told nothing, while others are."""
    ended, other = await watching(store), await watching(store)
    ended.end()
    await append(store, "resp_1", begun("resp_1"))
    await other.until(len)
    assert ended.notices == []


async def test_what_happened_before_is_not_told(store: Store) -> None:
    """A watch begins now."""
    await append(store, "resp_1", begun("resp_1"))
    told = await watching(store, "resp_1")
    await append(store, "resp_1", spoken("resp_1", "a"))
    await told.until(len)
    assert [notice.first for notice in told.appended("resp_1")] == [2]


@pytest.mark.parametrize("seed", range(5))
async def test_watch_then_read_has_no_seam(store: Store, seed: int) -> None:
    """Who watches, then reads, then goes on by position has everything once, while others write."""
    dice = random.Random(seed)

    async def write(name: str) -> None:
        for number in range(20):
            await append(store, "resp_1", spoken("resp_1", f"{name}{number} "))
            for _ in range(dice.randrange(3)):
                await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        for name in "abc":
            group.create_task(write(name))
        for _ in range(dice.randrange(60)):
            await asyncio.sleep(0)
        told = await watching(store, "resp_1")
        for _ in range(dice.randrange(5)):
            await asyncio.sleep(0)
        mine = flat(await store.read(SESSION, "resp_1", 0, ALL))
    await append(store, "resp_1", done("resp_1"))
    await told.until(lambda _: told.positions("resp_1")[-1:] == [done("resp_1")])
    for notice in told.appended("resp_1"):
        assert notice.first <= len(mine) + 1
        mine += flat(notice.entries)[len(mine) + 1 - notice.first :]
    assert mine == await whole(store, "resp_1")


# --- viewers and instances -----------------------------------------------------------------------------------------


async def test_who_joins_is_a_viewer(store: Store) -> None:
    """Viewers are listed the oldest first, with their instances, and watchers are told of each."""
    told = await watching(store)
    ann, bob = viewer("conn_1"), viewer("conn_2", "bob", "inst_2")
    await store.join(SESSION, ann)
    await store.join(SESSION, bob)
    assert await store.viewers(SESSION) == [ann, bob]
    assert await told.until(lambda notices: len(notices) == 2) == [ViewerJoined(ann), ViewerJoined(bob)]


async def test_many_viewers_keep_their_order(store: Store) -> None:
    """They stand as they came, not by their ids."""
    viewers = [viewer(f"conn_{number}") for number in range(12)]
    for one in viewers:
        await store.join(SESSION, one)
    assert await store.viewers(SESSION) == viewers


async def test_who_joins_twice_is_told_once(store: Store) -> None:
    """Who is there already stays where it stood, and nobody hears of it."""
    told = await watching(store)
    viewers = [viewer(f"conn_{number}") for number in range(3)]
    for one in [*viewers, viewers[0], viewer("conn_last")]:
        await store.join(SESSION, one)
    assert await store.viewers(SESSION) == [*viewers, viewer("conn_last")]
    await told.until(lambda notices: notices[-1:] == [ViewerJoined(viewer("conn_last"))])
    assert len(told.notices) == 4


async def test_who_leaves_and_comes_back_is_the_newest(store: Store) -> None:
    """A viewer that joins again has joined anew."""
    for name in ("conn_1", "conn_2"):
        await store.join(SESSION, viewer(name))
    await store.leave(SESSION, "conn_1", 0.0)
    await store.join(SESSION, viewer("conn_1"))
    assert await store.viewers(SESSION) == [viewer("conn_2"), viewer("conn_1")]


async def test_leaving_tells_the_floor(store: Store) -> None:
    """A viewer that leaves is gone at once, and watchers are told which grace it deserves."""
    told = await watching(store)
    for name in ("conn_1", "conn_2"):
        await store.join(SESSION, viewer(name))
    await store.leave(SESSION, "conn_1", 15.0)
    assert await store.viewers(SESSION) == [viewer("conn_2")]
    await told.until(lambda notices: len(notices) == 3)
    assert told.notices[2] == ViewerLeft(participant("conn_1"), 15.0)


async def test_leaving_twice_does_nothing(store: Store) -> None:
    """A connection that isn't there, or not any more, leaves without a word."""
    told = await watching(store)
    await store.join(SESSION, viewer("conn_1"))
    for _ in range(2):
        await store.leave(SESSION, "conn_1", 0.0)
    await store.leave(SESSION, "conn_none", 0.0)
    await append(store, "resp_1", begun("resp_1"))
    await told.until(lambda _: told.appended("resp_1"))
    assert [type(notice) for notice in told.notices] == [ViewerJoined, ViewerLeft, Appended]


async def test_nobody_looks_at_a_new_session(store: Store) -> None:
    """There are no viewers before the first has joined."""
    assert await store.viewers(SESSION) == []


async def test_an_instance_lives_while_it_signs(subject: Subject) -> None:
    """Signed again before its lease ran out, an instance lives on; after that it doesn't."""
    store = subject.store
    for _ in range(3):
        await store.sign("inst_1", LEASE_S)
        await subject.advance(LEASE_S - 1)
    assert await store.living(["inst_1"]) == {"inst_1"}
    await subject.advance(2)
    assert await store.living(["inst_1"]) == set()


async def test_an_instance_that_resigns_is_dead(store: Store) -> None:
    """Whatever is left of its lease; and it may sign again."""
    for name in ("inst_1", "inst_2"):
        await store.sign(name, LEASE_S)
    await store.resign("inst_1")
    await store.resign("inst_none")
    assert await store.living(["inst_1", "inst_2", "inst_none"]) == {"inst_2"}
    await store.sign("inst_1", LEASE_S)
    assert await store.living(["inst_1"]) == {"inst_1"}


# --- standings -----------------------------------------------------------------------------------------------------


async def test_standings_grow_with_what_happens(store: Store) -> None:
    """Each of the three numbers counts its own kind of happening, and nothing else does."""
    await append(store, SESSION_CHANNEL, item("hi"), created("resp_1"))
    await append(store, "resp_1", begun("resp_1"), spoken("resp_1", "a", "b"))
    await append(store, CONTROL_CHANNEL, CancelResponse(response_id="resp_1", reason="cancelled"))
    await store.join(SESSION, viewer("conn_1"))
    await store.join(SESSION, viewer("conn_1"))
    await store.join(SESSION, viewer("conn_2"))
    await store.leave(SESSION, "conn_1", 0.0)
    assert await store.standings([SESSION]) == [Standing(session=2, control=1, audience=3)]
    assert (await store.load(SESSION)).audience == 3


async def test_standings_of_many(store: Store) -> None:
    """They come in the order in which they were asked for; an unknown session has none."""
    await store.create(session("sess_2"))
    await append(store, SESSION_CHANNEL, closed())
    standings = await store.standings(["sess_2", "sess_none", SESSION])
    assert standings == [Standing(0, 0, 0), None, Standing(1, 0, 0)]
    assert await store.standings([]) == []


# --- expiry, erasure, and sessions that are not there --------------------------------------------------------------

Use = Callable[[Store, str], Coroutine[Any, Any, Any]]
USES: dict[str, Use] = {
    "use": lambda store, name: store.use(name),
    "append": lambda store, name: store.append(name, DELTA),
    "append_all": lambda store, name: store.append_all([Batch(name, DELTA)]),
    "join": lambda store, name: store.join(name, viewer("conn_1")),
}
CALLS: dict[str, Use] = {
    **{name: use for name, use in USES.items() if name != "append_all"},
    "load": lambda store, name: store.load(name),
    "read": lambda store, name: store.read(name, SESSION_CHANNEL, 0, ALL),
    "find_command": lambda store, name: store.find_command(name, "ann", "e1"),
    "leave": lambda store, name: store.leave(name, "conn_1", 0.0),
    "viewers": lambda store, name: store.viewers(name),
    "erase": lambda store, name: store.erase(name),
}


async def lose(subject: Subject, how: str) -> None:
    """Let the store know nothing of `SESSION`."""
    if how == "expired":
        await subject.advance(TTL_S + 1)
    else:
        await subject.store.erase(SESSION)


async def test_a_session_expires(subject: Subject) -> None:
    """`TTL_S` after its last use a session is gone, and watchers are told, once."""
    told = await watching(subject.store)
    await subject.advance(TTL_S - MARGIN_S)
    await append(subject.store, "resp_1", begun("resp_1"))
    await subject.advance(TTL_S + 1)
    with pytest.raises(NotFound):
        await subject.store.load(SESSION)
    await told.until(lambda notices: len(notices) == 2)
    await subject.advance(TTL_S)
    assert told.notices[1:] == [Gone("lost")]


@pytest.mark.parametrize("name", USES)
async def test_use_moves_expiry(subject: Subject, name: str) -> None:
    """Each use lets the session live for `TTL_S` from then."""
    for _ in range(2):
        await subject.advance(TTL_S - MARGIN_S)
        await USES[name](subject.store, SESSION)
    await subject.advance(TTL_S - MARGIN_S)
    assert await subject.store.read(SESSION, "resp_9", 0, ALL) == []


READS: dict[str, Use] = {
    **{name: call for name, call in CALLS.items() if name not in {*USES, "erase"}},
    "watch": lambda store, name: store.watch(name, lambda _: None),
    "standings": lambda store, name: store.standings([name]),
}


@pytest.mark.parametrize("name", READS)
async def test_reading_does_not_move_expiry(subject: Subject, name: str) -> None:
    """It is done before it is known whether somebody may see the session at all."""
    for _ in range(3):
        await subject.advance(TTL_S * 0.3)
        await READS[name](subject.store, SESSION)
    await subject.advance(TTL_S * 0.1 + 1)
    assert await subject.store.standings([SESSION]) == [None]


async def test_sessions_expire_one_by_one(subject: Subject) -> None:
    """The use of one session does not keep another."""
    await subject.store.create(session("sess_2"))
    await subject.advance(TTL_S - MARGIN_S)
    await subject.store.use("sess_2")
    await subject.advance(MARGIN_S + 1)
    with pytest.raises(NotFound):
        await subject.store.load(SESSION)
    await subject.store.load("sess_2")


@pytest.mark.parametrize("ttl_s", [SHORT_S, 10 * TTL_S])
@pytest.mark.parametrize("name", ["create", *USES])
async def test_a_session_may_have_a_time_to_live_of_its_own(subject: Subject, name: str, ttl_s: float) -> None:
    """It lives for so long after it was made, and after every use of it, whatever the store gives others."""
    store = subject.store
    await store.create(session("sess_own"), ttl_s)
    if name in USES:
        await subject.advance(ttl_s * 0.9)
        await USES[name](store, "sess_own")
    await subject.advance(ttl_s * 0.9)
    assert await store.standings(["sess_own"]) != [None]
    await subject.advance(ttl_s * 0.1 + 1)
    assert await store.standings(["sess_own"]) == [None]


async def test_load_tells_how_long_a_session_of_its_own_time_lives(subject: Subject) -> None:
    """`expires_in_s` is about its own time to live, or what it is kept for beyond that."""
    store = subject.store
    await store.create(session("sess_own"), SHORT_S)
    assert SHORT_S * 0.95 - 1 <= (await store.load("sess_own")).expires_in_s <= SHORT_S
    await store.append("sess_own", DELTA, keep_s=TTL_S)
    assert TTL_S - 1 <= (await store.load("sess_own")).expires_in_s <= TTL_S


async def test_an_append_may_keep_a_session(subject: Subject) -> None:
    """For so long from then it stays, with all that is in it, and not for ever."""
    store = subject.store
    await store.create(session("sess_own"), SHORT_S)
    await store.append("sess_own", DELTA, record("e1"))
    await store.join("sess_own", viewer("conn_1"))
    await store.append("sess_own", [Write("resp_1", [done("resp_1")])], keep_s=TTL_S)
    await subject.advance(TTL_S - SHORT_S - 1)
    assert len(flat(await store.read("sess_own", "resp_1", 0, ALL))) == 2
    assert await store.find_command("sess_own", "ann", "e1") == record("e1")
    assert await store.viewers("sess_own") == [viewer("conn_1")]
    await subject.advance(SHORT_S + 2)
    assert await store.standings(["sess_own"]) == [None]


async def test_keeping_for_less_changes_nothing(subject: Subject) -> None:
    """A session that is kept for less than it lives anyway lives as long as after any use."""
    store = subject.store
    await store.append(SESSION, DELTA, keep_s=1.0)
    await subject.advance(TTL_S - MARGIN_S)
    assert (await store.standings([SESSION])) != [None]


@pytest.mark.parametrize("name", USES)
async def test_no_use_moves_an_end_back(subject: Subject, name: str) -> None:
    """A session that is kept for longer than it lives is so after every use of it."""
    store = subject.store
    await store.create(session("sess_own"), SHORT_S)
    await store.append("sess_own", DELTA, keep_s=TTL_S)
    await USES[name](store, "sess_own")
    await subject.advance(TTL_S - 1)
    assert await store.standings(["sess_own"]) != [None]


@pytest.mark.parametrize("how", ["expired", "erased"])
@pytest.mark.parametrize("name", CALLS)
async def test_a_session_that_is_gone_is_unknown_to_every_call(subject: Subject, name: str, how: str) -> None:
    """Every call refuses it, in the same words as one that never was."""
    await lose(subject, how)
    with pytest.raises(NotFound) as gone:
        await CALLS[name](subject.store, SESSION)
    with pytest.raises(NotFound) as unknown:
        await subject.store.load("sess_none")
    assert gone.value.as_message() == unknown.value.as_message()
    assert gone.value.code == "session_not_found"


@pytest.mark.parametrize("name", CALLS)
async def test_a_session_that_never_was_is_unknown_to_every_call(store: Store, name: str) -> None:
    """Nothing but `create` makes one."""
    with pytest.raises(NotFound) as refusal:
        await CALLS[name](store, "sess_none")
    assert refusal.value.code == "session_not_found"


@pytest.mark.parametrize("how", ["expired", "erased"])
async def test_no_append_brings_a_session_back(subject: Subject, how: str) -> None:
    """An append to a session that is gone leaves it gone, alone or among others."""
    await append(subject.store, SESSION_CHANNEL, item("hi"))
    await lose(subject, how)
    with pytest.raises(NotFound):
        await append(subject.store, SESSION_CHANNEL, item("more"), expect=1)
    [error] = await subject.store.append_all([Batch(SESSION, [Write("resp_1", [begun("resp_1")], expect=0)])])
    assert isinstance(error, NotFound)
    assert error.code == "session_not_found"
    with pytest.raises(NotFound):
        await subject.store.load(SESSION)


async def test_erase_tells_watchers(store: Store) -> None:
    """Everyone who watches hears that the session was deleted, and nothing after it."""
    one, other = await watching(store), await watching(store)
    await append(store, "resp_1", begun("resp_1"))
    await store.erase(SESSION)
    for told in (one, other):
        await told.until(lambda notices: len(notices) == 2)
        assert told.notices[1] == Gone("deleted")


async def test_an_erased_session_is_not_told_of_again(subject: Subject) -> None:
    """Its time running out later is no news."""
    told = await watching(subject.store)
    await subject.store.join(SESSION, viewer("conn_1"))
    await subject.store.erase(SESSION)
    await subject.advance(TTL_S + 1)
    await told.until(lambda notices: len(notices) == 2)
    assert told.notices[1:] == [Gone("deleted")]


async def test_erase_forgets_everything(store: Store) -> None:
    """A session made anew under the same id has nothing of the old one."""
    await store.append(SESSION, [Write(SESSION_CHANNEL, [item("hi")])], record("e1"))
    await store.join(SESSION, viewer("conn_1"))
    await store.erase(SESSION)
    await store.create(session(SESSION))
    assert await heads(store) == {SESSION_CHANNEL: Head(0, finished=False)}
    assert await store.find_command(SESSION, "ann", "e1") is None
    assert await store.viewers(SESSION) == []


async def test_erase_leaves_other_sessions(store: Store) -> None:
    """Only the one session is erased."""
    await store.create(session("sess_2"))
    await store.erase(SESSION)
    assert (await store.load("sess_2")).session.id == "sess_2"


async def test_a_watch_of_an_erased_session_may_end(store: Store) -> None:
    """Who ends its watch after the session is gone does no harm."""
    told = await watching(store)
    await store.erase(SESSION)
    await told.until(len)
    told.end()


# --- unfinished tasks ----------------------------------------------------------------------------------------------

DUE_S = 5.0
AGAIN_S = 30.0
IDLE_S = 2 * TTL_S + 86_400
"""How long the index of a store lives in which sessions live for `TTL_S` and tasks for less."""


def task(number: int = 1) -> TaskRef:
    return TaskRef("sess_1", f"task_{number}", "analyse")


async def test_a_task_is_looked_after_once_it_is_due(subject: Subject) -> None:
    """Not before; it comes back as it was remembered."""
    store, odd = subject.store, TaskRef("task_1", "task_1", "Größe: 'x' \0")
    await store.track(odd, DUE_S)
    await subject.advance(DUE_S - 1)
    assert await store.overdue(AGAIN_S, 10) == []
    await subject.advance(2)
    assert await store.overdue(AGAIN_S, 10) == [odd]


async def test_a_task_that_is_due_at_once(store: Store) -> None:
    """It may be remembered so."""
    await store.track(task(), 0.0)
    assert await store.overdue(AGAIN_S, 10) == [task()]


async def test_a_task_that_was_looked_after_is_due_again(subject: Subject) -> None:
    """For as long as it is not untracked, after each `again_s`."""
    await subject.store.track(task(), DUE_S)
    await subject.advance(DUE_S + 1)
    for _ in range(3):
        assert await subject.store.overdue(AGAIN_S, 10) == [task()]
        assert await subject.store.overdue(AGAIN_S, 10) == []
        await subject.advance(AGAIN_S - 1)
        assert await subject.store.overdue(AGAIN_S, 10) == []
        await subject.advance(2)


@pytest.mark.parametrize("due_s", [1.0, 60.0])
async def test_tracking_again_moves_the_time(subject: Subject, due_s: float) -> None:
    """Back or on; it is one task still."""
    await subject.store.track(task(), DUE_S)
    await subject.store.track(task(), due_s)
    assert await subject.store.tracked() == 1
    await subject.advance(due_s - 0.5)
    assert await subject.store.overdue(AGAIN_S, 10) == []
    await subject.advance(1)
    assert await subject.store.overdue(AGAIN_S, 10) == [task()]


async def test_a_task_that_is_untracked_is_forgotten(subject: Subject) -> None:
    """Alone or among others; those that nobody remembers do no harm."""
    store = subject.store
    for number in range(4):
        await store.track(task(number), DUE_S)
    await store.untrack([task(0)])
    await store.untrack([task(0), task(2), task(9)])
    await store.untrack([])
    assert await store.tracked() == 2
    await subject.advance(DUE_S + 1)
    assert await store.overdue(AGAIN_S, 10) == [task(1), task(3)]


async def test_those_that_have_waited_longest_come_first(subject: Subject) -> None:
    """So many at a time as are asked for, until all had their turn."""
    store = subject.store
    for number in (3, 1, 4, 0, 2):
        await store.track(task(number), float(number))
    await subject.advance(10)
    assert await store.overdue(AGAIN_S, 2) == [task(0), task(1)]
    assert await store.overdue(AGAIN_S, 2) == [task(2), task(3)]
    assert await store.overdue(AGAIN_S, 2) == [task(4)]
    assert await store.overdue(AGAIN_S, 2) == []


async def test_of_many_that_look_one_gets_each(store: Store) -> None:
    """However many ask at once."""
    for number in range(20):
        await store.track(task(number), 0.0)
    found = await asyncio.gather(*(store.overdue(AGAIN_S, 3) for _ in range(10)))
    assert sorted(one for some in found for one in some) == sorted(task(number) for number in range(20))


async def test_tasks_are_apart(store: Store) -> None:
    """Another session's, another id, another name: another task."""
    others = [TaskRef("sess_2", "task_1", "analyse"), TaskRef("sess_1", "task_1", "summarise"), task(2)]
    for one in [task(1), *others]:
        await store.track(one, 0.0)
    await store.untrack([task(1)])
    assert sorted(await store.overdue(AGAIN_S, 10)) == sorted(others)


async def test_so_many_tasks_of_one_payer_are_remembered(store: Store) -> None:
    """However many ask at once; one that is remembered already is no other, and who is untracked makes room."""
    asked = [store.track(task(number), DUE_S, "user:ann", 3) for number in range(10)]
    remembered = [task(number) for number, told in enumerate(await asyncio.gather(*asked)) if told]
    assert len(remembered) == await store.tracked() == 3
    assert await store.track(remembered[0], 0.0, "user:ann", 3)
    assert not await store.track(task(10), 0.0, "user:ann", 3)
    assert await store.track(task(10), 0.0, "user:anna", 1)
    assert await store.track(task(11), 0.0)
    assert await store.tracked() == 5
    await store.untrack(remembered[:1])
    assert await store.track(task(12), 0.0, "user:ann", 3)
    assert not await store.track(task(13), 0.0, "user:ann", 3)
    await store.untrack([task(12)])
    assert await store.track(task(12), 0.0, "user:ann", 3)


async def test_a_task_outlives_its_session_in_the_index(subject: Subject) -> None:
    """It names a session that may not be there yet, or any more: somebody has to find that out."""
    await subject.store.track(TaskRef("sess_none", "task_1", "analyse"), 0.0)
    await subject.store.erase(SESSION)
    await subject.advance(TTL_S + 1)
    assert len(await subject.store.overdue(AGAIN_S, 10)) == 1


@pytest.mark.parametrize("use", ["track", "overdue"])
async def test_the_index_lives_while_it_is_used(subject: Subject, use: str) -> None:
    """It is used by whoever remembers a task, or looks for one; unused for its whole time it is forgotten."""
    store = subject.store
    await store.track(task(), IDLE_S)
    await subject.advance(IDLE_S - 10)
    await (store.track(task(2), IDLE_S) if use == "track" else store.overdue(AGAIN_S, 10))
    await subject.advance(IDLE_S - 10)
    assert await store.tracked() == 1 + (use == "track")
    await subject.advance(11)
    assert await store.tracked() == 0
    assert await store.overdue(AGAIN_S, 10) == []
