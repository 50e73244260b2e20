"""The pages say what the code does: every table is held against the code, in both directions."""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
import types
from collections.abc import Iterator, Set
from importlib.metadata import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest
from msgspec import Meta, Struct
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from starlette.routing import Route

import realtime
from realtime import (
    call,
    connection,
    connections,
    errors,
    feed,
    http,
    http_transport,
    inbox,
    log,
    oneshot,
    opening,
    protocol,
    session,
    sessions,
    settings,
    snapshot,
    sse,
    transport,
    turn,
    viewers,
)
from realtime.access import claims, door, endpoints, principal, verifiers
from realtime.app import create_app
from realtime.cli import main
from realtime.client.connection import RECONNECT_CODES
from realtime.observe import metrics
from realtime.responders.demo import demo
from realtime.store import memory
from realtime.tasks import analyse, clinical_note, outcome, record, summarise
from realtime.tasks.builtin import BUILTIN_TASKS
from realtime.tasks.registry import Registry
from realtime.usage import INCOMPLETE
from scripts.schemas import CLIENT, IN_THE_LOG_ONLY, SERVER
from scripts.update_pins import EXTRAS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(realtime.__file__).parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md")])
PROTOCOL = (ROOT / "docs/protocol.md").read_text()
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()
OPERATIONS = (ROOT / "docs/operations.md").read_text()
OBSERVABILITY = (ROOT / "docs/observability.md").read_text()
DECISIONS = (ROOT / "docs/decisions.md").read_text()

Row = dict[str, str]


# --- reading Markdown ------------------------------------------------------------------------------------------------


def section(page: str, heading: str) -> str:
    """The text under a heading, up to the next one of any level."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", page, re.MULTILINE | re.DOTALL)
    assert found, f"there is no heading {heading!r}"
    return found[1]


def tables(text: str) -> list[list[Row]]:
    """The tables in a text; a row maps the names of its columns to their cells."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text + "\n", re.MULTILINE):
        lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
        assert all(len(line) == len(lines[0]) for line in lines), f"not every row has {len(lines[0])} cells: {block}"
        found.append([dict(zip(lines[0], line, strict=True)) for line in lines[2:]])
    return found


def table(page: str, heading: str, first: str) -> dict[str, Row]:
    """The table under a heading whose first column is called `first`: rows by what that column says."""
    for rows in tables(section(page, heading)):
        if next(iter(rows[0])) == first:
            by_name = {plain(row[first]): row for row in rows}
            assert len(by_name) == len(rows), f"two rows of {heading!r} are about the same"
            return by_name
    raise AssertionError(f"under {heading!r} there is no table of {first!r}")


def plain(cell: str) -> str:
    """A cell without its markup: links are their text."""
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", cell).replace("`", "")


def code_in(page: str) -> Iterator[str]:
    """Every line of code in a page, in blocks and in line."""
    outside = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    for block in re.findall(r"^```\w*\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        yield from block.splitlines()
    yield from (line.strip() for line in re.findall(r"^ {4,}(.*)$", outside, re.MULTILINE))
    yield from re.findall(r"`([^`\n]+)`", outside)


# --- messages --------------------------------------------------------------------------------------------------------

OBJECTS: dict[str, type[Struct]] = {
    "Overrides": protocol.Overrides,
    "New item": protocol.NewItem,
    "Session": protocol.Session,
    "Participant": protocol.Participant,
    "Item": protocol.Item,
    "Truncation": protocol.Truncation,
    "Response": protocol.Response,
    "Task": protocol.Task,
    "Usage": protocol.Usage,
    "Rate limit": protocol.RateLimit,
    "Error body": protocol.ErrorBody,
    "Failure": protocol.Failure,
    "Accepted": sessions.Accepted,
    "Revocation": endpoints.Revocation,
    "Session state": snapshot.SessionSnapshot,
    "Response state": snapshot.ResponseSnapshot,
    "Task state": record.TaskSnapshot,
    "One-shot": oneshot.OneShot,
    "Message": oneshot.OneShotMessage,
    "Completion": oneshot.Completion,
    "Done": oneshot.Done,
    "Sources": analyse.Sources,
    "Source": analyse.Source,
    "Report": analyse.Report,
    "Entity": analyse.Entity,
    "Document report": analyse.DocumentReport,
    "Document": summarise.Document,
    "Summary": summarise.Summary,
    "Visit": clinical_note.Visit,
    "Utterance": clinical_note.Utterance,
    "Clinical note": clinical_note.ClinicalNote,
    "Note sections": clinical_note.Sections,
}
NAMES = {kind: name.lower() for name, kind in OBJECTS.items()}
PATTERNS = {get_args(protocol.Id)[1].pattern: "id", r"\S": "text"}
"""What the page calls a string of such a form."""


