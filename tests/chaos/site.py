"""What a chaos run is made of, for those who act in it."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
from msgspec import Struct

from tests.chaos.options import Options
from tests.support.model_server import ModelServer
from tests.support.nginx import Nginx
from tests.support.redis_server import RedisServer


class Violation(Struct, frozen=True):
    """Something that must not be: its kind, where it was seen, and enough to find out why."""

    kind: str
    where: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.detail}"


class Site:
    """The parts that are shared, and what was counted and found so far."""

    def __init__(self, options: Options, model: ModelServer, redis: RedisServer, http: httpx.AsyncClient) -> None:
        self.options = options
        self.model = model
        self.redis = redis
        self.proxy: Nginx
        self.http = http
        self.started_at = time.monotonic()
        self.calm_since = math.inf
        """From when on there are no more faults, and nobody leaves any more."""
        self.counts: Counter[str] = Counter()
        self.violations: list[Violation] = []
        self.events: list[str] = []
        """What was done to whom, and when."""

    @property
    def calm(self) -> bool:
        """Whether the faults are over."""
        return self.now() >= self.calm_since

    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started_at

    def note(self, text: str) -> None:
        """Write down what happens, for whoever looks into a violation."""
        line = f"{self.now():8.2f} {text}"
        self.events.append(line)
        if self.options.events:
            with Path(self.options.events).open("a") as file:
                print(line, file=file)

    def violated(self, kind: str, where: str, detail: str) -> None:
        """Take note of a violation."""
        self.violations.append(Violation(kind, where, detail))
        self.note(f"VIOLATION {self.violations[-1]}"[:2000])

    def chance(self, name: str) -> random.Random:
        """The random choices of one of the actors, all from the seed."""
        return random.Random(f"{self.options.seed} {name}")

    def check(self, holds: bool, kind: str, where: str, detail: Callable[[], str] = str) -> None:
        """Take note of a violation if something does not hold."""
        if not holds:
            self.violated(kind, where, detail())
