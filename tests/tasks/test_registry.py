"""What can be a task, what its input may be, and what a model is told of it."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import Meta

from realtime import Context, task
from realtime.errors import InvalidRequest, NotFound
from realtime.parts import make_parts
from realtime.settings import Settings, SettingsError
from realtime.tasks import builtin
from realtime.tasks.registry import MARK, Registry, tasks_in


class Page(msgspec.Struct, forbid_unknown_fields=True):
    """One page."""

    number: Annotated[int, Meta(ge=1)]
    kind: Literal["text", "table"] = "text"


class Batch(msgspec.Struct, forbid_unknown_fields=True):
    """Pages."""

    pages: list[Page]
    due: datetime.date | None = None
    type: int = 0


class Folder(msgspec.Struct):
    """Folders in folders."""

    folders: list[Folder]
    cover: Page


class Row(msgspec.Struct, array_like=True):
    """An input that is an array."""

    number: int


class Anything(msgspec.Struct):
    """An input with anything in it."""

    value: Any


class Odd(msgspec.Struct):
    """An input that no JSON can be."""

    value: Path


@task(retries=2, timeout_s=60, concurrency=3, priority="high", tool=True)
async def read_pages(ctx: Context, batch: Batch) -> int:
    """Read pages.

    All of them.
    """
    return len(batch.pages)


@task("count")
def count_pages(batch: Batch) -> int:
    return len(batch.pages)


@task(tool=True)
async def sort(ctx: Context, folder: Folder) -> None:
    """Sort folders."""


def test_a_task_is_what_its_function_says() -> None:
    """Its name, its description and the type of its input; the function stays what it is."""
    registry = Registry([read_pages, count_pages])
    definition = registry.definition("read_pages")
    assert (definition.function, definition.input_type, definition.is_async) == (read_pages, Batch, True)
    assert definition.description == "Read pages.\n\nAll of them."
    assert (definition.retries, definition.timeout_s, definition.concurrency, definition.priority) == (2, 60, 3, "high")
    plain = registry.definition("count")
    assert (plain.function, plain.is_async, plain.description, plain.tool) == (count_pages, False, "", False)
    assert count_pages(Batch([Page(1)])) == 1


def test_task_that_there_is_not() -> None:
    """A typed error names the field."""
    for ask in (Registry().definition, lambda name: Registry().check(name, {})):
        with pytest.raises(NotFound) as refusal:
            ask("nothing")
        assert (refusal.value.code, refusal.value.param) == ("unknown_task", "name")


def test_input_is_kept_as_json() -> None:
    """With its defaults, so that a later version of the task reads what was meant."""
    checked = Registry([read_pages]).check("read_pages", {"pages": [{"number": 1}], "due": "2026-01-02"})
    assert json.loads(checked) == {"pages": [{"number": 1, "kind": "text"}], "due": "2026-01-02", "type": 0}
    assert msgspec.json.decode(checked, type=Batch).due == datetime.date(2026, 1, 2)


BAD_INPUTS: list[tuple[Any, str, str]] = [
    (None, "invalid_input", "input"),
    ([], "invalid_input", "input"),
    ({}, "invalid_input", "input"),
    ({"pages": "secret"}, "invalid_input", "input.pages"),
    ({"pages": [{"number": 0}]}, "invalid_input", "input.pages[0].number"),
    ({"pages": [{"number": "secret"}]}, "invalid_input", "input.pages[0].number"),
    ({"pages": [{"number": 1, "kind": "secret"}]}, "invalid_input", "input.pages[0].kind"),
    ({"pages": [{"number": 1, "colour": "secret"}]}, "unknown_field", "input.pages[0].colour"),
    ({"pages": [], "size": 1}, "unknown_field", "input.size"),
    ({"pages": [], "due": "secret"}, "invalid_input", "input.due"),
    ({"pages": [], "type": "secret"}, "invalid_input", "input.type"),
]


@pytest.mark.parametrize(("given", "code", "param"), BAD_INPUTS)
def test_input_that_is_refused(given: Any, code: str, param: str) -> None:
    """The error says where, and repeats nothing of it."""
    with pytest.raises(InvalidRequest) as refusal:
        Registry([read_pages]).check("read_pages", given)
    assert (refusal.value.code, refusal.value.param) == (code, param)
    assert "secret" not in refusal.value.message
    assert "message" not in refusal.value.message.lower()


@task("anything")
async def take_anything(ctx: Context, given: Anything) -> None: ...


@pytest.mark.parametrize("value", [{(1, 2): 3}, msgspec.msgpack.Ext(1, b""), "\ud800"], ids=["keys", "ext", "text"])
def test_input_that_json_does_not_have_is_refused(value: Any) -> None:
    """MessagePack has more than that."""
    with pytest.raises(InvalidRequest) as refusal:
        Registry([take_anything]).check("anything", {"value": value})
    assert (refusal.value.code, refusal.value.param) == ("invalid_input", "input")


def test_input_that_is_too_deep_is_refused() -> None:
    """It would be so for whoever reads it."""
    registry = Registry([take_anything])
    value: Any = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(InvalidRequest) as refusal:
        registry.check("anything", {"value": value})
    assert (refusal.value.code, refusal.value.param) == ("invalid_input", "input")
    while value:  # or its end would be a recursion, too
        value = value.pop()


# --- what can't be a task --------------------------------------------------------------------------------------------


async def no_input(ctx: Context) -> None: ...
async def no_context(batch: Batch) -> None: ...
async def too_much(ctx: Context, batch: Batch, more: int) -> None: ...
async def untyped(ctx: Context, batch) -> None: ...  # type: ignore[no-untyped-def]
async def no_struct(ctx: Context, batch: dict[str, int]) -> None: ...
async def named(ctx: Context, *, batch: Batch) -> None: ...
async def many(*all: Context, batch: Batch) -> None: ...
async def odd(ctx: Context, odd: Odd) -> None: ...
def plain_context(ctx: Context, batch: Batch) -> None: ...
def plain_nothing() -> None: ...


@pytest.mark.parametrize(
    "function",
    [no_input, no_context, too_much, untyped, no_struct, named, many, odd, plain_context, plain_nothing],
    ids=lambda function: function.__name__,
)
def test_function_of_another_kind_is_refused(function: Callable[..., Any]) -> None:
    """When it is decorated, and not when it is called."""
    with pytest.raises(TypeError):
        task()(function)
    assert not hasattr(function, MARK)


async def work(ctx: Context, batch: Batch) -> None:
    """Any task."""


async def work_on_row(ctx: Context, row: Row) -> None:
    """Any task."""


@pytest.mark.parametrize(
    "options",
    [
        {"name": "two words"},
        {"name": "a" * 65},
        {"name": "new\nline"},
        {"retries": -1},
        {"timeout_s": 0},
        {"timeout_s": -1.0},
        {"timeout_s": float("nan")},
        {"concurrency": 0},
        {"concurrency": -1},
        {"priority": "urgent"},
    ],
    ids=repr,
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    """They would mean something else, or nothing."""
    with pytest.raises(ValueError, match=r"work|name"):
        task(**options)(work)


def test_tool_has_to_take_an_object() -> None:
    """A model gives a tool nothing else; a task that is no tool may take an array."""
    with pytest.raises(ValueError, match="object"):
        task(tool=True)(work_on_row)
    assert Registry([task("row")(work_on_row)]).check("row", [1]) == "[1]"


def test_two_tasks_of_one_name_are_refused() -> None:
    """The same one twice is no matter."""

    @task("count")
    async def other(ctx: Context, batch: Batch) -> None: ...

    assert list(Registry([count_pages, count_pages]).definitions) == ["count"]
    with pytest.raises(ValueError, match="count"):
        Registry([count_pages, other])


def test_function_without_the_decorator_is_refused() -> None:
    """By name."""
    with pytest.raises(ValueError, match="no_input"):
        Registry([no_input])


# --- tools -----------------------------------------------------------------------------------------------------------


def test_only_tools_are_offered_to_the_model() -> None:
    """With what a person wrote about them."""
    [tool] = Registry([read_pages, count_pages]).tools()
    assert (tool.name, tool.description) == ("read_pages", "Read pages.\n\nAll of them.")


@pytest.mark.parametrize("function", [read_pages, sort], ids=["nested", "recursive"])
def test_tool_definition_is_a_json_schema_of_an_object(function: Callable[..., Any]) -> None:
    """Every reference in it leads somewhere."""
    [tool] = Registry([function]).tools()
    schema = json.loads(msgspec.json.encode(tool.input_schema))
    assert schema["type"] == "object"
    assert set(schema["required"]) <= set(schema["properties"])
    references = list(_references(schema))
    assert references
    for reference in references:
        assert reference.startswith("#/$defs/")
        assert "type" in schema["$defs"][reference.removeprefix("#/$defs/")]


def _references(schema: Any) -> Iterator[str]:
    children = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    for child in children:
        yield from _references(child)
    if isinstance(schema, dict) and "$ref" in schema:
        yield schema["$ref"]


# --- modules ---------------------------------------------------------------------------------------------------------

MODULE = """
import msgspec
from realtime import Context, task

