"""What each command comes to, what refuses it, and how the log folds into a state."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from realtime.control import CancelResponse, CancelTask
from realtime.errors import ConflictError, InvalidRequest, NotFound, RealtimeError
from realtime.protocol import (
    JSON,
    MAX_UNFINISHED_CHANNELS,
    MSGPACK,
    ChannelEvent,
    Command,
    ItemCreate,
    ItemCreated,
    ItemTruncate,
    ItemTruncated,
    MultitaskStrategy,
    NewItem,
    Overrides,
    ResponseCancel,
    ResponseCreate,
    ResponseCreated,
    Scalar,
    SessionClose,
    SessionClosed,
    SessionUpdate,
    SessionUpdated,
    Task,
    TaskCancel,
    TaskCreate,
    TaskCreated,
    Truncation,
)
from realtime.session import Decision, Limits, SessionState, decide, truncated_response
from tests.contract import (
    NOW,
    begun,
    closed,
    created,
    done,
    item,
    session,
    task_begun,
    task_done,
    task_made,
    task_told,
)

LIMITS = Limits(frozenset({"m", "m2"}), 1000)


def state_of(*events: ChannelEvent, **settings: Any) -> SessionState:
    state = SessionState(session(**settings))
    for event in events:
        state.apply(event)
    return state


def decided(state: SessionState, command: Command, *, heard: str = "", limits: Limits = LIMITS) -> Decision:
    return decide(state, command, user="bob", now=NOW, limits=limits, heard=heard)


def refused(state: SessionState, command: Command, *, limits: Limits = LIMITS) -> tuple[type[RealtimeError], str, Any]:
    """The kind, the code and the parameter of the error that refuses a command."""
    with pytest.raises(RealtimeError) as refusal:
        decided(state, command, limits=limits)
    return type(refusal.value), refusal.value.code, refusal.value.param


def response_of(decision: Decision) -> ResponseCreated:
    [event] = [event for event in decision.events if isinstance(event, ResponseCreated)]
    return event


RUNNING = (item("hi"), created("resp_1"), begun("resp_1"))
DONE = (*RUNNING, done("resp_1"))


# --- session.update ------------------------------------------------------------------------------------------------


def test_an_update_changes_what_it_gives() -> None:
    """The other settings stay, and the event carries the command's id."""
    command = SessionUpdate(event_id="e1", session=Overrides(model="m2", disconnect_grace_ms=5))
    decision = decided(state_of(), command)
    changed = session(model="m2", disconnect_grace_ms=5)
    assert decision == Decision([SessionUpdated(session=changed, for_event_id="e1")], [])


def test_empty_instructions_clear_them() -> None:
    """An empty text is given; only `None` is not."""
    decision = decided(state_of(instructions="Be brief"), SessionUpdate(session=Overrides(instructions="")))
    assert decision.events == [SessionUpdated(session=session(instructions=""))]


def test_settings_share_the_first_frame() -> None:
    """Instructions that would leave no room in it for positions and participants are refused."""
    decided(state_of(), SessionUpdate(session=Overrides(instructions="x" * 65_536)))
    command = SessionUpdate(session=Overrides(instructions="x" * 100_000))
    assert refused(state_of(), command) == (InvalidRequest, "too_large", None)


def test_an_update_tells_when_the_session_expires() -> None:
    """The session is told as it is in a first frame."""
    command = SessionUpdate(session=Overrides())
    decision = decide(state_of(), command, user="bob", now=NOW, limits=LIMITS, expires_at="later")
    assert decision.events == [SessionUpdated(session=session(expires_at="later"))]


def test_an_update_to_an_unknown_model_is_refused() -> None:
    """A model that the server does not offer can't become the default."""
    command = SessionUpdate(session=Overrides(model="other"))
    assert refused(state_of(), command) == (InvalidRequest, "model_not_found", "model")


def test_an_update_to_too_many_tokens_is_refused() -> None:
    """One more than allowed is too many; as many as allowed is fine."""
    decided(state_of(), SessionUpdate(session=Overrides(max_output_tokens=1000)))
    command = SessionUpdate(session=Overrides(max_output_tokens=1001))
    assert refused(state_of(), command) == (InvalidRequest, "max_output_tokens_too_large", "max_output_tokens")


