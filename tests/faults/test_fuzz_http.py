"""Mutated bodies, heads and frames as they are on the wire: each is a typed error, legal, or cut, and none is logged.

`REALTIME_TEST_FUZZ_FRAMES` says how many of each kind are sent, times four, `REALTIME_TEST_FUZZ_SEED` which ones.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import random
import re
import struct
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import httpx
import msgspec
import pytest

from tests.access.signing import SECRET, token
from tests.end_to_end import ERROR_TYPES, PATIENCE_S, echo
from tests.faults.test_frames import BINARY, CONT, TEXT, frame, handshake, message
from tests.faults.test_fuzz import CANARY, FRAMES, MESSAGES, SEED, Mutator
from tests.support.client import attached
from tests.support.memory import resident_bytes
from tests.support.server import RunningServer, running_server

COUNT = FRAMES // 4
AT_ONCE = 40
QUIET_S = 0.25
"""How long what was sent may go without an answer: it was no whole request."""
TTL_S = 20.0
"""How long what the fuzz has made is kept: memory would not be flat otherwise."""
MAX_GROWTH_BYTES = 64 * 1024 * 1024
"""What the process, the clients in it too, may have grown by in the end."""
SESSION = "SESSION"
A_SESSION = re.compile(r"\bsession=[\w-]+")
"""What an administrator has named in a request, where it may be one: that is what the audit log is for."""
BODIES: dict[str, list[Any]] = {
    "/v1/sessions": [
        {"instructions": CANARY, "multitask_strategy": "enqueue"},
        {"model": "m", "max_output_tokens": 9, "on_disconnect": "continue", "disconnect_grace_ms": 500},
    ],
    f"/v1/sessions/{SESSION}/events": [one for one in MESSAGES if one["type"] != "session.close"],
    "/v1/tasks/analyse": [{"text": CANARY}, {"text": f"{CANARY} \u2028\x00"}],
    "/v1/tasks/clinical_note": [{"conversation": [{"role": "user", "content": CANARY}]}],
    "/v1/analyse": [{"text": CANARY}],
    "/v1/summarise": [{"text": CANARY}],
    "/v1/complete": [
        {"prompt": CANARY, "instructions": CANARY, "model": "m", "max_tokens": 10},
        {"messages": [{"role": "user", "content": CANARY}, {"role": "assistant", "content": "x"}]},
    ],
    "/v1/stream": [{"prompt": CANARY}, {"messages": [{"role": "user", "content": f"{CANARY}\r\n\x00"}]}],
    "/v1/auth/cookie": [{}],
    "/v1/admin/revoke": [{"user": "somebody"}, {"session_id": "sess_x"}],
}
LINES = (
    f"GET /v1/sessions/{SESSION}?after=session:1",
    f"GET /v1/sessions/{SESSION}/events?after=session:1,resp_1:2&history=all&delta_interval_ms=20",
    f"DELETE /v1/sessions/{SESSION}/tasks/task_1?x=%00%ff",
    "GET /v1/tasks/task_1/events",
    "POST /v1/tasks/analyse",
    "POST /v1/complete?a=b",
    "POST /v1/auth/cookie",
    "DELETE /v1/auth/cookie",
    "GET /static/..%2f..%2fx",
    "GET /metrics",
    "OPTIONS /v1/complete",
    "HEAD /",
)


class Wire:
    """Writes requests, and damages them."""

    def __init__(self, seed: str, bearer: str, session_id: str) -> None:
        self._chance = random.Random(seed)
        self._mutator = Mutator(self._chance, msgspec.json.encode)
        self._bearer = bearer
        self._session_id = session_id

    def head(self) -> bytes:
        """A head, most often with something wrong."""
        chance = self._chance
        if chance.random() < 0.3:
            head = handshake(f"session_id={self._session_id}&after=session:1&history=none", self._credentials())
        else:
            line = chance.choice(LINES).replace(SESSION, self._session_id)
            more = "Last-Event-ID: session:1\r\nContent-Length: 2\r\nPrefer: respond-async\r\nConnection: close\r\n"
            more += "X-Forwarded-For: 1.2.3.4, ::1\r\nX-Forwarded-Proto: https\r\nIdempotency-Key: k\r\n"
            head = f"{line} HTTP/1.1\r\nHost: localhost\r\n{self._credentials()}{more}\r\n".encode() + b"{}"
        for _ in range(chance.choice([0, 1, 1, 2, 3])):
            head = self._mutator.damaged(head)
        return head + b"\r\n\r\n"

    def frames(self) -> bytes:
        """Frames, at least one of which is damaged."""
        chance = self._chance
        text = json.dumps(chance.choice(MESSAGES)).encode()
        cut = chance.randrange(len(text))
        whole = chance.choice(
            [
                frame(TEXT, text),
                frame(TEXT, text[:cut], fin=False) + frame(CONT, text[cut:]),
                frame(BINARY, text),
                frame(9, b"p") + frame(TEXT, message("ping")) + frame(8, struct.pack("!H", 1000) + CANARY.encode()),
                frame(TEXT, text, rsv=chance.randrange(8), masked=chance.random() < 0.5),
            ]
        )
        for _ in range(chance.choice([1, 1, 2, 4])):
            whole = self._mutator.damaged(whole)
        return whole

    def _credentials(self) -> str:
        """A token in one of the places for one, or in none."""
        return self._chance.choice(
            [
                f"Authorization: Bearer {self._bearer}\r\n",
                f"Cookie: realtime_token={self._bearer}; a=b\r\nOrigin: http://localhost\r\n",
                f"Sec-WebSocket-Protocol: realtime.v1, bearer.{self._bearer}\r\n",
                f"Authorization: Basic {CANARY}\r\nCookie: {CANARY}\r\n",
                f"Origin: http://{CANARY}\r\n",
                "",
            ]
        )


class Watch(logging.Handler):
    """Takes all records of the server's side, and keeps only what must not be among them."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.wrong: list[str] = []
        self.seen: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        """Look at a record."""
        text = record.getMessage()
        self.seen[record.name] += 1
        if "admin.revoke" in text:
            return  # names, by design, whom an administrator shuts out
        if CANARY in A_SESSION.sub("", text) or record.exc_info or record.levelno >= logging.ERROR:
            self.wrong.append(text)