EVERY_EVENT = {field.name for field in msgspec.structs.fields(protocol.ChannelEvent)}


def described(hint: Any) -> str:
    """A type in the words of the protocol page; `None` beside others is left to the column `required`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        meta = arguments[1]
        return PATTERNS[meta.pattern] if meta.pattern else f"{described(arguments[0])}{bounds(arguments[0], meta)}"
    if origin is Literal:
        return " or ".join(str(argument).lower() for argument in arguments)
    if origin is list:
        return f"list of {described(arguments[0])}"
    if origin is dict:
        return f"map to {described(arguments[1])}"
    if origin in {Union, types.UnionType}:
        *first, last = [described(argument) for argument in arguments]
        return f"{', '.join(first)} or {last}"
    words = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null", Any: "anything"}
    return NAMES[hint] if hint in NAMES else words[hint]


def bounds(base: Any, meta: Meta) -> str:
    low = meta.ge if meta.ge is not None else meta.min_length
    high = meta.le if meta.le is not None else meta.max_length
    unit = " characters" if meta.max_length is not None and base is str else ""
    return f", {low or 0} to {high}{unit}" if high is not None else f", at least {low}"


def documented(kind: type[Struct], *, without: Set[str] = frozenset()) -> dict[str, tuple[str, str]]:
    """What the page has to say of each field: its type, and whether it is required."""
    hints = get_type_hints(kind, include_extras=True)
    may_lack = kind.__struct_config__.omit_defaults or kind.__struct_config__.forbid_unknown_fields
    found = {}
    for field in msgspec.structs.fields(kind):
        if field.name not in without:
            hint = hints[field.name]
            always = field.required or not may_lack or field.name == "seq"  # its default stands in the log alone
            if not always and get_origin(hint) in {Union, types.UnionType}:
                hint = optional_of(hint)
            found[field.name] = (described(hint), "yes" if always else "no")
    return found


def optional_of(hint: Any) -> Any:
    """`X` of `X | None`."""
    return Union[tuple(one for one in get_args(hint) if one is not type(None))]  # noqa: UP007  # made at run time


def said(heading: str) -> dict[str, tuple[str, str]]:
    """What the page says of the fields of a message or an object."""
    rows = table(PROTOCOL, heading, "field")
    return {name: (plain(row["type"]), row["required"]) for name, row in rows.items()}


def test_the_page_has_every_client_message_and_no_other() -> None:
    """A heading for each type that the decoder takes."""
    page = PROTOCOL.split("## What a client sends")[1].split("\n## ")[0]
    assert re.findall(r"^### `(.*)`$", page, re.MULTILINE) == list(CLIENT)


@pytest.mark.parametrize("tag", CLIENT)
def test_fields_of_client_messages_agree(tag: str) -> None:
    """Each field with its type, and whether it has to be there."""
    assert said(f"`{tag}`") == documented(CLIENT[tag])


def test_the_page_has_every_server_message_and_no_other() -> None:
    """A heading for each type that the server sends."""
    page = PROTOCOL.split("## What the server sends")[1].split("\n## ")[0]
    assert sorted(re.findall(r"^### `(.*)`$", page, re.MULTILINE)) == sorted(SERVER)


@pytest.mark.parametrize("tag", SERVER)
def test_fields_of_server_messages_agree(tag: str) -> None:
    """Each field, but for those that come with every channel event."""
    kind = SERVER[tag]
    common = EVERY_EVENT | IN_THE_LOG_ONLY if issubclass(kind, protocol.ChannelEvent) else set()
    assert said(f"`{tag}`") == documented(kind, without=common)


def test_fields_of_every_channel_event_agree() -> None:
    """What comes with each of them is said once."""
    assert said("Every channel event") == documented(protocol.ChannelEvent)


@pytest.mark.parametrize("name", OBJECTS)
def test_fields_of_objects_agree(name: str) -> None:
    """The objects inside messages and bodies."""
    assert said(name) == documented(OBJECTS[name])


def test_channels_and_merge_rules_agree() -> None:
    """Which channel an event belongs to, how neighbours merge, and whether it is the last."""
    expected = {}
    for tag, kind in SERVER.items():
        if issubclass(kind, protocol.ChannelEvent):
            owners = [owner for owner in ("response", "task") if f"{owner}_id" in kind.__struct_fields__]
            channel = owners[0] if owners else "session"
            expected[tag] = (channel, kind.merge.value, "yes" if kind.ends_channel else "no")
        else:
            expected[tag] = ("none", "", "")
    rows = table(PROTOCOL, "What the server sends", "type")
    assert {tag: tuple(list(row.values())[1:]) for tag, row in rows.items()} == expected


def test_merge_rules_agree() -> None:
    """Every rule is explained."""
    rows = table(PROTOCOL, "Session, channel, position", "rule")
    assert set(rows) == {rule.value for rule in protocol.Merge}


def test_strategies_and_statuses_agree() -> None:
    """The tables that explain an enumeration's values have all of them."""
    assert set(table(PROTOCOL, "Overrides", "`multitask_strategy`")) == set(get_args(protocol.MultitaskStrategy))
    assert set(table(PROTOCOL, "`response.done`", "status")) == set(get_args(protocol.ResponseStatus))


