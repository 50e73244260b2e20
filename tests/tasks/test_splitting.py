"""Documents in parts: where they are split, what is lost (nothing), how parts are worked on and merged."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realtime.conversation import estimate_tokens
from realtime.errors import UpstreamError
from realtime.tasks import splitting
from realtime.tasks.splitting import MAX_CALLS, at_once, merged, quoted, split, split_all

# --- split -----------------------------------------------------------------------------------------------------------

WORDS = st.text(st.sampled_from("ab.!\"')é漢。」🙂👩\u200d\u0301\u0085"), min_size=1, max_size=30)
SPACES = st.sampled_from([" ", "  ", "\n", "\n\n", "\r\n\r\n", "\n \n", "\t", "\u3000", " " * 50])
TEXTS = st.lists(st.one_of(WORDS, SPACES, st.text(st.characters(exclude_categories=["Cs"]))), max_size=60).map("".join)


@settings(deadline=None)
@given(TEXTS, st.integers(1, 40))
def test_nothing_is_lost_and_every_part_fits(text: str, max_tokens: int) -> None:
    """The parts have every character of the text that is no white space, in order, and none is empty or too long."""
    parts = split(text, max_tokens=max_tokens)
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert all(part == part.strip() != "" for part in parts)
    assert all(estimate_tokens(part) <= max_tokens for part in parts)


@given(TEXTS, st.integers(1, 40))
def test_parts_stand_in_the_text_as_they_are(text: str, max_tokens: int) -> None:
    """Each is a piece of the text, with all that stands between its words."""
    position = 0
    for part in split(text, max_tokens=max_tokens):
        found = text.find(part, position)
        assert found >= position
        assert not text[position:found].strip()
        position = found + len(part)


@given(st.lists(st.text("ab ", min_size=1, max_size=40).filter(str.strip), max_size=20))
def test_paragraphs_that_fit_are_never_split(paragraphs: list[str]) -> None:
    """Each paragraph is whole in one part, and each part has as many as fit."""
    paragraphs = [paragraph.strip() for paragraph in paragraphs]
    parts = split("\n\n".join(paragraphs), max_tokens=10)
    assert [paragraph for part in parts for paragraph in part.split("\n\n")] == paragraphs
    for part, after in pairwise(parts):
        assert estimate_tokens(part + "\n\n" + after.split("\n\n")[0]) > 10


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        (" \n\t ", []),
        ("  one ", ["one"]),
        ("12345678", ["12345678"]),
        ("12345678\n\n9", ["12345678", "9"]),
        ("1\n\n2\n\n3\n\n4", ["1\n\n2\n\n3", "4"]),
        ("1\n\n2\n \n345 7", ["1\n\n2", "345 7"]),
        ("One. Two. Three.", ["One.", "Two.", "Three."]),
        ("Is it?” No!", ["Is", "it?”", "No!"]),
        ("a b\nc d e f", ["a b", "c d e f"]),
        ("一。二三", ["一。", "二三"]),
        ("one two three", ["one two", "three"]),
        ("one twothreefour", ["one", "twothree", "four"]),
        ("1234567🙂9", ["1234567", "🙂9"]),
        ("a b" + " " * 100 + "c", ["a b", "c"]),
    ],
)
def test_where_a_text_is_split(text: str, parts: list[str]) -> None:
    """Between paragraphs, else lines or sentences, else words, else characters; two tokens are eight bytes here."""
    assert split(text, max_tokens=2) == parts


@pytest.mark.parametrize("character", ["e\u0301", "👩\u200d🔬", "👍🏽", "❤\ufe0f"])
def test_what_a_reader_sees_as_one_character_stays_one(character: str) -> None:
    """Accents stay with their letter, and the parts of an emoji with each other."""
    parts = split(character * 50, max_tokens=10)
    assert len(parts) > 1
    assert all(part == character * (len(part) // len(character)) for part in parts)


def test_a_character_longer_than_a_part_is_split_all_the_same() -> None:
    """There is no other way."""
    text = "e" + "\u0301" * 1000
    parts = split(text, max_tokens=10)
    assert "".join(parts) == text
    assert all(estimate_tokens(part) <= 10 for part in parts)


def test_several_texts() -> None:
    """Each for itself."""
    assert split_all(["one two three", "", "four"], max_tokens=2) == [["one two", "three"], [], ["four"]]


HARD = {
    "no space at all": "x",
    "one word after the other": "a ",
    "space alone": " ",
    "lines without end": "\n",
    "sentences without space": ".",
    "quotes after a full stop": ".''''''''''",
    "accents alone": "\u0301",
    "emoji that never end": "👩\u200d",
    "far indented lines": "\n" + " " * 5000 + "x",
    "space between words": "x" + " " * 40_000,
    "short before long": "a\n\nb. c d",
}


@pytest.mark.parametrize("unit", HARD.values(), ids=HARD.keys())
def test_the_time_is_linear(unit: str) -> None:
    """Four times the text takes about four times as long, and not sixteen times."""

    def seconds(size: int) -> float:
        text = (unit * (size // len(unit) + 1))[:size]
        started = time.thread_time()
        split(text, max_tokens=100)
        return time.thread_time() - started

    for _ in range(3):  # a measurement may be disturbed, three of them less likely
        if min(seconds(800_000) for _ in range(3)) < 8 * min(seconds(200_000) for _ in range(5)):
            return
    pytest.fail("it took more than eight times as long")


# --- quoted ----------------------------------------------------------------------------------------------------------


def test_no_text_can_end_its_quote() -> None:
    """The number in the tags is another one each time."""
    one, other = quoted("document", "a </document>"), quoted("document", "a </document>")
    assert one != other
    assert re.fullmatch(r"<document (\w{16})>\na </document>\n</document \1>", one)


# --- at_once ---------------------------------------------------------------------------------------------------------


async def test_as_many_at_once_as_may_be_and_no_more() -> None:
    """And the results are in the order of the items, whichever is first."""
    running = most = 0

    async def work(item: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(30 - item):
            await asyncio.sleep(0)
        running -= 1
        return item * 2

    assert await at_once(work, range(30)) == [item * 2 for item in range(30)]
    assert most == MAX_CALLS


async def test_each_one_that_is_done_is_reported() -> None:
    """By their number."""
    told = []

    async def work(item: int) -> None:
        await asyncio.sleep(0)

    async def report(done: int) -> None:
        told.append(done)

    await at_once(work, range(20), report=report)
    assert told == list(range(1, 21))


async def test_nothing_to_do() -> None:
    """Is done at once."""

    async def work(item: int) -> int:
        raise AssertionError

    assert await at_once(work, []) == []


async def test_the_first_error_ends_all_and_comes_out_as_it_is() -> None:
    """In no group, and once the others have ended; no further item is begun."""
    begun, ended = [], []

    async def work(item: int) -> None:
        begun.append(item)
        try:
            if item == 3:
                await asyncio.sleep(0)
                raise UpstreamError("upstream_error", "The model failed.")
            await asyncio.Event().wait()
        finally:
            ended.append(item)

    with pytest.raises(UpstreamError) as raised:
        await at_once(work, range(100))
    assert raised.value.code == "upstream_error"
    assert begun == list(range(MAX_CALLS))
    assert sorted(ended) == begun


async def test_cancelling_ends_all() -> None:
    """Before it comes out."""
    all_run = asyncio.Event()
    ended = []

    async def work(item: int) -> None:
        if item == MAX_CALLS - 1:
            all_run.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(item)

    working = asyncio.create_task(at_once(work, range(100)))
    await all_run.wait()
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert sorted(ended) == list(range(MAX_CALLS))


# --- merged ----------------------------------------------------------------------------------------------------------


async def joined(texts: Sequence[str]) -> str:
    assert len(texts) > 1
    return f"({''.join(texts)})"


async def test_lists_are_merged_neighbours_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many at once as a call may read, and what is alone stays as it is."""
    monkeypatch.setattr(splitting, "PART_TOKENS", 3)
    lists = [list("abcdefg"), ["h"], ["i", "j"]]
    assert await merged(lists, joined, tokens=lambda text: 1) == ["((abc)(def)g)", "h", "(ij)"]


@given(st.lists(st.lists(st.integers(1, 20_000), min_size=1, max_size=30), max_size=4))
def test_merging_comes_to_an_end_and_keeps_the_order(lists: list[list[int]]) -> None:
    """However long the items are, and however long what they are merged into."""

    async def concatenated(items: Sequence[list[int]]) -> list[int]:
        return [number for item in items for number in item]

    items = [[[number] for number in numbers] for numbers in lists]
    assert asyncio.run(merged(items, concatenated, tokens=sum)) == lists


async def test_all_lists_share_one_limit() -> None:
    """No more calls at once than one list alone would have."""
    running = most = 0

    async def merge(items: Sequence[int]) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return sum(items)

    assert await merged([[1] * 40] * 20, merge, tokens=lambda number: 3000) == [40] * 20
    assert most == MAX_CALLS
