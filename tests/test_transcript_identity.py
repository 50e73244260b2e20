"""Every reader gets every character: random schedules of writers, flushes and readers over the pure core.

No socket and no clock: a schedule is a list of steps, time is a number that steps move, and each step is done before
the next begins. Whatever the schedule, the readers' transcripts have to equal what was said.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence

import msgspec
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from realtime.cursor import Cursor, find_start
from realtime.journal import Journal, Tail
from realtime.live import LiveSession
from realtime.log import RUN_LENGTH, length
from realtime.protocol import (
    JSON,
    MAX_FRAME_BYTES,
    MAX_FRAME_CHARS,
    MSGPACK,
    SESSION_CHANNEL,
    ChannelEvent,
    Delta,
    OutputTextDelta,
    ReasoningDelta,
)
from realtime.store.base import Write
from realtime.store.memory import MemoryStore
from realtime.view import WINDOW
from tests.contract import begun, closed, created, done, item, participant, session
from tests.support.client import Event, Transcript
from tests.support.ears import Ears
from tests.support.stores import Distant

SESSION = "sess_1"
RESPONSES = 5
READERS = 5
INTERVALS_S = (0.0, 0.0, 0.0625, 1.0)
"""Binary fractions, like the time, so that sums of them are exact."""


class Reader:
    """A client over any number of connections. It holds each of them to the protocol."""

    def __init__(self, name: str) -> None:
        self.participant = participant(name)
        self.floor_s = 0.0
        self.transcript = Transcript()
        self.began: dict[str, int] | None = None
        """Where it began, if not at the start."""
        self.live: LiveSession
        self.cursor: Cursor | None = None

    @property
    def over(self) -> bool:
        """Whether it has seen the session's end."""
        return bool(self.transcript.events) and self.transcript.events[-1]["type"] == "session.closed"

    def wake(self) -> None:
        return

    def follows(self, channel: str) -> bool:
        return self.cursor is not None and channel in self.cursor.positions

    async def connect(self, live: LiveSession, interval_s: float, *, history: bool = True) -> None:
        """Attach, with what it has; without `history` only what comes now."""
        live.readers.add(self)
        self.live, self.interval_s = live, interval_s
        is_first = self.began is None and not self.transcript.events
        after = None if is_first else self.transcript.positions
        start = await find_start(live, after) if history else None
        if not history:
            self.transcript.positions = live.positions()
            self.began = dict(self.transcript.positions)
        self.stood = {name: head.position for name, head in start.heads.items()} if start else {}
        self.is_late = isinstance(live.store, Distant)
        self.cursor = Cursor(live, start, interval_s=interval_s)
        self.seen_live = not history
        self.sent_at: dict[str, float] = defaultdict(lambda: -math.inf)

    def disconnect(self) -> None:
        """The connection breaks."""
        self.cursor = None
        self.live.leave(self)

    async def read(self, now: float) -> bool:
        """Take one frame, if there is one."""
        assert self.cursor is not None
        event = await self.cursor.next(now)
        self._check_memory(self.cursor)
        if event is None:
            return False
        assert not self.over, f"after the session's end: {event}"
        received = decoded(event)
        self._check_order(received, now)
        self.transcript.apply(received)
        return True

    def _check_order(self, event: Event, now: float) -> None:
        channel = event.get("response_id", SESSION_CHANNEL)
        replay = event.get("replay", False)
        assert not event.get("reset"), "nothing was lost"
        assert not (replay and self.seen_live), f"a replayed event after a live one: {event}"
        self.seen_live = not replay
        if replay:
            assert event["seq"] <= self.stood[channel], f"replayed and live in one: {event}"
        elif not self.is_late and event["type"] != "session.closed":
            assert event["seq"] - event.get("merged", 1) >= self.stood.get(channel, 0), f"not marked: {event}"
        if channel != SESSION_CHANNEL:
            assert now - self.sent_at[channel] >= self.interval_s
            self.sent_at[channel] = now

    def _check_memory(self, cursor: Cursor) -> None:
        chars = 0
        if cursor._chunk is not None:
            log = cursor._chunk[1]
            chars = sum(len(JSON.encode(event)) for event in events_of(log.entries(log.start)))
        assert chars <= MAX_FRAME_BYTES + RUN_LENGTH * MAX_FRAME_CHARS * 6
        assert len(cursor.positions) <= 1 + RESPONSES


