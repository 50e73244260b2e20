"""What there is to say of each endpoint that its route does not say: its body, its answers, and what it is for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from msgspec import Struct
from starlette.routing import Route

from realtime.access.endpoints import Revocation
from realtime.app import create_app
from realtime.http import ErrorAnswer
from realtime.oneshot import Completion, OneShot
from realtime.opening import MAX_DELTA_INTERVAL_MS
from realtime.protocol import Command, Overrides, Session
from realtime.responders.demo import demo
from realtime.sessions import MAX_KEY_CHARS, Accepted
from realtime.settings import Settings
from realtime.snapshot import SessionSnapshot
from realtime.tasks.analyse import Sources
from realtime.tasks.record import TaskSnapshot
from realtime.tasks.summarise import Document, Summary

Json = dict[str, Any]


class Body(Struct, frozen=True):
    """A request's body: one of some messages, or with none any JSON."""

    kinds: tuple[Any, ...] = ()
    required: bool = True

    def schema(self, reference: str) -> Json:
        """Its JSON schema."""
        found = [{"$ref": reference.format(name=kind.__name__)} for kind in self.kinds]
        return {"oneOf": found} if len(found) > 1 else found[0] if found else {}


class Answer(Struct, frozen=True):
    """An answer: of a struct, inside the field `under` where there is one, or of a schema, or of text."""

    what: str
    kind: Any = None
    under: str = ""
    shape: Json | None = None
    media: str = "application/json"
    headers: tuple[str, ...] = ()

    def described(self, reference: str) -> Json:
        """As an OpenAPI response."""
        told: Json = {"description": self.what}
        if self.headers:
            told["headers"] = {name: {"schema": {"type": "string"}} for name in self.headers}
        schema = {"$ref": reference.format(name=self.kind.__name__)} if self.kind else self.shape
        if schema is not None and self.under:
            schema = {"type": "object", "properties": {self.under: schema}, "required": [self.under]}
        if schema is not None:
            told["content"] = {self.media: {"schema": schema}}
        return told


class DocumentedEndpoint(Struct, frozen=True):
    """One method of one path. `parameters` are those of the query and the headers."""

    name: str
    summary: str
    answers: Mapping[int, Answer]
    body: Body | None = None
    parameters: tuple[Json, ...] = ()

    def kinds(self) -> Iterator[Any]:
        """The structs that it needs schemas of."""
        yield ErrorAnswer
        yield from self.body.kinds if self.body else ()
        yield from (answer.kind for answer in self.answers.values() if answer.kind)


def _constant(**fields: Any) -> Json:
    shape = {name: {"const": value} if value is not str else {"type": "string"} for name, value in fields.items()}
    return {"type": "object", "properties": shape, "required": list(fields)}


TEXT: Json = {"type": "string"}
NOTHING = {204: Answer("It is done.")}
EVENTS = {200: Answer("Server-sent events, see docs/asyncapi.json.", shape=TEXT, media="text/event-stream")}
CANCELLED = {202: Answer("The task is cancelled.", shape=_constant(task_id=str, accepted=True))}
MADE = Answer("The task is accepted.", shape=_constant(task_id=str, status="pending"), headers=("Location",))
TASK = {200: Answer("How the task stands.", TaskSnapshot)}
RESULT = {200: Answer("The task's result, whole.", shape={})}
POSITIONS: tuple[Json, ...] = (
    {"name": "after", "in": "query", "schema": TEXT},
    {"name": "Last-Event-ID", "in": "header", "schema": TEXT},
)
STREAM = (
    *POSITIONS,
    {"name": "history", "in": "query", "schema": {"enum": ["all", "none"], "default": "all"}},
    {
        "name": "delta_interval_ms",
        "in": "query",
        "schema": {"type": "integer", "minimum": 0, "maximum": MAX_DELTA_INTERVAL_MS, "default": 0},
    },
)
KEY: tuple[Json, ...] = ({"name": "Idempotency-Key", "in": "header", "schema": {**TEXT, "maxLength": MAX_KEY_CHARS}},)
PREFER: tuple[Json, ...] = ({"name": "Prefer", "in": "header", "schema": {"const": "respond-async"}},)

