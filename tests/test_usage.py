"""What a turn has used: the provider's count, or an estimate that says so."""

from __future__ import annotations

import pytest

from realtime.protocol import Usage
from realtime.responders.base import Finish, TokenCount
from realtime.usage import INCOMPLETE, Meter, status_of


def count(input_tokens: int, output_tokens: int, **cache: int) -> TokenCount:
    return TokenCount(input_tokens=input_tokens, output_tokens=output_tokens, **cache)


def test_a_turn_that_said_nothing_used_its_input() -> None:
    """Estimated, because nobody counted."""
    usage = Usage(input_tokens=7, output_tokens=0, total_tokens=7, estimated=True)
    assert Meter(7).usage() == usage


def test_what_was_said_is_estimated() -> None:
    """Four bytes a token, rounded up over all that was said and thought."""
    meter = Meter(0)
    for text in ("abc", "🙂", "é"):
        meter.said(text)
    meter.thought("xyz!")
    assert meter.usage() == Usage(input_tokens=0, output_tokens=4, total_tokens=4, estimated=True)


def test_chars_are_the_answer_s_utf16_units() -> None:
    """Reasoning costs, and is no part of the answer."""
    meter = Meter(0)
    meter.said("a🙂")
    meter.thought("hm")
    assert meter.chars == 3


def test_a_final_count_is_the_provider_s() -> None:
    """Whatever was counted here."""
    meter = Meter(99)
    meter.said("x" * 400)
    meter.finished(Finish("end_turn", count(10, 5)))
    assert meter.usage() == Usage(input_tokens=10, output_tokens=5, total_tokens=15, estimated=False)


def test_cached_tokens_count_to_the_total() -> None:
    """They are told apart, and the total is the sum of all four."""
    meter = Meter(0)
    meter.finished(Finish("end_turn", count(10, 5, cache_read_input_tokens=100, cache_creation_input_tokens=1000)))
    usage = meter.usage()
    assert (usage.total_tokens, usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (1115, 100, 1000)


def test_a_count_on_the_way_is_not_final() -> None:
    """The provider's input count stands; of its output count and the estimate the larger one."""
    meter = Meter(99)
    meter.counted(count(10, 1))
    meter.said("x" * 40)
    assert meter.usage() == Usage(input_tokens=10, output_tokens=10, total_tokens=20, estimated=True)
    meter.counted(count(10, 50))
    assert meter.usage().output_tokens == 50


def test_a_finish_without_a_count_stays_an_estimate() -> None:
    """As where a responder gives none."""
    meter = Meter(3)
    meter.said("abcd")
    meter.finished(Finish("end_turn"))
    assert meter.usage() == Usage(input_tokens=3, output_tokens=1, total_tokens=4, estimated=True)


def test_calls_of_one_turn_are_summed() -> None:
    """What each call used is final at its end; a count that only some have is the sum of those."""
    meter = Meter(99)
    meter.counted(count(10, 1))
    meter.finished(Finish("tool_use", count(10, 5, cache_read_input_tokens=100)))
    meter.next_call(99)
    meter.counted(count(20, 1))
    meter.finished(Finish("tool_use", count(20, 6)))
    meter.next_call(99)
    meter.finished(Finish("end_turn", count(40, 7, cache_read_input_tokens=200)))
    assert meter.usage() == Usage(
        input_tokens=70, output_tokens=18, total_tokens=388, estimated=False, cache_read_input_tokens=300
    )


def test_characters_of_one_turn_are_summed() -> None:
    """The answer is what was said in all calls."""
    meter = Meter(0)
    meter.said("abc")
    meter.next_call(0)
    meter.said("🙂")
    assert meter.chars == 5


@pytest.mark.parametrize("estimated", [0, 1], ids=["first", "second"])
def test_one_estimated_call_makes_the_sum_an_estimate(estimated: int) -> None:
    """What was said in the other call is not counted twice."""
    meter = Meter(10)
    for call in range(2):
        if call:
            meter.next_call(10)
        meter.said("x" * 40)
        meter.finished(Finish("tool_use", None if call == estimated else count(30, 5)))
    assert meter.usage() == Usage(input_tokens=40, output_tokens=15, total_tokens=55, estimated=True)


def test_a_next_call_that_has_said_nothing_yet_used_its_input() -> None:
    """As where the turn is stopped before the model answers again."""
    meter = Meter(0)
    meter.finished(Finish("tool_use", count(10, 5)))
    meter.next_call(25)
    assert meter.usage() == Usage(input_tokens=35, output_tokens=5, total_tokens=40, estimated=True)


@pytest.mark.parametrize("reason", sorted(INCOMPLETE))
def test_a_model_that_stopped_early_is_incomplete(reason: str) -> None:
    """It has not said all it had to say."""
    assert status_of(reason) == "incomplete"


@pytest.mark.parametrize("reason", ["end_turn", "stop_sequence", "anything"])
def test_a_model_that_is_through_is_completed(reason: str) -> None:
    """Also for a reason that is new."""
    assert status_of(reason) == "completed"
