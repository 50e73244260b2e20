"""Write the protocol down for other programs: docs/asyncapi.json for WebSockets and server-sent events, and
docs/openapi.json for HTTP. `make schemas` does it. Both are made out of the structs and the routes of the package.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import msgspec
from msgspec import Struct

from realtime import __version__, protocol
from realtime.opening import MAX_DELTA_INTERVAL_MS
from scripts.endpoints import DocumentedEndpoint, endpoints

ROOT = Path(__file__).resolve().parent.parent
Json = dict[str, Any]

IN_THE_LOG_ONLY = frozenset(
    {"overrides", "bill", "instance", "input", "user", "payer", "traceparent", "at", "result_json"}
)
"""Fields of channel events that are not sent."""
LICENCE = {"name": "Apache-2.0", "identifier": "Apache-2.0"}
REFERENCE = "#/components/schemas/{name}"


def main() -> None:
    """Write both documents."""
    for name, document in documents().items():
        (ROOT / "docs" / name).write_text(document)


def documents() -> dict[str, str]:
    """Each document as it is to stand in docs/, by its file's name."""
    made = {"asyncapi.json": asyncapi(), "openapi.json": openapi(endpoints())}
    return {name: msgspec.json.format(msgspec.json.encode(one), indent=2).decode() + "\n" for name, one in made.items()}


# --- schemas ---------------------------------------------------------------------------------------------------------


def leaves(base: type[Struct]) -> Iterator[type[Struct]]:
    """The messages of the protocol under a base, without those that only others are made of."""
    for kind in base.__subclasses__():
        yield from leaves(kind)
    if not base.__subclasses__() and base.__module__ == "realtime.protocol":
        yield base


def tag_of(kind: type[Struct]) -> str:
    """The `type` of a message."""
    return str(kind.__struct_config__.tag)


CLIENT = {tag_of(kind): kind for kind in get_args(protocol.AnyClientMessage)}
SERVER = {tag_of(kind): kind for kind in leaves(protocol.ServerMessage)}


def schemas(kinds: Iterable[Any]) -> Json:
    """The schemas of these types and of what they hold, by name, as what is on the wire."""
    sent = {kind.__name__: kind for kind in SERVER.values() if issubclass(kind, protocol.ChannelEvent)}
    _, components = msgspec.json.schema_components(list(kinds), ref_template=REFERENCE)
    for name, schema in components.items():
        if name in sent:
            _as_sent(schema)
        _tidy(schema)
    return _reachable(components, kinds)


def _as_sent(schema: Json) -> None:
    """A channel event has its `seq` when it is sent, and what only the log holds is gone."""
    schema["properties"] = {name: one for name, one in schema["properties"].items() if name not in IN_THE_LOG_ONLY}
    schema["properties"]["seq"] = {"type": "integer", "minimum": 1}
    schema["required"] = [*schema["required"], "seq"]


def _tidy(schema: Any) -> None:
    """Regular expressions as JavaScript writes them, descriptions of one line, no `null` that stands for a default."""
    for part in _parts(schema):
        if "pattern" in part:
            part["pattern"] = part["pattern"].replace(r"\Z", "$")
        if isinstance(description := part.get("description"), str):
            part["description"] = re.split(r"(?<=\.)\s", " ".join(description.split()))[0]
        if part.get("default", ...) is None:
            del part["default"]


def _parts(schema: Any) -> Iterator[Json]:
    if isinstance(schema, dict):
        yield schema
    for value in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from _parts(value)


def _reachable(components: Json, kinds: Iterable[Any]) -> Json:
    """The schemas that these types need, now that some fields are gone; in the order of the alphabet."""
    waiting = [kind.__name__ for kind in kinds]
    found: Json = {}
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = components[name]
            waiting += [part["$ref"].rpartition("/")[2] for part in _parts(components[name]) if "$ref" in part]
    return dict(sorted(found.items()))


# --- AsyncAPI --------------------------------------------------------------------------------------------------------

QUERY: Json = {
    "session_id": {"type": "string", "description": "The session to attach to; without it a new one is made."},
    "after": {"type": "string", "description": "The positions that the client has: channel:position, with commas."},
    "history": {"enum": ["all", "none"], "default": "all", "description": "What a client is sent that gives no after."},
    "delta_interval_ms": {"type": "integer", "minimum": 0, "maximum": MAX_DELTA_INTERVAL_MS, "default": 0},
}