def test_built_in_tasks_agree() -> None:
    """Every one is there, with its input and what it comes to."""
    rows = table(PROTOCOL, "Built-in tasks", "task")
    definitions = Registry(BUILTIN_TASKS).definitions
    assert {name: plain(row["input"]) for name, row in rows.items()} == {
        name: NAMES[definition.input_type] for name, definition in definitions.items()
    }
    for name, row in rows.items():
        comes_to = NAMES[get_type_hints(definitions[name].function)["return"]]
        assert f"[{comes_to}](#" in row["result"], name


def test_subprotocols_agree() -> None:
    """Both encodings, with the kind of frame that they use."""
    rows = table(PROTOCOL, "Connecting", "subprotocol")
    frames = {"text": "text", "bytes": "binary"}
    expected = {name: frames[codec.frame] for name, codec in protocol.CODECS.items()}
    assert {name: row["frames"] for name, row in rows.items()} == expected


def test_query_parameters_agree() -> None:
    """The parameters that an upgrade reads are those of the page."""
    tree = ast.parse(inspect.getsource(opening))
    read = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "query.get"
        and isinstance(node.args[0], ast.Constant)
    }
    assert set(table(PROTOCOL, "Connecting", "query")) == read


# --- errors and close codes ------------------------------------------------------------------------------------------


def tree_of(base: type[errors.RealtimeError]) -> dict[str, type[errors.RealtimeError]]:
    """A class of errors and all that are made of it, by name."""
    found = {base.__name__: base}
    for kind in base.__subclasses__():
        found |= tree_of(kind)
    return found


ERRORS = tree_of(errors.RealtimeError)
CODES_MADE_OF = {
    "f'invalid_{name.lower()}'": ["invalid_json", "invalid_messagepack"],
    "BUDGET_EXCEEDED": [call.BUDGET_EXCEEDED],
}
"""Codes that are put together, or have a name of their own, by the expression that does it."""


def raised_in(source: str) -> Iterator[tuple[str, str]]:
    """Every code that a module makes an error with, and the error's type."""
    tree = ast.parse(source)
    for own in [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name in ERRORS]:
        for node in ast.walk(own):
            match node:  # a kind of errors that are all of one code
                case ast.Call(func=ast.Attribute(attr="__init__"), args=[ast.Constant(value=str(code)), _]):
                    yield code, ERRORS[own.name].type
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and (kind := ERRORS.get(ast.unparse(node.func).split(".")[-1])):
            for code in codes_of(node.args[0], tree):
                yield code, kind.type


