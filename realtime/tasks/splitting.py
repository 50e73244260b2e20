"""A document in parts: split where a reader would, shown to a model, worked on at once, and put together again."""

from __future__ import annotations

import asyncio
import re
import secrets
import unicodedata
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from realtime.conversation import BYTES_PER_TOKEN

PART_TOKENS = 8000
"""The most that a model is given to read in one call: little enough to be read closely, and for any model to hold."""
MAX_CALLS = 8
"""How many model calls of one task are under way at once."""

T = TypeVar("T")
R = TypeVar("R")

_SPACE = re.compile(r"\s*")
_UP_TO_A_BREAK = (
    re.compile(r".*\n\s*\n", re.DOTALL),
    re.compile(r""".*(?:\n|[.!?…]['")\]»’”]*\s|[\u3002\uff01\uff1f][\u300d\u300f’”]*)""", re.DOTALL),
    re.compile(r".*\s", re.DOTALL),
)
"""What ends with the last paragraph, the last line or sentence (those of Chinese need no space), the last word."""
_JOINER = "\u200d"
_MAX_JOINED = 32
"""How many characters are looked at to find where one that a reader sees begins."""


def split(text: str, *, max_tokens: int) -> list[str]:
    """The parts of a text, each of at most `max_tokens` (estimated; at least 1), without the space around them.

    A part has as many whole paragraphs as fit. A paragraph that is too long is split between lines or sentences, what
    is still too long between words, and that between characters. Only white space is left out, and a text of nothing
    else has no parts. The time is linear in the text's length.
    """
    max_bytes = max_tokens * BYTES_PER_TOKEN
    parts = []
    start = _after_space(text, 0)
    while start < len(text):
        end = start + _prefix_length(text[start : start + max_bytes], max_bytes)
        cut = _cut(text, start, end)
        parts.append(text[start:cut].rstrip())
        start = _after_space(text, cut)
    return parts


def split_all(texts: Sequence[str], *, max_tokens: int) -> list[list[str]]:
    """The parts of each text, as `split` makes them."""
    return [split(text, max_tokens=max_tokens) for text in texts]


def quoted(kind: str, text: str) -> str:
    """A text as a model is shown it: between two tags whose number is random, so that no text can forge its end."""
    number = secrets.token_hex(8)
    return f"<{kind} {number}>\n{text}\n</{kind} {number}>"


async def at_once(
    work: Callable[[T], Awaitable[R]], items: Sequence[T], *, report: Callable[[int], Awaitable[None]] | None = None
) -> list[R]:
    """What `work` makes of each item, in their order, with at most `MAX_CALLS` at work at once. After each one `report`
    is told how many are done.

    The first error cancels the others and comes out, as cancelling does, once all of them have ended.
    """
    results: dict[int, R] = {}
    waiting = iter(enumerate(items))

    async def work_on() -> None:
        for index, item in waiting:
            results[index] = await work(item)
            if report is not None:
                await report(len(results))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(MAX_CALLS, len(items))):
                group.create_task(work_on())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [results[index] for index in range(len(items))]


async def merged(
    lists: Sequence[Sequence[T]], merge: Callable[[Sequence[T]], Awaitable[T]], *, tokens: Callable[[T], int]
) -> list[T]:
    """Each list merged into one: neighbours first, as many as a call may read, until one is left. No list is empty.

    `merge` makes one of two or more, and `tokens` says how long one is. All lists are worked on as by `at_once`.
    """
    while any(len(items) > 1 for items in lists):
        grouped = [_groups(items, tokens) for items in lists]
        several = [group for groups in grouped for group in groups if len(group) > 1]
        results = iter(await at_once(merge, several))
        lists = [[next(results) if len(group) > 1 else group[0] for group in groups] for groups in grouped]
    return [items[0] for items in lists]


def _groups(items: Sequence[T], tokens: Callable[[T], int]) -> list[list[T]]:
    """Neighbours in groups of up to `PART_TOKENS`, but at least two to each, so that what is merged gets ever less."""
    groups: list[list[T]] = []
    size = 0
    for item in items:
        size += tokens(item)
        if groups and (size <= PART_TOKENS or len(groups[-1]) < 2):
            groups[-1].append(item)
        else:
            groups.append([item])
            size = tokens(item)
    return groups


def _after_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return found.end() if found else position


def _prefix_length(text: str, max_bytes: int) -> int:
    """How many characters from the start of a text have at most `max_bytes` bytes together."""
    return len(text.encode()[:max_bytes].decode(errors="ignore"))


def _cut(text: str, start: int, end: int) -> int:
    """Where to end a part that begins at `start` and has room up to `end`; white space beyond takes no room."""
    reach = _after_space(text, end)
    if reach == len(text):
        return reach
    for up_to_a_break in _UP_TO_A_BREAK:
        if found := up_to_a_break.match(text, start, reach):
            return found.end()
    return _between_characters(text, start, end)


def _between_characters(text: str, start: int, end: int) -> int:
    """The last place up to `end` that splits no character as a reader sees it, or `end` if none is near."""
    for cut in range(end, max(start, end - _MAX_JOINED), -1):
        if not _belongs_to_previous(text, cut):
            return cut
    return end


def _belongs_to_previous(text: str, index: int) -> bool:
    """Whether the character there is one with what stands before it: an accent, a part of an emoji."""
    return _JOINER in text[index - 1 : index + 1] or unicodedata.category(text[index]) in {"Mn", "Mc", "Me", "Sk"}