def asyncapi() -> Json:
    """The messages, by where they go over a connection that stays open."""
    everything = {**CLIENT, **SERVER}
    of_task = {tag: kind for tag, kind in SERVER.items() if tag.startswith("task.") and tag != "task.created"}
    return {
        "asyncapi": "3.0.0",
        "id": "urn:realtime:protocol:1",
        "info": {
            "title": "realtime",
            "version": __version__,
            "description": "Sessions for AI backends. In words: docs/protocol.md. Over HTTP: docs/openapi.json.",
            "license": {"name": LICENCE["name"]},
        },
        "defaultContentType": "application/json",
        "servers": {
            "websocket": {"host": "127.0.0.1:8000", "protocol": "ws"},
            "http": {"host": "127.0.0.1:8000", "protocol": "http"},
        },
        "channels": {
            "session": {
                "address": "/v1/realtime",
                "title": "A session over WebSocket",
                "description": f"Subprotocols: {', '.join(protocol.CODECS)}, the second in MessagePack.",
                "servers": [{"$ref": "#/servers/websocket"}],
                "messages": _references(everything),
                "bindings": {"ws": {"method": "GET", "query": {"type": "object", "properties": QUERY}}},
            },
            "sessionEvents": _stream("/v1/sessions/{session_id}/events", "A session", SERVER),
            "taskEvents": _stream("/v1/tasks/{task_id}/events", "A task", of_task),
            "sessionTaskEvents": _stream(
                "/v1/sessions/{session_id}/tasks/{task_id}/events", "A session's task", of_task
            ),
        },
        "operations": {
            "receiveFromClient": _operation("receive", "session", CLIENT),
            "sendToClient": _operation("send", "session", SERVER),
            "streamSession": _operation("send", "sessionEvents", SERVER),
            "streamTask": _operation("send", "taskEvents", of_task),
            "streamSessionTask": _operation("send", "sessionTaskEvents", of_task),
        },
        "components": {
            "messages": {tag: _message(tag, kind) for tag, kind in everything.items()},
            "schemas": schemas(everything.values()),
        },
    }


def _message(tag: str, kind: type[Struct]) -> Json:
    payload = REFERENCE.format(name=kind.__name__)
    return {"name": tag, "title": tag, "summary": _summary(kind), "payload": {"$ref": payload}}


def _summary(kind: type[Struct]) -> str:
    return re.split(r"(?<=\.)\s", " ".join((kind.__doc__ or "").split()))[0]


def _references(kinds: Mapping[str, Any]) -> Json:
    return {tag: {"$ref": f"#/components/messages/{tag}"} for tag in kinds}


def _stream(address: str, what: str, kinds: Mapping[str, Any]) -> Json:
    names = re.findall(r"\{(\w+)\}", address)
    return {
        "address": address,
        "title": f"{what} as server-sent events",
        "description": "The name of an event is the type of its message; that of error is server_error.",
        "servers": [{"$ref": "#/servers/http"}],
        "parameters": {name: {"description": f"The {name.removesuffix('_id')}'s id."} for name in names},
        "messages": _references(kinds),
    }


def _operation(action: str, channel: str, kinds: Mapping[str, Any]) -> Json:
    messages = [{"$ref": f"#/channels/{channel}/messages/{tag}"} for tag in kinds]
    return {"action": action, "channel": {"$ref": f"#/channels/{channel}"}, "messages": messages}


# --- OpenAPI ---------------------------------------------------------------------------------------------------------


def openapi(known: Mapping[tuple[str, str], DocumentedEndpoint]) -> Json:
    """The endpoints, by path and method."""
    paths: Json = {}
    for (method, path), endpoint in known.items():
        paths.setdefault(path, {})[method.lower()] = _endpoint(path, endpoint)
    kinds = {kind for endpoint in known.values() for kind in endpoint.kinds()}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "realtime",
            "version": __version__,
            "description": "Sessions for AI backends. In words: docs/protocol.md. Over WebSocket: docs/asyncapi.json.",
            "license": LICENCE,
        },
        "servers": [{"url": "http://127.0.0.1:8000"}],
        "security": [{}, {"bearer": []}, {"cookie": []}],
        "paths": paths,
        "components": {
            "schemas": schemas(sorted(kinds, key=lambda kind: str(kind.__name__))),
            "responses": {"Error": _error()},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
                "cookie": {"type": "apiKey", "in": "cookie", "name": "realtime_token"},
            },
        },
    }


def _endpoint(path: str, endpoint: DocumentedEndpoint) -> Json:
    parameters = [_path_parameter(name) for name in re.findall(r"\{(\w+)\}", path)]
    made: Json = {
        "operationId": endpoint.name,
        "summary": endpoint.summary,
        "responses": {
            **{str(status): one.described(REFERENCE) for status, one in endpoint.answers.items()},
            "default": {"$ref": "#/components/responses/Error"},
        },
    }
    if parameters or endpoint.parameters:
        made["parameters"] = [*parameters, *endpoint.parameters]
    if endpoint.body is not None:
        schema = endpoint.body.schema(REFERENCE)
        made["requestBody"] = {
            "required": endpoint.body.required,
            "content": {"application/json": {"schema": schema}},
        }
    return made


def _path_parameter(name: str) -> Json:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _error() -> Json:
    schema = {
        "type": "object",
        "properties": {"error": {"$ref": REFERENCE.format(name="ErrorAnswer")}},
        "required": ["error"],
    }
    return {
        "description": "What was refused or went wrong. 429 and 503 carry Retry-After.",
        "content": {"application/json": {"schema": schema}},
    }


if __name__ == "__main__":
    main()