def codes_of(argument: ast.expr, tree: ast.Module) -> list[str]:
    """The codes that the first argument of an error may be."""
    match argument:
        case ast.Constant(value=str(code)):
            return [code]
        case ast.Name(id="code"):  # from a table of codes and messages in the same module
            pairs = [node.elts for node in ast.walk(tree) if isinstance(node, ast.Tuple) and len(node.elts) == 2]
            constants = [pair[0].value for pair in pairs if isinstance(pair[0], ast.Constant)]
            return [code for code in constants if isinstance(code, str) and code.startswith("upstream_")]
        case _:
            return CODES_MADE_OF[ast.unparse(argument)]


def test_error_codes_agree() -> None:
    """Every code that some line of the server makes an error with is in the table, with its type; and no other."""
    servers = [file for file in PACKAGE.rglob("*.py") if file.parent.name != "client"]
    found = {pair for file in servers for pair in raised_in(file.read_text())}
    rows = table(PROTOCOL, "Errors", "code")
    told = [(code, kind) for code, row in rows.items() for kind in plain(row["type"]).split(", ")]
    assert sorted(told) == sorted(found)
    assert list(rows) == sorted(rows), "the table is in the order of the alphabet"


def test_error_types_agree() -> None:
    """Every type with the status that most of its errors have."""
    expected: dict[str, str] = {}
    for kind in ERRORS.values():  # a class comes before those that are made of it
        expected.setdefault(kind.type, str(kind.status))
    rows = table(PROTOCOL, "Errors", "type")
    assert {name: row["HTTP status"] for name, row in rows.items()} == expected


def test_close_codes_agree() -> None:
    """The page has every code that the server may close with."""
    rows = table(PROTOCOL, "Close codes", "code")
    ours = {int(code) for code, row in rows.items() if row["from"] == "server"}
    assert ours == set(map(int, protocol.CloseCode))
    assert {row["from"] for row in rows.values()} == {"server", "transport"}


def test_both_clients_reconnect_as_the_page_says() -> None:
    """The codes after which the Python client and JavaScript's come back are those of the page."""
    rows = table(PROTOCOL, "Close codes", "code")
    told = {int(code) for code, row in rows.items() if row["what a client does"].startswith("reconnect")}
    assert told == RECONNECT_CODES
    script = (ROOT / "static/realtime/connection.js").read_text()
    found = re.search(r"RECONNECT_CODES = new Set\(\[(.*?)\]\)", script)
    assert found
    assert told == {int(code) for code in found[1].split(", ")}


def test_endpoints_agree() -> None:
    """Every route of the application is in the table, and no other, however its parameters are called."""
    routes = [route for route in create_app(demo, settings.Settings()).routes if isinstance(route, Route)]
    served = set()
    for route in routes:
        methods = route.methods or {"GET"}
        served |= {f"{method} {route.path}" for method in methods - {"HEAD"}}
    told = [re.sub(r"\{\w+\}", "{}", endpoint) for endpoint in table(PROTOCOL, "HTTP endpoints", "endpoint")]
    assert sorted(told) == sorted(re.sub(r"\{\w+\}", "{}", endpoint) for endpoint in served)


def test_the_event_stream_agrees() -> None:
    """Its lines are those of an event, and its times those of the code."""
    going = protocol.SessionGoingAway(reason="shutdown", time_left_ms=1, reconnect_after_ms=2)
    event = sse.encode_event(going, {"session": 1}).decode().rstrip("\n")
    assert set(table(PROTOCOL, "Event stream", "line")) == {f"{line.partition(':')[0]}:" for line in event.split("\n")}
    page = section(PROTOCOL, "Event stream")
    assert f"on the first event {sse.RETRY_MS};" in page
    assert f"every {sse.COMMENT_S:.0f} s" in page
    floors = re.search(r"Three floors.*?\n\n", PROTOCOL, re.DOTALL)
    assert floors
    told = [int(seconds) for seconds in re.findall(r"(\d+) s\b", floors[0])]
    assert told == [viewers.SERVER_ENDED_FLOOR_S, sse.LOST_FLOOR_S, viewers.UNSEEN_FLOOR_S]


