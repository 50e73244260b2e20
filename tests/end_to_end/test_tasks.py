"""Background tasks over a WebSocket: what each viewer is told, how they end, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from realtime import Context, TaskError, task
from realtime.protocol import MAX_UNFINISHED_CHANNELS
from tests.end_to_end import PATIENCE_S, Model, events_of, refused, settled, until_closed
from tests.end_to_end.test_drain import drained
from tests.support.client import Client, Event, Transcript, attached
from tests.support.event_stream import http_client
from tests.support.server import RunningServer, running_server
from tests.tasks.workplace import eventually

CODECS = ["realtime.v1", "realtime.v1.msgpack"]


class Job(msgspec.Struct, forbid_unknown_fields=True):
    """What a task is given; any value, and a number."""

    value: Any = None
    number: int = 0


class Task:
    """A task that does what the test says, step by step. `running` are those that have begun and not ended."""

    def __init__(self, **options: Any) -> None:
        self.begun = asyncio.Event()
        self.running = 0
        self._steps: asyncio.Queue[Callable[[Context], Any]] = asyncio.Queue()

        @task("work", **options)
        async def work(ctx: Context, job: Job) -> Any:
            self.begun.set()
            self.running += 1
            try:
                while (said := await (await self._steps.get())(ctx)) is None:
                    pass
            finally:
                self.running -= 1
            return job.value if said == "done" else said

        self.function = work

    def progress(self, progress: int, total: int | None = None, message: str | None = None) -> None:
        """Have it report."""
        self._steps.put_nowait(lambda ctx: ctx.progress(progress, total, message))

    def write(self, text: str) -> None:
        """Have it write."""
        self._steps.put_nowait(lambda ctx: ctx.write(text))

    def end(self, result: Any = "done") -> None:
        """Have it return that, or what it was given."""
        self._steps.put_nowait(lambda _: _value(result))

    def fail(self, error: Exception) -> None:
        """Have it raise."""
        self._steps.put_nowait(lambda _: _raise(error))


async def _value(value: Any) -> Any:
    return value


async def _raise(error: Exception) -> None:
    raise error


@asynccontextmanager
async def viewing(
    work: Task, model: Model | None = None, *, subprotocol: str = "realtime.v1", **settings: Any
) -> AsyncIterator[tuple[RunningServer, Client]]:
    """A client of a server with that task."""
    async with (
        running_server(model or Model(), functions=[work.function], **{"journal_interval_ms": 1, **settings}) as server,
        attached(server, subprotocol=subprotocol) as client,
    ):
        yield server, client


async def create(client: Client, task_id: str = "t1", **fields: Any) -> Event:
    """Make a task; returns its `task.created`."""
    await client.send("task.create", **{"name": "work", "input": {}, "task_id": task_id, **fields})
    async with asyncio.timeout(PATIENCE_S):
        while True:
            event = await client.until("task.created")
            if event["task"]["id"] == task_id:
                return event


async def done(client: Client, task_id: str = "t1") -> Event:
    """The end of a task."""
    async with asyncio.timeout(PATIENCE_S):
        while task_id not in client.transcript.done:
            await client.receive()
    return client.transcript.done[task_id]


def of_task(client: Client, task_id: str = "t1") -> list[Event]:
    """What a client was told in a task's channel, without what depends on when it was told."""
    return [event for event in client.transcript.events if event.get("task_id") == task_id]


# --- what viewers are told -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subprotocol", CODECS)
async def test_the_whole_life_of_a_task(subprotocol: str) -> None:
    """Event for event, each with exactly its fields, in both encodings."""
    work = Task()
    async with viewing(work, subprotocol=subprotocol) as (_, client):
        created = await create(client, event_id="e1", input={"value": {"secret": [1, 2.5, None, "ü"]}})
        assert set(created) == {"type", "seq", "for_event_id", "task"}
        assert set(created["task"]) == {"id", "name", "status", "created_at"}
        assert (created["task"]["name"], created["task"]["status"]) == ("work", "pending")
        work.progress(3, 10, "reading page 3")
        await client.until("task.progress")
        work.write("Hello")
        await client.until("task.output_text.delta")
        work.end()
        await done(client)
        begun, progress, delta, end = of_task(client)
        assert begun == {"type": "task.started", "seq": 1, "task_id": "t1", "attempt": 1}
        assert progress == {
            "type": "task.progress",
            "seq": 2,
            "task_id": "t1",
            "attempt": 1,
            "progress": 3,
            "total": 10,
            "message": "reading page 3",
        }
        assert delta == {"type": "task.output_text.delta", "seq": 3, "task_id": "t1", "attempt": 1, "delta": "Hello"}
        assert end == {
            "type": "task.done",
            "seq": 4,
            "task_id": "t1",
            "status": "complete",
            "result": {"secret": [1, 2.5, None, "ü"]},
        }
        assert "t1" not in client.transcript.positions


