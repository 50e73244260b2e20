"""The protocol's documents are what the code says, what the standards allow, and what is really sent and answered."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate as validate_openapi

from scripts.endpoints import KNOWN
from scripts.schemas import CLIENT, SERVER, documents
from tests.end_to_end import echo
from tests.support.client import attached
from tests.support.server import RunningServer, running_server

ROOT = Path(__file__).resolve().parent.parent
ASYNCAPI: dict[str, Any] = json.loads((ROOT / "docs/asyncapi.json").read_text())
OPENAPI: dict[str, Any] = json.loads((ROOT / "docs/openapi.json").read_text())
META = json.loads((ROOT / "tests/schemas/asyncapi-3.0.0.json").read_text())


def validator(document: dict[str, Any], schema: dict[str, Any]) -> Draft202012Validator:
    """Checks values by a schema of a document, whose references are into the document."""
    return Draft202012Validator({**schema, "components": document["components"]})


def refused(document: dict[str, Any], schema: dict[str, Any], value: Any) -> list[str]:
    """What is wrong with a value; a field that the schema does not know is wrong here, though clients must allow it."""
    errors = [error.message for error in validator(document, schema).iter_errors(value)]
    name = schema.get("$ref", "").rpartition("/")[2]
    known = document["components"]["schemas"].get(name, {}).get("properties")
    unknown = set(value) - set(known) if known and isinstance(value, dict) else set()
    return errors + [f"{name} knows no {field}" for field in sorted(unknown)]


def payload(tag: str) -> dict[str, Any]:
    """The schema of a message."""
    found: dict[str, Any] = ASYNCAPI["components"]["messages"][tag]["payload"]
    return found


# --- the documents ---------------------------------------------------------------------------------------------------


def test_documents_are_those_of_the_code() -> None:
    """`make schemas` changes nothing."""
    for name, document in documents().items():
        assert (ROOT / "docs" / name).read_text() == document, f"docs/{name} is old: make schemas"


def test_asyncapi_document_is_one() -> None:
    """It is valid by the schema of AsyncAPI 3.0, and every reference in it leads somewhere."""
    jsonschema.validate(ASYNCAPI, META, cls=jsonschema.Draft7Validator)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**ASYNCAPI, "channels": [1]}, META, cls=jsonschema.Draft7Validator)
    for reference in re.findall(r'"\$ref": "#/([^"]+)"', (ROOT / "docs/asyncapi.json").read_text()):
        found: Any = ASYNCAPI
        for part in reference.split("/"):
            found = found[part]


def test_openapi_document_is_one() -> None:
    """It is valid by the schema of OpenAPI 3.1."""
    validate_openapi(OPENAPI)
    with pytest.raises(Exception, match="not unique"):
        validate_openapi(json.loads(json.dumps(OPENAPI).replace('"operationId": "alive"', '"operationId": "ready"')))


def test_asyncapi_document_has_every_message() -> None:
    """Of both sides, with the direction that is theirs."""
    operations = ASYNCAPI["operations"]
    for name, kinds in (("receiveFromClient", CLIENT), ("sendToClient", SERVER)):
        assert [one["$ref"].rpartition("/")[2] for one in operations[name]["messages"]] == list(kinds)


def test_what_only_the_log_holds_is_in_no_document() -> None:
    """It is not sent, so nobody is to look for it."""
    fields = {field for one in ASYNCAPI["components"]["schemas"].values() for field in one.get("properties", {})}
    assert not fields & {"bill", "payer", "result_json", "instance"}


# --- what is sent ----------------------------------------------------------------------------------------------------


@pytest.fixture
async def server() -> AsyncIterator[RunningServer]:
    """A server that repeats what it is told."""
    async with running_server(echo) as running:
        yield running


async def test_messages_of_a_session_are_those_of_the_document(server: RunningServer) -> None:
    """Every kind that can be had of one session, in both directions, and by a client that comes back."""
    sent: list[dict[str, Any]] = []
    async with attached(server) as client, attached(server, client.session_id) as other:

        async def say(kind: str, awaited: str, **fields: Any) -> Any:
            sent.append({"type": kind, **fields})
            await client.send(kind, **fields)
            return await client.until(awaited)

        await say("ping", "pong", event_id="e1")
        await say("session.update", "session.updated", session={"instructions": "Be brief."})
        await say("conversation.item.create", "conversation.item.created", item={"role": "user", "content": "é"})
        done = await say("response.create", "response.done", input="Hello", event_id="e2", metadata={"n": 1})
        heard = {"response_id": done["response_id"], "heard_chars": 1}
        await say("conversation.item.truncate", "conversation.item.truncated", **heard)
        await say("response.cancel", "error", response_id="nobody")
        await say("auth.refresh", "error", token="a.b.c")
        await say("task.create", "task.done", name="summarise", input={"text": "Short."}, task_id="t1")
        await say("task.cancel", "error", task_id="nobody")
        await say("session.close", "session.closed")
        await other.until_closed()
    received = [*client.transcript.events, *other.transcript.events]
    for message in sent + received:
        assert refused(ASYNCAPI, payload(message["type"]), message) == [], message
    assert {message["type"] for message in sent} == set(CLIENT)
    unseen = {"session.going_away", "auth.expiring", "auth.refreshed", "response.reasoning.delta", "participant.left"}
    assert {message["type"] for message in received} >= set(SERVER) - unseen - {"task.output_text.delta"}


@pytest.mark.parametrize(
    "message",
    [
        {"type": "ping", "more": 1},
        {"type": "response.cancel"},
        {"type": "response.cancel", "response_id": "not an id"},
        {"type": "response.create", "max_output_tokens": 0},
    ],
)
def test_what_the_server_refuses_the_document_refuses(message: dict[str, Any]) -> None:
    """The schemas are as strict as the decoder, so that they can show that something is wrong."""
    assert refused(ASYNCAPI, payload(message["type"]), message)


# --- what is answered ------------------------------------------------------------------------------------------------


def check_answer(template: str, response: httpx.Response) -> None:
    """Hold an answer against the document, and what it answered."""
    endpoint = OPENAPI["paths"][template][response.request.method.lower()]
    told = endpoint["responses"].get(str(response.status_code))
    if told is None:
        assert response.is_error, (template, response.status_code)
        told = OPENAPI["components"]["responses"]["Error"]
    assert set(told.get("headers", {})) <= {name.title() for name in response.headers}
    if "content" not in told:
        assert response.content == b""
        return
    [(media, content)] = told["content"].items()
    assert response.headers["content-type"].startswith(media)
    if media == "application/json":
        assert refused(OPENAPI, content["schema"], response.json()) == []
    body = endpoint.get("requestBody")
    if body is not None and response.request.content and not response.is_error:
        schema = body["content"]["application/json"]["schema"]
        assert refused(OPENAPI, schema, json.loads(response.request.content)) == []


async def test_answers_are_those_of_the_document(server: RunningServer) -> None:
    """Of every endpoint, those that stream included, and errors."""
    seen: set[tuple[str, str]] = set()
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=20) as http:

        async def ask(method: str, template: str, body: Any = None, **ids: str) -> httpx.Response:
            request = http.build_request(method, template.format(**ids), json=body)
            answer = await http.send(request, stream=template.endswith("/events") and method == "GET")
            if "text/event-stream" not in answer.headers.get("content-type", ""):
                await answer.aread()
            check_answer(template, answer)
            await answer.aclose()
            seen.add((method, template))
            return answer

        made = await ask("POST", "/v1/sessions", {"instructions": "Be brief."})
        session: dict[str, str] = {"session_id": made.json()["session"]["id"]}
        path = "/v1/sessions/{session_id}"
        await ask("POST", f"{path}/events", {"type": "response.create", "input": "Hello"}, **session)
        command = {"type": "task.create", "name": "summarise", "input": {"text": "Short."}}
        task = (await ask("POST", f"{path}/events", command, **session)).json()["task_id"]
        await check_task(ask, f"{path}/tasks/{{task_id}}", {**session, "task_id": task})
        await ask("GET", path, **session)
        await ask("GET", f"{path}/events", **session)
        await ask("DELETE", path, **session)
        await ask("GET", path, **session)
        alone = (await ask("POST", "/v1/tasks/{task_id}", {"text": "Short."}, task_id="summarise")).json()["task_id"]
        await check_task(ask, "/v1/tasks/{task_id}", {"task_id": alone})
        await ask("POST", "/v1/analyse", {"sources": [{"name": "a", "text": "Short."}]})
        await ask("POST", "/v1/summarise", {"text": "Short."})
        for one in ("/v1/stream", "/v1/complete"):
            await ask("POST", one, {"prompt": "Hello"})
        await ask("POST", "/v1/auth/cookie")
        await ask("DELETE", "/v1/auth/cookie")
        await ask("POST", "/v1/admin/revoke", {"user": "ann"})
        for one in ("/healthz", "/readyz", "/metrics", "/"):
            await ask("GET", one)
    assert seen == set(KNOWN)


async def check_task(ask: Any, path: str, ids: dict[str, str]) -> None:
    """What can be asked of a task, which is followed to its end first."""
    await ask("GET", path, **ids)
    await ask("GET", f"{path}/events", **ids)
    await ask("GET", f"{path}/result", **ids)
    await ask("DELETE", path, **ids)
