"""What this server is for: however a client reads, its transcript is what the model sent, character for character."""

from __future__ import annotations

import asyncio
import random
import socket as sockets
from typing import Any

import pytest
from websockets.asyncio.client import connect

from realtime.responders.anthropic import AnthropicResponder
from tests.support.client import Client, Transcript, attached
from tests.support.model_server import ModelServer
from tests.support.scenarios import Gate, Scenario, Stop, Text
from tests.support.server import RunningServer, running_server

SESSIONS = 50
TOKENS = 120
PATIENCE_S = 50.0
PIECES = [
    "word ",
    "ü",
    "漢字",
    "🙂",
    "👩‍👩‍👧‍👦",
    "🇪🇺",
    "e\u0301",
    "\u0301",
    "\u200d",
    "שלום ",
    "\u202e\u0645\u0631\u062d\u0628\u0627\u202c",
    "\r\n",
    "\r",
    "\n\n",
    "\u2028",
    "\u2029",
    "\x85",
    "\x00",
    "\x1b[31m",
    "\x7f",
    "\ufeff",
    "\ufffd",
    "\U0010ffff",
    '"\\/',
    "</script>",
    "data: [DONE]\n\n",
    "event: x\nid: 1\n",
    "\\u0000",
    " ",
    "\t",
]


class Story:
    """One session's text: what the model says before the late reader joins, and after."""

    def __init__(self, number: int) -> None:
        chance = random.Random(number)
        self.model = f"story-{number}"
        self.pieces = ["".join(chance.choices(PIECES, k=chance.randint(1, 4))) + f"{token}" for token in range(TOKENS)]
        self.text = "".join(self.pieces)
        self.half = Gate()
        self.units = len(self.text.encode("utf-16-le")) // 2
        middle = TOKENS // 2
        self.scenario = Scenario(
            [*map(Text, self.pieces[:middle]), self.half, *map(Text, self.pieces[middle:]), Stop()],
            bytes_per_write=7 if number % 10 == 0 else None,  # cuts through lines and characters
        )


async def read_fast(client: Client, story: Story, half_is_read: asyncio.Event, late_is_there: asyncio.Event) -> None:
    """Read everything as it comes; the model goes on once its first half was read and the late reader has joined."""
    middle = "".join(story.pieces[: TOKENS // 2])
    while not any(len(text) >= len(middle) for text in client.transcript.texts.values()):
        await client.receive()
    half_is_read.set()
    await late_is_there.wait()
    story.half.open()
    await client.until("response.done")


async def read_slowly(server: RunningServer, session_id: str, fast_is_done: asyncio.Event) -> Transcript:
    """Attach with the smallest buffers, take nothing until the answer is over, then everything."""
    raw = sockets.socket(sockets.AF_INET, sockets.SOCK_STREAM)
    raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
    raw.setblocking(False)
    await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", server.port))
    url = f"{server.ws_url}?session_id={session_id}&delta_interval_ms=20"
    async with connect(url, sock=raw, compression=None, max_size=None, max_queue=1, proxy=None) as socket:
        client = await Client(socket, Transcript()).start()
        await fast_is_done.wait()
        await client.until("response.done")
        socket.transport.abort()
    return client.transcript


async def read_with_cuts(server: RunningServer, session_id: str, chance: random.Random) -> tuple[Transcript, int]:
    """Lose the connection after a few frames, again and again, and come back each time with the positions."""
    transcript = Transcript()
    subprotocols = ["realtime.v1", "realtime.v1.msgpack"]
    connections = 0
    while not transcript.done:
        connections += 1
        query: dict[str, Any] = {"after": transcript.after()} if connections > 1 else {}
        subprotocol = chance.choice(subprotocols)
        async with attached(server, session_id, transcript=transcript, subprotocol=subprotocol, **query) as client:
            for _ in range(chance.randint(1, 20)):
                if (await client.receive())["type"] == "response.done":
                    break
            client.reset()
    return transcript, connections


async def read_late(
    server: RunningServer, session_id: str, half_is_read: asyncio.Event, late_is_there: asyncio.Event
) -> Transcript:
    """Join when half of the answer has been said."""
    await half_is_read.wait()
    async with attached(server, session_id) as client:
        late_is_there.set()
        await client.until("response.done")
        return client.transcript


async def tell(server: RunningServer, story: Story) -> int:
    """One session with four readers; returns how many connections the one with cuts needed."""
    half_is_read, late_is_there, fast_is_done = asyncio.Event(), asyncio.Event(), asyncio.Event()
    async with attached(server) as fast, asyncio.TaskGroup() as group:
        response_id = await fast.respond("Tell.", model=story.model)
        chance = random.Random(story.model)
        slow = group.create_task(read_slowly(server, fast.session_id, fast_is_done))
        cut = group.create_task(read_with_cuts(server, fast.session_id, chance))
        late = group.create_task(read_late(server, fast.session_id, half_is_read, late_is_there))
        await read_fast(fast, story, half_is_read, late_is_there)
        fast_is_done.set()
        transcripts = {"fast": fast.transcript, "slow": await slow, "cut": (await cut)[0], "late": await late}
    async with attached(server, fast.session_id, history="all") as reader:
        await reader.until("response.done")
        transcripts["stored"] = reader.transcript
    for name, transcript in transcripts.items():
        told = transcript.texts[response_id]
        assert told.encode() == story.text.encode(), f"{name} of {story.model}"
        done = transcript.done[response_id]
        assert (done["status"], done["output_chars"]) == ("completed", story.units), f"{name} of {story.model}"
    assert len({transcript.done[response_id]["seq"] for transcript in transcripts.values()}) == 1
    return cut.result()[1]


@pytest.mark.timeout(120)
async def test_all_transcripts_are_what_the_model_sent() -> None:
    """Fifty sessions at once, each with a fast, a slow, an often cut and a late reader, over the provider's own SDK."""
    stories = [Story(number) for number in range(SESSIONS)]
    async with ModelServer() as model:
        model.scenarios.update({story.model: story.scenario for story in stories})
        responder = AnthropicResponder(base_url=model.url, api_key="test")
        async with running_server(responder, send_timeout_s=100, ping_interval_s=100) as server:
            async with asyncio.timeout(PATIENCE_S):
                connections = await asyncio.gather(*(tell(server, story) for story in stories))
        assert sum(connections) > SESSIONS  # the cut readers were cut
        assert len(model.received) == SESSIONS
        assert len({story.text for story in stories}) == SESSIONS
