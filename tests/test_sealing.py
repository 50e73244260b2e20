"""Sealing: what goes in comes out, only where it belongs, only whole, and with the keys that one has."""

from __future__ import annotations

import asyncio
import base64
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from structlog.testing import capture_logs

from realtime.errors import StoreError
from realtime.parts import make_parts, make_worker
from realtime.protocol import SESSION_CHANNEL
from realtime.session import task_created
from realtime.settings import Settings, SettingsError
from realtime.store.base import CommandRecord, Missed, Notice, TaskRef, Viewer, ViewerJoined, Write
from realtime.store.redis import RedisStore
from realtime.store.sealing import KEY_BYTES, NONCE_BYTES, AesGcm, Clear, Sealer, parse_seal_keys
from realtime.tasks.local import LocalQueue
from realtime.tasks.sweeper import Sweeper
from tests.contract import NOW, item, participant, session
from tests.support import sample_tasks
from tests.support.redis_server import RedisServer, redis_server

OLD, NEW = b"o" * KEY_BYTES, b"n" * KEY_BYTES
BEFORE, BOTH, AFTER = AesGcm({"k1": OLD}), AesGcm({"k2": NEW, "k1": OLD}), AesGcm({"k2": NEW})
WHERE = {"session_id": "sess_1", "place": "log:resp_1"}
HEAD_BYTES = 1 + 1 + len("k1")
SESSION = "sess_1"
PATIENCE_S = 20.0
LOCAL = make_parts(Settings(responder="demo"), None, [sample_tasks.echo])
"""What a worker is made of, with a store and a queue of its own."""
RECORD = CommandRecord("ann", "e1", b"d")


def refused(sealer: Sealer, sealed: bytes, *, session_id: str = "sess_1", place: str = "log:resp_1") -> str:
    """Why a value is refused, as the log says it."""
    with capture_logs() as records, pytest.raises(StoreError) as caught:
        sealer.open(sealed, session_id=session_id, place=place)
    assert caught.value.code == "store_unreadable"
    [record] = records
    reason: str = record["reason"]
    return reason


# --- values ----------------------------------------------------------------------------------------------------------


@given(plain=st.binary(max_size=300), session_id=st.text("ab_-1", min_size=1), place=st.text(max_size=20))
def test_what_was_sealed_is_opened(plain: bytes, session_id: str, place: str) -> None:
    """Whatever it is, and wherever it stands."""
    sealed = BOTH.seal(plain, session_id=session_id, place=place)
    assert BOTH.open(sealed, session_id=session_id, place=place) == plain


def test_sealing_costs_thirty_bytes_and_the_key_s_name() -> None:
    """What a session may hold is counted as it is stored."""
    assert len(BEFORE.seal(b"x" * 100, **WHERE)) == 100 + 30 + len("k1")


