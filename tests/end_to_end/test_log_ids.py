"""Every line that is about a connection, a response or a task says which, and none holds what was said."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from realtime import Context, task
from realtime.access.audit import Audit
from realtime.background import Background
from realtime.observe import logs
from realtime.responders.base import Request
from tests.support.client import attached
from tests.support.sample_tasks import Steps
from tests.support.server import running_server
from tests.support.tokens import SECRET, token

CANARY = "canary-91d0"


async def failing(request: Request) -> AsyncIterator[str]:
    yield CANARY
    raise ValueError(request.messages[-1].content)


@task
async def falls(ctx: Context, given: Steps) -> None:
    raise ValueError(CANARY)


class Lines:
    """What was written to standard error since the last look, as records."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def read(self) -> list[dict[str, Any]]:
        written = self._capsys.readouterr().err
        assert CANARY not in written
        return [json.loads(line) for line in written.splitlines()]


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Iterator[Lines]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield Lines(capsys)
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize("secret", ["", SECRET])
async def test_every_line_about_a_connection_has_its_ids(lines: Lines, secret: str) -> None:
    """Its own, its session's (a hash where the id is a credential), and in what a response does that one's."""
    logs.configure("json", "debug")
    async with running_server(failing, auth_secret=secret, functions=[falls]) as server:
        lines.read()
        async with attached(server, bearer=token("ann") if secret else None) as client:
            response_id = await client.respond(CANARY)
            await client.until("response.done", response_id=response_id)
            await client.send_raw({"type": CANARY})
            await client.until("error")
            await client.send("task.create", name="falls", input={"steps": 1})
            task_id = (await client.until("task.done"))["task_id"]
        written = lines.read()
        name = Audit(hides_sessions=not secret).name_of(client.session_id)
        connection_id = client.first["connection_id"]
    assert {line["session"] for line in written} == {name}
    told = [(line["event"], line.get("connection"), line.get("response"), line.get("task")) for line in written]
    assert told == [
        ("session.attach", connection_id, None, None),
        ("response.create", connection_id, response_id, None),
        ("error", None, response_id, None),
        ("session.command", connection_id, None, None),
        ("task.create", connection_id, None, task_id),
        ("error", None, None, task_id),
    ]


async def test_what_goes_on_for_everybody_is_nobodys() -> None:
    """Work in the background has none of the ids of whoever has given rise to it."""
    found: list[dict[str, Any]] = []

    async def work() -> None:
        found.append(dict(logs.ids()))

    async with Background() as background:
        with logs.bound(connection="conn_1"):
            background.spawn(work())
            await work()
        while len(found) < 2:  # noqa: ASYNC110  # it takes a turn of the loop
            await asyncio.sleep(0)
    assert found == [{"connection": "conn_1"}, {}]
