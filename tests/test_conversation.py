"""What a model is sent: the conversation in order, cut to what was heard and to what fits."""

from __future__ import annotations

import pytest

from realtime.conversation import Message, ToolCall, ToolResult, estimate_tokens, fit, joined, messages
from realtime.errors import InvalidRequest
from realtime.protocol import ChannelEvent, ItemTruncated, Truncation
from realtime.session import SessionState
from tests.contract import created, done, item, session


def conversation(*events: ChannelEvent, upto: str, answers: dict[str, str] | None = None) -> list[tuple[str, str]]:
    state = SessionState(session())
    for event in events:
        state.apply(event)
    found = messages(state, answers or {}, upto=state.responses[upto])
    return [(message.role, message.content) for message in found]


def heard(response_id: str, chars: int) -> ItemTruncated:
    return ItemTruncated(item=Truncation(response_id=response_id, heard_chars=chars))


def user(text: str) -> Message:
    return Message("user", text)


def system(text: str) -> Message:
    return Message("system", text)


# --- messages ------------------------------------------------------------------------------------------------------


def test_items_and_answers_in_their_order() -> None:
    """An answer stands where its response was created."""
    events = [item("a"), created("r1"), item("b"), done("r1"), created("r2")]
    assert conversation(*events, upto="r2", answers={"r1": "A"}) == [("user", "a"), ("assistant", "A"), ("user", "b")]


def test_a_response_does_not_answer_itself() -> None:
    """What it has said so far is no part of its own conversation."""
    assert conversation(item("a"), created("r1"), upto="r1", answers={"r1": "A"}) == [("user", "a")]


def test_whole_conversation_is_that_of_no_response() -> None:
    """With what running responses have said so far."""
    state = SessionState(session())
    for event in (item("a"), created("r1")):
        state.apply(event)
    assert messages(state, {"r1": "A"}) == [user("a"), Message("assistant", "A")]


def test_what_came_while_it_waited_counts() -> None:
    """The conversation is the one when the response begins, later items included."""
    assert conversation(item("a"), created("r1"), item("b"), upto="r1") == [("user", "a"), ("user", "b")]


def test_an_answer_without_text_is_left_out() -> None:
    """Models refuse empty messages."""
    events = [item("a"), created("r1"), done("r1"), created("r2")]
    assert conversation(*events, upto="r2", answers={"r1": ""}) == [("user", "a")]
    assert conversation(*events, upto="r2") == [("user", "a")]


@pytest.mark.parametrize(
    ("chars", "kept"),
    [(99, "a🙂b"), (4, "a🙂b"), (3, "a🙂"), (2, "a"), (1, "a")],
)
def test_an_answer_counts_as_far_as_it_was_heard(chars: int, kept: str) -> None:
    """In UTF-16 code units, rounded down to a whole character."""
    events = [created("r1"), done("r1"), heard("r1", chars), created("r2")]
    assert conversation(*events, upto="r2", answers={"r1": "a🙂b"}) == [("assistant", kept)]


def test_an_answer_that_was_not_heard_is_left_out() -> None:
    """Heard are 0 characters, or half a surrogate pair."""
    for chars in (0, 1):
        events = [item("a"), created("r1"), done("r1"), heard("r1", chars), created("r2")]
        assert conversation(*events, upto="r2", answers={"r1": "🙂"}) == [("user", "a")]


# --- fit -----------------------------------------------------------------------------------------------------------

FOUR = "x" * 16
"""Four tokens, by the estimate."""


@pytest.mark.parametrize("truncation", ["auto", "error"])
def test_what_fits_is_left_alone(truncation: str) -> None:
    """Also if it fills the room exactly."""
    whole = [system(FOUR), user(FOUR), user(FOUR)]
    assert fit(whole, room_tokens=12, truncation=truncation) == whole


def test_auto_leaves_out_the_oldest() -> None:
    """The newest messages that fit stay, in their order."""
    whole = [user(f"{number:016}") for number in range(5)]
    assert fit(whole, room_tokens=11, truncation="auto") == whole[3:]


def test_auto_leaves_no_hole() -> None:
    """An old message that would fit is not kept where a newer one had to go."""
    assert fit([user("a"), user(FOUR * 9), user("b")], room_tokens=5, truncation="auto") == [user("b")]


def test_system_items_stay() -> None:
    """However old, and where they stood."""
    whole = [system(FOUR), user(FOUR), system(FOUR), user(FOUR), user(FOUR)]
    assert fit(whole, room_tokens=12, truncation="auto") == [system(FOUR), system(FOUR), user(FOUR)]


@pytest.mark.parametrize("truncation", ["auto", "error"])
def test_a_last_message_that_does_not_fit_is_refused(truncation: str) -> None:
    """It can't be left out, so there is nothing to send."""
    with pytest.raises(InvalidRequest) as refusal:
        fit([user("a"), user(FOUR)], room_tokens=3, truncation=truncation)
    assert refusal.value.code == "context_length_exceeded"


