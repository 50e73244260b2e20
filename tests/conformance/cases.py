"""What a client has to do: each case is a function of a `Site`, written once and held against every client and way."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from realtime.feed import Closing
from realtime.protocol import utf16_length
from tests.conformance.clients import Driven, Open, Refused
from tests.end_to_end import PATIENCE_S, Model
from tests.support.client import Client, attached
from tests.support.event_stream import connections_of, http_client
from tests.support.server import RunningServer
from tests.support.tcp_proxy import TcpProxy
from tests.support.tokens import bearer, token

CASES: list[Callable[[Site], Awaitable[None]]] = []
GRACE = {"disconnect_grace_ms": 60_000}
CONNECTIONS = 4
"""So many a user may have open."""
HARD_TEXT = "Good 👋🏽 day,\r\n\x00\x1b[0m “é́” \u2028\ufeff data: x\n\nevent: y 𐍈"
_numbers = itertools.count()


class Site:
    """Where a case takes place: a server, the way to it, and a client. Each case has a user of its own."""

    def __init__(
        self, server: RunningServer, model: Model, proxy: TcpProxy, open_session: Open, transport: str
    ) -> None:
        self.server = server
        self.model = model
        self.proxy = proxy
        self.transport = transport
        self.user = ""
        self._open = open_session
        self._sessions: list[Driven] = []

    @property
    def url(self) -> str:
        """What the client is told."""
        return f"http://127.0.0.1:{self.proxy.port}"

    async def open(self, **options: Any) -> Driven:
        """A session of the client under test, which is attached."""
        session = await self.begin(**options)
        await session.until_open()
        return session

    async def begin(self, **options: Any) -> Driven:
        """One that is not attached yet, and may never be."""
        chosen = {
            "transport": self.transport,
            **({} if "tokens" in options else {"token": token(self.user)}),
            **options,
        }
        session = await self._open(self.url, **chosen)
        self._sessions.append(session)
        return session

    @asynccontextmanager
    async def case(self) -> AsyncIterator[None]:
        """One case, which leaves nothing open."""
        self.user = f"user-{next(_numbers)}"
        try:
            async with asyncio.timeout(2 * PATIENCE_S):
                yield
        finally:
            await self.proxy.resume()
            for session in self._sessions:
                await session.call("close")
            self._sessions.clear()

    @asynccontextmanager
    async def other(self, session: Driven) -> AsyncIterator[Client]:
        """Another reader of the session, who is not the client under test."""
        async with attached(self.server, session.session_id, bearer=token(self.user)) as client:
            yield client

    async def delete(self, session: Driven) -> None:
        """Erase the session."""
        async with http_client(base_url=self.server.url) as http:
            answer = await http.delete(f"/v1/sessions/{session.session_id}", headers=bearer(self.user))
            assert answer.status_code == 204

    def end_connections(self, code: int) -> None:
        """Have the server end all connections with a code."""
        for feed in list(connections_of(self.server)._held):
            feed.drop(Closing(code, by_server=True))


def case(function: Callable[[Site], Awaitable[None]]) -> Callable[[Site], Awaitable[None]]:
    """Add a case to the list."""
    CASES.append(function)
    return function


# --- answers ---------------------------------------------------------------------------------------------------------


@case
async def an_answer_comes_byte_for_byte(site: Site) -> None:
    """Astral and control characters, and what would end a line or an event; its length counted in UTF-16."""
    session = await site.open()
    answer = await session.call("respond", "Hello", {})
    turn = await site.model.turn()
    turn.end(*HARD_TEXT)
    assert await session.call("text", answer) == HARD_TEXT
    done = await session.until("response.done")
    assert (done["status"], done["output_chars"]) == ("completed", utf16_length(HARD_TEXT))


@case
async def an_answer_is_iterated_from_its_creation_to_its_end(site: Site) -> None:
    """And what comes of others is not among it; what was not taken in time is joined."""
    session = await site.open()
    first = await session.call("respond", "1", {})
    second = await session.call("respond", "2", {"multitask_strategy": "enqueue"})
    (await site.model.turn()).end("one ", "two ", "three")
    (await site.model.turn()).end("other")
    await session.until("response.done", response_id=second)
    for one, text in ((first, "one two three"), (second, "other")):
        events = await session.call("iterate", one)
        assert [event["type"] for event in events] == [
            "response.created",
            "response.in_progress",
            "response.output_text.delta",
            "response.done",
        ]
        assert events[2]["delta"] == text
        assert [event["seq"] - event.get("merged", 1) for event in events[1:]] == [0, 1, events[2]["seq"]]


@case
async def an_answer_that_was_cut_goes_on_without_a_seam(site: Site) -> None:
    """In its middle, and again; what came meanwhile is caught up with."""
    session = await site.open()
    answer = await session.call("respond", "Hello", GRACE)
    turn = await site.model.turn()
    turn.say("one ", "👋 ")
    await session.until_text(answer, "one 👋 ")
    for number, piece in enumerate(("two ", "three "), 1):
        await site.proxy.cut()
        turn.say(piece)
        await session.until_open(number + 1)
    turn.end("four")
    assert await session.call("text", answer) == "one 👋 two three four"
    await session.until_text(answer, "one 👋 two three four")
    assert [told["code"] for told in session.told] == [1006, 1006]


@case
async def a_command_whose_answer_was_lost_is_carried_out_once(site: Site) -> None:
    """It is sent again under its id."""
    session = await site.open()
    calls = site.model.calls
    await site.proxy.cut_after(1)
    answer = await session.call("respond", "Hello", GRACE)
    turn = await site.model.turn()
    await session.until_told("disconnect")
    await site.proxy.resume()
    turn.end("once")
    assert await session.call("text", answer) == "once"
    await session.until("response.done")
    assert [item["content"] for item in session.transcript.items] == ["Hello"]
    assert site.model.calls == calls + 1


@case
async def what_is_said_offline_is_answered_later(site: Site) -> None:
    """In its order."""
    session = await site.open()
    await session.call("drop", 0.2)
    first = await session.call("respond", "1", GRACE)
    second = await session.call("respond", "2", {"multitask_strategy": "enqueue", **GRACE})
    (await site.model.turn()).end("one")
    (await site.model.turn()).end("two")
    assert await session.call("text", first) == "one"
    assert await session.call("text", second) == "two"
    await session.until("response.done", response_id=second)
    assert [item["content"] for item in session.transcript.items] == ["1", "2"]


@case
async def more_than_a_connection_may_send_at_once_is_all_carried_out(site: Site) -> None:
    """The client takes the time that the server wants for it: nothing is refused, nothing is lost."""
    session = await site.open()
    await session.call("drop", 0.05)
    said = [str(number) for number in range(120)]
    for text in said:
        item = {"role": "user", "content": text}
        await session.call("send", {"type": "conversation.item.create", "item": item})
    await session.until("conversation.item.created", seq=len(said))
    assert [item["content"] for item in session.transcript.items] == said
    assert not [event for event in session.transcript.events if event["type"] == "error"]


@case
async def no_more_waits_offline_than_was_allowed(site: Site) -> None:
    """One command more is refused by the client itself; once there is room it takes them again."""
    session = await site.open(max_unanswered=2)
    await session.call("drop", 0.2)
    update = {"type": "session.update", "session": {}}
    ids = [await session.call("send", update), await session.call("send", update)]
    with pytest.raises(Refused, match="queue_full"):
        await session.call("send", update)
    for event_id in ids:
        await session.until("session.updated", for_event_id=event_id)
    await session.call("send", update)


@case
async def a_command_that_is_too_large_is_refused_by_itself(site: Site) -> None:
    """By the client: the session lives on, and what the server just takes is carried out."""
    session = await site.open()
    with pytest.raises(Refused, match="message_too_large"):
        await session.call("respond", "é" * 33_000, {})
    answer = await session.call("respond", "e" * 65_000, {})
    (await site.model.turn()).end("one")
    assert await session.call("text", answer) == "one"
    assert not session.told


@case
async def two_viewers_see_the_same(site: Site) -> None:
    """Who comes later, too; and each knows of the other."""
    first = await site.open()
    answer = await first.call("respond", "Hello", {})
    turn = await site.model.turn()
    turn.say("one ")
    await first.until_text(answer, "one ")
    second = await site.open(session_id=first.session_id)
    await second.until_text(answer, "one ")
    turn.end("two")
    for viewer in (first, second):
        await viewer.until("response.done", response_id=answer)
        shown = await viewer.call("show")
        assert shown["texts"] == {answer: "one two"}
        assert shown["participants"] == 2
    assert first.transcript.items == second.transcript.items


@case
async def without_the_history_it_starts_where_the_session_stands(site: Site) -> None:
    """And sees what comes from then on."""
    first = await site.open()
    answer = await first.call("respond", "Hello", {})
    (await site.model.turn()).end("one")
    await first.call("text", answer)
    second = await site.begin(session_id=first.session_id, history="none")
    second.transcript.positions["session"] = first.transcript.positions["session"]
    await second.until_open()
    later = await second.call("respond", "More", {})
    (await site.model.turn()).end("two")
    assert await second.call("text", later) == "two"
    assert (await second.call("show"))["texts"] == {later: "two"}


@case
async def what_was_shown_and_never_stored_is_dropped(site: Site) -> None:
    """A client that is ahead of what the store has of an answer that ended begins it anew."""
    session = await site.open()
    async with site.other(session) as other:
        answer = await session.call("respond", "Hello", GRACE)
        turn = await site.model.turn()
        turn.say("one ")
        await session.until_text(answer, "one ")
        await session.call("drop", 0.2)
        await session.call("set_position", answer, 99)
        turn.end("two")
        async with asyncio.timeout(PATIENCE_S):
            await other.until("response.done")
    assert await session.call("text", answer) == "one two"
    await session.until("response.done")
    assert [event["type"] for event in session.transcript.events if event.get("reset")] == ["response.in_progress"]


# --- stopping --------------------------------------------------------------------------------------------------------


@case
async def stop_ends_the_model_call(site: Site) -> None:
    """What there is of the answer stays."""
    session = await site.open()
    answer = await session.call("respond", "Hello", {})
    turn = await site.model.turn()
    turn.say("one ")
    await session.until_text(answer, "one ")
    await session.call("cancel", answer)
    assert await session.call("text", answer) == "one "
    assert (await session.until("response.done"))["status"] == "cancelled"
    async with asyncio.timeout(PATIENCE_S):
        await turn.closed.wait()


@case
async def an_interruption_keeps_what_was_heard(site: Site) -> None:
    """Counted in UTF-16, and never half a character."""
    session = await site.open()
    answer = await session.call("respond", "Hello", {})
    turn = await site.model.turn()
    turn.say("Good 👋 day")
    await session.until_text(answer, "Good 👋 day")
    await session.call("heard", answer, 6)
    await session.call("interrupt")
    await session.call("heard", answer, 9)
    done = await session.until("response.done")
    assert (done["status"], done["heard_chars"]) == ("cancelled", 5)
    assert (await session.until("conversation.item.truncated"))["item"] == {"response_id": answer, "heard_chars": 5}


@case
async def an_interruption_reaches_an_answer_that_is_still_voiced(site: Site) -> None:
    """Though it was written to its end; and only once."""
    session = await site.open()
    answer = await session.call("respond", "Hello", {})
    (await site.model.turn()).end("Good 👋 day")
    await session.call("text", answer)
    await session.call("heard", answer, 7)
    await session.call("interrupt")
    await session.call("interrupt")
    assert (await session.until("conversation.item.truncated"))["item"]["heard_chars"] == 7
    marker = await session.call("send", {"type": "session.update", "session": {}})
    await session.until("session.updated", for_event_id=marker)
    assert [e["type"] for e in session.transcript.events].count("conversation.item.truncated") == 1


@case
async def what_was_sent_goes_out_before_it_is_left(site: Site) -> None:
    """However soon after; and more than may go out at once."""
    session = await site.open()
    answer = await session.call("respond", "Hello", GRACE)
    await site.model.turn()
    await session.until("response.in_progress")
    async with site.other(session) as other:
        item = {"role": "user", "content": "More"}
        commands: list[dict[str, Any]] = [{"type": "conversation.item.create", "item": item}] * 45
        commands += [{"type": "response.cancel", "response_id": answer}, {"type": "session.close"}]
        await session.call("leave_with", commands)
        assert (await session.call("show"))["state"] == "closed"
        async with asyncio.timeout(PATIENCE_S):
            assert (await other.until("response.done"))["status"] == "cancelled"
            await other.until("session.closed")


# --- tasks -----------------------------------------------------------------------------------------------------------


@case
async def a_task_tells_its_progress_and_its_result(site: Site) -> None:
    """Up to its end, which is what the loop ends with."""
    session = await site.open()
    task = await session.call("create_task", "count", {"steps": 3})
    assert await session.call("result", task) == 3
    events = await session.call("iterate", task)
    assert [events[0]["type"], events[-1]["type"]] == ["task.created", "task.done"]
    assert [e["message"] for e in events if e["type"] == "task.progress"][-1] == "step 3"
    assert (await session.call("show"))["statuses"] == {task: "complete"}


@case
async def a_task_is_cancelled(site: Site) -> None:
    """Its result is then an error, with a code of its own."""
    session = await site.open()
    task = await session.call("create_task", "sleep", {"seconds": 60})
    await session.until("task.progress")
    await session.call("cancel_task", task)
    with pytest.raises(Refused, match="cancelled"):
        await session.call("result", task)


@case
async def a_large_result_is_fetched(site: Site) -> None:
    """It is not in the event."""
    session = await site.open()
    text = "long " * 40_000
    task = await session.call("create_task", "repeat", {"number": 40_000})
    assert await session.call("result", task) == text
    assert "result" not in await session.until("task.done")


@case
async def what_the_server_refuses_is_raised_with_its_code(site: Site) -> None:
    """And the session lives on."""
    session = await site.open()
    task = await session.call("create_task", "nowhere", {})
    with pytest.raises(Refused) as refused:
        await session.call("iterate", task)
    assert refused.value.code == (await session.until("error"))["error"]["code"]
    answer = await session.call("respond", "Hello", {})
    (await site.model.turn()).end("one")
    assert await session.call("text", answer) == "one"


# --- ends ------------------------------------------------------------------------------------------------------------


@case
async def a_session_that_is_closed_ends_the_loop(site: Site) -> None:
    """Without an error: 1000 is no failure."""
    session = await site.open()
    await session.call("send", {"type": "session.close"})
    assert "error" not in await session.until_told("end")
    assert (await session.call("show"))["state"] == "closed"


@case
async def an_unknown_session_is_not_tried_again(site: Site) -> None:
    """4404, raised by the loop and by whatever waits."""
    session = await site.begin(session_id="sess_00000000000000000000000000000000")
    assert (await session.until_told("end"))["code"] == 4404
    with pytest.raises(Refused, match="closed"):
        await session.call("respond", "Hello", {})


@case
async def a_deleted_session_is_not_tried_again(site: Site) -> None:
    """4410."""
    session = await site.open()
    answer = await session.call("respond", "Hello", {})
    await site.model.turn()
    await session.until("response.in_progress")
    await site.delete(session)
    assert (await session.until_told("end"))["code"] == 4410
    with pytest.raises(Refused, match="closed"):
        await session.call("text", answer)


@case
async def a_refused_token_is_the_end_where_there_is_no_other(site: Site) -> None:
    """4401."""
    session = await site.begin(token="no.such.token")
    assert (await session.until_told("end"))["code"] == 4401


@case
async def a_token_that_has_expired_is_named(site: Site) -> None:
    """By the error that comes before the end, whatever carries it."""
    session = await site.open(token=token(site.user, ttl_s=40))
    connections_of(site.server)._drop_expired(time.time() + 60)
    end = await session.until_told("end")
    assert (end["code"], end["reason"]) == (4401, "token_expired")


@case
async def a_refused_token_is_replaced(site: Site) -> None:
    """Where a function gets them."""
    session = await site.open(tokens=["no.such.token", token(site.user)])
    assert (await session.until_told("disconnect"))["code"] == 4401


@case
async def a_token_is_replaced_before_it_expires(site: Site) -> None:
    """On the open connection, or with the next stream; an answer goes on across it."""
    session = await site.open(tokens=[token(site.user, ttl_s=40), token(site.user)])
    answer = await session.call("respond", "Hello", GRACE)
    turn = await site.model.turn()
    turn.say("one ")
    await session.until_text(answer, "one ")
    connections_of(site.server)._drop_expired(time.time())
    await session.until("auth.expiring")
    await (session.until("auth.refreshed") if site.transport == "websocket" else session.until_open(2))
    connections_of(site.server)._drop_expired(time.time() + 60)
    turn.end("two")
    assert await session.call("text", answer) == "one two"
    assert len(session.told) == (0 if site.transport == "websocket" else 1)


@case
async def too_many_connections_are_waited_for(site: Site) -> None:
    """As long as the error says."""
    others = [await site.open() for _ in range(CONNECTIONS)]
    session = await site.begin()
    error = (await session.until("error"))["error"]
    told = await session.until_told("disconnect")
    await others[0].call("close")
    assert told["code"] == 4429
    assert told["reconnectInMs"] > error["retry_after_ms"]
    await session.until_open()


@case
async def who_is_dropped_comes_back(site: Site) -> None:
    """After each code that says so, with what was missed."""
    session = await site.open()
    answer = await session.call("respond", "Hello", GRACE)
    turn = await site.model.turn()
    text = ""
    for number, code in enumerate((1011, 1012, 4408), 1):
        site.end_connections(code)
        turn.say(f"{code} ")
        text += f"{code} "
        await session.until_open(number + 1)
        await session.until_text(answer, text)
    turn.end()
    assert await session.call("text", answer) == text


@case
async def an_instance_that_goes_away_is_left_when_it_says(site: Site) -> None:
    """At once where it says so; the answer goes on."""
    session = await site.open()
    answer = await session.call("respond", "Hello", GRACE)
    turn = await site.model.turn()
    turn.say("one ")
    await session.until_text(answer, "one ")
    connections_of(site.server).say_goodbye(60, 0)
    await session.until("session.going_away")
    await session.until_open(2)
    turn.end("two")
    assert await session.call("text", answer) == "one two"
