"""Text that breaks careless streams, and connections that break: whoever parses the stream has every character once.

The parsers are none of ours: `httpx-sse`, the `eventsource` package from npm under Node, and Chromium's `EventSource`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx
import pytest

from realtime.responders.base import Reasoning
from tests.end_to_end import Model, Turn
from tests.support.client import Client, Event, Transcript, attached
from tests.support.event_sources import CLOSED, chromium_source, node_source
from tests.support.event_stream import events_url, http_client, streaming
from tests.support.server import RunningServer, running_server
from tests.support.tcp_proxy import TcpProxy

PATIENCE_S = 45.0
SHORT_BYTES = 2500
LONG_BYTES = 50_000
"""More than a whole answer: a reader that was away gets all that it missed in one event, which has to pass."""
PIECES = [
    "",
    "plain",
    "\r",
    "\n",
    "\r\n",
    "\n\n",
    "\r\r",
    "\x00",
    "\x0b\x0c\x1c\x1d\x1e\x1f\x7f",
    "\u0085",
    "\u2028",
    "\u2029",
    "\ufeff",
    "\u0301",
    "e\u0301\u0301",
    "\u200b\u200d\u2060",
    "🙂",
    "👩\u200d👩\u200d👧",
    "\U0010ffff",
    "שלום \u202eabc\u202c",
    "مرحبا",
    "\ndata: x",
    "\nid: 9",
    "\nid: \x00",
    "\nevent: response.done\ndata: {}\n\n",
    "\nretry: 1\n",
    "\n: comment\n\n",
    ":",
    " leading",
    "trailing ",
    '"\\/\b\t{}[]',
    "\\u2028\\n",
    "data: [DONE]\n\n",
    "</script><!--",
]
TORTURE = "\ufeff" + "".join(PIECES)
METADATA = {"text": TORTURE, **{f"key {number} {piece}": piece for number, piece in enumerate(PIECES)}}

Follow = Callable[[str], AbstractAsyncContextManager[Any]]
SOURCES = pytest.mark.parametrize("source", [node_source, chromium_source])
PARSERS = pytest.mark.parametrize("parser", [streaming, node_source, chromium_source])

pytestmark = pytest.mark.timeout(180)


async def say_everything(turn: Turn, client: Client) -> None:
    """The model says every piece by itself, then all of it character by character, then at once."""
    for piece in PIECES:
        turn.say(Reasoning(piece), piece)
        await asyncio.sleep(0)
    for character in TORTURE:
        turn.say(character)
    await client.until("response.output_text.delta")
    turn.end(TORTURE)


SAID = "".join(PIECES) + TORTURE * 2
THOUGHT = "".join(PIECES)


@PARSERS
async def test_text_comes_out_as_it_went_in(parser: Follow) -> None:
    """Live and from the history: what the model said, what was added, what was given along; as over the WebSocket, and
    as it is stored."""
    model = Model()
    async with asyncio.timeout(PATIENCE_S), running_server(model) as server, attached(server) as client:
        url = events_url(server, client.session_id)
        async with parser(url) as live:
            await client.send("conversation.item.create", item={"role": "user", "content": TORTURE, "id": "mine"})
            await client.send("session.update", session={"instructions": TORTURE})
            await client.send("response.create", response_id="r", input=TORTURE, metadata=METADATA)
            turn = await model.turn()
            assert turn.request.instructions == TORTURE
            assert turn.conversation == [("user", TORTURE), ("user", TORTURE)]
            await say_everything(turn, client)
            for follower in (client, live):
                await follower.until("response.done", response_id="r")
        async with parser(url) as late:
            await late.until("response.done", response_id="r")
        async with http_client() as http:
            stored = (await http.get(url.removesuffix("/events"))).json()
        for transcript in (client.transcript, live.transcript, late.transcript):
            check(transcript)
        assert stored["responses"][0]["text"] == SAID
        assert stored["responses"][0]["metadata"] == METADATA
        assert [item["content"] for item in stored["items"]] == [TORTURE, TORTURE]


def check(transcript: Transcript) -> None:
    """A reader has everything, exactly."""
    assert transcript.texts["r"] == SAID
    assert transcript.reasonings["r"] == THOUGHT
    assert [item["content"] for item in transcript.items] == [TORTURE, TORTURE]
    [updated] = events_of(transcript, "session.updated")
    assert updated["session"]["instructions"] == TORTURE
    [created] = events_of(transcript, "response.created")
    assert created["response"]["metadata"] == METADATA


def events_of(transcript: Transcript, kind: str) -> list[Event]:
    return [event for event in transcript.events if event["type"] == kind]


async def test_every_event_is_one_line_for_every_splitter() -> None:
    """Also for parsers that take more characters for line ends than the standard does, and that split the bytes
    anywhere."""
    model = Model()
    async with asyncio.timeout(PATIENCE_S), running_server(model) as server, attached(server) as client:
        url = events_url(server, client.session_id)
        async with http_client() as http, http.stream("GET", url) as response:
            await client.send("response.create", response_id="r", input=TORTURE, metadata=METADATA)
            await say_everything(await model.turn(), client)
            await client.until("response.done")
            raw = await until_done(response)
    lines = raw.decode().splitlines()  # at every one of Unicode's line ends
    assert {line.partition(":")[0] for line in lines} == {"retry", "event", "id", "data", ""}
    assert all(line.isascii() for line in lines if not line.startswith("data: "))
    assert "\r" not in raw.decode()


async def until_done(response: httpx.Response) -> bytes:
    """Read a stream up to its first `response.done`."""
    raw = b""
    async for chunk in response.aiter_bytes():
        raw += chunk
        if b"\nevent: response.done\n" in raw and raw.endswith(b"\n\n"):
            break
    return raw


# --- EventSource by itself -------------------------------------------------------------------------------------------


@asynccontextmanager
async def proxied(server: RunningServer, session_id: str) -> AsyncIterator[tuple[TcpProxy, str]]:
    """A proxy, and the URL of a session's events through it."""
    async with TcpProxy("127.0.0.1", server.port) as proxy:
        yield proxy, events_url(server, session_id).replace(f":{server.port}/", f":{proxy.port}/")


