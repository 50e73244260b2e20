"""What was taken back, in this process and in Redis: from when on, for how long, and what becomes of it here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress

import msgspec
import pytest

from realtime.access import revocations
from realtime.access.principal import Principal
from realtime.access.revocations import MemoryRegister, Register, Revocations
from realtime.access.revocations_redis import KEY, RedisRegister
from realtime.errors import AuthenticationError, StoreError
from tests.support.principals import known
from tests.support.redis_server import RedisServer, redis_server

PATIENCE_S = 20.0


@pytest.fixture
async def redis() -> AsyncIterator[RedisServer]:
    async with redis_server() as redis:
        yield redis


@pytest.fixture(params=["memory", "redis"])
async def register(request: pytest.FixtureRequest) -> AsyncIterator[Register]:
    """Each of the two."""
    if request.param == "memory":
        yield MemoryRegister(keep_s=60)
        return
    async with redis_server() as redis, RedisRegister(redis.url, keep_s=60) as register:
        yield register


class Away:
    """A register that does not answer while it is `away`."""

    def __init__(self) -> None:
        self.away = False
        self.looks = 0
        self.kept: dict[str, float] = {}

    async def add(self, subject: str) -> None:
        if self.away:
            raise StoreError("away", "It is away.")
        self.kept[subject] = time.time()

    async def all(self) -> dict[str, float]:
        self.looks += 1
        if self.away:
            raise StoreError("away", "It is away.")
        return dict(self.kept)


def issued(user: str, at: float) -> Principal:
    """Somebody whose token was issued then."""
    return msgspec.structs.replace(known(user), issued_at=at)


async def test_what_is_added_is_there(register: Register) -> None:
    """With its time, whatever it is called; again counts from then on."""
    assert await register.all() == {}
    before = time.time() - 1
    for subject in ("user:ann", "session:sess_1", "user:" + "ü😀 \\:*" * 20):
        await register.add(subject)
    found = await register.all()
    assert set(found) == {"user:ann", "session:sess_1", "user:" + "ü😀 \\:*" * 20}
    assert all(before < at < time.time() + 1 for at in found.values())
    while (again := await register.all())["user:ann"] <= found["user:ann"]:
        await register.add("user:ann")
    assert again["session:sess_1"] == found["session:sess_1"]


async def test_memory_keeps_it_for_so_long() -> None:
    """And no longer."""
    now = 1000.0
    register = MemoryRegister(keep_s=10, clock=lambda: now)
    await register.add("user:ann")
    now += 9
    assert await register.all() == {"user:ann": 1000.0}
    now += 2
    assert await register.all() == {}


async def test_redis_keeps_it_for_so_long(redis: RedisServer) -> None:
    """What is older is not told, is taken out when something is added, and goes with its key where nothing is."""
    async with RedisRegister(redis.url, keep_s=60) as register:
        await register.add("user:ann")
        assert 50_000 < await redis.command("PTTL", KEY) <= 60_000
        await redis.command("ZADD", KEY, time.time() * 1000 - 61_000, "user:old")
        assert set(await register.all()) == {"user:ann"}
        await register.add("user:bob")
        assert await redis.command("ZCARD", KEY) == 2


async def test_redis_away_is_a_typed_error(redis: RedisServer) -> None:
    """Of both."""
    async with RedisRegister(redis.url, keep_s=60) as register:
        await redis.kill()
        with pytest.raises(StoreError):
            await register.all()
        with pytest.raises(StoreError):
            await register.add("user:ann")


async def test_a_token_from_before_counts_no_more() -> None:
    """For whom, and for where, it was taken back; one from after does."""
    known_here = Revocations(MemoryRegister(keep_s=60), lambda: None)
    now = time.time()
    await known_here.revoke(user="ann")
    await known_here.revoke(session_id="sess_1")
    assert known_here.covers(issued("ann", now - 1), None)
    assert known_here.covers(issued("ann", now - 1), "sess_2")
    assert known_here.covers(issued("bob", now - 1), "sess_1")
    assert not known_here.covers(issued("bob", now - 1), "sess_2")
    assert not known_here.covers(issued("bob", now - 1), None)
    assert not known_here.covers(issued("ann", now + 1), "sess_1")
    assert not known_here.covers(Principal(), "sess_1")
    with pytest.raises(AuthenticationError) as refused:
        known_here.check(issued("ann", now - 1), None)
    assert refused.value.code == "token_revoked"


async def test_a_token_that_does_not_tell_when_it_was_issued_is_from_before() -> None:
    """It may be."""
    known_here = Revocations(MemoryRegister(keep_s=60), lambda: None)
    await known_here.revoke(user="ann")
    assert known_here.covers(msgspec.structs.replace(known("ann"), issued_at=None), None)


async def test_users_and_sessions_of_one_name_are_two() -> None:
    """And the lack of a session is none."""
    known_here = Revocations(MemoryRegister(keep_s=60), lambda: None)
    before = time.time() - 1
    await known_here.revoke(user="x")
    await known_here.revoke(session_id="None")
    assert not known_here.covers(issued("ann", before), "x")
    assert not known_here.covers(issued("ann", before), None)
    assert known_here.covers(issued("ann", before), "None")


async def test_what_is_known_goes_on_being_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the register is away; and what it is told then is an error, and not lost silently."""
    monkeypatch.setattr(revocations, "LOOK_S", 0.001)
    register, dropped = Away(), asyncio.Event()
    known_here = Revocations(register, dropped.set)
    before = time.time() - 1
    watching = asyncio.create_task(known_here.watch())
    try:
        async with asyncio.timeout(PATIENCE_S):
            register.kept[revocations._user("ann")] = time.time()  # by another instance
            await dropped.wait()
            register.away = True
            looks = register.looks
            while register.looks < looks + 3:  # noqa: ASYNC110  # it only counts
                await asyncio.sleep(0.001)
            assert known_here.covers(issued("ann", before), None)
            with pytest.raises(StoreError):
                await known_here.revoke(user="bob")
            register.away = False
            register.kept[revocations._user("bob")] = time.time()
            while not known_here.covers(issued("bob", before), None):  # noqa: ASYNC110  # likewise
                await asyncio.sleep(0.001)
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