async def test_every_viewer_sees_the_same() -> None:
    """Whoever is there from the start, and whoever comes while it runs, in either encoding."""
    work = Task()
    async with viewing(work) as (server, first):
        await create(first)
        work.write("one ")
        await first.until("task.output_text.delta")
        async with attached(server, first.session_id, subprotocol=CODECS[1]) as second:
            work.progress(1)
            work.write("two")
            work.end(42)
            for client in (first, second):
                assert (await done(client))["result"] == 42
                assert client.transcript.texts["t1"] == "one two"
                assert client.transcript.progress["t1"] == 1


async def test_who_comes_back_goes_on_where_they_were() -> None:
    """At any position: nothing is missed, nothing comes twice."""
    work = Task()
    async with viewing(work) as (server, watching):
        transcript = Transcript()
        await create(watching)
        words = [f"word{number} " for number in range(20)]
        for word in words:
            query = {"after": transcript.after()} if transcript.events else {}
            async with attached(server, watching.session_id, transcript=transcript, **query) as client:
                work.write(word)
                await client.until("task.output_text.delta")
                client.reset()
        work.end()
        async with attached(server, watching.session_id, transcript=transcript, after=transcript.after()) as client:
            await done(client)
        assert transcript.texts["t1"] == "".join(words)


async def test_it_is_all_there_after_the_end() -> None:
    """For who comes late, merged; for who wants no history, nothing of it."""
    work = Task()
    async with viewing(work) as (server, client):
        await create(client)
        for number in range(10):
            work.write(f"{number} ")
        work.end()
        await done(client)
        async with attached(server, client.session_id) as late:
            end = await done(late)
            assert end["replay"] is True
            assert late.transcript.texts["t1"] == "0 1 2 3 4 5 6 7 8 9 "
            assert len(events_of(late, "task.output_text.delta")) == 1
        async with attached(server, client.session_id, history="none") as late:
            await settled(late)
            assert of_task(late) == []
            assert set(late.first["positions"]) == {"session"}


async def test_progress_of_a_late_reader_is_the_newest_alone() -> None:
    """It stands for all that came before it."""
    work = Task()
    async with viewing(work) as (server, client):
        await create(client)
        for number in range(5):
            work.progress(number)
            await client.until("task.progress", progress=number)
        async with attached(server, client.session_id) as late:
            told = await late.until("task.progress")
            assert (told["progress"], told["merged"], told["seq"]) == (4, 5, 6)
        work.end()
        await done(client)


async def test_each_attempt_voids_what_the_one_before_it_told() -> None:
    """The client keeps what the last one said."""
    work = Task(retries=1)
    async with viewing(work) as (_, client):
        await create(client)
        work.progress(9)
        work.write("wrong")
        work.fail(ValueError("secret"))
        await client.until("task.started", attempt=2)
        work.progress(1)
        work.write("right")
        work.end("fine")
        assert (await done(client))["result"] == "fine"
        assert (client.transcript.texts["t1"], client.transcript.progress["t1"]) == ("right", 1)
        assert "secret" not in str(client.transcript.events)


async def test_task_that_fails_says_why() -> None:
    """In its own words, where it means them to be told; and nothing of what it had in hand."""
    work = Task()
    async with viewing(work) as (_, client):
        for task_id, error, expected in (
            ("t1", TaskError("no_window", "There is no window."), ("no_window", "There is no window.")),
            ("t2", KeyError("secret"), ("task_failed", "The task raised KeyError.")),
        ):
            await create(client, task_id)
            work.fail(error)
            end = await done(client, task_id)
            assert (end["status"], "result" in end) == ("failed", False)
            code, message = expected
            assert end["error"] == {"type": "server_error", "code": code, "message": message}
        assert "secret" not in str(client.transcript.events)


# --- cancelling, and the session's end -------------------------------------------------------------------------------


