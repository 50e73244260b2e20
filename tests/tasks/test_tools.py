"""Tool calls as tasks, below the model: what is let through, what the store's faults do, and what cancelling leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from realtime import Context, TaskError, task
from realtime.conversation import ToolCall, ToolResult
from realtime.errors import NotFound, RateLimited, RealtimeError, StoreError
from realtime.live import LiveSession
from realtime.protocol import MAX_UNFINISHED_CHANNELS, SESSION_CHANNEL, Bill, Overrides, TaskDone
from realtime.session import ResponseState
from realtime.store.base import Write
from realtime.tasks import tools as tools_module
from realtime.tasks.record import read_record
from realtime.tasks.tools import MAX_RESULT_CHARS, TaskTools
from tests.contract import closed, item
from tests.support.principals import known
from tests.support.sdk import turns
from tests.support.stores import Faulty, Slow
from tests.tasks.test_run import Gate, Job
from tests.tasks.workplace import PATIENCE_S, engine_of, eventually

ANN = known("ann")

pytestmark = pytest.mark.usefixtures("reports")

RESPONSE = ResponseState("resp_1", "m", "ann", Overrides(), None)
PAID = ResponseState("resp_1", "m", "ann", Overrides(), Bill(payer="user:ann", hold_id="h", tokens=0, made_at=0.0))


@task(tool=True)
async def shout(ctx: Context, job: Job) -> str:
    """Shout."""
    return job.text.upper()


@task(tool=True)
async def fail(ctx: Context, job: Job) -> None:
    """Fail."""
    raise TaskError("no_window", "There is no window.")


@task(tool=True)
async def tell(ctx: Context, job: Job) -> str:
    """Tell more than a model is to read."""
    return "x" * MAX_RESULT_CHARS


@task()
async def secret(ctx: Context, job: Job) -> str:
    """A task that is not the model's."""
    return "secret"


class Network(Slow, Faulty):
    """A store that takes its time, and fails."""


class Place:
    """A session whose model calls tools."""

    def __init__(self, store: Faulty, live: LiveSession, tools: TaskTools, gate: Gate) -> None:
        self.store = store
        self.live = live
        self.tools = tools
        self.gate = gate

    async def call(self, name: str, call_id: str = "c1", /, **given: Any) -> ToolResult:
        """Have a tool called."""
        async with asyncio.timeout(PATIENCE_S):
            return await self.tools.call(self.live, RESPONSE, ToolCall(call_id, name, dict(given)))

    async def ended(self) -> list[TaskDone]:
        """The ends of the session's tasks, once all have one, and the index knows of none any more."""

        async def are_over() -> bool:
            return not (self.live.state.unfinished_tasks or await self.store.tracked())

        await eventually(are_over)
        records = [await read_record(self.store, self.live.id, task_id) for task_id in self.live.state.tasks]
        return [record.done for record in records if record.done]


async def everything(_payer: str, _take_place: Callable[[], Awaitable[None]]) -> None:
    """Refuse nobody a task."""


@asynccontextmanager
async def calling(
    *,
    max_session_bytes: int = 1_000_000,
    admit: Callable[[str, Callable[[], Awaitable[None]]], Awaitable[object]] = everything,
) -> AsyncIterator[Place]:
    """A session, and tools; one of them, `wait`, waits at a gate."""
    gate = Gate()

    @task(tool=True)
    async def wait(ctx: Context, job: Job) -> str:
        """Wait."""
        await gate.wait()
        return "done"

    store = Network(turns=lambda: 2)
    store._max_bytes = max_session_bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tools_module, "RETRY_S", 0.01)
        async with engine_of(shout, fail, tell, secret, wait, store=store) as engine:
            session_id = await engine.commands.create(ANN)
            async with engine.hub.use(session_id) as live:
                yield Place(store, live, TaskTools(engine.desk, admit), gate)


async def test_result_goes_back_as_json() -> None:
    """Under the call's id; the task is the session's, and says which response has made it."""
    async with calling() as place:
        assert await place.call("shout", text="hi") == ToolResult("c1", '"HI"')
        [entry] = await place.store.read(place.live.id, SESSION_CHANNEL, 0, 1000)
        assert entry.task.response_id == "resp_1"  # type: ignore[union-attr]
        assert entry.user == "ann"  # type: ignore[union-attr]


async def test_a_payer_whose_tasks_all_run_or_wait_has_the_model_make_none() -> None:
    """Who pays for the response pays for its tools; a place that is free again is taken."""
    async with calling() as place:
        tools = TaskTools(msgspec.structs.replace(place.tools._desk, most_per_payer=1), everything)
        waiting = asyncio.create_task(tools.call(place.live, PAID, ToolCall("c1", "wait", {"text": ""})))
        await place.gate.until_begun()
        called = await tools.call(place.live, PAID, ToolCall("c2", "shout", {"text": "hi"}))
        assert called == ToolResult("c2", "Too many tasks of yours run or wait.", is_error=True)
        place.gate.open.set()
        assert (await waiting).content == '"done"'
        await place.ended()
        assert (await tools.call(place.live, PAID, ToolCall("c3", "shout", {"text": "hi"}))).content == '"HI"'


@pytest.mark.parametrize(
    "error", [RateLimited("rate_limited", "Too many tasks."), StoreError("store_unavailable", "Later.")]
)
async def test_a_payer_who_may_make_no_more_tasks_has_the_model_make_none(error: RealtimeError) -> None:
    """The model is told why; nor is one made while nobody knows how many there may be."""
    asked: list[str] = []

    async def refuse(payer: str, _take_place: Callable[[], Awaitable[None]]) -> None:
        asked.append(payer)
        raise error

    async with calling(admit=refuse) as place:
        paid = msgspec.structs.replace(RESPONSE, bill=Bill(payer="ann", hold_id="h", tokens=1, made_at=0.0, tasks=True))
        result = await place.tools.call(place.live, paid, ToolCall("c1", "shout", {"text": "hi"}))
        assert result == ToolResult("c1", error.message, is_error=True)
        assert asked == ["ann"]
        assert not place.live.state.tasks