_SESSION = "/v1/sessions/{session_id}"
_SESSION_TASK = f"{_SESSION}/tasks/{{task_id}}"
_TASK = "/v1/tasks/{task_id}"
KNOWN: dict[tuple[str, str], DocumentedEndpoint] = {
    ("POST", "/v1/sessions"): DocumentedEndpoint(
        "createSession",
        "Makes a session.",
        {201: Answer("The session.", Session, under="session", headers=("Location",))},
        Body((Overrides,), required=False),
    ),
    ("GET", _SESSION): DocumentedEndpoint(
        "readSession", "Reads a session whole.", {200: Answer("It.", SessionSnapshot)}
    ),
    ("DELETE", _SESSION): DocumentedEndpoint("deleteSession", "Erases a session.", NOTHING),
    ("GET", f"{_SESSION}/events"): DocumentedEndpoint(
        "streamSession", "Streams what happens in a session.", EVENTS, parameters=STREAM
    ),
    ("POST", f"{_SESSION}/events"): DocumentedEndpoint(
        "command",
        "Carries out a command in a session.",
        {202: Answer("It was.", Accepted)},
        Body(get_args(Command)),
        KEY,
    ),
    ("GET", _SESSION_TASK): DocumentedEndpoint("readSessionTask", "Reads a task of a session.", TASK),
    ("DELETE", _SESSION_TASK): DocumentedEndpoint("cancelSessionTask", "Cancels a task of a session.", CANCELLED),
    ("GET", f"{_SESSION_TASK}/events"): DocumentedEndpoint(
        "streamSessionTask", "Streams a task of a session.", EVENTS, parameters=POSITIONS
    ),
    ("GET", f"{_SESSION_TASK}/result"): DocumentedEndpoint("readSessionTaskResult", "A task's result.", RESULT),
    ("POST", _TASK): DocumentedEndpoint(
        "createTask", "Makes a task; its name stands where its id stands afterwards.", {202: MADE}, Body()
    ),
    ("GET", _TASK): DocumentedEndpoint("readTask", "Reads a task.", TASK),
    ("DELETE", _TASK): DocumentedEndpoint("cancelTask", "Cancels a task.", CANCELLED),
    ("GET", f"{_TASK}/events"): DocumentedEndpoint("streamTask", "Streams a task.", EVENTS, parameters=POSITIONS),
    ("GET", f"{_TASK}/result"): DocumentedEndpoint("readTaskResult", "A task's result.", RESULT),
    ("POST", "/v1/analyse"): DocumentedEndpoint("analyse", "Makes the task analyse.", {202: MADE}, Body((Sources,))),
    ("POST", "/v1/summarise"): DocumentedEndpoint(
        "summarise",
        "Summarises a document.",
        {200: Answer("The summary.", Summary), 202: MADE},
        Body((Document,)),
        PREFER,
    ),
    ("POST", "/v1/stream"): DocumentedEndpoint(
        "stream",
        "One answer without a session, as it comes.",
        {200: Answer("Server-sent events.", shape=TEXT, media="text/event-stream")},
        Body((OneShot,)),
    ),
    ("POST", "/v1/complete"): DocumentedEndpoint(
        "complete", "One answer without a session, whole.", {200: Answer("It.", Completion)}, Body((OneShot,))
    ),
    ("POST", "/v1/auth/cookie"): DocumentedEndpoint("setCookie", "Makes a cookie of the token.", NOTHING),
    ("DELETE", "/v1/auth/cookie"): DocumentedEndpoint("forgetCookie", "Takes the cookie away.", NOTHING),
    ("POST", "/v1/admin/revoke"): DocumentedEndpoint("revoke", "Takes tokens back.", NOTHING, Body((Revocation,))),
    ("GET", "/healthz"): DocumentedEndpoint(
        "alive", "Whether the process answers.", {200: Answer("It does.", shape=_constant(status="ok"))}
    ),
    ("GET", "/readyz"): DocumentedEndpoint(
        "ready", "Whether it is ready for work.", {200: Answer("It is.", shape=_constant(status="ready"))}
    ),
    ("GET", "/metrics"): DocumentedEndpoint(
        "metrics", "Figures of this instance.", {200: Answer("For Prometheus.", shape=TEXT, media="text/plain")}
    ),
    ("GET", "/"): DocumentedEndpoint("page", "The demo page.", {200: Answer("It.", shape=TEXT, media="text/html")}),
}


def endpoints() -> dict[tuple[str, str], DocumentedEndpoint]:
    """Every method of every route of the application, in its order. Raises `KeyError` for one that is not known here,
    and `ValueError` for one that is known and not there."""
    routes = [route for route in create_app(demo, Settings()).routes if isinstance(route, Route)]
    there = [(method, route.path) for route in routes for method in sorted((route.methods or {"GET"}) - {"HEAD"})]
    if gone := KNOWN.keys() - set(there):
        raise ValueError(f"there is no {sorted(gone)}")
    return {key: KNOWN[key] for key in there}