def events_of(entries: Sequence[object]) -> list[ChannelEvent]:
    return [entry for entry in entries if isinstance(entry, ChannelEvent)]


def decoded(event: ChannelEvent) -> Event:
    """The event as a client gets it, the same in both encodings, and no larger than a frame may be."""
    text, packed = JSON.encode(event), MSGPACK.encode(event)
    assert isinstance(text, str)
    assert isinstance(packed, bytes)
    assert len(text.encode()) <= MAX_FRAME_BYTES
    assert len(packed) <= MAX_FRAME_BYTES
    received: Event = json.loads(text)
    assert received == msgspec.msgpack.decode(packed)
    assert "overrides" not in received
    return received


class World:
    """A session with one owner that speaks, readers, and perhaps a second instance that hears late."""

    def __init__(self) -> None:
        self.now = 0.0
        self.store = MemoryStore(clock=lambda: self.now)
        self.delay = 0
        self.late = Distant(self.store, lambda: self.delay)
        self.ears = [Ears("inst_1"), Ears("inst_2")]
        self.journal = Journal(self.store, interval_s=0.05)
        self.tails: dict[str, Tail] = {}
        self.said: dict[str, list[tuple[int, Delta]]] = defaultdict(list)
        self.readers: list[Reader] = []
        self.waiting: list[str] = []
        self.running: list[str] = []
        self.ending: list[asyncio.Future[None]] = []
        self.items: list[str] = []
        self.closed = False

    async def open(self, instances: int) -> None:
        """Make the session, and open it on so many instances."""
        await self.store.create(session(SESSION))
        self.instances = [
            LiveSession(SESSION, store, ears)
            for store, ears in list(zip((self.store, self.late), self.ears, strict=True))[:instances]
        ]
        for live in self.instances:
            await live.open()
        self.owner = self.instances[0]

    async def append(self, *events: ChannelEvent) -> None:
        """Append to the session's channel."""
        await self.store.append(SESSION, [Write(SESSION_CHANNEL, events, expect=self.owner.state.position)])

    async def create(self, response_id: str) -> None:
        """Accept a response."""
        await self.append(item("go", f"item_{response_id}"), created(response_id))
        self.items.append("go")
        self.tails[response_id] = Tail(SESSION, response_id, self.owner.views[response_id], lost=refuse)
        self.waiting.append(response_id)

    async def begin(self, response_id: str) -> None:
        """Claim a response."""
        await self.store.append(SESSION, [Write(response_id, [begun(response_id, "inst_1")], expect=0)])
        self.waiting.remove(response_id)
        self.running.append(response_id)

    def say(self, template: OutputTextDelta | ReasoningDelta, text: str) -> None:
        """Show a delta of a running response, as a turn does."""
        view = self.tails[template.response_id].view
        for start in range(0, len(text), MAX_FRAME_CHARS):
            piece = text[start : start + MAX_FRAME_CHARS]
            view.append_delta(template, piece)
            self.said[template.response_id].append((view.log.head, msgspec.structs.replace(template, delta=piece)))
            self.journal.mark(self.tails[template.response_id])
            assert view.stored - view.log.start <= 3 * WINDOW + RUN_LENGTH

    async def end(self, response_id: str) -> None:
        """End a response, running or not; the store has it after the next flush."""
        for group in (self.waiting, self.running):
            if response_id in group:
                group.remove(response_id)
        finish = self.journal.finish(self.tails[response_id], done(response_id))
        self.ending.append(asyncio.ensure_future(finish))
        await asyncio.sleep(0)

    async def flush(self) -> None:
        """What the journal does every few milliseconds."""
        await self.journal._flush()

    async def finish(self) -> None:
        """End everything, and let every reader take what is left."""
        for response_id in [*self.waiting, *self.running]:
            await self.end(response_id)
        await self.flush()
        await asyncio.gather(*self.ending)
        if not self.closed:
            await self.append(closed())
        for _ in range(2):  # what is heard may have something read, during which more is heard
            self.late.deliver()
            for ears in self.ears:
                await ears.settled()
        for reader in self.readers:
            await self.drain(reader)

    async def drain(self, reader: Reader) -> None:
        """Let a reader take all that it can get, however long it takes."""
        assert reader.cursor is not None
        while await reader.read(self.now) or reader.cursor.due < math.inf:
            if reader.cursor.due < math.inf:
                self.now = max(self.now, reader.cursor.due)

    def check(self) -> None:
        """Hold every transcript against what was said."""
        for reader in self.readers:
            transcript = reader.transcript
            assert reader.over
            assert [event["type"] for event in transcript.events].count("session.closed") == 1
            assert transcript.positions == {SESSION_CHANNEL: self.owner.state.position}
            began = reader.began or {}
            for response_id in transcript.done:
                assert transcript.texts[response_id] == self.text(OutputTextDelta, response_id, began)
                assert transcript.reasonings[response_id] == self.text(ReasoningDelta, response_id, began)
            if reader.began is None:
                assert set(transcript.done) == set(self.tails)
                assert [found["content"] for found in transcript.items] == self.items
            else:
                assert set(transcript.done) >= set(reader.began) - {SESSION_CHANNEL}

    def text(self, kind: type[Delta], response_id: str, began: dict[str, int]) -> str:
        """What was said of a kind after the position at which a reader began."""
        after = began.get(response_id, 0)
        return "".join(
            delta.delta for position, delta in self.said[response_id] if isinstance(delta, kind) and position > after
        )


