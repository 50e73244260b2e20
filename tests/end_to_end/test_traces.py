"""One trace from a command, by way of the model, to the last frame of its answer, in any process, without content."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest
import structlog
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai
from opentelemetry.semconv.attributes import error_attributes, http_attributes
from opentelemetry.trace import StatusCode, format_span_id, format_trace_id

from realtime.access.audit import hidden
from realtime.errors import UpstreamError
from realtime.observe import traces
from realtime.observe.otel import OtelTracer
from realtime.responders.anthropic import AnthropicResponder
from realtime.responders.base import Finish, TokenCount
from realtime.settings import SettingsError
from tests.end_to_end import Model
from tests.support.client import attached
from tests.support.collector import Collector
from tests.support.redis_server import redis_server
from tests.support.server import running_server
from tests.support.worker import site

CANARY = "canary-40aa"
TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"}
COUNT = TokenCount(input_tokens=10, output_tokens=5, cache_read_input_tokens=100, cache_creation_input_tokens=7)


class Spans:
    """The spans that have ended here."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()

    @property
    def all(self) -> Sequence[ReadableSpan]:
        return self.exporter.get_finished_spans()

    def of(self, name: str) -> Any:
        """The one of that name."""
        [found] = [span for span in self.all if span.name == name]
        return found

    def parents(self) -> dict[str, str | None]:
        """By the name of each span, that of its parent."""
        names = {span.context.span_id: span.name for span in self.all if span.context}
        return {span.name: names[span.parent.span_id] if span.parent else None for span in self.all}


@pytest.fixture
def spans() -> Iterator[Spans]:
    spans = Spans()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans.exporter))
    traces.use(OtelTracer(provider, is_ours=False))
    yield spans
    traces.use(None)
    for span in spans.all:
        assert CANARY not in span.to_json(), "content in a span"


@pytest.fixture
def model() -> Model:
    return Model()


async def test_one_answer_is_one_trace(spans: Spans, model: Model) -> None:
    """The command, the response, its model call, and what a reader was sent of it, up to its end."""
    async with running_server(model) as server, attached(server) as client:
        response_id = await client.respond(CANARY)
        turn = await model.turn()
        turn.end(CANARY, Finish("end_turn", COUNT))
        await client.until("response.done", response_id=response_id)
        session_id, connection_id, name = client.session_id, client.first["connection_id"], turn.request.model
    assert spans.parents() == {
        "response.create": None,
        "response": "response.create",
        f"chat {name}": "response",
        "deliver": "response.create",
    }
    assert len({span.context.trace_id for span in spans.all if span.context}) == 1
    chat = dict(spans.of(f"chat {name}").attributes)
    assert 0 < chat.pop(gen_ai.GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK) < 60
    assert chat == {
        gen_ai.GEN_AI_OPERATION_NAME: "chat",
        gen_ai.GEN_AI_PROVIDER_NAME: "Model",
        gen_ai.GEN_AI_REQUEST_MODEL: name,
        gen_ai.GEN_AI_REQUEST_MAX_TOKENS: turn.request.max_output_tokens,
        gen_ai.GEN_AI_REQUEST_STREAM: True,
        gen_ai.GEN_AI_CONVERSATION_ID: hidden(session_id),
        gen_ai.GEN_AI_RESPONSE_FINISH_REASONS: ("end_turn",),
        gen_ai.GEN_AI_USAGE_INPUT_TOKENS: 117,
        gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS: 5,
        gen_ai.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS: 100,
        gen_ai.GEN_AI_USAGE_CACHE_CREATION_INPUT_TOKENS: 7,
        "realtime.session.id": hidden(session_id),
        "realtime.response.id": response_id,
    }
    assert spans.of("response").attributes["realtime.response.status"] == "completed"
    assert dict(spans.of("deliver").attributes) == {
        "realtime.session.id": hidden(session_id),
        "realtime.connection.id": connection_id,
        "realtime.delivery.frames": 3,
        "realtime.delivery.events": 3,
        "realtime.delivery.whole": True,
    }
    assert spans.of("deliver").end_time >= spans.of("response").start_time


async def test_how_it_ends_stands_in_the_spans(spans: Spans, model: Model) -> None:
    """To be cancelled is no error; to fail is one, with the code that clients are told."""
    async with running_server(model) as server, attached(server) as client:
        cancelled = await client.respond(CANARY)
        (await model.turn()).say("Hel")
        await client.until("response.output_text.delta")
        await client.send("response.cancel", response_id=cancelled)
        await client.until("response.done", response_id=cancelled)
        failed = await client.respond(CANARY)
        turn = await model.turn()
        turn.fail(UpstreamError("upstream_overloaded", CANARY))
        await client.until("response.done", response_id=failed)
        await client.send("response.cancel", response_id=CANARY)
        await client.until("error")
    first, second = [span for span in spans.all if span.name == "response"]
    assert first.attributes is not None
    assert first.attributes["realtime.response.status"] == "cancelled"
    assert first.attributes["realtime.response.stop_reason"] == "cancelled"
    assert first.status.status_code is StatusCode.UNSET
    chats = [span for span in spans.all if span.name == f"chat {turn.request.model}"]
    refusal = [span for span in spans.all if span.name == "response.cancel"][-1]
    assert [chat.status.status_code for chat in chats] == [StatusCode.UNSET, StatusCode.ERROR]
    for span, code in ((second, "upstream_overloaded"), (chats[1], "upstream_overloaded"), (refusal, None)):
        assert span.attributes is not None
        assert span.status.status_code is StatusCode.ERROR
        assert span.status.description is None
        assert not span.events
        assert code is None or span.attributes[error_attributes.ERROR_TYPE] == code