def test_error_refuses_what_auto_would_leave_out() -> None:
    """With `error` nothing is ever left out."""
    with pytest.raises(InvalidRequest) as refusal:
        fit([user(FOUR), user(FOUR)], room_tokens=7, truncation="error")
    assert refusal.value.code == "context_length_exceeded"


@pytest.mark.parametrize("truncation", ["auto", "error"])
@pytest.mark.parametrize("others", [[], [user("a")]])
def test_system_items_that_do_not_fit_are_refused(others: list[Message], truncation: str) -> None:
    """What always stays is too much already, whatever the rest is."""
    with pytest.raises(InvalidRequest) as refusal:
        fit([*others, system(FOUR)], room_tokens=3, truncation=truncation)
    assert refusal.value.code == "context_length_exceeded"


def test_an_empty_conversation_fits() -> None:
    """There is nothing to leave out."""
    assert fit([], room_tokens=0, truncation="error") == []


# --- tool calls ----------------------------------------------------------------------------------------------------

CALL = ToolCall("c1", "abcd", {"a": "bcdefghi"})
"""Name and input are 20 bytes: five tokens."""


def call(content: str = "") -> Message:
    return Message("assistant", content, tool_calls=(CALL,))


def result(content: str = FOUR) -> Message:
    return Message("user", "", tool_results=(ToolResult("c1", content),))


@pytest.mark.parametrize(
    ("message", "tokens"),
    [
        (user(FOUR), 4),
        (call(), 5),
        (call(FOUR), 9),
        (Message("assistant", "", tool_calls=(CALL, CALL)), 10),
        (result(), 4),
        (Message("user", FOUR, tool_results=(ToolResult("c1", FOUR), ToolResult("c2", FOUR, is_error=True))), 12),
        (Message("assistant", FOUR, tool_calls=(CALL,), raw=({"thinking": "x" * 23},)), 10),
    ],
)
def test_calls_and_results_count(message: Message, tokens: int) -> None:
    """A raw message counts as it is sent, in place of its text and calls."""
    assert message.estimated_tokens() == tokens


ROUNDS = [user(FOUR), call(), result(), call("Hm. "), result()]
"""A question and two rounds of calls: 4 and 9 and 10 tokens."""


@pytest.mark.parametrize(
    ("room", "kept"),
    [(23, 0), (24, 0), (26, 0), (27, 1), (30, 1), (31, 2)],
)
def test_question_calls_and_results_go_together(room: int, kept: int) -> None:
    """The last ones stay whole, and older messages go first."""
    whole = [user(FOUR), Message("assistant", FOUR), *ROUNDS]
    assert fit(whole, room_tokens=room, truncation="auto") == whole[2 - kept :]


@pytest.mark.parametrize("room", range(23))
def test_rounds_that_do_not_fit_are_refused(room: int) -> None:
    """A result is never sent without its call, nor a call without the question that led to it."""
    with pytest.raises(InvalidRequest) as refusal:
        fit([user(FOUR), *ROUNDS], room_tokens=room, truncation="auto")
    assert refusal.value.code == "context_length_exceeded"


@pytest.mark.parametrize("room", range(4, 31))
def test_earlier_rounds_stay_or_go_together(room: int) -> None:
    """What begins with a result is no conversation."""
    whole = [*ROUNDS, Message("assistant", FOUR), user(FOUR)]
    kept = fit(whole, room_tokens=room, truncation="auto")
    assert len(kept) == (1 if room < 8 else 2)


def test_system_items_between_question_and_call_do_not_part_them() -> None:
    """They stay where they stood, and don't count as the question."""
    whole = [user(FOUR), user(FOUR), system(FOUR), call(), result()]
    assert fit(whole, room_tokens=17, truncation="auto") == whole[1:]
    with pytest.raises(InvalidRequest):
        fit(whole, room_tokens=16, truncation="auto")


def test_answer_in_front_of_a_call_stays_with_its_question() -> None:
    """As where a response is asked for with nothing new: its conversation must still begin with the user."""
    whole = [user(FOUR), user(FOUR), Message("assistant", FOUR), call(), result()]
    assert fit(whole, room_tokens=17, truncation="auto") == whole[1:]
    with pytest.raises(InvalidRequest):
        fit(whole, room_tokens=16, truncation="auto")


def test_calls_without_a_question_fit() -> None:
    """A responder of one's own may need none."""
    whole = [call(), result()]
    assert fit(whole, room_tokens=9, truncation="error") == whole


# --- small things --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "tokens"), [([], 0), ([""], 0), (["a"], 1), (["abcd"], 1), (["abcd", "e"], 2), (["🙂é"], 2)]
)
def test_tokens_are_estimated_by_bytes(texts: list[str], tokens: int) -> None:
    """Four UTF-8 bytes are a token, rounded up over all."""
    assert estimate_tokens(*texts) == tokens


def test_texts_are_joined_as_paragraphs() -> None:
    """Empty ones make no paragraph."""
    assert joined(["a", "", "b"]) == "a\n\nb"
    assert joined([]) == ""