@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        ("fail", {}, "There is no window."),
        ("shout", {"text": 1}, "Expected `str`, got `int`."),
        ("tell", {}, "The task's result is too long to be read here."),
        ("nothing", {}, "There is no tool of that name."),
        ("secret", {}, "There is no tool of that name."),
        ("analyse", {"text": "x"}, "There is no tool of that name."),
    ],
    ids=["raises", "input", "long", "unknown", "not offered", "built in"],
)
async def test_what_goes_wrong_the_model_is_told(name: str, given: dict[str, Any], told: str) -> None:
    """A task that was not offered is no tool, whatever the model has read about it."""
    async with calling() as place:
        assert await place.call(name, **given) == ToolResult("c1", told, is_error=True)
        if "no tool" in told:
            assert place.live.state.tasks == {}


async def test_session_takes_only_so_many_at_once() -> None:
    """A model that calls a hundred tools gets what there is room for, and is told of the rest."""
    async with calling() as place:
        calls = [asyncio.create_task(place.call("wait", str(number))) for number in range(100)]
        await place.gate.until_begun()

        async def are_refused() -> bool:
            return sum(call.done() for call in calls) == 100 - MAX_UNFINISHED_CHANNELS

        await eventually(are_refused)
        assert len(place.live.state.unfinished_tasks) == MAX_UNFINISHED_CHANNELS
        place.gate.open.set()
        results = await asyncio.gather(*calls)
        assert sum(result.is_error for result in results) == 100 - MAX_UNFINISHED_CHANNELS
        assert [result.call_id for result in results] == [str(number) for number in range(100)]


@pytest.mark.parametrize("how", ["closed", "full"])
async def test_session_that_takes_no_more_is_told_as_an_error(how: str) -> None:
    """The response may still say so."""
    async with calling(max_session_bytes=1000 if how == "full" else 1_000_000) as place:
        event = item("x" * 1000) if how == "full" else closed()
        await place.store.append(place.live.id, [Write(SESSION_CHANNEL, [event])])
        result = await place.call("shout", text="hi")
        assert (result.call_id, result.is_error) == ("c1", True)


@pytest.mark.parametrize("how", ["closed", "full"])
async def test_session_that_takes_no_more_takes_no_place(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is free again at once: nobody has to look after it before."""
    monkeypatch.setattr("realtime.tasks.desk.SUBMIT_S", 600.0)

    async def admit(_payer: str, take_place: Callable[[], Awaitable[None]]) -> None:
        await take_place()
        assert await place.store.tracked() == 1

    async with calling(max_session_bytes=1000 if how == "full" else 1_000_000, admit=admit) as place:
        event = item("x" * 1000) if how == "full" else closed()
        await place.store.append(place.live.id, [Write(SESSION_CHANNEL, [event])])
        called = await place.tools.call(place.live, PAID, ToolCall("c1", "shout", {"text": "hi"}))
        assert called.is_error
        assert await place.store.tracked() == 0


async def test_session_that_is_gone_ends_the_call() -> None:
    """There is nobody to tell."""
    async with calling() as place:
        waiting = asyncio.create_task(place.call("wait"))
        await place.gate.until_begun()
        await place.store.erase(place.live.id)
        with pytest.raises(NotFound):
            await waiting
        with pytest.raises(NotFound):
            await place.call("shout")


@pytest.mark.parametrize("fault", ["before", "after", "untold"])
async def test_task_is_made_once_whatever_the_store_answers(fault: str) -> None:
    """A call that was not answered may have had its effect."""
    async with calling() as place:
        place.store.faults = [fault]
        calling_ = asyncio.create_task(place.call("shout", text="hi"))
        if fault == "untold":
            await turns()
            place.live.doubt()  # as a store does that can't be sure
        assert await calling_ == ToolResult("c1", '"HI"')
        assert len(place.live.state.tasks) == 1


async def test_call_goes_on_through_an_outage() -> None:
    """The result is read once the store tells it."""
    async with calling() as place:
        waiting = asyncio.create_task(place.call("wait"))
        await place.gate.until_begun()
        place.store.is_down = True
        place.gate.open.set()
        await asyncio.sleep(0.03)
        place.store.is_down = False
        assert await waiting == ToolResult("c1", '"done"')


@pytest.mark.parametrize("hops", range(0, 60, 3))
async def test_cancelled_at_any_moment_no_task_goes_on(hops: int) -> None:
    """Neither one that runs, nor one that is about to be made."""
    async with calling() as place:
        waiting = asyncio.create_task(place.call("wait"))
        await turns(hops)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        await turns()
        assert [end.status for end in await place.ended()] == ["cancelled"] * len(place.live.state.tasks)


async def test_cancelled_while_its_task_is_being_recorded() -> None:
    """The task is recorded all the same, and then cancelled."""
    async with calling() as place:
        place.store.faults = ["before", "before", "after"]
        waiting = asyncio.create_task(place.call("wait"))
        await turns()
        waiting.cancel()
        await asyncio.wait([waiting])

        async def is_recorded() -> bool:
            return bool(place.live.state.tasks)

        await eventually(is_recorded)
        [end] = await place.ended()
        assert end.status == "cancelled"