async def test_task_is_cancelled() -> None:
    """Whether it runs, waits, or has ended: the first counts, and the last is no error."""
    work = Task()
    async with viewing(work, worker_slots=1) as (server, client):
        await create(client, "runs")
        await client.until("task.started")
        await create(client, "waits")
        for task_id in ("waits", "runs"):
            async with attached(server, client.session_id) as other:
                await other.send("task.cancel", task_id=task_id, event_id=f"cancel-{task_id}")
                for viewer in (client, other):
                    end = await done(viewer, task_id)
                    assert (end["status"], end["for_event_id"]) == ("cancelled", f"cancel-{task_id}")
            await client.send("task.cancel", task_id=task_id)
            await settled(client)
        assert work.running == 0
        assert [event["type"] for event in of_task(client, "waits")] == ["task.done"]


@pytest.mark.parametrize("on_disconnect", ["cancel", "continue"])
async def test_task_goes_on_with_nobody_there(on_disconnect: str) -> None:
    """A task is not a response: its result is there for whoever comes."""
    work = Task()
    async with viewing(work, on_disconnect=on_disconnect) as (server, client):
        await create(client)
        await work.begun.wait()
        client.reset()
        await client.socket.wait_closed()
        work.write("to nobody")
        work.end("there")
        async with attached(server, client.session_id) as late:
            assert (await done(late))["result"] == "there"
            assert late.transcript.texts["t1"] == "to nobody"


async def test_closed_session_ends_its_tasks_first() -> None:
    """Those that run and those that wait; `session.closed` is the last that anybody is told."""
    work = Task()
    async with viewing(work, worker_slots=1) as (server, client), attached(server, client.session_id) as other:
        for task_id in ("runs", "waits"):
            await create(client, task_id)
        await work.begun.wait()
        await client.send("session.close", event_id="bye")
        for viewer in (client, other):
            assert await until_closed(viewer) == 1000
            kinds = [event["type"] for event in viewer.transcript.events]
            assert kinds[-1] == "session.closed"
            ends = viewer.transcript.done
            assert {ends[task_id]["status"] for task_id in ("runs", "waits")} == {"cancelled"}
            assert ends["runs"]["for_event_id"] == "bye"
        assert work.running == 0


async def test_erased_session_stops_its_tasks() -> None:
    """Nothing of them is left."""
    work = Task()
    async with viewing(work, worker_slots=1) as (server, client), http_client(base_url=server.url) as http:
        for task_id in ("runs", "waits"):
            await create(client, task_id)
        await work.begun.wait()
        url = f"/v1/sessions/{client.session_id}"
        assert (await http.delete(url)).status_code == 204
        assert await until_closed(client) == 4410

        async def is_over() -> bool:
            return not (work.running or await server.engine.store.tracked())

        await eventually(is_over)
        assert (await http.get(f"{url}/tasks/runs")).status_code == 404


async def test_full_session_takes_no_task_and_ends_those_that_talk() -> None:
    """By name, both times."""
    work = Task()
    async with viewing(work, max_session_bytes=5000) as (_, client):
        await create(client)
        for _ in range(3):
            work.write("x" * 2000)
            await client.until("task.output_text.delta")
        work.write("too much")
        end = await done(client)
        assert (end["status"], end["error"]["code"]) == ("failed", "session_full")
        error = await refused(client, "task.create", name="work", input={}, event_id="e1")
        assert (error["type"], error["code"]) == ("conflict_error", "session_full")


# --- what is refused -------------------------------------------------------------------------------------------------

BAD_TASKS: list[tuple[dict[str, Any], str, str, str]] = [
    ({"name": "nothing", "input": {}}, "not_found_error", "unknown_task", "name"),
    ({"name": "work", "input": []}, "invalid_request_error", "invalid_input", "input"),
    ({"name": "work", "input": {"number": "x"}}, "invalid_request_error", "invalid_input", "input.number"),
    ({"name": "work", "input": {"size": 1}}, "invalid_request_error", "unknown_field", "input.size"),
    ({"name": "work"}, "invalid_request_error", "invalid_message", None),  # type: ignore[list-item]
    ({"name": 3, "input": {}}, "invalid_request_error", "invalid_message", "name"),
    ({"name": "work", "input": {}, "task_id": "session"}, "invalid_request_error", "reserved_id", "task_id"),
    ({"name": "work", "input": {}, "task_id": "control"}, "invalid_request_error", "reserved_id", "task_id"),
    ({"name": "work", "input": {}, "task_id": "a b"}, "invalid_request_error", "invalid_message", "task_id"),
    ({"name": "work", "input": {}, "retries": 9}, "invalid_request_error", "unknown_field", "retries"),
]