def test_any_model_may_be_allowed() -> None:
    """`*` stands for all of them."""
    command = SessionUpdate(session=Overrides(model="whatever"))
    assert decided(state_of(), command, limits=Limits(frozenset({"*"}), 1)).events


# --- conversation.item.create --------------------------------------------------------------------------------------


def test_an_item_is_added() -> None:
    """With the client's id, role and content, the user and the time."""
    decision = decided(state_of(), ItemCreate(event_id="e1", item=NewItem(role="system", content="x", id="mine")))
    [event] = decision.events
    assert isinstance(event, ItemCreated)
    assert (event.item.id, event.item.role, event.item.content) == ("mine", "system", "x")
    assert (event.item.user, event.item.created_at, event.for_event_id) == ("bob", NOW, "e1")


def test_an_item_without_an_id_gets_one() -> None:
    """Two of them get two, with 128 random bits each."""
    command = ItemCreate(item=NewItem(role="user", content="x"))
    ids = {event.item.id for _ in range(2) for event in decided(state_of(), command).events}  # type: ignore[attr-defined]
    assert len(ids) == 2
    assert all(len(item_id) == len("item_") + 32 for item_id in ids)


def test_an_item_s_id_is_taken_once() -> None:
    """An id that the conversation has already is a conflict."""
    command = ItemCreate(item=NewItem(role="user", content="x", id="item_1"))
    assert refused(state_of(item("hi", "item_1")), command) == (ConflictError, "already_exists", "item.id")


@pytest.mark.parametrize("reserved", ["session", "control"])
def test_an_item_s_id_may_not_be_reserved(reserved: str) -> None:
    """The names of the server's own channels are no ids."""
    command = ItemCreate(item=NewItem(role="user", content="x", id=reserved))
    assert refused(state_of(), command) == (InvalidRequest, "reserved_id", "item.id")


def test_an_item_larger_than_a_frame_is_refused() -> None:
    """What could not be sent in one frame is not taken, by its encoded size."""
    for content in ("x" * 262_144, "\x00" * 44_000):
        command = ItemCreate(item=NewItem(role="user", content=content))
        assert refused(state_of(), command) == (InvalidRequest, "too_large", None)
    decided(state_of(), ItemCreate(item=NewItem(role="user", content="x" * 200_000)))


# --- response.create -----------------------------------------------------------------------------------------------


def test_a_response_is_created() -> None:
    """It has the session's model, the user, the time, and runs as soon as it can."""
    decision = decided(state_of(item("hi")), ResponseCreate(event_id="e1", metadata={"a": None}))
    event = response_of(decision)
    assert decision == Decision([event], [])
    assert (event.response.status, event.response.model, event.response.user) == ("in_progress", "m", "bob")
    assert (event.response.metadata, event.response.created_at, event.for_event_id) == ({"a": None}, NOW, "e1")
    assert event.response.id.startswith("resp_")


def test_input_comes_before_the_response() -> None:
    """The user item and the response are one decision, in this order, both of the command."""
    first, second = decided(state_of(), ResponseCreate(event_id="e1", input="hi", response_id="r")).events
    assert isinstance(first, ItemCreated)
    assert (first.item.role, first.item.content, first.item.user, first.for_event_id) == ("user", "hi", "bob", "e1")
    assert isinstance(second, ResponseCreated)
    assert second.response.id == "r"


def test_a_response_s_own_settings_stay_its_own() -> None:
    """They are logged with it, the model told, and the session's settings left alone."""
    state = state_of(item("hi"))
    event = response_of(decided(state, ResponseCreate(model="m2", max_output_tokens=5, response_id="r")))
    assert event.response.model == "m2"
    assert event.overrides == Overrides(model="m2", max_output_tokens=5)
    state.apply(event)
    assert state.settings_of(state.responses["r"]).max_output_tokens == 5
    assert state.session == session()


