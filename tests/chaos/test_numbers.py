"""What is wrong with an answer is recognised for what it is."""

from __future__ import annotations

import pytest

from tests.chaos.numbers import count_of, faults_of, text_of, tokens_of

TOKENS = tokens_of("one")


def test_an_answer_and_its_beginnings_are_right() -> None:
    """However much of it there is."""
    for count in range(len(TOKENS) + 1):
        assert not faults_of("one", "".join(TOKENS[:count]))
        assert count_of("".join(TOKENS[:count])) == count


def test_each_response_has_an_answer_of_its_own_and_always_the_same() -> None:
    """Whoever asks for it, and however often."""
    assert text_of("one") == text_of("one") != text_of("other")


@pytest.mark.parametrize(
    ("tokens", "fault"),
    [
        (TOKENS[:2] + TOKENS[3:], "lost"),
        (TOKENS[1:], "lost"),
        (TOKENS[:3] + TOKENS[2:], "doubled"),
        (TOKENS + TOKENS, "doubled"),
        ((TOKENS[1], TOKENS[0], *TOKENS[2:]), "out of order"),
        (TOKENS[:2] + tokens_of("other")[2:3], "foreign"),
        ((*TOKENS[:2], TOKENS[2][:-1]), ""),
        ((*TOKENS[:2], "???"), "garbled"),
    ],
)
def test_a_fault_is_named(tokens: tuple[str, ...], fault: str) -> None:
    """By its kind; half a token is the beginning of one."""
    assert (fault in faults_of("one", "".join(tokens))) == bool(fault)
