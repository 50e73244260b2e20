"""What the endpoints of tasks answer at each moment of a task's life, beside its plain course."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed

from realtime import Context, TaskError, task
from realtime.tasks.outcome import MAX_INLINE_BYTES, MAX_RESULT_BYTES
from tests.end_to_end import dialled, frames_until_closed
from tests.end_to_end.test_drain import drained
from tests.support.client import attached
from tests.support.event_stream import http_client
from tests.support.server import RunningServer, running_server
from tests.tasks.test_run import Gate, Job
from tests.tasks.workplace import PATIENCE_S, eventually

NOBODY = "task_" + "0" * 32


@task()
async def large(ctx: Context, job: Job) -> str:
    """A result of so many bytes as JSON."""
    return "x" * (int(job.text) - 2)


@task(retries=1)
async def fail(ctx: Context, job: Job) -> None:
    """Fail."""
    await ctx.write("partial")
    raise TaskError("no_window", "There is no window.")


class Site:
    """A server with a task that waits at a gate."""

    def __init__(self, server: RunningServer, http: httpx.AsyncClient, gate: Gate) -> None:
        self.server = server
        self.http = http
        self.gate = gate

    async def make(self, name: str, text: str = "") -> str:
        """Make a task; returns its URL."""
        answer = await self.http.post(f"/v1/tasks/{name}", json={"text": text})
        assert answer.status_code == 202, answer.text
        return answer.headers["location"]

    async def shows(self, url: str, field: str) -> bool:
        """Whether a task's state has a field."""
        return field in (await self.http.get(url)).json()

    async def ended(self, url: str) -> dict[str, Any]:
        """A task's state once it has ended."""
        async with asyncio.timeout(PATIENCE_S), self.http.stream("GET", f"{url}/events") as stream:
            async for _ in stream.aiter_raw():
                pass
        shown: dict[str, Any] = (await self.http.get(url)).json()
        return shown


@asynccontextmanager
async def site(**settings: Any) -> AsyncIterator[Site]:
    """See `Site`."""
    gate = Gate()

    @task()
    async def wait(ctx: Context, job: Job) -> str:
        await ctx.progress(1, 2, "half")
        await ctx.write("some text")
        await gate.wait()
        return "done"

    functions = [large, fail, wait]
    async with (
        running_server(functions=functions, **settings) as server,
        http_client(base_url=server.url) as http,
    ):
        yield Site(server, http, gate)


def error_of(answer: httpx.Response) -> tuple[int, str]:
    """Status and code of a refusal."""
    return answer.status_code, answer.json()["error"]["code"]


async def test_task_at_each_moment_of_its_life() -> None:
    """Pending, running, complete: what is known is shown, and there is no result before there is one."""
    async with site(worker_slots=1) as here:
        running, pending = await here.make("wait"), await here.make("wait")
        await here.gate.until_begun()
        shown = (await here.http.get(pending)).json()
        assert (shown["status"], shown["attempt"], "progress" in shown) == ("pending", 0, False)
        await eventually(partial(here.shows, running, "output_text"))
        shown = (await here.http.get(running)).json()
        told = {name: shown[name] for name in ("status", "attempt", "progress", "total", "message", "output_text")}
        assert told == {
            "status": "running",
            "attempt": 1,
            "progress": 1,
            "total": 2,
            "message": "half",
            "output_text": "some text",
        }
        for url in (running, pending):
            assert error_of(await here.http.get(f"{url}/result")) == (409, "no_result")
        here.gate.open.set()
        for url in (running, pending):
            assert (await here.ended(url))["result"] == "done"
            assert (await here.http.get(f"{url}/result")).json() == "done"


async def test_task_that_has_failed_says_why() -> None:
    """With the attempt that was its last, and what that one has told."""
    async with site() as here:
        url = await here.make("fail")
        shown = await here.ended(url)
        assert (shown["status"], shown["attempt"], shown["output_text"]) == ("failed", 2, "partial")
        assert shown["error"] == {"type": "server_error", "code": "no_window", "message": "There is no window."}
        assert "result" not in shown
        assert error_of(await here.http.get(f"{url}/result")) == (409, "no_result")


@pytest.mark.parametrize("is_waiting", [True, False])
async def test_task_is_cancelled_by_delete(is_waiting: bool) -> None:
    """Whether or not it has begun; the second time is no error."""
    async with site(worker_slots=1) as here:
        running = await here.make("wait")
        await here.gate.until_begun()
        url = await here.make("wait") if is_waiting else running
        for _ in range(2):
            answer = await here.http.delete(url)
            assert (answer.status_code, answer.json()["task_id"]) == (202, url.rpartition("/")[2])
            shown = await here.ended(url)
            assert (shown["status"], shown["attempt"]) == ("cancelled", 0 if is_waiting else 1)
        here.gate.open.set()


