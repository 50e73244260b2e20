"""Tasks over HTTP: made, shown, followed, cancelled, and their results, without a session and in one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.support.client import attached
from tests.support.event_stream import http_client
from tests.support.sample_tasks import MODULE
from tests.support.server import RunningServer, running_server

PATIENCE_S = 20.0
UNKNOWN = ["task_" + "0" * 32, "x", "sess_" + "0" * 32, "%00", "t" * 3000]


@pytest.fixture
async def server() -> AsyncIterator[RunningServer]:
    async with running_server(tasks=(MODULE,)) as server:
        yield server


@pytest.fixture
async def http(server: RunningServer) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(base_url=server.url) as http:
        yield http


async def made(http: httpx.AsyncClient, name: str, **given: Any) -> str:
    """Make a task; returns its id."""
    answer = await http.post(f"/v1/tasks/{name}", json=given)
    assert answer.status_code == 202, answer.text
    task_id: str = answer.json()["task_id"]
    assert answer.json() == {"task_id": task_id, "status": "pending"}
    assert answer.headers["location"] == f"/v1/tasks/{task_id}"
    return task_id


async def ended(http: httpx.AsyncClient, url: str) -> dict[str, Any]:
    """A task's state, once it has ended: its stream tells when."""
    async with asyncio.timeout(PATIENCE_S), http.stream("GET", f"{url}/events") as stream:
        async for _ in stream.aiter_raw():
            pass
    shown: dict[str, Any] = (await http.get(url)).json()
    return shown


async def events_of(http: httpx.AsyncClient, url: str, **headers: str) -> list[tuple[str, str]]:
    """The names and ids of a task's events, to its end."""
    async with asyncio.timeout(PATIENCE_S):
        lines = (await http.get(f"{url}/events", headers=headers)).text.splitlines()
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    ids = [line.removeprefix("id: ") for line in lines if line.startswith("id: ")]
    return list(zip(names, ids, strict=True))


async def test_a_task_is_made_runs_and_is_there(http: httpx.AsyncClient) -> None:
    """Its state is the fold of its log; nothing is in it that is not known."""
    task_id = await made(http, "write_numbers", steps=3)
    shown = await ended(http, f"/v1/tasks/{task_id}")
    assert shown.pop("created_at") <= shown.pop("updated_at")
    assert shown == {
        "task_id": task_id,
        "name": "write_numbers",
        "status": "complete",
        "attempt": 1,
        "progress": 3,
        "total": 3,
        "output_text": "1 2 3 ",
        "result": 3,
    }
    assert (await http.get(f"/v1/tasks/{task_id}/result")).json() == 3


async def test_its_events_are_resumed_by_their_ids(http: httpx.AsyncClient) -> None:
    """From each of them on; who has seen the end is told that there is nothing more."""
    task_id = await made(http, "write_numbers", steps=3)
    url = f"/v1/tasks/{task_id}"
    await ended(http, url)
    events = await events_of(http, url)
    assert [name for name, _ in events][:: len(events) - 1] == ["task.started", "task.done"]
    for seen, (_, event_id) in enumerate(events[:-1], 1):
        assert await events_of(http, url, **{"last-event-id": event_id}) == events[seen:]
    again = await http.get(f"{url}/events", headers={"last-event-id": events[-1][1]})
    assert again.status_code == 204


async def test_a_stream_shows_what_comes(http: httpx.AsyncClient) -> None:
    """Live: the task's end is not there yet when its start is."""
    task_id = await made(http, "sleep", seconds=3600)
    async with asyncio.timeout(PATIENCE_S), http.stream("GET", f"/v1/tasks/{task_id}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert stream.headers["x-accel-buffering"] == "no"
        text = ""
        async for piece in stream.aiter_text():
            text += piece
            if "task.progress" in text and "cancelled" not in text:
                answer = await http.delete(f"/v1/tasks/{task_id}")
                assert answer.status_code == 202
    assert text.count("event: task.done") == 1
    assert '"status":"cancelled"' in text
    assert (await http.get(f"/v1/tasks/{task_id}")).json()["status"] == "cancelled"
    refused = await http.get(f"/v1/tasks/{task_id}/result")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "no_result")
    assert (await http.delete(f"/v1/tasks/{task_id}")).status_code == 202  # it has ended already, which is no error


@pytest.mark.parametrize("path", ["/v1/tasks/{}", "/v1/tasks/{}/events", "/v1/tasks/{}/result"])
async def test_what_is_no_task_is_not_there(http: httpx.AsyncClient, path: str) -> None:
    """Whatever its id looks like, the answer is the same; a session is no task, and a task's session no session."""
    session_id = (await http.post("/v1/sessions")).json()["session"]["id"]
    answers = [await http.get(path.format(task_id)) for task_id in [*UNKNOWN, session_id]]
    assert {answer.status_code for answer in answers} == {404}
    assert len({answer.text for answer in answers}) == 1
    task_id = await made(http, "count", steps=1)
    for hidden in (
        f"/v1/sessions/{task_id}",
        f"/v1/sessions/{task_id}/events",
        f"/v1/sessions/{task_id}/tasks/{task_id}",
    ):
        answer = await http.get(hidden)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "session_not_found")
    assert (await http.delete(f"/v1/sessions/{task_id}")).status_code == 404


