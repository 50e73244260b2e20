"""What a session's calls and loops raise."""

from __future__ import annotations

from realtime.protocol import ErrorBody, Failure


class RealtimeError(Exception):
    """Something was refused, or failed. `code` says what: the server's, or one of the client's own; `type` is its kind.

    `message` is for a person, `param` names the field at fault, `retry_after_ms` says when to try again.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        type: str = "client_error",
        param: str | None = None,
        retry_after_ms: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.type = type
        self.param = param
        self.retry_after_ms = retry_after_ms

    @classmethod
    def told(cls, error: ErrorBody | Failure) -> RealtimeError:
        """What the server says in a message."""
        more = {"param": error.param, "retry_after_ms": error.retry_after_ms} if isinstance(error, ErrorBody) else {}
        return cls(error.code, error.message, type=error.type, **more)  # type: ignore[arg-type]


class QueueFull(RealtimeError):
    """More commands wait for an answer than the session keeps: this one was not taken."""

    def __init__(self, limit: int) -> None:
        super().__init__("queue_full", f"{limit} commands wait for the server already")


class MessageTooLarge(RealtimeError):
    """A command is larger than the server takes: it was not sent."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__("message_too_large", f"the command has {size} bytes; the limit is {limit}")


class SessionClosed(RealtimeError):
    """The session's connection has ended for good. `close_code` says why, by the protocol's table of close codes."""

    def __init__(self, close_code: int, reason: str) -> None:
        why = f"{close_code} {reason}".rstrip()
        super().__init__("closed", f"the session's connection was closed for good ({why})")
        self.close_code = close_code
        self.reason = reason
