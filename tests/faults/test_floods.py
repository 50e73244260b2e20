"""Floods by one client: they end at limits that are told, cost bounded memory, and nobody else is refused anything.

How much later others' tokens are meanwhile `python -m bench.floods` measures.
"""

from __future__ import annotations

import asyncio
import gc
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from realtime.connection import MAX_REFUSED
from realtime.http_transport import MAX_HEAD_BYTES
from realtime.protocol import SESSION_CHANNEL, Item, ItemCreated
from realtime.settings import Settings
from realtime.store.base import Write
from realtime.transport import MAX_LATE, PINGS, SLICE_BYTES, StallProofProtocol
from tests.access.signing import SECRET, token
from tests.end_to_end import PATIENCE_S, Model, dialled, echo
from tests.faults.test_frames import CLOSE, PING, PONG, TEXT, RawSocket, frame, message, raw
from tests.support.client import attached
from tests.support.memory import resident_bytes
from tests.support.server import RunningServer, running_server

DEFAULTS = Settings()
LIMITS = {
    name: getattr(DEFAULTS, name)
    for name in (
        "rate_responses",
        "rate_oneshots",
        "rate_tasks",
        "rate_messages",
        "max_responses_per_user",
        "max_tasks_per_user",
        "max_connections_per_user",
        "max_connections_per_address",
    )
}
"""The limits as they are shipped."""
FLOOD = 100_000
MAX_GROWTH_BYTES = 16 * 1024 * 1024
BEARER = f"Authorization: Bearer {token(sub='flooder', exp=2**32)}\r\n"


@asynccontextmanager
async def flooded(**limits: Any) -> AsyncIterator[RunningServer]:
    """A server with the limits that it is shipped with, but for those given, in which somebody else gets an answer
    token by token."""
    model = Model()
    async with running_server(model, auth_secret=SECRET, **{**LIMITS, **limits}) as server:
        async with attached(server, bearer=token(sub="other", exp=2**32)) as other:
            response_id = await other.respond()
            turn = await model.turn()
            gc.collect()
            before = resident_bytes()
            talking = asyncio.create_task(talk(turn.say))
            try:
                yield server
            finally:
                talking.cancel()
                await asyncio.wait([talking])
            gc.collect()
            grown = resident_bytes() - before
            turn.end("end")
            async with asyncio.timeout(PATIENCE_S):
                done = await other.until("response.done")
            assert done["status"] == "completed"
            assert other.transcript.texts[response_id].endswith("end")
            assert [event for event in other.transcript.events if event["type"] == "error"] == []
            assert grown < MAX_GROWTH_BYTES, grown


async def talk(say: Callable[[str], None]) -> None:
    """Say something now and then."""
    while True:
        say("token ")
        await asyncio.sleep(0.02)


async def pour(client: RawSocket, one: bytes, *, at_once: int = 1000) -> int:
    """Send a frame 100,000 times, or until the connection is cut; returns how often."""
    block = one * at_once
    for sent in range(0, FLOOD, at_once):
        if client.reader.at_eof() or client.writer.transport.is_closing():
            return sent
        async with asyncio.timeout(PATIENCE_S):
            await client.send(block)
    return FLOOD


async def ending(client: RawSocket) -> tuple[int | None, Counter[int]]:
    """How a connection ends, and how many frames of which kind came before."""
    opcodes: Counter[int] = Counter()
    with suppress(ConnectionError, asyncio.IncompleteReadError):
        while True:
            opcode, payload = await client.frame()
            opcodes[opcode] += 1
            if opcode == CLOSE:
                return int.from_bytes(payload[:2], "big"), opcodes
    return None, opcodes


@pytest.mark.parametrize("opcode", [PING, PONG])
async def test_a_flood_of_pings_is_cut_off(opcode: int) -> None:
    """Also of pongs; neither passes any limit on messages."""
    async with flooded() as server, raw(server, headers=BEARER) as client:
        await client.send(frame(opcode, b"x" * 125) * (5 * PINGS.limit))
        code, opcodes = await ending(client)
        assert code == 1008
        assert opcodes[PONG] < 3 * PINGS.limit  # on a busy machine it takes a while until all have come
    async with flooded() as server:
        for _ in range(3):
            async with raw(server, headers=BEARER) as client:
                await pour(client, frame(opcode, b"x" * 125))