@pytest.mark.parametrize(
    ("name", "body", "status", "code", "param"),
    [
        ("nowhere", b"{}", 404, "unknown_task", "name"),
        ("count", b"{", 400, "invalid_json", None),
        ("count", b"", 400, "invalid_json", None),
        ("count", b"\xff", 400, "invalid_json", None),
        ("count", b"[" * 100_000, 400, "invalid_json", None),
        ("count", b"{}", 400, "invalid_input", "input"),
        ("count", b'{"steps": "many"}', 400, "invalid_input", "input.steps"),
        ("count", b'{"steps": 1e400}', 400, None, None),
        ("analyse", b'{"text": ""}', 400, "invalid_input", "input.text"),
        ("count", b" " * (2 * 1024 * 1024 + 1), 413, "body_too_large", None),
    ],
)
async def test_bad_input_is_refused(
    http: httpx.AsyncClient, name: str, body: bytes, status: int, code: str | None, param: str | None
) -> None:
    """By a typed error; nothing is made of it."""
    answer = await http.post(f"/v1/tasks/{name}", content=body)
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert code in {None, error["code"]}
    assert code is None or error.get("param") == param


async def test_the_built_in_ones_have_paths_of_their_own(http: httpx.AsyncClient) -> None:
    """`/v1/analyse` is a task; `/v1/summarise` is one where the client prefers that."""
    made_task = await http.post("/v1/analyse", json={"text": "A short text."})
    assert made_task.status_code == 202
    assert (await http.get(made_task.headers["location"])).json()["name"] == "analyse"
    preferred = await http.post("/v1/summarise", json={"text": "A text."}, headers={"prefer": "respond-async, wait=1"})
    assert (preferred.status_code, preferred.headers["preference-applied"]) == (202, "respond-async")
    for url in (made_task.headers["location"], preferred.headers["location"]):
        await http.delete(url)
        assert (await ended(http, url))["status"] == "cancelled"
    refused = await http.post("/v1/summarise", json={"text": 3})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input.text")


async def test_a_session_s_task_is_under_its_session(server: RunningServer, http: httpx.AsyncClient) -> None:
    """Nowhere else; and the session's state has it."""
    async with attached(server) as client:
        await client.send("task.create", name="count", input={"steps": 2}, task_id="mine", event_id="e1")
        created = await client.until("task.created")
        assert created["for_event_id"] == "e1"
        assert created["task"] == {
            "id": "mine",
            "name": "count",
            "status": "pending",
            "created_at": created["task"]["created_at"],
        }
        done = await client.until("task.done")
        assert (done["task_id"], done["status"], done["result"]) == ("mine", "complete", 2)
        url = f"/v1/sessions/{client.session_id}"
        shown = (await http.get(f"{url}/tasks/mine")).json()
        assert (shown["status"], shown["result"]) == ("complete", 2)
        assert (await http.get(url)).json()["tasks"] == [shown]
        assert (await http.get("/v1/tasks/mine")).status_code == 404
        assert (await http.get(f"{url}/tasks/other")).json()["error"]["code"] == "task_not_found"
        assert [name for name, _ in await events_of(http, f"{url}/tasks/mine")][-1] == "task.done"


async def test_commands_over_http_make_and_cancel_tasks(server: RunningServer, http: httpx.AsyncClient) -> None:
    """With the ids of what they made; the same `event_id` makes it once."""
    session_id = (await http.post("/v1/sessions")).json()["session"]["id"]
    url = f"/v1/sessions/{session_id}"
    create = {"type": "task.create", "name": "sleep", "input": {"seconds": 3600}, "event_id": "e1"}
    first, second = [(await http.post(f"{url}/events", json=create)).json() for _ in range(2)]
    assert second == {**first, "duplicate": True}
    cancel = {"type": "task.cancel", "task_id": first["task_id"], "event_id": "e2"}
    assert (await http.post(f"{url}/events", json=cancel)).status_code == 202
    assert (await ended(http, f"{url}/tasks/{first['task_id']}"))["status"] == "cancelled"
    unknown = await http.post(f"{url}/events", json={"type": "task.cancel", "task_id": "other"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "task_not_found")
    taken = {**create, "task_id": first["task_id"], "event_id": "e3"}
    assert (await http.post(f"{url}/events", json=taken)).json()["error"]["code"] == "already_exists"


async def test_a_task_is_gone_after_its_time() -> None:
    """And not before: each use of it gives it the time anew."""
    async with running_server(tasks=(MODULE,), task_ttl_s=1.0) as server, http_client(base_url=server.url) as http:
        url = f"/v1/tasks/{await made(http, 'count', steps=1)}"
        assert (await ended(http, url))["status"] == "complete"
        loop = asyncio.get_running_loop()
        used = loop.time()
        async with asyncio.timeout(PATIENCE_S):
            while (await http.get(url)).status_code == 200:
                assert loop.time() - used < PATIENCE_S
                used = loop.time()
                await asyncio.sleep(1.5)
        assert loop.time() - used > 0.9


async def test_hanging_up_ends_the_model_calls_of_a_summary() -> None:
    """Nobody would read it."""
    calls, closed = asyncio.Event(), asyncio.Event()

    async def waits(_request: object) -> AsyncIterator[str]:
        calls.set()
        try:
            await asyncio.Event().wait()
            yield ""
        finally:
            closed.set()

    async with running_server(waits) as server, http_client(base_url=server.url) as http:
        asking = asyncio.create_task(http.post("/v1/summarise", json={"text": "A text."}))
        async with asyncio.timeout(PATIENCE_S):
            await calls.wait()
            asking.cancel()
            await closed.wait()
