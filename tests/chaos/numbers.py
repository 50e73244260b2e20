"""What the stand-in model says, so that a token that is lost, doubled, misplaced or another's is recognised.

The name of the model that a response asks for is the response's own id, so each answer is a text of its own, whoever
asks for it, and however often.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from functools import lru_cache
from itertools import pairwise
from typing import Any

from tests.support.scenarios import Paced, Pause, Scenario, Step, Stop

TOKEN = re.compile(r"\[([\w-]+):(\d+)[^\[\]]*\]")
TAILS = ("", "", "", " é", " 😀")
"""Not all text is ASCII, nor of one UTF-16 code unit a character."""


@lru_cache(maxsize=4096)
def tokens_of(response_id: str) -> tuple[str, ...]:
    """The tokens of the answer to a response, in order."""
    chance = random.Random(f"tokens of {response_id}")
    return tuple(f"[{response_id}:{number}{chance.choice(TAILS)}]" for number in range(chance.randint(5, 60)))


def text_of(response_id: str) -> str:
    """The whole answer."""
    return "".join(tokens_of(response_id))


def scenario_of(response_id: str) -> Scenario:
    """How the stand-in model gives that answer: after a moment, at a pace of its own."""
    chance = random.Random(f"pace of {response_id}")
    steps: list[Step] = [Pause(chance.uniform(0, 0.5)), Paced(tokens_of(response_id), chance.uniform(12, 30)), Stop()]
    return Scenario(steps)


class Scenarios(dict[str, Scenario]):
    """The scenario of each model there could be."""

    def get(self, key: str, default: Any = None) -> Any:
        """The scenario of a model's name; the same one each time."""
        return self.setdefault(key, scenario_of(key))


def faults_of(response_id: str, text: str) -> Counter[str]:
    """What is wrong with a text that should be an answer or its beginning; nothing where it is."""
    found: Counter[str] = Counter()
    if text_of(response_id).startswith(text):
        return found
    numbers = [int(number) for name, number in TOKEN.findall(text) if name == response_id]
    found["foreign"] = sum(name != response_id for name, _ in TOKEN.findall(text))
    found["doubled"] = len(numbers) - len(set(numbers))
    found["out of order"] = sum(one > other for one, other in pairwise(numbers))
    found["lost"] = len(set(range(max(numbers, default=-1) + 1)) - set(numbers))
    found["garbled"] = int(not +found)
    return +found


def count_of(text: str) -> int:
    """How many tokens a text holds."""
    return len(TOKEN.findall(text))
