"""What a request to the stand-in model holds of earlier tool calls and their results, and whether that makes sense.

The provider refuses a conversation in which a call is without its result, or a result without its call.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, TypeAlias

Block: TypeAlias = dict[str, Any]


class ToolMismatchError(Exception):
    """The calls of one message and the results of the next are not of the same ids."""


def tool_rounds(messages: list[dict[str, Any]]) -> int:
    """How often tools were called so far, and their results given. Raises `ToolMismatchError`."""
    rounds = 0
    for message, following in pairwise([{}, *messages, {}]):
        called = sorted(block["id"] for block in blocks(message, "tool_use"))
        answered = sorted(block["tool_use_id"] for block in blocks(following, "tool_result"))
        if called != answered:
            raise ToolMismatchError(f"calls {called} have results {answered}")
        rounds += bool(called)
    return rounds


def quoted_results(messages: list[dict[str, Any]]) -> str:
    """The results at the end of the conversation, each with the name of its tool, in the order of the results."""
    names = {block["id"]: block["name"] for message in messages for block in blocks(message, "tool_use")}
    return " ".join(_quoted(result, names) for result in blocks(messages[-1], "tool_result"))


def blocks(message: dict[str, Any], type_: str) -> Iterator[Block]:
    """The blocks of a message that are of a type; one whose content is a string has none."""
    content = message.get("content", "")
    if not isinstance(content, str):
        yield from (block for block in content if block["type"] == type_)


def _quoted(result: Block, names: dict[str, str]) -> str:
    verb = "failed" if result.get("is_error") else "said"
    return f"{names[result['tool_use_id']]} {verb}: {result['content']}"
