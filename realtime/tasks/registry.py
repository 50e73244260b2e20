"""The tasks that a server knows: functions with a typed input, registered by a decorator.

    class Batch(msgspec.Struct):
        pages: list[str]

    @task(retries=2, timeout_s=60)
    async def read_pages(ctx: Context, batch: Batch) -> int:
        for number, page in enumerate(batch.pages, 1):
            ...
            await ctx.progress(number, len(batch.pages), f"read page {number}")
        return len(batch.pages)

An `async def` takes a context and its input; a plain function takes the input alone and runs in a process of its own,
so that it may use the processor as long as it likes.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar, get_type_hints, overload

import msgspec
from msgspec import Struct

from realtime.decoding import invalid
from realtime.errors import InvalidRequest, NotFound
from realtime.protocol import Id
from realtime.responders.base import Tool

Priority = Literal["high", "normal", "low"]
PRIORITIES: tuple[Priority, ...] = ("high", "normal", "low")
POSITIONAL = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
MARK = "__realtime_task__"
"""The attribute that the decorator leaves at a function."""
F = TypeVar("F", bound=Callable[..., Any])


class TaskDefinition(Struct, frozen=True, kw_only=True):
    """One task: its function, the type of its input, and how it is run.

    `is_async` tells the two kinds of functions apart. An attempt may take `timeout_s` (`None`: as long as it likes);
    one that raises is followed by up to `retries` more. At most `concurrency` run at once in one process (`None`: as
    many as it has room for), those of a higher `priority` first. A `tool` is offered to the model in every response.
    """

    name: str
    function: Callable[..., Any]
    input_type: type[Any]
    is_async: bool
    description: str = ""
    retries: int = 0
    timeout_s: float | None = None
    concurrency: int | None = None
    priority: Priority = "normal"
    tool: bool = False


@overload
def task(function: F, /) -> F: ...


@overload
def task(
    name: str | None = None,
    *,
    retries: int = 0,
    timeout_s: float | None = None,
    concurrency: int | None = None,
    priority: Priority = "normal",
    tool: bool = False,
) -> Callable[[F], F]: ...


def task(
    name: F | str | None = None,
    *,
    retries: int = 0,
    timeout_s: float | None = None,
    concurrency: int | None = None,
    priority: Priority = "normal",
    tool: bool = False,
) -> F | Callable[[F], F]:
    """Make a task of a function, which stays what it is: `@task`, or `@task(…)` with options. Its name is that of the
    function unless `name` is given, its description the docstring.

    Raises `TypeError` or `ValueError` for what can't be a task.
    """

    def register(function: F) -> F:
        definition = TaskDefinition(
            name=name if isinstance(name, str) else function.__name__,
            function=function,
            input_type=_input_type(function),
            is_async=inspect.iscoroutinefunction(function),
            description=inspect.getdoc(function) or "",
            retries=retries,
            timeout_s=timeout_s,
            concurrency=concurrency,
            priority=priority,
            tool=tool,
        )
        _check(definition)
        setattr(function, MARK, definition)
        return function

    return register(name) if callable(name) else register


class Registry:
    """Tasks by name. Raises `ValueError` for a function that is no task, or a name that two have."""

    def __init__(self, functions: Iterable[Callable[..., Any]] = ()) -> None:
        self.definitions: dict[str, TaskDefinition] = {}
        for function in functions:
            self._add(function)

    def check(self, name: str, given: Any) -> str:
        """The input of a task as JSON, checked. Raises `NotFound` for a task that there is not, `InvalidRequest`."""
        definition = self.definition(name)
        try:
            typed = msgspec.convert(given, definition.input_type)
            return msgspec.json.encode(typed).decode()
        except msgspec.ValidationError as error:
            raise _refusal(invalid(error)) from None
        except (TypeError, RecursionError, OverflowError, UnicodeError):
            raise InvalidRequest("invalid_input", "The input can't be read.", param="input") from None

    def definition(self, name: str) -> TaskDefinition:
        """The task of that name. Raises `NotFound`."""
        definition = self.definitions.get(name)
        if definition is None:
            raise NotFound("unknown_task", "There is no task of that name.", param="name")
        return definition

    def tools(self) -> list[Tool]:
        """What a model is told of those that it may call."""
        return [_tool(definition) for definition in self.definitions.values() if definition.tool]

    def _add(self, function: Callable[..., Any]) -> None:
        definition = getattr(function, MARK, None)
        if not isinstance(definition, TaskDefinition):
            raise ValueError(f"{function!r} is no task: decorate it with realtime.task")
        known = self.definitions.setdefault(definition.name, definition)
        if known.function is not function:
            raise ValueError(f"two tasks have the name {definition.name!r}")


def tasks_in(modules: Sequence[str]) -> list[Callable[..., Any]]:
    """The tasks that modules define or import, by the modules' names; they may be in the working directory. Raises
    `ImportError`, or what they raise."""
    if modules and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # where it is for `python -m`, and is not for an installed command
    found: dict[Callable[..., Any], None] = {}  # each of them once, however many modules have it
    for module in modules:
        for value in vars(importlib.import_module(module)).values():
            if isinstance(getattr(value, MARK, None), TaskDefinition):
                found[value] = None
    return list(found)


def _input_type(function: Callable[..., Any]) -> type[Any]:
    wanted = 2 if inspect.iscoroutinefunction(function) else 1
    parameters = list(inspect.signature(function).parameters.values())
    if len(parameters) != wanted or any(one.kind not in POSITIONAL for one in parameters):
        takes = "a context and its input" if wanted == 2 else "its input alone"
        raise TypeError(f"{function.__qualname__} has to take {takes}")
    input_type = get_type_hints(function).get(parameters[-1].name)
    if not (isinstance(input_type, type) and issubclass(input_type, Struct)):
        raise TypeError(f"the input of {function.__qualname__} has to be annotated as a msgspec.Struct")
    return input_type


def _check(definition: TaskDefinition) -> None:
    try:
        msgspec.convert(definition.name, Id)
    except msgspec.ValidationError:
        raise ValueError(f"{definition.name!r} is no name for a task") from None
    if not (definition.retries >= 0 and _is_positive(definition.concurrency) and _is_positive(definition.timeout_s)):
        raise ValueError(f"retries, concurrency and timeout_s of {definition.name} have to be positive")
    if definition.priority not in PRIORITIES:
        raise ValueError(f"the priority of {definition.name} is one of {', '.join(PRIORITIES)}")
    schema = _tool(definition).input_schema  # which a type that JSON does not have is refused for
    if definition.tool and schema["type"] != "object":
        raise ValueError(f"the input of {definition.name} has to be an object, or a model can't call it")


def _is_positive(number: float | None) -> bool:
    return number is None or number > 0


def _refusal(error: InvalidRequest) -> InvalidRequest:
    """The error of a message as that of a task's input."""
    param = f"input.{error.param}" if error.param else "input"
    match error.code:
        case "unknown_field":
            return InvalidRequest("unknown_field", error.message, param=param)
        case "unknown_type":  # its `type` is the task's own affair
            return InvalidRequest("invalid_input", "That value is not allowed.", param=param)
        case _:
            return InvalidRequest("invalid_input", error.message, param=param)


def _tool(definition: TaskDefinition) -> Tool:
    (schema,), components = msgspec.json.schema_components([definition.input_type])
    name = schema["$ref"].rpartition("/")[2]
    own = dict(components[name])
    if f'"{schema["$ref"]}"' not in msgspec.json.encode(components).decode():
        del components[name]  # or it is part of itself
    if components:
        own["$defs"] = components
    return Tool(name=definition.name, description=definition.description, input_schema=own)