@pytest.fixture
def watch() -> Iterator[Watch]:
    """All that the server's loggers are told; nobody else is, who would keep it."""
    watch = Watch()
    loggers = [logging.getLogger(name) for name in ("realtime", "uvicorn", "asyncio")]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(watch)
        logger.propagate = False
    loggers[0].setLevel(logging.DEBUG)  # as an operator may; not so the libraries', which then log frames
    yield watch
    for logger, (level, propagate) in zip(loggers, before, strict=True):
        logger.removeHandler(watch)
        logger.setLevel(level)
        logger.propagate = propagate


@asynccontextmanager
async def fuzzed(capfd: pytest.CaptureFixture[str], watch: Watch) -> AsyncIterator[tuple[RunningServer, str]]:
    """A server that nothing may harm, and a token for it; a bystander is there, and all that is logged is looked at."""
    bearer = token(sub="fuzzer", scope="session task oneshot admin", exp=2**32)
    async with running_server(echo, session_ttl_s=TTL_S, task_ttl_s=TTL_S, auth_secret=SECRET) as server:
        async with attached(server, bearer=token(sub="bystander", exp=2**32)) as bystander:
            gc.collect()
            before = resident_bytes()
            yield server, bearer
            async with asyncio.timeout(PATIENCE_S):
                assert await bystander.answer("unharmed") == "unharmed"
            assert [event for event in bystander.transcript.events if event["type"] == "error"] == []
            gc.collect()
            grown = resident_bytes() - before
            assert grown < MAX_GROWTH_BYTES
    output = "".join(capfd.readouterr())
    assert CANARY not in output
    assert "Traceback" not in output
    assert watch.wrong == []
    assert watch.seen["realtime.audit"]
    if COUNT > 500:
        with capfd.disabled():
            print(f"\nthe process has grown by {grown / 2**20:.1f} MiB")


def batches(size: int) -> Iterator[int]:
    """So many at a time, until all are sent."""
    for sent in range(0, COUNT, size):
        yield min(size, COUNT - sent)


def judge(status: int, body: bytes) -> str:
    """The answer is legal, or a typed error of the client's; returns what it is."""
    assert status < 500 or status == 502, (status, body[:500])
    if status < 400:
        return str(status)
    error = json.loads(body)["error"]
    assert error["type"] in ERROR_TYPES - {"server_error", "store_error"}, error
    assert CANARY not in error["message"], error
    return str(error["code"])