def refuse(error: Exception) -> None:
    raise AssertionError("the store refused what the owner wrote") from error


# --- steps ---------------------------------------------------------------------------------------------------------


async def create(world: World, number: int, text: str) -> None:
    if not world.closed and len(world.tails) < RESPONSES:
        response_id = f"resp_{len(world.tails) + 1}"
        await world.create(response_id)
        if number % 4:
            await world.begin(response_id)


async def begin(world: World, number: int, text: str) -> None:
    if world.waiting:
        await world.begin(world.waiting[number % len(world.waiting)])


async def say(world: World, number: int, text: str) -> None:
    if world.running:
        world.say(OutputTextDelta(response_id=world.running[number % len(world.running)], delta=""), text)


async def think(world: World, number: int, text: str) -> None:
    if world.running:
        world.say(ReasoningDelta(response_id=world.running[number % len(world.running)], delta=""), text)


async def chatter(world: World, number: int, text: str) -> None:
    """More than a run, often more than the window."""
    for index in range(number % 230):
        await say(world, 0, f"{index}{text}")


async def shout(world: World, number: int, text: str) -> None:
    """More than a frame holds."""
    await say(world, number, (text or "\x00") * (1 + (number * 100) // (len(text) or 1)))


async def note(world: World, number: int, text: str) -> None:
    if not world.closed:
        for index in range(number % 90 + 1):
            await world.append(item(text, f"item_{len(world.items)}_{index}"))
            world.items.append(text)


async def flush(world: World, number: int, text: str) -> None:
    await world.flush()


async def end(world: World, number: int, text: str) -> None:
    candidates = [*world.running, *world.waiting]
    if candidates:
        await world.end(candidates[number % len(candidates)])


async def close(world: World, number: int, text: str) -> None:
    if not world.closed and number % 5 == 0:
        await world.append(closed())
        world.closed = True


async def read(world: World, number: int, text: str) -> None:
    if world.readers:
        reader = world.readers[number % len(world.readers)]
        for _ in range(1 + number % 7):
            await reader.read(world.now)


async def catch_up(world: World, number: int, text: str) -> None:
    if world.readers:
        await world.drain(world.readers[number % len(world.readers)])


async def reconnect(world: World, number: int, text: str) -> None:
    reader = world.readers[number % len(world.readers)] if world.readers else None
    if reader is not None and not reader.over:
        reader.disconnect()
        live = world.instances[number % len(world.instances)]
        await reader.connect(live, INTERVALS_S[number % len(INTERVALS_S)])


async def join(world: World, number: int, text: str) -> None:
    if len(world.readers) < READERS:
        reader = Reader(f"conn_{len(world.readers)}")
        live = world.instances[number // 2 % len(world.instances)]
        history = number % 3 > 0
        await reader.connect(live, INTERVALS_S[number % len(INTERVALS_S)], history=history)
        world.readers.append(reader)


async def hear(world: World, number: int, text: str) -> None:
    world.delay = number % 5
    world.late.deliver(number % 8)
    for _ in range(number % 7):
        await asyncio.sleep(0)


async def wait(world: World, number: int, text: str) -> None:
    world.now += number / 1024


MODEST = settings(max_examples=100, deadline=None, phases=set(Phase) - {Phase.explain})
"""Without the phase that traces every line, which the guard on the loop would take for the package's doing."""

Step = tuple[Callable[[World, int, str], Awaitable[None]], int, str]

PIECES = [
    "",
    " ",
    "a",
    "\r\n",
    "\x00",
    "\u2028",
    "e\u0301",
    "👩\u200d👩\u200d👧",
    "שלום",
    "\u202e",
    '"\\',
    "\ufeff",
    "\U0010ffff",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=4).map("".join) | st.text(max_size=12)
FIRST: list[Step] = [(create, 1, ""), (join, 1, "")]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            # what happens more often stands here more often
            [
                *(create, begin, say, say, say, think, chatter, chatter, shout, note, flush, flush, end, close),
                *(read, read, read, catch_up, reconnect, reconnect, join, hear, wait),
            ]
        ),
        st.integers(0, 999),
        TEXTS,
    ),
    max_size=40,
)


