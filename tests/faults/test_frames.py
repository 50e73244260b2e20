"""Frames that no client should send: each ends in a typed error or a close code, and harms nobody else."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from realtime.connection import MAX_MALFORMED
from realtime.server import listen
from realtime.settings import Settings
from realtime.transport import ABORT_S
from tests.end_to_end import ERROR_TYPES, PATIENCE_S, echo
from tests.support.client import Client, Event, Transcript, attached
from tests.support.clock import advancing_clock
from tests.support.server import RunningServer, running_server

CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
MAX_MESSAGE_BYTES = 65_536
GONE = (ConnectionError, asyncio.IncompleteReadError)


def frame(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    rsv: int = 0,
    masked: bool = True,
    claimed: int | None = None,
) -> bytes:
    """A frame as its bytes; `claimed` is the length that its header says, where that is to be a lie."""
    length = len(payload) if claimed is None else claimed
    head = bytes([(fin << 7) | (rsv << 4) | opcode])
    bit = masked << 7
    if length < 126:
        head += bytes([bit | length])
    elif length < 2**16:
        head += bytes([bit | 126]) + struct.pack("!H", length)
    else:
        head += bytes([bit | 127]) + struct.pack("!Q", length)
    if not masked:
        return head + payload
    mask = os.urandom(4)
    return head + mask + bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))


def message(kind: str, **fields: Any) -> bytes:
    """A client message as JSON."""
    return json.dumps({"type": kind, **fields}).encode()


class RawSocket:
    """A WebSocket without a library: what is sent is what the test says."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.head = b""

    async def send(self, *data: bytes) -> None:
        """Write these bytes, as far as the server takes them."""
        with suppress(ConnectionError):
            self.writer.write(b"".join(data))
            await self.writer.drain()

    def hang_up(self) -> None:
        """Say that nothing more will be sent."""
        with suppress(OSError):
            self.writer.write_eof()

    async def frame(self) -> tuple[int, bytes]:
        """The next frame from the server: opcode and payload."""
        async with asyncio.timeout(PATIENCE_S):
            first, second = await self.reader.readexactly(2)
            assert second < 128, "the server must not mask"
            length = second
            if length == 126:
                [length] = struct.unpack("!H", await self.reader.readexactly(2))
            elif length == 127:
                [length] = struct.unpack("!Q", await self.reader.readexactly(8))
            return first & 15, await self.reader.readexactly(length)

    async def event(self) -> Event:
        """The next event, from a text frame."""
        opcode, payload = await self.frame()
        assert opcode == TEXT, (opcode, payload)
        event: Event = json.loads(payload)
        return event

    async def end(self) -> tuple[int | None, list[Event]]:
        """Read to the end; returns the close code, `None` if the connection was cut, and the events before it."""
        events: list[Event] = []
        try:
            while True:
                opcode, payload = await self.frame()
                if opcode == CLOSE:
                    return (struct.unpack("!H", payload[:2])[0] if payload else 1005), events
                if opcode == TEXT:
                    events.append(json.loads(payload))
        except GONE:
            return None, events

    async def answers(self) -> None:
        """See that this connection still works."""
        await self.send(frame(TEXT, message("ping", event_id="works")))
        while (await self.event()) != {"type": "pong", "event_id": "works"}:
            pass


