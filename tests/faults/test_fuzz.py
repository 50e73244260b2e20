"""Mutated messages over one real connection: each is a typed error or a legal effect, and none is logged.

`REALTIME_TEST_FUZZ_FRAMES` says how many frames of each encoding are sent, `REALTIME_TEST_FUZZ_SEED` which ones.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from websockets.exceptions import ConnectionClosed

from tests.end_to_end import ERROR_TYPES, PATIENCE_S, dialled, echo
from tests.support.client import NO_CHANNEL, Client, Event, Transcript, attached
from tests.support.server import RunningServer, running_server

FRAMES = int(os.environ.get("REALTIME_TEST_FUZZ_FRAMES", "2000"))
SEED = int(os.environ.get("REALTIME_TEST_FUZZ_SEED", "1"))
BATCH = 40
CANARY = "canary-7f3a"
LEGAL = NO_CHANNEL | {
    "session.updated",
    "session.closed",
    "conversation.item.created",
    "conversation.item.truncated",
    "response.created",
    "response.in_progress",
    "response.output_text.delta",
    "response.done",
}

MESSAGES: list[dict[str, Any]] = [
    {"type": "ping", "event_id": "e1"},
    {"type": "session.update", "session": {"instructions": CANARY, "multitask_strategy": "enqueue"}},
    {"type": "session.update", "session": {"model": "m", "max_output_tokens": 9, "on_disconnect": "continue"}},
    {"type": "session.update", "session": {"disconnect_grace_ms": 500}, "event_id": "e2"},
    {"type": "conversation.item.create", "item": {"id": "i1", "role": "user", "content": CANARY}},
    {"type": "conversation.item.create", "item": {"role": "assistant", "content": f"{CANARY} 🙂\u2028"}},
    {"type": "conversation.item.truncate", "response_id": "r1", "heard_chars": 3},
    {"type": "response.create", "response_id": "r1", "input": CANARY, "metadata": {CANARY: 1, "b": None, "c": 0.5}},
    {
        "type": "response.create",
        "input": f"{CANARY} \r\n\x00",
        "instructions": CANARY,
        "multitask_strategy": "interrupt",
    },
    {"type": "response.cancel", "response_id": "r1", "heard_chars": 2, "event_id": "e3"},
    {"type": "response.cancel", "response_id": "r1"},
    {"type": "session.close"},
    {"type": "task.create", "name": "t", "input": {"text": CANARY}},
    {"type": "auth.refresh", "token": CANARY},
]
VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    1.5,
    2**31,
    2**53 + 1,
    2**63,
    2**64,
    10**40,
    "",
    "session",
    "control",
    "r1",
    "\x00",
    "\u2028",
    "🙂" * 20,
    CANARY,
    "x" * 65,
    "../..",
    [],
    {},
    [CANARY],
    {"type": "ping"},
    [[[[[[]]]]]],
    "ping",
    "response.create",
]
DATA = [b"", b"\x00", b'"', b"{", b"}", b"[" * 200, b"]", b",", b":", b"\\u0000", b"\\ud83d", b"1e309", b"-0", b"NaN"]

Encode = Callable[[Any], bytes]


class Mutator:
    """Makes frames out of messages by one to three mutations each; the same seed makes the same frames."""

    def __init__(self, chance: random.Random, encode: Encode, messages: Sequence[Any] = MESSAGES) -> None:
        self._chance = chance
        self._encode = encode
        self._messages = messages

    def frame(self) -> bytes:
        """The next frame."""
        value: Any = json.loads(json.dumps(self._chance.choice(self._messages)))
        for _ in range(self._chance.randint(0, 2)):
            value = self._mutated(value)
        try:
            data = self._encode(value)
        except OverflowError:  # a number that MessagePack has no room for
            data = self._encode(0)
        for _ in range(self._chance.choice([0, 0, 1, 1, 2])):
            data = self.damaged(data)
        return data

    def _mutated(self, value: Any) -> Any:
        """One place in the value changed, left out, or put in."""
        chance = self._chance
        if not isinstance(value, dict) or not value or chance.random() < 0.05:
            return chance.choice(VALUES)
        key = chance.choice(list(value))
        match chance.randrange(5):
            case 0:
                value.pop(key)
            case 1:
                value[key] = chance.choice(VALUES)
            case 2:
                value[chance.choice(["type", "event_id", "response_id", "item", "session", "extra", CANARY])] = (
                    chance.choice(VALUES)
                )
            case _:
                value[key] = self._mutated(value[key])
        return value

    def damaged(self, data: bytes) -> bytes:
        """Some bytes flipped, cut, doubled or put in."""
        chance = self._chance
        at = chance.randrange(len(data) + 1)
        to = min(len(data), at + chance.randint(0, 8))
        match chance.randrange(5):
            case 0:
                return data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
            case 1:
                return data[:at] + data[to:]
            case 2:
                return data[:to] + data[at:]
            case 3:
                return data[:at] + chance.choice(DATA) + data[at:]
            case _:
                return data[:at]


def judge(event: Event) -> None:
    """What the server says is in the protocol, and an error is one of the client's."""
    assert event["type"] in LEGAL, event
    if event["type"] == "error":
        error = event["error"]
        assert error["type"] in ERROR_TYPES - {"server_error", "store_error"}, error
        assert {"type", "code", "message", "fatal"} <= set(error) <= {
            "type", "code", "message", "param", "event_id", "retry_after_ms", "fatal",
        }  # fmt: skip
        assert error["fatal"] is False
        assert CANARY not in error["message"], error
    if event["type"] == "response.done":
        assert event["status"] in {"completed", "cancelled"}, event