async def test_a_request_goes_on_with_its_callers_trace(spans: Spans, model: Model) -> None:
    """A POST is a part of it; a connection lasts too long for that, and what is asked over it only points to it."""
    async with running_server(model) as server:
        async with httpx.AsyncClient(base_url=server.url, trust_env=False, headers=PARENT) as http:
            bad = await http.post("/v1/complete", content=CANARY)
        async with attached(server, headers=PARENT) as client:
            await client.respond(CANARY)
            (await model.turn()).end()
            await client.until("response.done")
    posted, created = spans.of("POST /v1/complete"), spans.of("response.create")
    assert (format_trace_id(posted.context.trace_id), format_span_id(posted.parent.span_id)) == (TRACE_ID, SPAN_ID)
    assert posted.attributes[http_attributes.HTTP_RESPONSE_STATUS_CODE] == bad.status_code == 400
    assert posted.attributes[http_attributes.HTTP_ROUTE] == "/v1/complete"
    assert created.parent is None
    assert [format_trace_id(link.context.trace_id) for link in created.links] == [TRACE_ID]


async def test_what_cant_be_read_begins_a_new_trace(spans: Spans, model: Model) -> None:
    """Whatever a client sends as its trace, the request is answered."""
    async with running_server(model) as server:
        async with httpx.AsyncClient(base_url=server.url, trust_env=False) as http:
            for bad in (b"", b"00-1-2-3", b"ff" * 5000, b"\xe9"):
                assert (await http.post("/v1/sessions", headers={b"traceparent": bad})).status_code == 201
    assert all(span.parent is None for span in spans.all)


async def test_a_tasks_worker_goes_on_with_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, which sends its spans by itself: so do the exporter and its variables work."""
    async with Collector() as collector, redis_server() as redis:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        async with site(redis, workers=1) as here:
            await here.come_to_what_they_must([await here.submit("count", steps=2)])
            made, ran = await collector.until("POST /v1/tasks/{task_id}", "task count")
    assert ran.trace_id == made.trace_id
    assert ran.parent_span_id == made.span_id
    told = {pair.key: pair.value.string_value or pair.value.int_value for pair in ran.attributes}
    assert told["realtime.task.status"] == "complete"
    assert told["realtime.task.attempt"] == 1


def test_without_traces_nothing_of_them_is_loaded() -> None:
    """Neither by what serves, nor by what runs tasks."""
    code = (
        "import sys\n"
        "import realtime.server, realtime.tasks.process\n"
        "from realtime.app import create_app\n"
        "create_app()\n"
        "assert 'realtime.observe.traces' in sys.modules\n"
        "loaded = [name for name in sys.modules if 'opentelemetry' in name or name == 'realtime.observe.otel']\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("setting", "variables", "wanted"),
    [
        ("auto", {}, False),
        ("on", {}, True),
        ("off", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}, False),
        ("auto", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}, True),
        ("auto", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_SDK_DISABLED": "true"}, False),
        ("auto", {"OTEL_TRACES_EXPORTER": "console"}, True),
        ("auto", {"OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_traces_are_on_where_they_are_asked_for(setting: str, variables: dict[str, str], wanted: bool) -> None:
    """By the setting, or else by the variables that OpenTelemetry has for it."""
    assert traces.are_wanted(setting, variables) is wanted


async def test_a_start_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where traces are asked for; a server's, a worker's, and what `realtime check` finds."""
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    with pytest.raises(SettingsError, match=r"realtime-server\[otel\]"):
        async with traces.tracing("on"):
            pass
    with pytest.raises(SettingsError, match=r"realtime-server\[otel\]"):
        traces.check("on")


def test_an_exporter_that_is_unknown_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what is allowed."""
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with pytest.raises(SettingsError, match="expected otlp, console or none"):
        traces.check("auto")


async def test_the_models_client_makes_no_spans_of_its_own() -> None:
    """Nor does it tell the provider of ours."""
    async with AnthropicResponder(api_key="test", base_url="http://127.0.0.1:1") as responder:
        options = responder._provider._client.open_telemetry
    assert options["propagation"] is False
    assert options["traces"]["enabled"] is False


class Stuck(OtelTracer):
    """One that can't send what is left until it is let."""

    def __init__(self) -> None:
        super().__init__(TracerProvider(shutdown_on_exit=False), is_ours=True)
        self.may_end = threading.Event()

    def close(self) -> None:
        self.may_end.wait()


async def test_spans_that_cant_be_sent_hold_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of the process waits for a collector that does not answer, but not for long."""
    stuck = Stuck()
    monkeypatch.setattr(traces, "CLOSE_S", 0.05)
    monkeypatch.setattr(traces, "_load", lambda _setting: stuck)
    with structlog.testing.capture_logs() as written:
        async with traces.tracing("on"):
            assert traces.is_on()
        assert not traces.is_on()
    stuck.may_end.set()
    assert [line["event"] for line in written] == ["the last traces could not be sent"]