def test_nothing_to_respond_to_is_refused() -> None:
    """An empty conversation and no input."""
    assert refused(state_of(), ResponseCreate()) == (InvalidRequest, "empty_conversation", "input")


def test_a_response_s_id_is_taken_once() -> None:
    """Also after the response has ended."""
    command = ResponseCreate(response_id="resp_1", input="x")
    assert refused(state_of(*DONE), command) == (ConflictError, "already_exists", "response_id")


@pytest.mark.parametrize("reserved", ["session", "control"])
def test_a_response_s_id_may_not_be_reserved(reserved: str) -> None:
    """A response can't take the place of the server's own channels."""
    command = ResponseCreate(response_id=reserved, input="x")
    assert refused(state_of(), command) == (InvalidRequest, "reserved_id", "response_id")


def test_a_response_by_an_unknown_model_is_refused() -> None:
    """As for the session's default."""
    command = ResponseCreate(model="other", input="x")
    assert refused(state_of(), command) == (InvalidRequest, "model_not_found", "model")


def test_a_response_of_too_many_tokens_is_refused() -> None:
    """As for the session's default."""
    command = ResponseCreate(max_output_tokens=1001, input="x")
    assert refused(state_of(), command) == (InvalidRequest, "max_output_tokens_too_large", "max_output_tokens")


@pytest.mark.parametrize("events", [RUNNING, RUNNING[:2]])
def test_reject_refuses_a_second_response(events: tuple[ChannelEvent, ...]) -> None:
    """By default one response at a time: while another runs, or waits to."""
    assert refused(state_of(*events), ResponseCreate()) == (ConflictError, "response_in_progress", None)


def test_reject_lets_one_follow_another() -> None:
    """After the end of the first the second is created, and is not queued."""
    assert response_of(decided(state_of(*DONE), ResponseCreate())).response.status == "in_progress"


def test_enqueue_lets_it_wait() -> None:
    """The second response is queued, and the first goes on."""
    decision = decided(state_of(*RUNNING), ResponseCreate(multitask_strategy="enqueue"))
    assert response_of(decision).response.status == "queued"
    assert decision.cancels == []


def test_interrupt_cancels_all_that_run_or_wait() -> None:
    """Every unfinished response is asked to end, and the new one waits for that."""
    state = state_of(*RUNNING, created("resp_2"))
    decision = decided(state, ResponseCreate(event_id="e1", multitask_strategy="interrupt"))
    assert response_of(decision).response.status == "queued"
    assert decision.cancels == [
        CancelResponse(response_id=name, reason="interrupted", for_event_id="e1") for name in ("resp_1", "resp_2")
    ]


@pytest.mark.parametrize("strategy", ["interrupt", "enqueue"])
def test_the_session_s_strategy_counts_where_the_command_has_none(strategy: MultitaskStrategy) -> None:
    """A strategy is a setting like any other."""
    assert decided(state_of(*RUNNING, multitask_strategy=strategy), ResponseCreate()).events


def test_the_command_s_strategy_counts_before_the_session_s() -> None:
    """A response may ask for another strategy than the session's."""
    state = state_of(*RUNNING, multitask_strategy="enqueue")
    assert refused(state, ResponseCreate(multitask_strategy="reject"))[1] == "response_in_progress"


def test_a_strategy_is_the_new_response_s() -> None:
    """What the running response was created with does not matter to the next."""
    state = state_of(item("hi"), created("resp_1", Overrides(multitask_strategy="interrupt")))
    assert refused(state, ResponseCreate())[1] == "response_in_progress"