@asynccontextmanager
async def raw(
    server: RunningServer, query: str = "", headers: str = "", *, attach: bool = True
) -> AsyncIterator[RawSocket]:
    """A raw connection; upgraded, and the first frame taken, unless not to `attach`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        client = RawSocket(reader, writer)
        if attach:
            writer.write(handshake(query, headers))
            client.head = await reader.readuntil(b"\r\n\r\n")
            assert client.head.startswith(b"HTTP/1.1 101 ")
            if "msgpack" not in headers:
                assert (await client.event())["type"] == "session.created"
        yield client
    finally:
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()


def handshake(query: str = "", headers: str = "") -> bytes:
    """A valid upgrade request."""
    return (
        f"GET /v1/realtime?{query} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n{headers}\r\n"
    ).encode()


@pytest.fixture
async def server(caplog: pytest.LogCaptureFixture) -> AsyncIterator[RunningServer]:
    """A server with a client in it that behaves, and that nothing of what the test does may harm."""
    async with running_server(echo) as server, attached(server) as bystander:
        yield server
        async with asyncio.timeout(PATIENCE_S):
            assert await bystander.answer("unharmed") == "unharmed"
        assert [event for event in bystander.transcript.events if event["type"] == "error"] == []
        async with attached(server) as another:
            assert await another.answer("welcome") == "welcome"
    assert "CANARY" not in caplog.text


# --- what breaks the WebSocket protocol -----------------------------------------------------------------------------

BROKEN = {
    "RSV1, as if it were compressed": frame(TEXT, message("ping"), rsv=4),
    "RSV2": frame(TEXT, message("ping"), rsv=2),
    "RSV3 on a control frame": frame(PING, b"", rsv=1),
    "unmasked": frame(TEXT, message("ping"), masked=False),
    "reserved data opcode": frame(3, message("ping")),
    "reserved control opcode": frame(11, b""),
    "fragmented ping": frame(PING, b"x", fin=False),
    "ping of 126 bytes": frame(PING, b"x" * 126),
    "continuation of nothing": frame(CONT, b"x"),
    "a new message inside a fragmented one": frame(TEXT, b"{", fin=False) + frame(TEXT, b"}"),
    "close code 1005": frame(CLOSE, struct.pack("!H", 1005)),
    "close of one byte": frame(CLOSE, b"\x03"),
    "length of 2^63": frame(TEXT, b"", claimed=2**63 + 1),
    "HTTP instead of frames": handshake(),
}


async def test_broken_frames_close_their_connection(server: RunningServer) -> None:
    """Whatever breaks the WebSocket protocol is closed with the protocol's own code, or cut."""
    for name, data in BROKEN.items():
        async with raw(server) as client:
            await client.send(data)
            code, events = await client.end()
            assert code in {1002, 1007, 1009, None}, name
            assert [event for event in events if event["type"] != "error"] == [], name


async def test_close_that_is_not_utf8_is_survived(server: RunningServer) -> None:
    """A close reason that is no text."""
    async with raw(server) as client:
        await client.send(frame(CLOSE, struct.pack("!H", 1000) + b"\xff\xfe"))
        assert (await client.end())[0] in {1002, 1007, None}


async def test_random_bytes_are_survived(server: RunningServer) -> None:
    """Noise after the upgrade ends that connection and nothing else.

    It may happen to begin a frame that is allowed, and larger than what comes: so the client sends no more in the end.
    """
    for _ in range(30):
        async with raw(server) as client:
            await client.send(os.urandom(300), frame(TEXT, b"", claimed=2**40))
            client.hang_up()
            code, _ = await client.end()
            assert code is None or 1000 <= code < 1016


# --- size and fragments ---------------------------------------------------------------------------------------------


async def test_largest_message_is_taken_and_one_byte_more_is_1009(server: RunningServer) -> None:
    """A message may have 65,536 bytes; the header of a larger one is enough to be closed."""
    async with raw(server) as client:
        text = message("ping", event_id="x")
        await client.send(frame(TEXT, text + b" " * (MAX_MESSAGE_BYTES - len(text))))
        assert await client.event() == {"type": "pong", "event_id": "x"}
        await client.send(frame(TEXT, b"", claimed=MAX_MESSAGE_BYTES + 1))
        assert await client.end() == (1009, [])


async def test_oversized_messages_tell_a_real_client_so(server: RunningServer) -> None:
    """A client that sent too much sees 1009, which says that it must stop, and not a lost connection."""
    for size in (MAX_MESSAGE_BYTES + 1, 200_000):
        async with connect(server.ws_url, compression=None, proxy=None) as client:
            await client.recv()
            with suppress(ConnectionClosed):
                await client.send("x" * size)
                while True:
                    await client.recv()
            assert client.close_code == 1009


async def test_oversized_message_in_fragments_is_1009(server: RunningServer) -> None:
    """The limit is the message's, however many frames it comes in."""
    async with raw(server) as client:
        await client.send(frame(TEXT, b"x" * 40_000, fin=False))
        await client.send(frame(CONT, b"x" * 20_000, fin=False))
        await client.send(frame(CONT, b"", claimed=5_537))
        assert await client.end() == (1009, [])