class Input(msgspec.Struct):
    text: str

@task()
async def {name}(ctx: Context, given: Input) -> str:
    return given.text
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory for modules, which are forgotten after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_tasks_of_modules(folder: Path) -> None:
    """Found in the working directory, those that a module imports too, and each once."""
    (folder / "reports").mkdir()
    (folder / "reports" / "daily.py").write_text(MODULE.format(name="report"))
    (folder / "all_of_them.py").write_text("from reports.daily import report\nimport math\n")
    found = tasks_in(["reports.daily", "all_of_them"])
    assert [getattr(one, MARK).name for one in found] == ["report"]
    parts = make_parts(Settings(tasks=("all_of_them",)), None, ())
    assert {"report", "analyse", "clinical_note", "summarise"} == set(parts.registry.definitions)


def test_two_modules_with_one_name_are_refused(folder: Path) -> None:
    """Nobody could say which of the two would run."""
    for name in ("one", "other"):
        (folder / f"{name}.py").write_text(MODULE.format(name="report"))
    with pytest.raises(ValueError, match="report"):
        make_parts(Settings(tasks=("one", "other")), None, ())


def test_module_that_there_is_not() -> None:
    """The setting is named."""
    with pytest.raises(SettingsError, match="REALTIME_TASKS"):
        make_parts(Settings(tasks=("no.such.module",)), None, ())


def test_own_task_takes_the_place_of_a_built_in_one() -> None:
    """Where it has its name."""

    @task("analyse")
    async def mine(ctx: Context, batch: Batch) -> None: ...

    parts = make_parts(Settings(), None, [mine])
    assert parts.registry.definition("analyse").function is mine
    assert set(parts.registry.definitions) == {getattr(one, MARK).name for one in builtin.BUILTIN_TASKS}


def test_the_decorator_needs_no_parentheses() -> None:
    """As with any other."""

    @task
    async def bare(ctx: Context, batch: Batch) -> None: ...

    assert list(Registry([bare]).definitions) == ["bare"]
