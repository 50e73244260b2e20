"""What the terminal client makes of lost connections: it says so, and a script does not wait for ever."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from websockets.frames import CloseCode

PATIENCE_S = 30.0
"""How long a script waits for a server that is away. A person knows best."""
EMPTY_REASONS = frozenset({"", "lost"})


class ChatEnded(Exception):
    """The conversation can't go on; the text says why, for a person."""


class Absence:
    """Whether the server is there, and since when it is not. `note` says it to the user."""

    def __init__(
        self,
        note: Callable[[str], None],
        *,
        patience_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._note = note
        self._patience_s = patience_s
        self._clock = clock
        self._was_there = False
        self._since: float | None = None
        self._told = ""
        """What was said last since then: once is enough."""

    def attached(self) -> None:
        """The session is there, for the first time or again."""
        self._was_there = True
        self._since = None
        self._told = ""

    def lost(self, code: int, reason: str, reconnect_in_s: float) -> None:
        """The connection is lost, or did not open, and is tried again. Raises `ChatEnded` where that is no use."""
        if code == CloseCode.ABNORMAL_CLOSURE and not self._was_there:
            raise ChatEnded(f"There is no server there: {reason}")
        because = "" if reason in EMPTY_REASONS else f": {reason}"
        now = self._clock()
        if self._since is None:
            self._since = now
        if now + reconnect_in_s - self._since > self._patience_s:
            raise ChatEnded(f"No session for {now - self._since:.0f} s{because}")
        self._tell(f"{'connection lost, coming back' if self._was_there else 'no session yet, trying again'}{because}")

    def _tell(self, text: str) -> None:
        if text != self._told:
            self._note(text)
        self._told = text