@pytest.mark.parametrize("subprotocol", CODECS)
async def test_task_that_is_not_allowed_is_refused(subprotocol: str) -> None:
    """A typed error names the field; nothing is made."""
    async with viewing(Task(), subprotocol=subprotocol) as (_, client):
        for fields, kind, code, param in BAD_TASKS:
            error = await refused(client, "task.create", event_id="e1", **fields)
            assert (error["type"], error["code"], error.get("param")) == (kind, code, param), fields
        error = await refused(client, "task.cancel", task_id="nothing", event_id="e1")
        assert (error["type"], error["code"], error["param"]) == ("not_found_error", "task_not_found", "task_id")
        assert client.transcript.positions == {"session": 0}


ODD_VALUES: dict[str, Any] = {
    "extension": msgspec.msgpack.Ext(5, b"x"),
    "keys": {1: {2.5: "x"}},
    "no key": {None: 1},
    "array key": {(1, 2): 3},
    "bytes": b"\xff",
    "large": 2**64 - 1,
    "nan": float("nan"),
}


@pytest.mark.parametrize("name", ODD_VALUES)
async def test_input_that_json_does_not_have(name: str) -> None:
    """What only one of the two encodings knows is refused, or is an input like any other: nothing breaks of it."""
    work = Task()
    async with viewing(work, subprotocol=CODECS[1]) as (_, client):
        fields = {"name": "work", "task_id": "t1", "event_id": "e1", "input": {"value": ODD_VALUES[name]}}
        await client.send("task.create", **fields)
        async with asyncio.timeout(PATIENCE_S):
            while (told := await client.receive())["type"] not in {"error", "task.created"}:
                pass
        if told["type"] == "error":
            assert (told["error"]["code"], told["error"]["fatal"]) == ("invalid_input", False)
        else:
            work.end()
            assert (await done(client))["status"] == "complete"
        await client.send("ping", event_id="lives-on")
        await client.until("pong", event_id="lives-on")


@pytest.mark.parametrize("number", [2**63, 2**64, 10**30, -(2**70)], ids=["63", "64", "10^30", "-70"])
async def test_numbers_larger_than_anybody_has(number: int) -> None:
    """A JSON client may send one, and a MessagePack client can look on."""
    work = Task()
    async with viewing(work) as (server, client), attached(server, client.session_id, subprotocol=CODECS[1]) as other:
        await client.send("task.create", name="work", task_id="t1", input={"value": number}, event_id="e1")
        async with asyncio.timeout(PATIENCE_S):
            while (told := await client.receive())["type"] not in {"error", "task.created"}:
                pass
        if told["type"] == "task.created":
            work.end()
            assert (await done(client))["status"] == (await done(other))["status"]
        await settled(other)


async def test_ids_are_one_namespace() -> None:
    """Of responses and tasks; the one that is taken changes nothing, whether it still runs or not."""
    work, model = Task(), Model()
    async with viewing(work, model) as (_, client):
        await create(client, "one")
        await client.respond("go", response_id="two")
        turn = await model.turn()
        for kind, fields in (
            ("response.create", {"response_id": "one", "input": "x", "multitask_strategy": "enqueue"}),
            ("task.create", {"task_id": "two", "name": "work", "input": {}}),
            ("task.create", {"task_id": "one", "name": "work", "input": {}}),
        ):
            error = await refused(client, kind, event_id="e1", **fields)
            assert (error["type"], error["code"]) == ("conflict_error", "already_exists")
        turn.end()
        work.end()
        await done(client, "one")
        error = await refused(client, "task.create", task_id="one", name="work", input={})
        assert error["code"] == "already_exists"
        await settled(client)
        assert len(events_of(client, "task.created")) == len(events_of(client, "response.created")) == 1


async def test_command_that_comes_twice_makes_one_task() -> None:
    """Under the same id with other content it is refused."""
    work = Task()
    async with viewing(work) as (_, client):
        fields = {"name": "work", "input": {"number": 1}, "event_id": "e1"}
        await client.send("task.create", **fields)
        await client.send("task.create", **fields)
        await client.until("task.created", for_event_id="e1")
        error = await refused(client, "task.create", **{**fields, "input": {"number": 2}})
        assert (error["type"], error["code"]) == ("conflict_error", "event_id_reused")
        await settled(client)
        assert len(events_of(client, "task.created")) == 1