@SOURCES
async def test_event_source_resumes_by_itself(source: Follow) -> None:
    """Cut again and again in mid-answer, it comes back within the grace and misses nothing; a closed session stops
    it."""
    model = Model()
    async with asyncio.timeout(PATIENCE_S), running_server(model) as server:
        async with http_client() as http:
            session_id = (await http.post(f"{server.url}/v1/sessions")).json()["session"]["id"]
            async with proxied(server, session_id) as (proxy, url), source(url) as follower:
                create = {"type": "response.create", "input": "go", "response_id": "r"}
                assert (await http.post(events_url(server, session_id), json=create)).status_code == 202
                turn = await model.turn()
                said = ""
                for cut in range(1, 4):
                    await follower.until_opened(cut)
                    said += say(turn, f"{cut} before ")
                    while follower.transcript.texts["r"] != said:
                        await follower.receive()
                    await proxy.cut_after(random.Random(cut).randrange(150))  # mostly within the next event
                    said += say(turn, f"{cut} in between \u2028 ")
                    await asyncio.sleep(0.05)
                    await proxy.cut()
                    await proxy.resume()
                    said += say(turn, f"{cut} after ")
                await follower.until_opened(4)
                turn.end("end")
                await follower.until("response.done", response_id="r")
                assert follower.transcript.done["r"]["status"] == "completed"
                assert follower.transcript.texts["r"] == said + "end"
                await http.post(events_url(server, session_id), json={"type": "session.close"})
                await follower.until("session.closed")
                await follower.until_stopped()
                assert (follower.state, follower.opened) == (CLOSED, 4)


def say(turn: Turn, text: str) -> str:
    """Have the model say it, in pieces; returns it."""
    turn.say(*text)
    return text


@SOURCES
async def test_event_source_is_stopped_by_a_session_that_is_gone(source: Follow) -> None:
    """Deleted under it: it is told, comes back once, and stays away."""
    model = Model()
    async with asyncio.timeout(PATIENCE_S), running_server(model) as server, attached(server) as client:
        async with source(events_url(server, client.session_id)) as follower, http_client() as http:
            await follower.until("session.resumed")
            await http.delete(events_url(server, client.session_id).removesuffix("/events"))
            assert (await follower.until("error"))["error"]["code"] == "session_deleted"
            await follower.until_stopped()
            assert follower.opened == 1


# --- drops at random -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mixed", [False, True], ids=["streams", "both transports"])
async def test_transcript_survives_drops_at_random(seed: int, mixed: bool) -> None:
    """Streams that are cut at any byte, many times within an answer; and changes from one transport to the other."""
    chance = random.Random(seed)
    model = Model()
    async with asyncio.timeout(PATIENCE_S), running_server(model, disconnect_grace_ms=60_000) as server:
        async with attached(server) as witness:
            await witness.send("response.create", input="go", response_id="r")
            turn = await model.turn()
            speaking = asyncio.create_task(speak(turn, chance))
            transcript = Transcript()
            connections = 0
            async with proxied(server, witness.session_id) as (proxy, url):
                while "r" not in transcript.done:
                    connections += 1
                    if mixed and chance.random() < 0.5:
                        await read_some(server, witness.session_id, transcript, chance)
                    else:
                        await proxy.cut_after(chance.randrange(200, LONG_BYTES if speaking.done() else SHORT_BYTES))
                        await read_until_cut(url, transcript)
                        await proxy.cut()
            said = await speaking
            await witness.until("response.done")
            assert witness.transcript.texts["r"] == transcript.texts["r"] == said
            assert transcript.done["r"]["output_chars"] == len(said.encode("utf-16-le")) // 2
            assert transcript.items == witness.transcript.items
            assert connections > 5


async def speak(turn: Turn, chance: random.Random) -> str:
    """Say a few hundred pieces, now fast, now slowly; returns the whole."""
    said = ""
    for number in range(400):
        piece = f"{number} {chance.choice(PIECES)}"
        turn.say(piece)
        said += piece
        if chance.random() < 0.3:
            await asyncio.sleep(chance.choice([0, 0.005, 0.01]))
    turn.end()
    return said


async def read_some(server: RunningServer, session_id: str, transcript: Transcript, chance: random.Random) -> None:
    """Take a few events over a WebSocket, then leave with a reset."""
    async with attached(server, session_id, transcript=transcript, after=transcript.after()) as client:
        for _ in range(chance.randrange(6)):
            if (await client.receive())["type"] == "response.done":
                break
        client.reset()


async def read_until_cut(url: str, transcript: Transcript) -> None:
    """Read a stream until the response is done or the connection breaks."""
    try:
        async with streaming(url, transcript=transcript, last_event_id=transcript.after()) as stream:
            await stream.until("response.done")
    except (httpx.TransportError, StopAsyncIteration):
        return