async def test_pings_now_and_then_are_answered() -> None:
    """As many as are allowed at once."""
    async with flooded() as server, raw(server, headers=BEARER) as client:
        await client.send(frame(PING, b"x") * (PINGS.limit // 2))
        for _ in range(PINGS.limit // 2):
            assert await client.frame() == (PONG, b"x")
        await client.answers()


async def test_pongs_that_nobody_reads_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many pings are allowed: uvicorn alone would keep an answer to each."""
    monkeypatch.setattr("realtime.transport.PINGS", type(PINGS)(10**9, 1.0))
    async with flooded() as server, raw(server, headers=BEARER) as client:
        client.reader._transport.pause_reading()  # type: ignore[attr-defined]
        assert await pour(client, frame(PING, b"x" * 125)) == FLOOD


@pytest.mark.parametrize("text", [b"", b"nonsense", message("ping"), message("response.create", input="x" * 50)])
async def test_a_flood_of_messages_is_told_and_cut_off(text: bytes) -> None:
    """The messages that are allowed are answered, some more are refused with the time to wait, then it is over."""
    async with flooded() as server, raw(server, headers=BEARER) as client:
        await pour(client, frame(TEXT, text))
        code, opcodes = await ending(client)
        assert code in {4400, 4429, None}  # too many that are none, or too soon
        assert opcodes[TEXT] <= 2 * (50 + MAX_REFUSED)


async def test_messages_that_come_too_fast_are_told_when_to_come_again() -> None:
    """Every one too many has its error, and the connection lives on."""
    async with flooded() as server, raw(server, headers=BEARER) as client:
        await client.send(frame(TEXT, message("ping")) * 120)
        events = [await client.event() for _ in range(120)]
        refused = [event["error"] for event in events if event["type"] == "error"]
        assert len(refused) >= 120 - 2 * 50
        assert {error["code"] for error in refused} == {"rate_limited"}
        assert all(error["retry_after_ms"] > 0 and not error["fatal"] for error in refused)


async def test_what_is_not_asked_for_is_not_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages are six bytes each here: one read brings ten thousands of them, of which a few are looked at."""
    waiting: list[int] = []
    late: list[int] = []
    take_apart = StallProofProtocol._take_apart

    def watched(self: StallProofProtocol) -> None:
        take_apart(self)
        waiting.append(len(self.queue))  # type: ignore[arg-type]  # a mailbox
        late.append(self._late)

    monkeypatch.setattr(StallProofProtocol, "_take_apart", watched)
    async with flooded() as server, raw(server, headers=BEARER) as client:
        await pour(client, frame(TEXT, b""), at_once=40_000)
        assert (await ending(client))[0] in {4400, None}
    assert max(waiting) <= SLICE_BYTES // 6 + 1
    assert max(late) <= MAX_LATE + SLICE_BYTES // 6


async def test_an_address_that_connects_too_often_waits_its_turn() -> None:
    """And who would have to wait for too long is not waited for; others are read at once."""

    async def alive(server: RunningServer, address: str) -> float:
        transport = httpx.AsyncHTTPTransport(local_address=address)
        async with httpx.AsyncClient(transport=transport, base_url=server.url, timeout=PATIENCE_S) as client:
            assert (await client.get("/healthz")).status_code == 200
            return asyncio.get_running_loop().time()

    async with running_server(echo, rate_connections="1/second") as server:
        began = asyncio.get_running_loop().time()
        await alive(server, "127.0.0.2")
        assert await alive(server, "127.0.0.2") - began >= 0.99
        for _ in range(3):
            await alive(server, "127.0.0.1")
    async with running_server(echo, rate_connections="1/day") as server:
        await alive(server, "127.0.0.2")
        with pytest.raises(httpx.TransportError):
            await alive(server, "127.0.0.2")
        await alive(server, "127.0.0.3")


async def test_a_head_without_an_end_is_cut_off() -> None:
    """Of a request, also of the second one of a connection; a long one that has an end is read."""
    endless = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"a: b\r\n" * 100_000
    whole = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Long: " + b"x" * (MAX_HEAD_BYTES // 2) + b"\r\n\r\n"
    async with running_server(echo) as server:
        for before in (b"", whole):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            async with asyncio.timeout(PATIENCE_S):
                writer.write(before)
                if before:
                    assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
                    await reader.readuntil(b"}")
                writer.write(endless)
                with suppress(ConnectionError):  # it is cut off while it still sends
                    assert (await reader.readline()).startswith(b"HTTP/1.1 431 ")
                    await reader.read()
            writer.close()


@asynccontextmanager
async def tcp(server: RunningServer) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection on which anything may be written."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def test_a_body_that_nobody_wants_holds_up_nobody() -> None:
    """A stream is asked for with a body in chunks of one byte, for as long as it is taken."""
    async with flooded() as server, attached(server, bearer=token(sub="flooder", exp=2**32)) as client:
        path = f"/v1/sessions/{client.session_id}/events"
        head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{BEARER}Transfer-Encoding: chunked\r\n\r\n"
        async with tcp(server) as (_, writer):
            writer.write(head.encode())
            await pour_into(writer, b"1\r\nx\r\n" * 1000)
        await client.send("ping")
        await client.until("pong")


async def test_requests_that_wait_for_no_answer_hold_up_nobody() -> None:
    """Whether or not the answers are read."""
    alive = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 1000
    for reads in (True, False):
        async with flooded() as server, tcp(server) as (reader, writer):
            reading = asyncio.create_task(read_all(reader)) if reads else None
            await pour_into(writer, alive)
            if reading is not None:
                reading.cancel()
            async with tcp(server) as (others, asking):
                asking.write(alive[: len(alive) // 1000])
                async with asyncio.timeout(PATIENCE_S):
                    assert (await others.readline()).startswith(b"HTTP/1.1 200 ")


async def read_all(reader: asyncio.StreamReader) -> None:
    """Read, and keep nothing."""
    with suppress(ConnectionError):
        while await reader.read(65536):
            pass


async def pour_into(writer: asyncio.StreamWriter, block: bytes) -> None:
    """Send a block over and over, until that is enough, or it is cut off, or not taken any more."""
    with suppress(ConnectionError, TimeoutError):
        for _ in range(20):
            async with asyncio.timeout(1.0):
                writer.write(block)
                await writer.drain()


async def test_requests_over_http_have_the_rate_of_a_connection() -> None:
    """Of each user, over however many connections, whatever is asked for, and upgrades, too."""
    async with running_server(echo, auth_secret=SECRET, rate_messages="5/hour") as server:
        async with attached(server, bearer=token(sub="ann")) as client, httpx.AsyncClient(base_url=server.url) as http:
            url = f"/v1/sessions/{client.session_id}"
            headers = {"authorization": f"Bearer {token(sub='ann')}"}
            update = {"type": "session.update", "session": {}}
            posts = [(await http.post(f"{url}/events", json=update, headers=headers)).status_code for _ in range(2)]
            assert posts == [202, 202]
            paths = [url, f"{url}/tasks/t", "/v1/tasks/t/result"]
            answers = [await http.get(path, headers=headers) for path in paths]
            assert [answer.status_code for answer in answers] == [200, 404, 429]
            assert answers[2].json()["error"]["code"] == "rate_limited"
            assert int(answers[2].headers["retry-after"]) > 0
            async with dialled(server, subprotocols=("realtime.v1", f"bearer.{token(sub='ann')}")) as again:
                assert json.loads(await again.recv())["error"]["code"] == "rate_limited"
            assert (await http.post("/v1/sessions", headers={"authorization": f"Bearer {token(sub='bob')}"})).is_success


async def test_a_large_session_is_read_less_often() -> None:
    """A request for each 64 KiB, and no more than half of the rate: as large as a session may be, it can be read."""
    for text_bytes, reads in ((1000, 8), (200_000, 2), (5_000_000, 1)):
        async with running_server(echo, rate_messages="9/day") as server, httpx.AsyncClient() as http:
            session = (await http.post(f"{server.url}/v1/sessions")).json()["session"]
            said = ItemCreated(
                item=Item(id="item_1", role="user", content="x" * text_bytes, user="ann", created_at="now")
            )
            await server.engine.store.append(session["id"], [Write(SESSION_CHANNEL, [said])])
            url = f"{server.url}/v1/sessions/{session['id']}"
            answers = [await http.get(url) for _ in range(reads + 1)]
            assert [answer.status_code for answer in answers] == [200] * reads + [429]
            assert answers[0].json()["items"][0]["content"] == "x" * text_bytes


async def responses(server: RunningServer) -> Counter[str]:
    """Ask for many responses over one connection."""
    seen: Counter[str] = Counter()
    async with attached(server, bearer=token(sub="flooder")) as client:
        for number in range(40):
            await client.send("response.create", input="go", multitask_strategy="enqueue", event_id=str(number))
            while (event := await client.receive())["type"] not in {"error", "response.created"}:
                pass
            seen[event["error"]["code"] if event["type"] == "error" else "made"] += 1
            assert event["type"] != "error" or event["error"].get("retry_after_ms", 1) > 0
    return seen


async def sessions_with_responses(server: RunningServer) -> Counter[str]:
    """Ask for a response in each of many sessions."""
    seen: Counter[str] = Counter()
    for _ in range(15):
        async with attached(server, bearer=token(sub="flooder")) as client:
            await client.send("response.create", input="go")
            while (event := await client.receive())["type"] not in {"error", "response.created"}:
                pass
            seen[event["error"]["code"] if event["type"] == "error" else "made"] += 1
    return seen


async def posts(server: RunningServer, path: str, body: dict[str, Any]) -> Counter[str]:
    """Post the same many times, all at once; nobody waits for an answer for long."""
    headers = {"Authorization": f"Bearer {token(sub='flooder')}"}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, trust_env=False, timeout=3) as client:
        answers = await asyncio.gather(*(client.post(path, json=body) for _ in range(60)), return_exceptions=True)
    seen: Counter[str] = Counter()
    for answer in answers:
        if isinstance(answer, httpx.Response) and answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            seen[answer.json()["error"]["code"]] += 1
        else:
            assert isinstance(answer, httpx.TimeoutException) or getattr(answer, "status_code", 0) == 202, answer
            seen["made"] += 1
    return seen


async def prompts(server: RunningServer) -> Counter[str]:
    """One-shot calls."""
    return await posts(server, "/v1/complete", {"prompt": "go"})


async def tasks(server: RunningServer) -> Counter[str]:
    """Background tasks."""
    return await posts(server, "/v1/tasks/analyse", {"text": "go"})


async def connects(server: RunningServer) -> Counter[str]:
    """Connections, all of them kept."""
    seen: Counter[str] = Counter()
    sockets = []
    try:
        for _ in range(60):
            headers = {"Authorization": f"Bearer {token(sub='flooder')}"}
            socket = await connect(server.ws_url, additional_headers=headers, compression=None, proxy=None)
            sockets.append(socket)
            first = json.loads(await socket.recv())
            seen[first["error"]["code"] if first["type"] == "error" else "made"] += 1
            if first["type"] == "error":
                with suppress(ConnectionClosed):
                    await socket.recv()
                assert socket.close_code == 4429
    finally:
        for socket in sockets:
            await socket.close()
    return seen


Flood = Callable[[RunningServer], Awaitable[Counter[str]]]


@pytest.mark.parametrize(
    ("flood", "most", "code"),
    [
        (responses, 4, {"rate_limited", "too_many_responses_at_once"}),
        (sessions_with_responses, 10, {"rate_limited", "too_many_responses_at_once"}),
        (prompts, 30, {"rate_limited", "too_many_responses_at_once"}),
        (tasks, 30, {"rate_limited"}),
        (connects, 20, {"too_many_connections", "rate_limited"}),
    ],
)
async def test_what_costs_is_limited(flood: Flood, most: int, code: set[str]) -> None:
    """No more is made than the limit allows; all else is told why not, and when to try again."""
    async with flooded() as server:
        async with asyncio.timeout(60):
            seen = await flood(server)
    assert 0 < seen.pop("made") <= most, seen
    assert seen
    assert set(seen) <= code


async def test_many_connects_one_after_the_other_leave_nothing() -> None:
    """A client that comes and goes again and again."""
    async with flooded(rate_messages="1000/second") as server:
        for _ in range(200):
            async with raw(server, headers=BEARER):
                pass


async def test_the_control_without_limits_everything_is_made() -> None:
    """The limits that tests usually have let all of a flood pass."""
    async with running_server(echo, auth_secret=SECRET) as server:
        assert (await responses(server))["made"] == 40
        assert (await connects(server))["made"] == 60