async def test_session_has_so_many_unfinished_ones_and_no_more() -> None:
    """Responses and tasks together; once one has ended there is room again."""
    work, model = Task(), Model()
    async with viewing(work, model, worker_slots=1) as (_, client):
        await client.respond("go")
        turn = await model.turn()
        for number in range(MAX_UNFINISHED_CHANNELS - 1):
            await create(client, f"t{number}")
        error = await refused(client, "task.create", name="work", input={}, event_id="e1")
        assert (error["type"], error["code"]) == ("conflict_error", "too_many_tasks")
        error = await refused(client, "response.create", input="x", multitask_strategy="enqueue")
        assert error["code"] == "too_many_responses"
        await client.send("task.cancel", task_id="t5")
        await done(client, "t5")
        await create(client, "again", event_id="e1")
        turn.end()
        await client.send("session.close")
        assert await until_closed(client) == 1000
        assert len(client.transcript.done) == MAX_UNFINISHED_CHANNELS + 1


# --- the session's state ---------------------------------------------------------------------------------------------


async def test_session_s_state_has_its_tasks() -> None:
    """Who attaches with its positions is sent all that is not in it, and nothing that is."""
    work = Task()
    async with viewing(work) as (server, client), http_client(base_url=server.url) as http:
        await create(client, "over")
        work.end("before")
        await done(client, "over")
        await create(client, "runs")
        work.write("so far ")
        await client.until("task.output_text.delta", task_id="runs")
        state = (await http.get(f"/v1/sessions/{client.session_id}")).json()
        over, runs = state["tasks"]
        assert (over["task_id"], over["status"], over["result"]) == ("over", "complete", "before")
        assert (runs["task_id"], runs["status"], runs["output_text"]) == ("runs", "running", "so far ")
        assert set(state["positions"]) == {"session", "runs"}
        transcript = Transcript()
        transcript.positions = dict(state["positions"])
        transcript.texts["runs"], transcript.attempts["runs"] = runs["output_text"], runs["attempt"]
        async with attached(server, client.session_id, transcript=transcript, after=transcript.after()) as late:
            work.write("and on")
            work.end()
            await done(late, "runs")
            assert transcript.texts["runs"] == "so far and on"
            assert [event["type"] for event in transcript.events].count("task.created") == 0


async def test_task_outlives_its_session_s_short_life() -> None:
    """A session that nobody uses is kept for its tasks, while they work and for as long as their time says."""
    work = Task()
    async with (
        viewing(work, session_ttl_s=2.0, task_ttl_s=60.0) as (server, client),
        http_client(base_url=server.url) as http,
    ):
        await create(client)
        await work.begun.wait()
        client.reset()
        await client.socket.wait_closed()
        await asyncio.sleep(3.0)
        work.end("kept")

        async def is_over() -> bool:
            return await server.engine.store.tracked() == 0

        await eventually(is_over)
        await asyncio.sleep(3.0)
        answer = await http.get(f"/v1/sessions/{client.session_id}/tasks/t1")
        assert (answer.status_code, answer.json()["result"]) == (200, "kept")


# --- the instance's end ----------------------------------------------------------------------------------------------


async def test_task_that_finishes_in_time_is_whole() -> None:
    """The instance waits for it, and begins no other."""
    work = Task()
    async with viewing(work, drain_s=30.0) as (server, client):
        await create(client)
        await work.begun.wait()
        server.stop()
        await drained(server)
        error = await refused(client, "task.create", name="work", input={}, event_id="e1")
        assert error["code"] == "draining"
        work.end("in time")
        assert (await done(client))["result"] == "in time"
        assert await until_closed(client) == 1012


@pytest.mark.parametrize("slots", [1, 2])
async def test_task_that_does_not_finish_fails_by_name(slots: int) -> None:
    """With what it has told."""
    work = Task()
    async with viewing(work, drain_s=1.0, worker_slots=slots) as (server, client):
        for task_id in ("t1", "t2"):
            await create(client, task_id)
        await work.begun.wait()
        server.stop()
        for task_id in ("t1", "t2")[:slots]:
            end = await done(client, task_id)
            assert (end["status"], end["error"]["code"]) == ("failed", "instance_shutdown")
        await until_closed(client)
        assert work.running == 0
        assert ("t2" in client.transcript.attempts) is (slots == 2)