async def test_mutated_bodies_are_typed_errors_or_legal(capfd: pytest.CaptureFixture[str], watch: Watch) -> None:
    """Whatever is posted wherever something is taken, the server answers in its own words, and lives on."""
    chance = random.Random(f"{SEED} bodies")
    mutators = {path: Mutator(chance, msgspec.json.encode, messages) for path, messages in BODIES.items()}
    seen: Counter[str] = Counter()
    async with AsyncExitStack() as stack:
        server, bearer = await stack.enter_async_context(fuzzed(capfd, watch))
        headers = {"Authorization": f"Bearer {bearer}"}
        client = await stack.enter_async_context(
            httpx.AsyncClient(base_url=server.url, headers=headers, trust_env=False, timeout=PATIENCE_S)
        )
        for count in batches(200):
            session_id = (await client.post("/v1/sessions")).json()["session"]["id"]
            paths = [chance.choice(list(BODIES)) for _ in range(count)]
            bodies = [(path.replace(SESSION, session_id), mutators[path].frame()) for path in paths]
            for at in range(0, count, AT_ONCE):
                answers = await asyncio.gather(
                    *(client.post(path, content=body) for path, body in bodies[at : at + AT_ONCE])
                )
                seen.update(judge(answer.status_code, answer.content) for answer in answers)
    tell(capfd, "bodies", seen)
    assert {"200", "201", "202", "204", "invalid_json", "invalid_message", "invalid_input", "unknown_field"} <= set(
        seen
    )


async def test_mutated_heads_are_answered_or_cut(capfd: pytest.CaptureFixture[str], watch: Watch) -> None:
    """Request lines, queries, cookies, tokens and all other headers, also those of upgrades."""
    seen: Counter[str] = Counter()
    async with fuzzed(capfd, watch) as (server, bearer):
        async with attached(server, bearer=bearer) as client:
            wire = Wire(f"{SEED} heads", bearer, client.session_id)
            for count in batches(AT_ONCE):
                seen.update(await asyncio.gather(*(send(server.port, wire.head()) for _ in range(count))))
    tell(capfd, "heads", seen)
    assert {"101", "200", "400", "401", "403", "404"} <= set(seen)
    assert {status for status in seen if status > "415"} <= {"426", "nothing"}


async def test_mutated_frames_on_the_wire_are_told_or_cut(capfd: pytest.CaptureFixture[str], watch: Watch) -> None:
    """Whatever comes after the upgrade, down to the bits of a frame's head."""
    seen: Counter[str] = Counter()
    async with fuzzed(capfd, watch) as (server, bearer):
        wire = Wire(f"{SEED} frames", bearer, "")
        upgrade = handshake(headers=f"Authorization: Bearer {bearer}\r\n")
        for count in batches(AT_ONCE):
            seen.update(await asyncio.gather(*(send(server.port, upgrade, wire.frames()) for _ in range(count))))
    tell(capfd, "frames on the wire", seen)
    assert set(seen) == {"101"}


def tell(capfd: pytest.CaptureFixture[str], what: str, seen: Counter[str]) -> None:
    """Say what came of it, where somebody has asked for more than usual."""
    if COUNT > 500:
        with capfd.disabled():
            print(f"\n{seen.total()} {what}:", dict(seen.most_common()))


async def send(port: int, head: bytes, frames: bytes | None = None) -> str:
    """The status that is answered to what may be a head, or "nothing". `frames` follow where it is an upgrade."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    received = b""
    try:
        with suppress(ConnectionError):
            writer.write(head)
            if frames is not None:
                received = await everything(reader, until=b"\r\n\r\n", within_s=PATIENCE_S)
                writer.write(frames)
                writer.write_eof()
            received += await everything(reader, within_s=QUIET_S if frames is None else PATIENCE_S)
    finally:
        writer.transport.abort()
    assert b"internal_error" not in received, (head, frames, received)
    if not received:
        return "nothing"
    status = received.split(b" ", 2)[1].decode()
    assert int(status) < 500, (head, received)
    assert CANARY.encode() not in received.partition(b"\r\n\r\n")[0], received
    return status


async def everything(reader: asyncio.StreamReader, *, within_s: float, until: bytes | None = None) -> bytes:
    """What comes until the end, or until there is enough, or for so long."""
    received = b""
    with suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(within_s):
            while (until is None or until not in received) and (piece := await reader.read(65_536)):
                received += piece
    return received