async def test_huge_frames_cost_no_memory(server: RunningServer) -> None:
    """Clients that send 17 MB frames are cut off at the header."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    payload = b"\x00" * (1 << 20)
    for _ in range(10):
        async with raw(server) as client:
            await client.send(frame(TEXT, b"", claimed=17 << 20))
            for _ in range(17):
                await client.send(payload)
            assert (await client.end())[0] in {1009, None}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024


async def test_message_in_fragments_is_one_message(server: RunningServer) -> None:
    """A message may come in pieces, cut anywhere, with pings in between."""
    async with raw(server) as client:
        text = '{"type":"ping","event_id":"ü🙂"}'.encode()
        pieces = [text[index : index + 1] for index in range(len(text))]
        await client.send(frame(TEXT, pieces[0], fin=False), frame(PING, b"p"))
        for piece in pieces[1:-1]:
            await client.send(frame(CONT, piece, fin=False), frame(CONT, b"", fin=False))
        await client.send(frame(CONT, pieces[-1]))
        assert await client.frame() == (PONG, b"p")
        assert await client.event() == {"type": "pong", "event_id": "ü🙂"}


async def test_message_a_byte_at_a_time_is_one_message(server: RunningServer) -> None:
    """Frames have nothing to do with how the bytes come in."""
    async with raw(server) as client:
        for byte in frame(TEXT, message("ping", event_id="slow")):
            await client.send(bytes([byte]))
        assert await client.event() == {"type": "pong", "event_id": "slow"}


async def test_a_million_empty_fragments_are_cut_off(server: RunningServer) -> None:
    """Empty fragments pass any limit on bytes: their number is bounded, and so is what they cost."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    empties = frame(CONT, b"", fin=False) * 1000
    async with raw(server) as client:
        await client.send(frame(TEXT, b"", fin=False))
        sent = 0
        while sent < 1_000_000 and not client.reader.at_eof():
            await client.send(empties)
            sent += 1000
            if client.writer.transport.is_closing():
                break
        code, _ = await client.end()
        assert code in {1009, None}
        assert sent < 1_000_000 or code == 1009
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


async def test_fragments_that_are_not_many_are_told_1009(server: RunningServer) -> None:
    """Who sends too many fragments, and then listens, reads why it was closed."""
    async with raw(server) as client:
        await client.send(frame(TEXT, b"", fin=False) + frame(CONT, b"", fin=False) * 1100)
        assert await client.end() == (1009, [])


async def test_message_never_finished_is_given_up_with_its_client(server: RunningServer) -> None:
    """A fragment without an end holds nothing up: what the server has to say still comes."""
    async with raw(server) as client:
        await client.send(frame(TEXT, message("ping")))
        await client.send(frame(TEXT, b'{"type":', fin=False))
        assert await client.event() == {"type": "pong"}
        await client.send(frame(PING, b"still"))
        assert await client.frame() == (PONG, b"still")


# --- compression ----------------------------------------------------------------------------------------------------


async def test_compression_is_not_negotiated(server: RunningServer) -> None:
    """A client that offers to compress is not taken up on it, and works without."""
    async with connect(server.ws_url, compression="deflate", proxy=None) as connection:
        assert connection.response is not None
        assert "Sec-WebSocket-Extensions" not in connection.response.headers
        client = await Client(connection, Transcript()).start()
        assert await client.answer("plain") == "plain"
    offer = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits, x-webkit-deflate-frame\r\n"
    async with raw(server, headers=offer) as client_raw:
        assert b"extensions" not in client_raw.head.lower()
        await client_raw.answers()


# --- kinds of frames ------------------------------------------------------------------------------------------------


async def test_binary_where_text_is_due_is_1003(server: RunningServer) -> None:
    """JSON comes in text frames; a binary one is a bug of the client, which must stop."""
    async with raw(server) as client:
        await client.send(frame(BINARY, message("ping")))
        assert await client.end() == (1003, [])


async def test_text_where_binary_is_due_is_1003(server: RunningServer) -> None:
    """MessagePack comes in binary frames."""
    async with raw(server, headers="Sec-WebSocket-Protocol: realtime.v1.msgpack\r\n") as client:
        assert (await client.frame())[0] == BINARY
        await client.send(frame(TEXT, message("ping")))
        assert await client.end() == (1003, [])


async def test_text_that_is_not_utf8_is_1007(server: RunningServer) -> None:
    """A text frame has to be UTF-8: surrogates, overlong forms and stray bytes are a bug of the client."""
    for data in (b"\xff", b'{"type":"ping","event_id":"CANARY\xc3("}', b"\xed\xa0\x80", b"\xf8", b"\xc0\x80"):
        async with raw(server) as client:
            await client.send(frame(TEXT, data))
            assert await client.end() == (1007, []), data


