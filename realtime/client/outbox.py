"""The commands that nobody has answered yet. No I/O: whoever opens the next connection sends them again."""

from __future__ import annotations

import msgspec

from realtime.client.errors import MessageTooLarge, QueueFull
from realtime.client.events import Fields

CONNECTION_COMMANDS = frozenset({"ping", "auth.refresh"})
"""Commands about one connection: void on the next one."""


class Outbox:
    """Keeps at most `limit` of them, of at most `max_bytes` each."""

    def __init__(self, limit: int, max_bytes: int) -> None:
        self._limit = limit
        self._max_bytes = max_bytes
        self._commands: dict[str, Fields] = {}

    @property
    def waiting(self) -> list[Fields]:
        """Those that wait, in their order."""
        return list(self._commands.values())

    def add(self, command: Fields) -> None:
        """Keep a command until it is answered. Raises `QueueFull` and `MessageTooLarge`."""
        size = len(msgspec.json.encode(command))
        if size > self._max_bytes:
            raise MessageTooLarge(size, self._max_bytes)
        if command["type"] in CONNECTION_COMMANDS:
            return
        if len(self._commands) >= self._limit:
            raise QueueFull(self._limit)
        self._commands[command["event_id"]] = command

    def settle(self, event_id: str | None) -> None:
        """It is answered. Idempotent."""
        self._commands.pop(event_id or "", None)

    def settle_cancels(self, channel: str) -> None:
        """A channel has ended: to cancel that is answered by nothing. To truncate it is."""
        for event_id, command in list(self._commands.items()):
            cancels = channel in {command.get("response_id"), command.get("task_id")}
            if cancels and command["type"].endswith(".cancel") and "heard_chars" not in command:
                del self._commands[event_id]