@given(st.data())
def test_an_altered_value_is_refused(data: st.DataObject) -> None:
    """Any bit of it, the nonce and the key's name included."""
    sealed = bytearray(BOTH.seal(b"what was said", **WHERE))
    at = data.draw(st.integers(0, 8 * len(sealed) - 1))
    sealed[at // 8] ^= 1 << at % 8
    with pytest.raises(StoreError):
        BOTH.open(bytes(sealed), **WHERE)


@given(st.data())
def test_a_value_that_was_cut_or_grew_is_refused(data: st.DataObject) -> None:
    """At either end."""
    sealed = BOTH.seal(b"what was said", **WHERE)
    cut = data.draw(st.integers(0, len(sealed) - 1))
    more = data.draw(st.binary(min_size=1, max_size=20))
    for wrong in (sealed[:cut], sealed[cut + 1 :], sealed + more, sealed[:HEAD_BYTES] + more + sealed[HEAD_BYTES:]):
        with pytest.raises(StoreError):
            BOTH.open(wrong, **WHERE)


@given(st.binary(max_size=100))
def test_anything_else_is_refused(noise: bytes) -> None:
    """Nothing but a typed error comes of bytes that nobody has sealed, also where they begin like a sealed value."""
    for value in (noise, b"\x01" + noise, b"\x01\x02k1" + noise):
        with pytest.raises(StoreError):
            BOTH.open(value, **WHERE)


@pytest.mark.parametrize("elsewhere", [{"session_id": "sess_2"}, {"place": "log:resp_2"}, {"place": "viewer"}])
def test_a_value_that_was_moved_is_refused(elsewhere: dict[str, str]) -> None:
    """To another session, another channel, or another kind of value."""
    assert refused(AesGcm({"k1": OLD}), BEFORE.seal(b"x", **WHERE), **{**WHERE, **elsewhere}) == "it was altered"


def test_session_and_place_don_t_run_into_each_other() -> None:
    """A value is not opened where the two of them only read the same."""
    sealed = BEFORE.seal(b"x", session_id="a", place="b\0c")
    with pytest.raises(StoreError):
        BEFORE.open(sealed, session_id="ab", place="\0c")


def test_one_key_s_value_is_not_opened_as_another_s() -> None:
    """Under another name, with the same bytes."""
    twins = AesGcm({"k1": OLD, "k2": OLD})
    sealed = twins.seal(b"x", **WHERE)
    with pytest.raises(StoreError):
        twins.open(sealed.replace(b"k1", b"k2", 1), **WHERE)


def test_no_nonce_comes_twice() -> None:
    """Each value has one of its own, and the same content never looks the same."""
    sealed = [BEFORE.seal(b"the same", **WHERE) for _ in range(10_000)]
    assert len({value[HEAD_BYTES : HEAD_BYTES + NONCE_BYTES] for value in sealed}) == len(sealed)


def test_each_session_has_a_key_of_its_own() -> None:
    """Their number bounds what is sealed with one key, and the key of one session opens no other."""
    ciphers = [BOTH._keys(name, session_id) for name in ("k1", "k2") for session_id in ("sess_1", "sess_2")]
    assert len({id(one.cipher) for one in ciphers}) == len({one.naming for one in ciphers}) == 4
    assert all(one.naming not in (OLD, NEW) for one in ciphers)


def test_the_keys_that_are_kept_ready_are_bounded() -> None:
    """However many sessions there are."""
    sealer = AesGcm({"k1": OLD})
    for number in range(5000):
        sealer.seal(b"", session_id=f"sess_{number}", place="session")
    assert sealer._keys.cache_info().currsize < 5000
    assert sealer.open(sealer.seal(b"x", **WHERE), **WHERE) == b"x"


# --- changing keys ---------------------------------------------------------------------------------------------------


def test_the_first_key_seals_and_each_opens() -> None:
    """An instance with both keys reads what was written before, and what it writes is read after."""
    old = BEFORE.seal(b"x", **WHERE)
    assert BOTH.open(old, **WHERE) == b"x"
    assert AFTER.open(BOTH.seal(b"y", **WHERE), **WHERE) == b"y"


def test_what_was_sealed_with_a_key_that_is_gone_is_refused() -> None:
    """The log says so, and not which value it was."""
    assert refused(AesGcm({"k2": NEW}), BEFORE.seal(b"x", **WHERE)) == "its key is not known here"


def test_what_is_not_sealed_is_refused() -> None:
    """As from before sealing was turned on, or from somebody who has no key."""
    assert refused(AesGcm({"k1": OLD}), b'{"id":"sess_1"}') == "it is not sealed"


def test_without_keys_what_is_sealed_is_refused() -> None:
    """While sealing is turned on, an instance that has no keys yet does not take noise for content."""
    assert refused(Clear(), BEFORE.seal(b"x", **WHERE)) == "it is sealed"
    assert Clear().open(Clear().seal(b"x", **WHERE), **WHERE) == b"x"


def test_each_reason_is_logged_once() -> None:
    """And without anything of the value."""
    sealer = AesGcm({"k1": OLD})
    with capture_logs() as records:
        for value in [b"secret"] * 3 + [AFTER.seal(b"secret", **WHERE)] * 3:
            with pytest.raises(StoreError):
                sealer.open(value, **WHERE)
    assert [record["reason"] for record in records] == ["it is not sealed", "its key is not known here"]


def test_names_are_the_same_again_and_show_nothing() -> None:
    """In the same session and under the same key; an instance with both keys looks under both."""
    [old], both, [new] = (sealer.names(b"x", session_id="sess_1") for sealer in (BEFORE, BOTH, AFTER))
    assert both == [new, old]
    assert old != new
    assert BEFORE.names(b"x", session_id="sess_2") != [old] != BEFORE.names(b"y", session_id="sess_1")


# --- the setting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encode", [base64.standard_b64encode, base64.urlsafe_b64encode])
@pytest.mark.parametrize("cut", ["", "="])
def test_keys_are_read_in_their_order(encode: type[bytes], cut: str) -> None:
    """In both alphabets of base64, with or without padding."""
    keys = {"k-2": b"\xfb\xef\xff" * 10 + b"ab", "K_1": bytes(range(KEY_BYTES))}
    values = [f"{name}:{encode(key).decode().rstrip(cut)}" for name, key in keys.items()]
    assert list(parse_seal_keys(values).items()) == list(keys.items())


GOOD = "a:" + base64.b64encode(OLD).decode()


@pytest.mark.parametrize(
    "wrong",
    [
        GOOD[2:],
        GOOD[1:],
        GOOD[2:] + ":a",
        "b" * 33 + GOOD[1:],
        "b c" + GOOD[1:],
        GOOD,
        "b:" + base64.b64encode(b"s" * 31).decode(),
        "b:" + base64.b64encode(b"s" * 33).decode(),
        "b:" + "!" + GOOD[3:],
        "b:é" + GOOD[3:],
        "b:",
    ],
)
def test_a_wrong_key_is_refused_without_being_shown(wrong: str) -> None:
    """In one line that says which one it is."""
    with pytest.raises(SettingsError) as caught:
        parse_seal_keys((GOOD, wrong))
    text = str(caught.value)
    assert text.startswith("REALTIME_SEAL_KEYS=… is not allowed: key 2: ")
    assert "\n" not in text
    assert all(wrong[at : at + 12] not in text for at in range(max(len(wrong) - 12, 1)) if len(wrong) > 12)


def test_a_server_does_not_start_with_a_wrong_key() -> None:
    """Not even where nothing would be sealed with it."""
    with pytest.raises(SettingsError):
        make_parts(Settings(responder="demo", seal_keys=("k1:short",)), None, ())


def test_nothing_of_the_library_is_loaded_without_keys() -> None:
    """It takes time and memory that most don't need to give."""
    code = "import realtime.store.redis, sys; assert 'cryptography.hazmat' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=50)


# --- in the store ----------------------------------------------------------------------------------------------------


@pytest.fixture
async def redis() -> AsyncIterator[RedisServer]:
    """The Redis of a test."""
    async with redis_server() as server:
        yield server


def viewer() -> Viewer:
    return Viewer(participant("conn_1"), "inst_1")


async def test_keys_are_changed_while_instances_run(redis: RedisServer) -> None:
    """One that still seals with the old key and one that seals with the new one read each other, if each has both."""
    notices: list[Notice] = []
    async with (
        RedisStore(redis.url, sealer=AesGcm({"k1": OLD, "k2": NEW})) as one,
        RedisStore(redis.url, sealer=AesGcm({"k2": NEW, "k1": OLD})) as two,
    ):
        await one.create(session(SESSION, instructions="be brief"))
        await one.append(SESSION, [Write("session", [item("hi")])], RECORD)
        await two.watch(SESSION, notices.append)
        assert (await two.load(SESSION)).session.instructions == "be brief"
        assert await two.find_command(SESSION, "ann", "e1") == RECORD
        await two.append(SESSION, [Write("session", [item("ho", "item_2")])])
        assert await one.read(SESSION, "session", 0, 1000) == [item("hi"), item("ho", "item_2")]
        await one.join(SESSION, viewer())
        assert await two.viewers(SESSION) == [viewer()]


async def test_a_session_whose_key_is_gone_is_unreadable(redis: RedisServer) -> None:
    """Each call that reads says so; the session is there until it expires."""
    async with RedisStore(redis.url, sealer=BEFORE) as one, RedisStore(redis.url, sealer=AFTER) as two:
        await one.create(session(SESSION))
        await one.append(SESSION, [Write("session", [item("hi")])], RECORD)
        await one.join(SESSION, viewer())
        for call in (two.load(SESSION), two.read(SESSION, "session", 0, 1000), two.viewers(SESSION)):
            with pytest.raises(StoreError) as caught:
                await call
            assert caught.value.code == "store_unreadable"
        await two.erase(SESSION)


@pytest.mark.parametrize("who", ["one", "two"])
async def test_a_viewer_that_can_t_be_read_is_told_of_as_missed(redis: RedisServer, who: str) -> None:
    """Where its leaving comes from another instance, and where it is this one's own doing."""
    notices: list[Notice] = []
    async with RedisStore(redis.url, sealer=BEFORE) as one, RedisStore(redis.url, sealer=AFTER) as two:
        await one.create(session(SESSION))
        await one.join(SESSION, viewer())
        await two.watch(SESSION, notices.append)
        await {"one": one, "two": two}[who].leave(SESSION, "conn_1", 0.0)
        await two.join(SESSION, viewer())  # what was published before is heard by then, or is told right away
        await heard(redis, two, notices)
    assert notices[0] == Missed()
    assert ViewerJoined(viewer()) in notices


async def heard(redis: RedisServer, store: RedisStore, notices: list[Notice]) -> None:
    """Return once a store has heard what another has published before."""
    async with RedisStore(redis.url, sealer=AFTER) as other:
        await other.append(SESSION, [Write("session", [item("marker")])])
    while not any(not isinstance(notice, Missed | ViewerJoined) for notice in notices):
        await store.ping()


class Untaken(LocalQueue):
    """A queue that remembers what it was given."""

    def __init__(self) -> None:
        super().__init__((), slots=1)
        self.tasks: list[TaskRef] = []

    async def submit(self, task: TaskRef) -> None:
        """Remember it."""
        self.tasks.append(task)


async def test_a_task_that_can_t_be_read_holds_up_no_other(redis: RedisServer) -> None:
    """Nobody is asked to look after it any more; the one beside it is handed out."""
    tasks = [TaskRef("sess_1", "task_1", "work"), TaskRef("sess_2", "task_2", "work")]
    queue = Untaken()
    async with RedisStore(redis.url, sealer=BEFORE) as one, RedisStore(redis.url, sealer=AFTER) as two:
        for store, task in zip((one, two), tasks, strict=True):
            await store.create(session(task.session_id))
            created = task_created(task.task_id, task.name, "{}", user="ann", payer=None, now=NOW)
            await store.append(task.session_id, [Write(SESSION_CHANNEL, [created])])
            await store.track(task, 0.0)
        assert await Sweeper(two, queue, again_s=60.0).sweep() == 2
        assert await two.tracked() == 1
    assert queue.tasks == tasks[1:]


async def test_a_worker_gives_up_a_task_that_it_can_t_read(redis: RedisServer) -> None:
    """It has its place for another one."""
    task = TaskRef(SESSION, "task_1", "echo")
    async with RedisStore(redis.url, sealer=BEFORE) as one, RedisStore(redis.url, sealer=AFTER) as two:
        await one.create(session(SESSION))
        await one.track(task, 60.0)
        worker = make_worker(structs.replace(LOCAL, store=two), Settings())
        async with asyncio.timeout(PATIENCE_S):
            await worker.handle(task)
        assert await one.tracked() == 0