async def fuzz(server: RunningServer, mutator: Mutator, subprotocol: str, frames: int) -> tuple[int, set[str]]:
    """Send mutated frames to one session until it is closed; returns how many were sent and what came."""
    sent = 0
    seen: set[str] = set()
    async with dialled(server, subprotocols=(subprotocol,)) as socket:
        client = await Client(socket, Transcript()).start()
        judge(client.first)
        with suppress(ConnectionClosed):
            while sent < frames:
                for data in [mutator.frame() for _ in range(BATCH)]:
                    sent += 1
                    await send(client, data)
                await client.send("ping", event_id=f"fuzz-{sent}")
                seen |= await receive_until(client, {"type": "pong", "event_id": f"fuzz-{sent}"})
            return sent, seen
        with suppress(ConnectionClosed):
            seen |= await receive_until(client, None)
        # Legal for one reason only: a message that was left whole said so.
        assert client.transcript.events[-1]["type"] == "session.closed", client.transcript.events[-1]
        assert socket.close_code == 1000
    return sent, seen


async def receive_until(client: Client, last: Event | None) -> set[str]:
    """Judge what comes until `last` does; returns the types."""
    seen: set[str] = set()
    async with asyncio.timeout(PATIENCE_S):
        while (event := await client.receive()) != last:
            judge(event)
            seen.add(event["type"])
    return seen


async def send(client: Client, data: bytes) -> None:
    """Send a frame; text has to stay UTF-8, or it would be the frame that is wrong and not the message."""
    if client.socket.subprotocol == "realtime.v1.msgpack":
        await client.socket.send(data)
    else:
        await client.socket.send(data.decode(errors="replace"))


@pytest.mark.parametrize("subprotocol", ["realtime.v1", "realtime.v1.msgpack"])
async def test_mutated_messages_are_typed_errors_or_legal(
    subprotocol: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is sent, the server answers in its own words, lives on, and logs nothing of it."""
    encode: Encode = msgspec.msgpack.encode if "msgpack" in subprotocol else msgspec.json.encode
    mutator = Mutator(random.Random(f"{SEED} {subprotocol}"), encode)
    seen: set[str] = set()
    caplog.set_level("DEBUG", "realtime")  # as an operator may; not so the libraries, which then log frames
    async with running_server(echo) as server, attached(server) as bystander:
        left = FRAMES
        while left > 0:
            sent, types = await fuzz(server, mutator, subprotocol, left)
            left -= sent
            seen |= types
        async with asyncio.timeout(30):
            assert await bystander.answer("unharmed") == "unharmed"
        assert [event for event in bystander.transcript.events if event["type"] == "error"] == []
    assert {"error", "pong", "session.updated", "conversation.item.created", "response.done"} <= seen | {"pong"}
    output = "".join(capfd.readouterr())
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith("websockets.client")]
    assert CANARY not in output
    assert CANARY not in "".join(ours)
    assert "Traceback" not in output
    assert [record for record in caplog.records if record.levelname in {"ERROR", "CRITICAL"}] == []
