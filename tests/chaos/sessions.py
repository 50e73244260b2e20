"""A session of the chaos run as its clients know it: its readers, and what became of its commands."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from msgspec import Struct

from tests.support.client import Event

PASSING = frozenset({"store_error", "rate_limit_error", "server_error"})
"""Types of errors after which a command is to be sent again under its id."""


class Sent(Struct):
    """A command, how often it was sent, and what its sender was told of it in the end."""

    command: dict[str, Any]
    times: int = 0
    accepted: bool = False
    refused: str = ""
    """The code of a refusal that is final."""
    sent_at: float = 0.0
    told: asyncio.Event = msgspec.field(default_factory=asyncio.Event)

    @property
    def event_id(self) -> str:
        """Its id."""
        return str(self.command["event_id"])

    @property
    def may_have_effect(self) -> bool:
        """Whether a refusal leaves open what became of an earlier attempt."""
        return self.accepted or self.times > 1 or not self.refused


class Session:
    """What is known from outside. `attached` are its readers' connections now."""

    def __init__(self, session_id: str, name: str, on_disconnect: str) -> None:
        self.id = session_id
        self.name = name
        self.on_disconnect = on_disconnect
        self.sent: dict[str, Sent] = {}
        self.responses: list[str] = []
        """The ids of those that were asked for, in that order."""
        self.done: set[str] = set()
        """Those of which somebody has seen the end."""
        self.gone = ""
        """Why the server says that there is no such session any more."""
        self.attached = 0
        self.deserted: list[tuple[float, float]] = []
        """When nobody was attached, as far as can be seen from here."""
        self._empty_since = 0.0

    def attach(self, now: float) -> None:
        """A reader is there."""
        self.attached += 1
        if self.attached == 1:
            self.deserted.append((self._empty_since, now))

    def detach(self, now: float) -> None:
        """A reader is not there any more."""
        self.attached -= 1
        if not self.attached:
            self._empty_since = now

    def heard(self, event: Event) -> None:
        """One of the readers was told something: it may be what became of a command."""
        if event["type"] == "response.done":
            self.done.add(event["response_id"])
        if event["type"] == "error" and event["error"].get("event_id"):
            self.refuse(event["error"]["event_id"], event["error"])
        sent = self.sent.get(event.get("for_event_id", ""))
        if sent is not None:
            sent.accepted = True
            sent.told.set()

    def refuse(self, event_id: str, error: dict[str, Any]) -> None:
        """A command was refused; in a final way, unless its sender may try again."""
        sent = self.sent.get(event_id)
        if sent is not None and error.get("type") not in PASSING:
            sent.refused = sent.refused or str(error.get("code"))
            sent.told.set()

    @property
    def waiting(self) -> int:
        """How many of the accepted responses have not been seen to end."""
        accepted = {sent.command.get("response_id") for sent in self.sent.values() if sent.accepted}
        return len([one for one in self.responses if one in accepted and one not in self.done])
