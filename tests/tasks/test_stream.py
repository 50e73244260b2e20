"""One task's channel as server-sent events: from any position, through attempts, to its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import httpx
import pytest
from httpx_sse import EventSource
from starlette.types import Message

from realtime import Context, task
from realtime.feed import Closing
from realtime.protocol import CloseCode
from realtime.tasks import stream as stream_module
from realtime.tasks.stream import TaskStream
from tests.support.client import Event, Transcript
from tests.support.event_stream import http_client
from tests.support.principals import known
from tests.support.server import RunningServer, running_server
from tests.tasks.test_run import Job
from tests.tasks.workplace import PATIENCE_S, eventually, hurried


class Steps:
    """A task that goes on step by step, as the test says."""

    def __init__(self) -> None:
        self._steps: asyncio.Queue[str] = asyncio.Queue()

    def go(self, *steps: str) -> None:
        """Have it do these: a number is progress, `fail` and `end` are what they say, all else is text."""
        for step in steps:
            self._steps.put_nowait(step)

    async def run(self, ctx: Context) -> str:
        while (step := await self._steps.get()) != "end":
            if step == "fail":
                raise ValueError
            if step.isdigit():
                await ctx.progress(int(step), 100)
            else:
                await ctx.write(step)
        return "done"


class Site:
    """A server with one such task, made over HTTP."""

    def __init__(self, server: RunningServer, http: httpx.AsyncClient, steps: Steps, url: str) -> None:
        self.server = server
        self.http = http
        self.steps = steps
        self.url = url
        self.task_id = url.rpartition("/")[2]

    @asynccontextmanager
    async def following(
        self, transcript: Transcript | None = None, **options: Any
    ) -> AsyncIterator[AsyncIterator[tuple[str, Event]]]:
        """The events that a client is sent, each with its id, checked by `transcript`."""
        transcript = transcript or Transcript()
        transcript.positions.setdefault(self.task_id, 0)
        async with self.http.stream("GET", f"{self.url}/events", **options) as answer:
            assert answer.status_code == 200, await answer.aread()
            async with aclosing(EventSource(answer).aiter_sse()) as told:
                yield _applied(told, transcript)

    async def all(self, transcript: Transcript | None = None, **options: Any) -> list[tuple[str, Event]]:
        """Everything to the end."""
        async with asyncio.timeout(PATIENCE_S), self.following(transcript, **options) as events:
            return [event async for event in events]


async def _applied(told: Any, transcript: Transcript) -> AsyncIterator[tuple[str, Event]]:
    async for one in told:
        event = one.json()
        assert one.event == ("server_error" if event["type"] == "error" else event["type"])
        transcript.apply(event)
        yield one.id, event


@asynccontextmanager
async def site(*, retries: int = 1, **settings: Any) -> AsyncIterator[Site]:
    """See `Site`."""
    steps = Steps()

    @task(retries=retries)
    async def work(ctx: Context, job: Job) -> str:
        return await steps.run(ctx)

    with hurried():
        async with (
            running_server(functions=[work], journal_interval_ms=1, **settings) as server,
            http_client(base_url=server.url) as http,
        ):
            url = (await http.post("/v1/tasks/work", json={})).headers["location"]
            yield Site(server, http, steps, url)


async def until(events: AsyncIterator[tuple[str, Event]], kind: str) -> tuple[str, Event]:
    """The next event of a kind."""
    async with asyncio.timeout(PATIENCE_S):
        async for told in events:
            if told[1]["type"] == kind:
                return told
    raise AssertionError(f"the stream has ended without {kind}")


async def test_it_shows_what_comes_to_the_end() -> None:
    """Live: start, progress, text and end, with the positions that a client may come back with."""
    async with site() as here:
        transcript = Transcript()
        async with here.following(transcript) as events:
            assert (await until(events, "task.started"))[1]["attempt"] == 1
            here.steps.go("5")
            event_id, progress = await until(events, "task.progress")
            assert (progress["progress"], progress["total"], progress["message"]) == (5, 100, None)
            assert event_id == f"{here.task_id}:{progress['seq']}"
            assert not {"at", "instance"} & set(progress)
            here.steps.go("some ", "text", "end")
            _, done = await until(events, "task.done")
            assert (done["status"], done["result"]) == ("complete", "done")
            assert [event async for event in events] == []
        assert transcript.texts[here.task_id] == "some text"


async def test_it_shows_each_attempt() -> None:
    """What an earlier one told is void from the next start on."""
    async with site() as here:
        transcript = Transcript()
        async with here.following(transcript) as events:
            await until(events, "task.started")
            here.steps.go("50", "first", "fail")
            assert (await until(events, "task.started"))[1]["attempt"] == 2
            here.steps.go("10", "second", "end")
            await until(events, "task.done")
        assert (transcript.texts[here.task_id], transcript.progress[here.task_id]) == ("second", 10)


@pytest.mark.parametrize("how", ["last-event-id", "after"])
async def test_who_comes_back_while_it_runs_goes_on_where_they_were(how: str) -> None:
    """Over any number of connections the text is whole and nothing comes twice."""
    async with site() as here:
        transcript = Transcript()
        position = f"{here.task_id}:0"
        for number in range(5):
            options = (
                {"headers": {"last-event-id": position}} if how == "last-event-id" else {"params": {how: position}}
            )
            async with here.following(transcript, **options) as events:
                here.steps.go(f"piece {'abcde'[number]} ")
                position, _ = await until(events, "task.output_text.delta")
        here.steps.go("end")
        await here.all(transcript, headers={"last-event-id": position}, params={"after": f"{here.task_id}:0"})
        assert transcript.texts[here.task_id] == "piece a piece b piece c piece d piece e "
        assert transcript.done[here.task_id]["status"] == "complete"


async def test_it_is_all_there_after_the_end() -> None:
    """Merged, marked as a replay, from any position; who has seen the end gets a 204, which stops an `EventSource`."""
    async with site() as here:
        here.steps.go("1", *(f"{letter} " for letter in "abcdefgh"), "end")
        await here.all()
        told = await here.all()
        assert [event["type"] for _, event in told] == [
            "task.started",
            "task.progress",
            "task.output_text.delta",
            "task.done",
        ]
        assert all(event["replay"] for _, event in told)
        assert told[2][1]["merged"] == 8
        last = told[-1][1]["seq"]
        for position in range(last):
            transcript = Transcript()
            transcript.positions[here.task_id] = position
            transcript.attempts[here.task_id] = 1 if position else 0
            await here.all(transcript, params={"after": f"{here.task_id}:{position}"})
            assert transcript.done[here.task_id]["seq"] == last
        for position in (last, last + 1, 10**15 - 1):
            answer = await here.http.get(f"{here.url}/events", params={"after": f"{here.task_id}:{position}"})
            assert (answer.status_code, answer.content) == (204, b"")


@pytest.mark.parametrize("ahead", [1, 1000])
async def test_who_is_ahead_of_a_task_that_runs_waits_for_what_comes(ahead: int) -> None:
    """A position that nobody can have is taken for the newest one."""
    async with site() as here:
        async with here.following() as events:
            _, started = await until(events, "task.started")
        position = started["seq"] + ahead
        async with here.following(Transcript(), params={"after": f"{here.task_id}:{position}"}) as _:
            here.steps.go("end")
        shown = await here.http.get(f"{here.url}/events", params={"after": f"{here.task_id}:{started['seq']}"})
        assert "event: task.done" in shown.text


@pytest.mark.parametrize(
    "after", ["", "x", "session:1", "task_0:1", "{id}", "{id}:", "{id}:-1", "{id}:1.5", "{id}:1,,", "{id}:" + "9" * 16]
)
async def test_position_that_makes_no_sense_is_refused(after: str) -> None:
    """Before the stream begins."""
    async with site() as here:
        answer = await here.http.get(f"{here.url}/events", params={"after": after.format(id=here.task_id)})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_positions")
        here.steps.go("end")


async def test_quiet_stream_shows_that_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """By comments, without an empty line: some clients take that for the end of an event."""
    monkeypatch.setattr(stream_module, "COMMENT_S", 0.02)
    async with site() as here, here.http.stream("GET", f"{here.url}/events") as answer:
        text = ""
        async with asyncio.timeout(PATIENCE_S):
            async for piece in answer.aiter_text():
                text += piece
                if text.count("\n:") == 3:
                    here.steps.go("end")
        assert text.startswith("retry: ")
        assert text.count("event: ") == text.count("\n\n") == 2


async def test_task_that_is_erased_ends_its_stream_with_an_error() -> None:
    """The client is told; if it comes back all the same, it is told what it is of a task that never was."""
    async with site() as here:
        async with here.following() as events:
            await until(events, "task.started")
            await here.server.engine.store.erase(here.task_id)
            _, error = await until(events, "error")
            assert (error["error"]["code"], error["error"]["fatal"]) == ("task_not_found", True)
        assert (await here.http.get(f"{here.url}/events")).status_code == 404
        here.steps.go("end")


async def test_one_that_is_being_told_its_end_may_be_dropped_meanwhile() -> None:
    """Its client takes nothing any more: what else would end it does no harm."""
    async with site() as here:
        told, taken = asyncio.Event(), asyncio.Event()

        async def send(message: Message) -> None:
            if b"task_not_found" in message.get("body", b""):
                told.set()
                await taken.wait()

        async with here.server.engine.hub.use(here.task_id) as live:
            stream = TaskStream(live, here.task_id, known("ann"), send, send_timeout_s=60)
            await stream.open(None)
            running = asyncio.create_task(stream.run())
            await here.server.engine.store.erase(here.task_id)
            async with asyncio.timeout(PATIENCE_S):
                await told.wait()
                stream.drop(Closing(CloseCode.DELETED))
                taken.set()
                await running
        here.steps.go("end")


async def test_who_hangs_up_leaves_nothing_behind() -> None:
    """The session is open for nobody; the task goes on."""
    async with site() as here:
        live = None
        async with here.following() as events:
            await until(events, "task.started")
            [live] = [one for one in here.server.engine.hub.sessions() if one.id == here.task_id]
            assert len(live.bells) == 1

        async def is_idle() -> bool:
            return here.server.busy_sessions == 0

        await eventually(is_idle)
        assert live.bells == set()
        here.steps.go("end")
        assert (await here.all())[-1][1]["status"] == "complete"


async def test_many_follow_one_task() -> None:
    """Each is told all of it."""
    async with site() as here:
        transcripts = [Transcript() for _ in range(10)]
        following = [asyncio.create_task(here.all(transcript)) for transcript in transcripts]
        here.steps.go("1", "some ", "2", "text", "3", "end")
        for told in await asyncio.gather(*following):
            assert told[-1][1]["type"] == "task.done"
        assert {transcript.texts[here.task_id] for transcript in transcripts} == {"some text"}