def test_limits_agree() -> None:
    """The figures of the page are the constants and defaults of the code."""
    defaults = settings.Settings()
    expected = {
        "a frame from the server": protocol.MAX_FRAME_BYTES,
        "a message from a client": defaults.max_message_bytes,
        "fragments of one message": transport.MAX_FRAGMENTS,
        "pings and pongs of one connection": transport.PINGS.limit,
        "the head of a request or an upgrade": http_transport.MAX_HEAD_BYTES,
        "what is sent before the answer to what was sent before": http_transport.MAX_AHEAD_BYTES,
        "malformed messages in a row": connection.MAX_MALFORMED,
        "messages that come too soon, without a pause": connection.MAX_REFUSED,
        "a token": verifiers.MAX_TOKEN_BYTES,
        "commands of one connection that wait": inbox.MAX_WAITING,
        "unfinished responses and tasks of a session": protocol.MAX_UNFINISHED_CHANNELS,
        "a task's input, in a session": defaults.max_message_bytes,
        "a task's input, over HTTP": defaults.max_body_bytes,
        "a task's result": outcome.MAX_RESULT_BYTES,
        "a result that task.done itself tells": outcome.MAX_INLINE_BYTES,
        "a session's settings": session.MAX_SESSION_BYTES,
        "model calls of one response": turn.MAX_MODEL_CALLS,
        "participants that a first frame names": feed.MAX_TOLD_PARTICIPANTS,
        "a session's logs": defaults.max_session_bytes,
        "remembered event_ids of a session": memory.KEPT_COMMANDS,
        "connections of an instance": defaults.max_connections,
        "connections of a user": defaults.max_connections_per_user,
        "connections from an address": defaults.max_connections_per_address,
        "responses and one-shot calls of a user at once": defaults.max_responses_per_user,
        "tasks of a user that run or wait": defaults.max_tasks_per_user,
        "a one-shot body": defaults.max_body_bytes,
        "messages of a one-shot": oneshot.MAX_MESSAGES,
        "the time for a body": int(http.BODY_TIMEOUT_S),
    }
    rows = table(PROTOCOL, "Limits", "what")
    figures = {name: row["limit"].split()[0] for name, row in rows.items() if name != "numbers in metadata"}
    assert {name: int(figure) for name, figure in figures.items()} == expected
    rates = {name: row["default"].strip("`") for name, row in table(PROTOCOL, "Rates and budgets", "rate").items()}
    assert rates == {name: getattr(defaults, f"rate_{name}") for name in admission_rates()}
    assert f"after {connection.MAX_REFUSED} of them without a pause" in PROTOCOL
    assert f"{protocol.MAX_FRAME_CHARS} characters" in PROTOCOL
    assert f"up to {outcome.MAX_INLINE_BYTES} bytes" in table(PROTOCOL, "`task.done`", "field")["result"]["meaning"]
    assert (
        f"0 to {opening.MAX_DELTA_INTERVAL_MS}"
        in table(PROTOCOL, "Connecting", "query")["delta_interval_ms"]["meaning"]
    )


def admission_rates() -> list[str]:
    """The names of the rates that there are."""
    return [field.removeprefix("rate_") for field in settings.Settings.__struct_fields__ if field.startswith("rate_")]


def test_the_limits_of_the_page_are_told_as_it_says() -> None:
    """The headers of the example are those that the server makes, and so are the words for scopes."""
    told = [
        protocol.RateLimit(name="responses", limit=10, remaining=9, reset_s=6.0),
        protocol.RateLimit(name="tokens", limit=200_000, remaining=181_424, reset_s=30_170.0),
    ]
    for name, value in door.limit_headers(told):
        assert re.search(rf"^{name.decode()}: {re.escape(value.decode())}$", PROTOCOL, re.MULTILINE | re.IGNORECASE)
    scopes = table(PROTOCOL, "Who may do what", "scope")
    assert set(scopes) == claims.SCOPES
    assert set(list(scopes)[:3]) == principal.DEFAULT_SCOPES


def test_the_times_of_tokens_agree() -> None:
    """When a client is warned, and by which cookie and subprotocol it shows its token."""
    assert f"comes {connections.WARN_S:.0f} s before" in section(PROTOCOL, "Tokens")
    ways = "".join(row["how"] for row in tables(section(PROTOCOL, "Tokens"))[0])
    assert f"`{door.COOKIE}`" in ways
    assert f"`{door.BEARER_PROTOCOL}<token>`" in ways