async def play(steps: Sequence[Step], *, instances: int) -> None:
    world = World()
    await world.open(instances)
    for act, number, text in [*FIRST, *steps]:
        await act(world, number, text)
    await world.finish()
    world.check()


@MODEST
@given(steps=STEPS)
@example(
    steps=[(chatter, 229, "🙂"), (flush, 0, ""), (chatter, 229, "é"), (flush, 0, ""), (reconnect, 0, ""), (say, 0, "a")]
)
@example(steps=[(note, 89, "🙂")] * 4 + [(join, 1, "")])
@example(steps=[(read, 0, ""), (say, 0, "a"), (close, 0, ""), (end, 0, ""), (join, 1, ""), (read, 8, "")])
async def test_every_transcript_is_what_was_said(steps: Sequence[Step]) -> None:
    """Whatever the order of writes, flushes, reads and reconnects, every reader has every character once."""
    await play(steps, instances=1)


@MODEST
@given(steps=STEPS)
@example(steps=[(create, 0, ""), (catch_up, 0, ""), (reconnect, 1, "")])
@example(steps=[(read, 0, ""), (reconnect, 1, "")])
async def test_every_transcript_is_what_was_said_on_two_instances(steps: Sequence[Step]) -> None:
    """The same where readers change between the owner's instance and one that hears late."""
    await play(steps, instances=2)


async def test_a_cursor_costs_the_same_in_a_long_session() -> None:
    """Once it has caught up, what a cursor holds does not grow with the session's past."""
    sizes = []
    for past in (3, 60):
        world = World()
        await world.open(1)
        for number in range(past):
            await world.create(f"resp_{number}")
            await world.end(f"resp_{number}")
            await world.flush()
        await asyncio.gather(*world.ending)
        start = await find_start(world.owner, None)
        cursor = Cursor(world.owner, start)
        while await cursor.next(0.0):
            pass
        kept = [getattr(cursor, name) for name in Cursor.__slots__]
        sizes.append(sum(len(value) for value in kept if isinstance(value, dict | set)))
    assert sizes[0] == sizes[1]


def test_what_a_schedule_says_takes_positions() -> None:
    """The events that schedules are made of take one position each, as the checks here assume."""
    assert [length(event) for event in (begun("r"), done("r"), closed(), item(""))] == [1, 1, 1, 1]