def test_the_queue_is_bounded() -> None:
    """As many responses may be unfinished as channels may, and no more."""
    waiting = [created(f"resp_{number}") for number in range(MAX_UNFINISHED_CHANNELS - 1)]
    state = state_of(*waiting, multitask_strategy="enqueue")
    state.apply(response_of(decided(state, ResponseCreate())))
    assert refused(state, ResponseCreate()) == (ConflictError, "too_many_responses", None)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.text(max_size=3), st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3))
)
@example({"a": 2**64})
@example({"a": -(2**63) - 1})
@example({"a": float("nan")})
def test_whatever_metadata_is_logged_can_be_sent_to_everybody(metadata: dict[str, Scalar]) -> None:
    """What one encoding can't write is refused, so no event is poison for the readers that use it."""
    try:
        event = response_of(decided(state_of(item("hi")), ResponseCreate(metadata=metadata)))
    except InvalidRequest:
        return
    packed = MSGPACK.encode(event)
    assert isinstance(packed, bytes)
    assert json.loads(JSON.encode(event)) == msgspec.msgpack.decode(packed)


@pytest.mark.parametrize("number", [2**64, 2**70, -(2**64), float("nan"), float("inf"), float("-inf")])
def test_a_number_that_an_encoding_can_t_write_is_refused(number: float) -> None:
    """JSON has no NaN, MessagePack no integer past 64 bits."""
    command = ResponseCreate(input="x", metadata={"a": number})
    assert refused(state_of(), command) == (InvalidRequest, "invalid_message", "metadata")


def test_a_response_larger_than_a_frame_is_refused() -> None:
    """Metadata and instructions count as well."""
    for command in (
        ResponseCreate(input="x", metadata={"a": "x" * 270_000}),
        ResponseCreate(input="x", instructions="x" * 270_000),
        ResponseCreate(input="x" * 270_000),
    ):
        assert refused(state_of(), command) == (InvalidRequest, "too_large", None)


# --- response.cancel and conversation.item.truncate ----------------------------------------------------------------


@pytest.mark.parametrize("events", [RUNNING, RUNNING[:2]])
def test_cancel_asks_for_the_end(events: tuple[ChannelEvent, ...]) -> None:
    """Of a response that runs, or waits."""
    decision = decided(state_of(*events), ResponseCancel(event_id="e1", response_id="resp_1"))
    assert decision == Decision([], [CancelResponse(response_id="resp_1", reason="cancelled", for_event_id="e1")])


def test_cancel_of_what_is_done_is_no_error() -> None:
    """It comes to nothing."""
    assert decided(state_of(*DONE), ResponseCancel(response_id="resp_1")) == Decision([], [])


def test_cancel_truncates_too() -> None:
    """With `heard_chars` the answer is cut to what was heard, running or done."""
    truncated = ItemTruncated(item=Truncation(response_id="resp_1", heard_chars=3))
    command = ResponseCancel(response_id="resp_1", heard_chars=3)
    assert decided(state_of(*RUNNING), command, heard="hello").events == [truncated]
    assert decided(state_of(*DONE), command, heard="hello") == Decision([truncated], [])


def test_cancel_of_an_unknown_response_is_refused() -> None:
    """There is nothing to cancel."""
    assert refused(state_of(), ResponseCancel(response_id="r")) == (NotFound, "response_not_found", "response_id")


def test_truncate_of_an_unknown_response_is_refused() -> None:
    """There is nothing to truncate."""
    command = ItemTruncate(response_id="r", heard_chars=0)
    assert refused(state_of(), command) == (NotFound, "response_not_found", "response_id")


@pytest.mark.parametrize(
    ("heard", "text", "kept"),
    [
        (0, "hello", 0),
        (3, "hello", 3),
        (99, "hello", 5),
        (2**70, "hello", 5),
        (5, "", 0),
        (1, "🙂🙂", 0),
        (2, "🙂🙂", 2),
        (3, "🙂🙂", 2),
        (4, "🙂🙂", 4),
        (2, "a🙂", 1),
        (1, "é", 1),
    ],
)
def test_truncate_keeps_whole_characters(heard: int, text: str, kept: int) -> None:
    """UTF-16 code units are clamped to the answer's length, and never split a surrogate pair."""
    decision = decided(state_of(*RUNNING), ItemTruncate(response_id="resp_1", heard_chars=heard), heard=text)
    assert decision == Decision([ItemTruncated(item=Truncation(response_id="resp_1", heard_chars=kept))], [])