async def test_bad_utf8_is_no_error_of_ours(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    """What a client does wrong is no traceback in the log."""
    async with raw(server) as client:
        await client.send(frame(TEXT, b"\xff"))
        assert (await client.end())[0] == 1007
    assert [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"] == []


async def test_utf8_may_be_split_between_fragments(server: RunningServer) -> None:
    """Only the whole message has to be UTF-8."""
    text = '{"type":"ping","event_id":"🙂"}'.encode()
    cut = text.index(b"\xf0") + 2
    async with raw(server) as client:
        await client.send(frame(TEXT, text[:cut], fin=False), frame(CONT, text[cut:]))
        assert await client.event() == {"type": "pong", "event_id": "🙂"}


# --- what is no message ---------------------------------------------------------------------------------------------

DEEP = 30_000
MALFORMED = {
    "nothing": b"",
    "a space": b" ",
    "half of an object": b'{"type":',
    "two messages": b'{"type":"ping"}{"type":"ping"}',
    "NaN": b'{"type":"ping","event_id":NaN}',
    "a lone surrogate": b'{"type":"ping","event_id":"\\ud800"}',
    "a byte order mark": b'\xef\xbb\xbf{"type":"ping"}',
    "a NUL": b'\x00{"type":"ping"}',
    "single quotes": b"{'type':'ping'}",
    "a comment": b'{"type":"ping"/* */}',
    "deep arrays": b"[" * DEEP,
    "deep objects": b'{"a":' * (DEEP // 4),
    "deep and closed": b"[" * DEEP + b"]" * DEEP,
    "deep in an unknown field": b'{"type":"ping","x":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep in a known field": b'{"type":"response.create","metadata":' + b'{"a":' * 9000 + b"1" + b"}" * 9000 + b"}",
    "deep before the type": b'{"x":' + b"[" * DEEP + b"]" * DEEP + b',"type":"ping"}',
    "a number of 60,000 digits": b'{"type":"response.cancel","response_id":"x","heard_chars":' + b"9" * 60_000 + b"}",
    "ten thousand fields": b'{"type":"ping"' + b"".join(b',"%d":0' % number for number in range(5000)) + b"}",
}


async def test_malformed_message_is_a_typed_error(server: RunningServer) -> None:
    """What can't be read is refused with a code, and the connection lives on."""
    async with raw(server) as client:
        for name, data in MALFORMED.items():
            await client.send(frame(TEXT, data))
            event = await client.event()
            assert event["type"] == "error", name
            assert event["error"]["type"] in ERROR_TYPES - {"server_error"}, name
            assert event["error"]["fatal"] is False
            await client.answers()


async def test_too_many_malformed_in_a_row_are_4400(server: RunningServer) -> None:
    """A client that sends nothing but nonsense is told errors, then a fatal one, and closed."""
    async with raw(server) as client:
        for number in range(MAX_MALFORMED):
            await client.send(frame(TEXT, b"nonsense"))
            if number % 20 == 19:
                await asyncio.sleep(0)
        errors = [await client.event() for _ in range(MAX_MALFORMED)]
        assert {event["error"]["code"] for event in errors} == {"invalid_json"}
        assert not any(event["error"]["fatal"] for event in errors)
        await client.send(frame(TEXT, b"nonsense"))
        code, events = await client.end()
        assert code == 4400
        assert [event["error"]["code"] for event in events] == ["too_many_malformed"]
        assert events[0]["error"]["fatal"] is True


async def test_malformed_now_and_then_are_survived(server: RunningServer) -> None:
    """Only what comes in a row counts."""
    async with raw(server) as client:
        for _ in range(3):
            for _ in range(MAX_MALFORMED - 10):
                await client.send(frame(TEXT, b"nonsense"))
                assert (await client.event())["error"]["code"] == "invalid_json"
            await client.answers()


async def test_flood_of_nonsense_by_a_client_that_does_not_read(server: RunningServer) -> None:
    """Errors that nobody reads do not pile up: the flood ends at the limit, the connection is closed."""
    async with raw(server) as client:
        for _ in range(200):
            await client.send(frame(TEXT, b"nonsense") * 50)
        code, events = await client.end()
        assert code in {4400, None}
        assert len(events) <= MAX_MALFORMED + 1


# --- handshakes -----------------------------------------------------------------------------------------------------


async def test_half_sent_handshakes_crash_nothing(server: RunningServer) -> None:
    """Clients that stop in the middle of the upgrade, and leave, are forgotten."""
    whole = handshake()
    for cut in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        async with raw(server, attach=False) as client:
            await client.send(whole[:cut])
    async with raw(server, attach=False) as client:
        await client.send(whole)
        # It leaves without having read the answer.


async def refused_or_cut(server: RunningServer, request: bytes) -> None:
    """Send an upgrade that is none: it has to get an HTTP error, or be cut, and soon."""
    async with raw(server, attach=False) as client:
        await client.send(request)
        with suppress(*GONE):
            async with asyncio.timeout(PATIENCE_S):
                head = await client.reader.readuntil(b"\r\n")
            assert head.split()[1][:1] == b"4", request[:200]


async def test_bad_handshakes_are_refused(server: RunningServer) -> None:
    """An upgrade that is none gets an HTTP error, or is cut."""
    for old, new in (
        ("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n", ""),
        ("dGhlIHNhbXBsZSBub25jZQ==", "short"),
        ("Sec-WebSocket-Version: 13", "Sec-WebSocket-Version: 12"),
        ("Connection: Upgrade", "Connection: close"),
        ("Host: localhost", "Host: local host\x00"),
        ("GET ", "POST "),
        ("/v1/realtime?", "/v1/realtime?\x00"),
    ):
        await refused_or_cut(server, handshake().replace(old.encode(), new.encode(), 1))


async def test_handshakes_that_are_too_large_are_refused(server: RunningServer) -> None:
    """So is one with more headers, or a longer one, than a request may have. As long a token as over HTTP is taken."""
    async with raw(server, attach=False) as client:
        await client.send(handshake(headers="X: " + "y" * 20_000 + "\r\n"))
        async with asyncio.timeout(PATIENCE_S):
            assert (await client.reader.readline()).startswith(b"HTTP/1.1 101 ")
    for headers in ("X: " + "y" * 40_000 + "\r\n", "X: y\r\n" * 1000):
        await refused_or_cut(server, handshake(headers=headers))


@pytest.mark.parametrize("sent", [handshake()[:40], b"GET /healthz HTTP/1.1\r\nHost: x\r\n", b""])
async def test_half_sent_handshake_is_given_up(sent: bytes) -> None:
    """A client that doesn't finish its request within a minute is cut off."""
    with advancing_clock() as advance:  # outermost: what is scheduled in the future has to end in it
        async with running_server(echo) as server, raw(server, attach=False) as client:
            await client.send(sent)
            async with attached(server) as other:  # by now what was sent was read
                assert await other.answer("hello") == "hello"
            for _ in range(13):
                advance(5.0)
                for _ in range(5):
                    await asyncio.sleep(0)
            with suppress(ConnectionError):
                async with asyncio.timeout(PATIENCE_S):
                    await client.reader.read()


async def test_frame_behind_the_handshake_is_survived(server: RunningServer) -> None:
    """A client that doesn't wait for the answer to its upgrade is served, cut, or left alone, and that is all."""
    async with raw(server, attach=False) as client:
        await client.send(handshake() + frame(TEXT, message("ping", event_id="early")))
        await client.reader.readuntil(b"\r\n\r\n")
        assert (await client.event())["type"] in {"session.created", "pong"}


# --- small frames ---------------------------------------------------------------------------------------------------


async def test_small_frames_are_not_held_back() -> None:
    """Nagle's algorithm is off on every accepted connection: with it a second token waits 40 ms for an ACK."""
    seen: asyncio.Queue[int] = asyncio.Queue()

    def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.put_nowait(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.transport.abort()

    listener = listen(Settings(port=0))
    async with await asyncio.start_server(note, sock=listener):
        _, writer = await asyncio.open_connection(*listener.getsockname())
        try:
            assert await seen.get() == 1
        finally:
            writer.transport.abort()
            await asyncio.sleep(0)


async def test_client_that_never_answers_the_close_is_cut() -> None:
    """After its close frame the server waits for nobody for long."""
    with advancing_clock() as advance:
        async with running_server(echo) as server, raw(server) as client:
            await client.send(frame(BINARY, b""))
            assert await client.frame() == (CLOSE, struct.pack("!H", 1003))
            advance(ABORT_S + 1)
            with suppress(ConnectionError):
                async with asyncio.timeout(PATIENCE_S):
                    assert await client.reader.read() == b""
