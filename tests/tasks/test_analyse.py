"""The task `analyse`: what is read, how findings become one report, and what becomes of answers that are none."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest

from realtime.errors import InvalidRequest, UpstreamError
from realtime.responders.base import Request
from realtime.responders.demo import ANSWER
from realtime.tasks import analyse as module
from realtime.tasks.analyse import (
    MAX_DOCUMENTS,
    MERGE,
    READ,
    DocumentReport,
    Entity,
    Findings,
    Source,
    Sources,
    analyse,
    parse,
)
from realtime.tasks.registry import Registry
from realtime.tasks.splitting import MAX_CALLS, PART_TOKENS, split_all
from tests.tasks.scripted import Offloaded, Script, context_of, quotes_in


@pytest.fixture(autouse=True)
def offloaded(monkeypatch: pytest.MonkeyPatch) -> Offloaded:
    here = Offloaded()
    monkeypatch.setattr(module, "offload", here)
    return here


def text_of(*marks: str) -> str:
    """A text that has a part for each mark, which is its first word."""
    return "\n\n".join(f"{mark} " + "word " * (PART_TOKENS // 2) for mark in marks)


def found(summary: str, **more: Any) -> str:
    return json.dumps({"title": f"On {summary}", "summary": summary, **more})


def answer(request: Request) -> str:
    """The findings of a part say its first word, merged ones say what all of them say, in brackets."""
    if request.instructions == READ:
        return found(quotes_in(request, "document")[0].split()[0])
    assert request.instructions == MERGE
    merged = [json.loads(findings) for findings in quotes_in(request, "findings")]
    return found("(" + "+".join(findings["summary"] for findings in merged) + ")")


FULL = Findings(
    title="A lease",
    summary="Two parties agree.",
    key_points=["900 a month"],
    topics=["rent"],
    entities=[Entity("Ann", "person")],
    sentiment="neutral",
    open_questions=["From when?"],
)

# --- the report ------------------------------------------------------------------------------------------------------


async def test_one_short_text_takes_one_call() -> None:
    """What is found in it is the report."""
    script = Script(lambda _: msgspec.json.encode(FULL).decode())
    context, _ = context_of(script)
    report = await analyse(context, Sources(text="Some text."))
    assert msgspec.to_builtins(report) == {
        **msgspec.to_builtins(FULL),
        "structured": True,
        "documents": [{"title": "A lease", "parts": 1, "summary": "Two parties agree."}],
        "usage": msgspec.to_builtins(context.model.usage),
    }
    [request] = script.requests
    assert quotes_in(request, "document") == ["Some text."]


async def test_a_long_text_is_read_in_parts() -> None:
    """Whose findings are merged, in their order."""
    script = Script(answer)
    context, _ = context_of(script)
    report = await analyse(context, Sources(text=text_of("a", "b", "c")))
    assert report.summary == "(a+b+c)"
    assert report.documents == [DocumentReport("On (a+b+c)", 3, "(a+b+c)")]
    assert len(script.requests) == 4


async def test_several_documents_are_merged_each_and_then_all() -> None:
    """A document of one part needs no merging of its own."""
    script = Script(answer)
    context, _ = context_of(script)
    documents = [Source(text_of("a", "b")), Source("c"), Source(text_of("d", "e"), "Five")]
    report = await analyse(context, Sources(documents=documents))
    assert report.summary == "((a+b)+c+(d+e))"
    assert report.documents == [
        DocumentReport("On (a+b)", 2, "(a+b)"),
        DocumentReport("On c", 1, "c"),
        DocumentReport("Five", 2, "(d+e)"),
    ]
    assert len(script.requests) == 5 + 2 + 1


async def test_the_model_is_told_which_part_of_what_it_reads() -> None:
    """And the document's title, as data."""
    script = Script(answer)
    context, _ = context_of(script)
    await analyse(context, Sources(documents=[Source(text_of("a", "b"), "Lease 7"), Source("c")]))
    reads = [request for request in script.requests if request.instructions == READ]
    assert [quotes_in(request, "title") for request in reads] == [["Lease 7"], ["Lease 7"], []]
    told = [request.messages[0].content.rpartition("This is ")[2].partition(".")[0] for request in reads]
    assert told == ["part 1 of 2 of the document", "part 2 of 2 of the document", "the document"]


async def test_a_given_title_counts() -> None:
    """More than what the model calls it, also where documents are merged."""
    script = Script(answer)
    context, _ = context_of(script)
    report = await analyse(context, Sources(documents=[Source("a", "First"), Source("b", "Second")]))
    [merge] = [request for request in script.requests if request.instructions == MERGE]
    assert [json.loads(each)["title"] for each in quotes_in(merge, "findings")] == ["First", "Second"]
    assert [document.title for document in report.documents] == ["First", "Second"]


async def test_every_part_is_reported_and_then_the_report() -> None:
    """Progress only grows, towards a total that stays."""
    context, reports = context_of(Script(answer))
    await analyse(context, Sources(documents=[Source(text_of("a", "b")), Source("c")]))
    assert reports.steps == [
        (1, 4, "read part 1 of 3"),
        (2, 4, "read part 2 of 3"),
        (3, 4, "read part 3 of 3"),
        (4, 4, "wrote the report"),
    ]