def test_the_ends_that_the_page_names_are_those_of_the_code() -> None:
    """The stop reasons that the server gives itself are quoted in the package."""
    sources = "".join(file.read_text() for file in PACKAGE.rglob("*.py"))
    rows = table(PROTOCOL, "`response.done`", "status")
    given = re.findall(r"`(\w+)`", rows["cancelled"]["`stop_reason`"].replace("`response.cancel`", ""))
    for reason in given:
        stem = "session_" if reason in {"session_expired", "session_deleted"} else reason
        assert f'"{stem}' in sources, reason
    assert set(re.findall(r"`(\w+)`", rows["incomplete"]["`stop_reason`"])) == INCOMPLETE | {call.BUDGET_EXCEEDED}


def test_positions_of_the_page_can_be_read() -> None:
    """The example of `after` is one, and no reserved name is left out."""
    assert "session:41,resp_9:512" in PROTOCOL
    assert log.parse_positions("session:41,resp_9:512") == {"session": 41, "resp_9": 512}
    reserved = re.search(r"The names (.*?) are reserved", PROTOCOL, re.DOTALL)
    assert reserved
    assert set(re.findall(r"`(\w+)`", reserved[1])) == protocol.RESERVED_IDS


# --- settings --------------------------------------------------------------------------------------------------------


def test_settings_agree() -> None:
    """Every setting with its default, and no other."""
    expected = {}
    for field in msgspec.structs.fields(settings.Settings):
        default = ",".join(field.default) if isinstance(field.default, tuple) else str(field.default)
        expected[settings.variable(field.name)] = default
    rows = table(OPERATIONS, "Settings", "name")
    assert {name: plain(row["default"]) for name, row in rows.items()} == expected
    assert list(rows) == list(expected), "the table is in the order of the struct"


def test_allowed_values_of_settings_are_named() -> None:
    """Where only some words are allowed, the table names each."""
    rows = table(OPERATIONS, "Settings", "name")
    for field, hint in get_type_hints(settings.Settings).items():
        if get_origin(hint) is Literal:
            row = rows[settings.variable(field)]
            for value in get_args(hint):
                assert f"`{value}`" in row["default"] + row["meaning"], f"{field}: {value}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_name_no_setting_that_is_none(page: Path) -> None:
    """A setting that a page names exists."""
    known = {settings.variable(field) for field in settings.Settings.__struct_fields__} | settings.CLIENT_VARIABLES
    named = set(re.findall(r"REALTIME_[A-Z_]*[A-Z]\b", page.read_text()))
    assert named - known == set()


def test_metrics_agree() -> None:
    """Every metric with its labels, and no other."""
    rows = table(OBSERVABILITY, "Metrics", "metric")
    named = {name: tuple(re.findall(r"`(\w+)`", row["labels"])) for name, row in rows.items()}
    assert named == metrics.LABELS
    causes = rows["realtime_responses_total"]["counts"].partition("for `cancelled`: ")[2]
    assert tuple(re.findall(r"`(\w+)`", causes)) == metrics.CAUSES


# --- architecture ----------------------------------------------------------------------------------------------------


def test_modules_agree() -> None:
    """Every module is in the table, and every module and test that the page names exists."""
    modules = {str(file.relative_to(ROOT)) for file in PACKAGE.rglob("*.py") if file.name != "__init__.py"}
    assert set(table(ARCHITECTURE, "Modules", "module")) == modules
    named = re.findall(r"(?:realtime|tests)/[\w/]+\.py", ARCHITECTURE + DECISIONS)
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    """A module, a test or a measurement that is named by its path is there."""
    named = re.findall(r"`((?:realtime|tests|bench|static|scripts|nginx)/[\w./-]+\.\w+)`", page.read_text())
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_each_promise_has_a_test() -> None:
    """Whatever is promised of security names what holds it to that."""
    promises = table((ROOT / "SECURITY.md").read_text(), "What is promised", "promise")
    assert [promise for promise, row in promises.items() if not re.search(r"`tests/[\w/]+\.py`", row["tests"])] == []