def test_which_commands_need_what_was_heard() -> None:
    """Those that truncate, and no others."""
    assert truncated_response(ItemTruncate(response_id="r", heard_chars=1)) == "r"
    assert truncated_response(ResponseCancel(response_id="r", heard_chars=0)) == "r"
    for command in (ResponseCancel(response_id="r"), ResponseCreate(response_id="r"), SessionClose()):
        assert truncated_response(command) is None


# --- session.close -------------------------------------------------------------------------------------------------


def test_close_ends_the_session() -> None:
    """Its event says why, and for which command."""
    decision = decided(state_of(), SessionClose(event_id="e1"))
    assert decision == Decision([SessionClosed(reason="closed by client", for_event_id="e1")], [])


@pytest.mark.parametrize(
    "command",
    [
        SessionUpdate(session=Overrides()),
        ItemCreate(item=NewItem(role="user", content="")),
        ItemTruncate(response_id="resp_1", heard_chars=0),
        ResponseCreate(input=""),
        ResponseCancel(response_id="resp_1"),
        SessionClose(),
    ],
    ids=lambda command: type(command).__name__,
)
def test_a_closed_session_takes_no_command(command: Command) -> None:
    """Whatever it is."""
    assert refused(state_of(*DONE, closed()), command) == (ConflictError, "session_closed", None)


# --- the fold ------------------------------------------------------------------------------------------------------


def test_an_answer_stands_where_it_was_created() -> None:
    """The conversation's order is that of the session's channel."""
    state = state_of(item("a", "item_a"), created("resp_1"), item("b", "item_b"), begun("resp_1"), done("resp_1"))
    assert [entry.id for entry in state.timeline] == ["item_a", "resp_1", "item_b"]


def test_a_response_s_life() -> None:
    """It is created, runs, and is done; unfinished until then."""
    state = state_of(*RUNNING[:2])
    response = state.responses["resp_1"]
    assert (response.running, response.done, list(state.unfinished)) == (False, False, ["resp_1"])
    state.apply(begun("resp_1"))
    assert (response.running, response.done, list(state.unfinished)) == (True, False, ["resp_1"])
    state.apply(done("resp_1"))
    assert (response.done, list(state.unfinished)) == (True, [])


def test_the_last_truncation_counts() -> None:
    """Heard more, or less, later."""
    state = state_of(
        *DONE,
        ItemTruncated(item=Truncation(response_id="resp_1", heard_chars=3)),
        ItemTruncated(item=Truncation(response_id="resp_1", heard_chars=7)),
    )
    assert state.heard == {"resp_1": 7}


def test_an_update_folds() -> None:
    """The session's settings are the last update's."""
    assert state_of(SessionUpdated(session=session(model="m2"))).session.model == "m2"


def test_one_response_may_run_at_a_time() -> None:
    """The first unfinished one, in the order of creation, unless it runs already or is being stopped."""
    state = state_of(created("resp_1"), created("resp_2"))
    first = state.runnable()
    assert first is state.responses["resp_1"]
    state.apply(begun("resp_1"))
    assert state.runnable() is None
    state.apply(done("resp_1"))
    assert state.runnable() is state.responses["resp_2"]
    state.responses["resp_2"].stopping = True
    assert state.runnable() is None


def test_nothing_is_runnable_in_a_new_session() -> None:
    """There is no response."""
    assert state_of().runnable() is None


# --- tasks -----------------------------------------------------------------------------------------------------------

TASK = TaskCreate(name="work", input={"any": "thing"}, task_id="t", event_id="e1")


def test_a_task_is_created_with_its_checked_input() -> None:
    """Which clients are not told, nor who asked for it."""
    decision = decide(state_of(), TASK, user="bob", now=NOW, limits=LIMITS, task_input='{"n":1}')
    made = Task(id="t", name="work", status="pending", created_at=NOW)
    created_ = TaskCreated(task=made, input='{"n":1}', user="bob", for_event_id="e1")
    assert decision == Decision([created_], [])
    assert created_.for_clients() == TaskCreated(task=made, for_event_id="e1")