async def test_no_more_calls_at_once_than_may_be() -> None:
    """Over all documents together, in reading and in merging."""
    script = Script(answer)
    context, _ = context_of(script)
    await analyse(context, Sources(documents=[Source(text_of("a", "b"))] * 20))
    assert script.most == MAX_CALLS


async def test_the_texts_are_split_off_the_loop(offloaded: Offloaded) -> None:
    """All of them in one go, in another process."""
    context, _ = context_of(Script(answer))
    await analyse(context, Sources(documents=[Source("a"), Source("b")]))
    [(function, args)] = offloaded.calls
    assert getattr(function, "func", None) is split_all
    assert args == (["a", "b"],)


async def test_cancelling_closes_all_calls() -> None:
    """Those that are under way."""
    script = Script(hold=MAX_CALLS)
    context, _ = context_of(script)
    working = asyncio.create_task(analyse(context, Sources(documents=[Source("a")] * 20)))
    await script.full.wait()
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert script.running == 0


async def test_an_error_of_the_model_comes_out_as_it_is() -> None:
    """In no group."""

    def fails(_request: Request) -> str:
        raise UpstreamError("upstream_error", "The model failed.")

    script = Script(fails)
    context, _ = context_of(script)
    with pytest.raises(UpstreamError):
        await analyse(context, Sources(text=text_of("a", "b", "c")))
    assert script.running == 0


# --- answers that are no findings ------------------------------------------------------------------------------------


async def test_prose_is_the_summary() -> None:
    """The demo responder, for one, knows no JSON: what it says is told, and that it is no more than that."""
    context, _ = context_of(Script(lambda _: ANSWER))
    report = await analyse(context, Sources(text="a"))
    assert not report.structured
    assert report.summary == ANSWER
    assert (report.key_points, report.topics, report.entities, report.open_questions) == ([], [], [], [])
    assert report.documents == [DocumentReport("", 1, ANSWER)]


async def test_prose_about_one_part_is_merged_like_findings() -> None:
    """The merged findings are as good as they are."""

    def partly(request: Request) -> str:
        if request.instructions == READ and quotes_in(request, "document")[0].startswith("b"):
            return "Only words."
        return answer(request)

    context, _ = context_of(Script(partly))
    report = await analyse(context, Sources(text=text_of("a", "b")))
    assert report.structured
    assert report.summary == "(a+Only words.)"


JSON = msgspec.json.encode(FULL).decode()


@pytest.mark.parametrize(
    "said",
    [
        JSON,
        f"\n {JSON}\n",
        f"```json\n{JSON}\n```",
        f"```\n{JSON}\n```\nAnything else?",
        f"Here it is:\n\n{JSON}\n\nI hope that it helps.",
        json.dumps(json.loads(JSON), indent=2),
        JSON.replace("{", '{"confidence": [1, {}], ', 1),
    ],
)
def test_findings_are_found_in_what_stands_around_them(said: str) -> None:
    """Fences, courtesies, fields that nobody asked for."""
    assert parse(said) == FULL


def test_what_is_left_out_is_empty() -> None:
    """But for the summary, without which there are no findings."""
    assert parse('{"summary": "s", "sentiment": null}') == Findings(summary="s")
    assert not parse('{"title": "t"}').structured


@pytest.mark.parametrize(
    "said",
    ["", "No JSON at all.", "}{", "{", "[1]", '{"summary": 1}', '{"summary": "s"', "{}", '{"summary": "a"} {"b": 1}'],
)
def test_an_answer_without_findings_is_the_summary(said: str) -> None:
    """As it is, without the space around it."""
    assert parse(f" {said}\n") == Findings(structured=False, summary=said)


def test_an_answer_too_deep_to_be_read_is_the_summary() -> None:
    """It does no harm."""
    said = '{"summary": "s", "more": ' + "[" * 100_000 + "]" * 100_000 + "}"
    assert not parse(said).structured


# --- the input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"text": "a", "documents": [{"text": "b"}]},
        {"text": ""},
        {"text": " \n"},
        {"documents": []},
        {"documents": [{"text": ""}]},
        {"documents": [{"title": "a"}]},
        {"documents": [{"text": "a", "title": "b" * 201}]},
        {"documents": [{"text": "a"}] * (MAX_DOCUMENTS + 1)},
        {"text": "a", "more": 1},
    ],
)
def test_what_can_not_be_analysed_is_refused(given: object) -> None:
    """Before there is a task."""
    with pytest.raises(InvalidRequest):
        Registry([analyse]).check("analyse", given)


def test_both_or_neither_is_told() -> None:
    """In words of our own."""
    with pytest.raises(InvalidRequest) as raised:
        Registry([analyse]).check("analyse", {})
    assert raised.value.message == "Give either text or documents."
    assert (raised.value.code, raised.value.param) == ("invalid_input", "input")


@pytest.mark.parametrize("given", [{"text": "a"}, {"documents": [{"text": "a"}, {"text": "b", "title": "B"}]}])
def test_an_input_survives_being_stored(given: dict[str, Any]) -> None:
    """What was checked and written down is read again as the same."""
    stored = Registry([analyse]).check("analyse", given)
    assert msgspec.json.decode(stored, type=Sources) == msgspec.convert(given, Sources)
