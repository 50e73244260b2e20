"""Text that is made to be more than text: line ends in logs, made-up addresses, keys twice, half characters."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import quote

import pytest

from realtime.access.audit import hidden
from tests.access.signing import SECRET, handmade_claims, token
from tests.access.wire import ask
from tests.end_to_end import echo
from tests.faults.test_frames import TEXT, frame, raw
from tests.support.instance import instance
from tests.support.server import running_server

INJECTED = '{"event":"injected"}'
BREAKS = ("\r\n", "\n", "\r", "\0", "\x1b[2J", "\x0b", "\u2028", "\u0085")
BODY = b'{"type":"response.create","input":"x"}'


def lines_of(log: list[str]) -> list[Any]:
    """The records of a log, but for the line that says where the server is; every line has to be one."""
    return [json.loads(line) for line in log if not line.startswith("realtime ")]


async def test_nothing_that_is_logged_can_begin_a_line() -> None:
    """Session ids in paths and queries, users, agents, keys, forwarded addresses: a record stays one line of JSON."""
    async with instance(auth_secret=SECRET, log_format="json", log_level="debug") as one:
        good = b"Authorization: Bearer " + token(sub="anna", scope="session admin").encode()
        for text in BREAKS:
            odd = quote(f"x{text}{INJECTED}")
            evil = INJECTED.encode() if text.isascii() else text.encode()  # others are no header
            sub = b"Authorization: Bearer " + handmade_claims(sub=f"x{text}{INJECTED}").encode()
            headers = (b"User-Agent: " + evil, b"X-Forwarded-For: " + evil, b"Idempotency-Key: " + evil)
            length = b"Content-Length: %d" % len(BODY)
            for line in (f"POST /v1/sessions/{odd}/events", f"POST /v1/tasks/{odd}", "POST /v1/admin/revoke"):
                for who in (good, sub):
                    answer = await ask(one.port, line, who, *headers, length, body=BODY)
                    assert 400 <= answer.status < 500, (line, answer)
            revoked = json.dumps({"session_id": f"x{text}{INJECTED}"}).encode()
            answer = await ask(
                one.port, "POST /v1/admin/revoke", good, b"Content-Length: %d" % len(revoked), body=revoked
            )
            assert answer.status == 400
        await ask(one.port, "GET /v1/sessions/last", good)
        async with asyncio.timeout(20):
            await one.logged(f'"session": "{hidden("last")}"')
        records = lines_of(one.log)
    assert len(records) >= 6 * len(BREAKS) + 2
    assert INJECTED not in "\n".join(one.log)
    assert "injected" not in {record["event"] for record in records}
    assert {record["user"] for record in records if "user" in record} == {"anna", None}


async def test_the_control_line_ends_get_through_to_the_server() -> None:
    """What stands escaped in a path is a line end when it gets to the application: it is the log that keeps it out."""
    async with running_server(echo) as server:
        answer = await ask(server.port, f"GET /v1/sessions/{quote('x' + BREAKS[0])}")
        assert (answer.status, answer.code) == (404, "session_not_found")


async def test_an_address_that_is_made_up_is_not_told() -> None:
    """Whoever is no trusted proxy is known by their own address, whatever they say."""
    made_up = ("8.8.8.8", "unknown", "8.8.8.8, 9.9.9.9", "::1", "10.0.0.1:80", "a" * 999, "\u2028")
    async with instance(log_format="json", trusted_proxies="192.0.2.1") as one:
        for address in made_up:
            answer = await ask(one.port, "GET /v1/sessions/nobody", b"X-Forwarded-For: " + address.encode())
            assert answer.status == 404
        await ask(one.port, "POST /v1/admin/revoke")
        async with asyncio.timeout(20):
            await one.logged("admin.revoke")
        records = [record for record in lines_of(one.log) if "address" in record]
    assert [record["address"] for record in records] == ["127.0.0.1"] * (len(made_up) + 1)


async def test_keys_that_stand_twice_are_one_message() -> None:
    """The last one counts, or the message is refused: there is one parser, and so one meaning."""
    async with running_server(echo) as server, raw(server) as client:
        await client.send(frame(TEXT, b'{"type":"ping","event_id":"a","event_id":"b"}'))
        assert await client.event() == {"type": "pong", "event_id": "b"}
        await client.send(frame(TEXT, b'{"type":"ping","type":"session.close"}'))
        answer = await client.event()
        assert answer["type"] == "pong" or answer["error"]["type"] == "invalid_request_error"
        await client.answers()


@pytest.mark.parametrize("path", ["/v1/complete", "/v1/stream", "/v1/tasks/analyse", "/v1/summarise", "/v1/sessions"])
@pytest.mark.parametrize("half", [b'"\\ud800"', b'"\xed\xa0\x80"', b'"\xff"', b'"\\udc00\\ud800"', b'"\xc0\x80"'])
async def test_half_characters_are_no_json(path: str, half: bytes) -> None:
    """Lone surrogates, written out or as bytes, and what else is no UTF-8."""
    field = {"/v1/sessions": b"instructions", "/v1/complete": b"prompt", "/v1/stream": b"prompt"}.get(path, b"text")
    body = b'{"%s": %s}' % (field, half)
    async with running_server(echo) as server:
        answer = await ask(server.port, f"POST {path}", b"Content-Length: %d" % len(body), body=body)
    assert (answer.status, answer.code) in {(400, "invalid_json"), (400, "invalid_message")}, answer