def test_functions_that_the_page_names_exist() -> None:
    """What is written as a call is a function or a method of the package; what has a capital is a class."""
    functions, classes = set(), set()
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text())
        functions |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        for kind in (node for node in tree.body if isinstance(node, ast.ClassDef)):
            classes.add(kind.name)
            methods = [node for node in kind.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
            functions |= {f"{kind.name}.{method.name}" for method in methods}
    quoted = re.findall(r"`([^`\n]+)`", ARCHITECTURE + DECISIONS)
    calls = [name[:-2] for name in quoted if re.fullmatch(r"[\w.]+\(\)", name)]
    assert calls
    assert [name for name in calls if name not in functions] == []
    capitals = [name for name in quoted if re.fullmatch(r"[A-Z][a-z]+(?:[A-Z]+[a-z]*)*", name)]
    assert [name for name in capitals if name not in classes] == []


def asked_for() -> list[tuple[str, list[str]]]:
    """The packages that the project asks for, each time with where they are pinned: to run, to run with the extras, and
    to be checked."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = [one for name in EXTRAS for one in project["project"]["optional-dependencies"][name]]
    groups = project["project"]["dependencies"], extras, project["dependency-groups"]["dev"]
    runtime, optional, dev = ([str(canonicalize_name(Requirement(one).name)) for one in group] for group in groups)
    return [("runtime.txt", runtime), ("runtime.txt", optional), ("dev.txt", dev)]


def test_dependencies_agree() -> None:
    """Each dependency is there with its reason and the version that is pinned, and no other is."""
    for rows, (file, packages) in zip(tables(section(DECISIONS, "Dependencies")), asked_for(), strict=True):
        pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements" / file).read_text(), re.MULTILINE))
        pinned = {str(canonicalize_name(name)): version for name, version in pins.items()}
        assert {row["package"]: row["version"] for row in rows} == {name: pinned[name] for name in packages}
        assert all(row["why"] for row in rows)


def test_licences_agree() -> None:
    """The licence of each dependency is what the installed package says."""
    spellings = {
        "Apache Software License": "Apache-2.0",
        "BSD License": "BSD-3-Clause",
        "MIT License": "MIT",
    }
    for row in (row for rows in tables(section(DECISIONS, "Dependencies")) for row in rows):
        package: Any = metadata(row["package"])
        told = {package.get("License-Expression"), package.get("License")}
        kinds = [one for one in package.get_all("Classifier") or [] if one.startswith("License :: OSI Approved ::")]
        named = {spellings[one.rpartition(" :: ")[2]] for one in kinds}
        assert row["licence"] in told or set(row["licence"].split(" OR ")) == named, row["package"]


# --- links, targets, commands ----------------------------------------------------------------------------------------


def anchors(page: str) -> set[str]:
    """The anchors that a page's headings make."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", plain(heading).lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Each link inside the repository names a file, and a heading in it, that exist."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file.read_text()), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_make_targets_exist(page: Path) -> None:
    """Each target that a page names is one of the Makefile's."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {found[1] for line in code_in(page.read_text()) if (found := re.search(r"(?:^|\s)make ([a-z-]+)", line))}
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_their_options_exist(page: Path) -> None:
    """Each subcommand of `realtime` that a page names exists, with the options that it names."""
    for line in code_in(page.read_text()):
        if found := re.search(r"(?:^|[\s/])(?<!from )realtime ([a-z]+)(.*)", line):
            command = main.commands.get(found[1])
            assert command is not None, line
            options = {option for parameter in command.params for option in parameter.opts}
            assert set(re.findall(r"--[a-z-]+", found[2])) <= options, line


def test_the_commands_are_documented() -> None:
    """Every subcommand is in the table, with its options somewhere on the page."""
    rows = table(OPERATIONS, "Commands", "command")
    assert {name for name in rows if name.startswith("realtime ")} == {f"realtime {name}" for name in main.commands}
    for command in main.commands.values():
        shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
        for option in [option for parameter in shown for option in parameter.opts]:
            assert f"`{option}`" in OPERATIONS, option


def test_the_readme_begins_with_the_two_commands() -> None:
    """Who opens the page sees how to start before anything else."""
    first = [
        line.split("#")[0].strip() for line in code_in((ROOT / "README.md").read_text()) if line.startswith("make ")
    ]
    assert {"make serve", "make test"} <= set(first)