@pytest.mark.parametrize("size", [MAX_INLINE_BYTES, MAX_INLINE_BYTES + 1, MAX_RESULT_BYTES])
async def test_large_result_is_fetched_from_where_it_is_told(size: int) -> None:
    """Of a session's task too: whoever was told the end finds it there, whole."""
    is_inline = size <= MAX_INLINE_BYTES
    async with site() as here, attached(here.server) as client:
        await client.send("task.create", name="large", input={"text": str(size)}, task_id="mine")
        done = await client.until("task.done")
        alone = await here.ended(await here.make("large", str(size)))
        for told in (done, alone):
            assert told["status"] == "complete"
            assert ("result" in told, "result_url" in told) == (is_inline, not is_inline)
            if not is_inline:
                answer = await here.http.get(told["result_url"])
                assert answer.headers["content-type"] == "application/json"
                assert len(answer.content) == size
                assert answer.json() == "x" * (size - 2)


async def test_result_that_is_too_large_is_an_error() -> None:
    """By name."""
    async with site() as here:
        shown = await here.ended(await here.make("large", str(MAX_RESULT_BYTES + 1)))
        assert (shown["status"], shown["error"]["code"]) == ("failed", "result_too_large")


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_what_is_not_there_looks_like_what_is_somebody_else_s(method: str) -> None:
    """Under every verb, and under every path: status, code and text are the same."""
    async with site() as here, attached(here.server) as client:
        for task_id in (client.session_id, "task_mine"):
            await client.send("task.create", name="wait", input={}, task_id=task_id)
            await client.until("task.started", task_id=task_id)
        strangers = ["task_mine", client.session_id, NOBODY, "x", "%00", "session", "control"]
        answers = [await here.http.request(method, f"/v1/tasks/{one}") for one in strangers]
        assert {error_of(answer) for answer in answers} == {(404, "task_not_found")}
        assert len({answer.text for answer in answers}) == 1
        own = [
            await here.http.request(method, f"/v1/sessions/{client.session_id}/tasks/{one}")
            for one in ("other", "session", "control", NOBODY)
        ]
        assert {error_of(answer) for answer in own} == {(404, "task_not_found")}
        foreign = [
            await here.http.request(method, f"/v1/sessions/{one}/tasks/task_mine") for one in ("sess_0", NOBODY, "x")
        ]
        assert {error_of(answer) for answer in foreign} == {(404, "session_not_found")}
        assert len({answer.text for answer in foreign}) == 1
        await client.send("ping")
        assert (await client.until("pong"))["type"] == "pong"
        assert client.transcript.done == {}


async def test_session_of_a_task_is_nobody_s() -> None:
    """It can't be attached to, written to, or erased."""
    async with site() as here:
        url = await here.make("wait")
        await here.gate.until_begun()
        task_id = url.rpartition("/")[2]
        command = {"type": "conversation.item.create", "item": {"role": "user", "content": "x"}}
        for answer in (
            await here.http.post(f"/v1/sessions/{task_id}/events", json=command),
            await here.http.get(f"/v1/sessions/{task_id}/events", headers={"accept": "text/event-stream"}),
            await here.http.get(f"/v1/sessions/{task_id}/tasks/{task_id}/result"),
            await here.http.delete(f"/v1/sessions/{task_id}"),
        ):
            assert error_of(answer) == (404, "session_not_found")
        async with dialled(here.server, {"session_id": task_id}) as socket:
            [error] = await frames_until_closed(socket)
            assert (error["error"]["code"], socket.close_code) == ("session_not_found", 4404)
            with pytest.raises(ConnectionClosed):
                await socket.send("{}")
        assert (await here.http.get(url)).json()["status"] == "running"


async def test_instance_that_drains_makes_no_more_tasks() -> None:
    """It shows and cancels those that there are."""
    async with site(drain_s=30.0) as here:
        url = await here.make("wait")
        await here.gate.until_begun()
        here.server.stop()
        await drained(here.server)
        for path in ("/v1/tasks/wait", "/v1/analyse", "/v1/summarise"):
            answer = await here.http.post(path, json={"text": "x"})
            assert error_of(answer) == (503, "draining")
            assert int(answer.headers["retry-after"]) > 0
        assert (await here.http.get(url)).json()["status"] == "running"
        assert (await here.http.delete(url)).status_code == 202


async def test_nothing_stays_open_for_tasks_that_have_ended() -> None:
    """Neither a session, nor a place on the index, nor room in the queue."""
    async with site() as here:
        urls = [await here.make("large", "10") for _ in range(20)]
        for url in urls:
            assert (await here.ended(url))["result"] == "x" * 8
        engine = here.server.engine

        async def is_idle() -> bool:
            return not (here.server.busy_sessions or await engine.store.tracked())

        await eventually(is_idle)
        assert engine.desk.queue._known == set()  # type: ignore[attr-defined]