def test_a_task_without_an_id_is_given_one() -> None:
    """That nobody can guess."""
    first, second = (decided(state_of(), TaskCreate(name="work", input={})).events[0] for _ in range(2))
    assert isinstance(first, TaskCreated)
    assert isinstance(second, TaskCreated)
    assert first.task.id.startswith("task_")
    assert first.task.id != second.task.id


@pytest.mark.parametrize(
    ("events", "task_id", "expected"),
    [
        ((task_made("t"),), "t", (ConflictError, "already_exists", "task_id")),
        ((task_made("t"), task_done("t")), "t", (ConflictError, "already_exists", "task_id")),
        ((created("t"),), "t", (ConflictError, "already_exists", "task_id")),
        ((), "session", (InvalidRequest, "reserved_id", "task_id")),
        ((), "control", (InvalidRequest, "reserved_id", "task_id")),
        ((closed(),), "t", (ConflictError, "session_closed", None)),
    ],
    ids=["unfinished", "done", "response", "session", "control", "closed"],
)
def test_a_task_that_is_refused(events: tuple[ChannelEvent, ...], task_id: str, expected: Any) -> None:
    """Its id is taken, or there is no session any more."""
    assert refused(state_of(*events), TaskCreate(name="work", input={}, task_id=task_id)) == expected


def test_a_response_can_t_have_a_task_s_id() -> None:
    """They share one namespace."""
    state = state_of(item("hi"), task_made("t"))
    assert refused(state, ResponseCreate(response_id="t")) == (ConflictError, "already_exists", "response_id")


def test_responses_and_tasks_share_the_room() -> None:
    """Whatever there are of each; one that has ended takes none."""
    half = MAX_UNFINISHED_CHANNELS // 2
    made = [task_made(f"t{number}") for number in range(half)]
    waiting = [created(f"r{number}") for number in range(MAX_UNFINISHED_CHANNELS - half)]
    state = state_of(item("hi"), *made, *waiting, multitask_strategy="enqueue")
    assert refused(state, TASK) == (ConflictError, "too_many_tasks", None)
    assert refused(state, ResponseCreate()) == (ConflictError, "too_many_responses", None)
    state.apply(task_done("t0"))
    assert decided(state, TASK).events
    assert decided(state, ResponseCreate()).events


def test_a_task_is_cancelled_by_a_request_to_its_worker() -> None:
    """One that is done already is left alone; one that is not there is an error."""
    command = TaskCancel(task_id="t", event_id="e1")
    request = CancelTask(task_id="t", for_event_id="e1")
    assert decided(state_of(task_made("t")), command) == Decision([], [request])
    assert decided(state_of(task_made("t"), task_begun("t")), command) == Decision([], [request])
    assert decided(state_of(task_made("t"), task_done("t")), command) == Decision([], [])
    assert refused(state_of(created("t")), command) == (NotFound, "task_not_found", "task_id")


def test_tasks_fold() -> None:
    """Where they were made, whether they run and where, whether they are over; they are no part of what was said."""
    state = state_of()
    for event in (item("hi"), task_made("t1"), task_made("t2")):
        state.apply(event)
        state.position += 1
    assert [task.position for task in state.tasks.values()] == [2, 3]
    assert list(state.unfinished_tasks) == ["t1", "t2"]
    state.apply(task_begun("t1", 1, "inst_1"))
    state.apply(task_told("t1", 5))
    state.apply(task_begun("t1", 2, "inst_2"))
    first, second = state.tasks.values()
    assert (first.running, first.instance, second.running, second.instance) == (True, "inst_2", False, None)
    state.apply(task_done("t1"))
    assert (first.done, list(state.unfinished_tasks), state.is_over("t1"), state.is_over("t2")) == (
        True,
        ["t2"],
        True,
        False,
    )
    assert len(state.timeline) == 1


def test_a_response_that_interrupts_leaves_tasks_alone() -> None:
    """They are not answers."""
    state = state_of(*RUNNING, task_made("t"), multitask_strategy="interrupt")
    [cancel] = decided(state, ResponseCreate()).cancels
    assert cancel == CancelResponse(response_id="resp_1", reason="interrupted")
