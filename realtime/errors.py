"""Errors that a client may see: one tree, each with a type, a code, an HTTP status and words that hold no content."""

from __future__ import annotations

import copyreg
from collections.abc import Sequence
from typing import Any, ClassVar

from realtime.protocol import CloseCode, ErrorBody, ErrorMessage, Failure, RateLimit


class RealtimeError(Exception):
    """An error that is told to the client.

    `code` is specific and stable, `message` is for a person and never holds what a user or a model said, `param`
    names the field at fault, `retry_after_ms` says when to try again. `close_code` is the WebSocket's close code
    where the error ends a connection.
    """

    type: ClassVar[str] = "server_error"
    status: ClassVar[int] = 500
    close_code: ClassVar[CloseCode] = CloseCode.INTERNAL_ERROR

    def __init__(self, code: str, message: str, *, param: str | None = None, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_ms = retry_after_ms

    def __reduce__(self) -> tuple[Any, ...]:
        """Go from process to process as it is."""
        return copyreg.__newobj__, (type(self), self.message), self.__dict__  # type: ignore[attr-defined]

    def as_message(self, *, event_id: str | None = None, fatal: bool = False) -> ErrorMessage:
        """The `error` frame that tells of this; with `fatal` the connection's end follows."""
        return ErrorMessage(
            error=ErrorBody(
                type=self.type,
                code=self.code,
                message=self.message,
                param=self.param,
                event_id=event_id,
                retry_after_ms=self.retry_after_ms,
                fatal=fatal,
            )
        )

    def as_failure(self) -> Failure:
        """The `error` of a `response.done` that this ended."""
        return Failure(type=self.type, code=self.code, message=self.message)


class InvalidRequest(RealtimeError):
    """The client sent something that can't be carried out."""

    type = "invalid_request_error"
    status = 400
    close_code = CloseCode.TOO_MANY_MALFORMED


class AuthenticationError(RealtimeError):
    """The client has not shown who it is, or not any more."""

    type = "authentication_error"
    status = 401
    close_code = CloseCode.UNAUTHENTICATED


class PermissionDenied(RealtimeError):
    """The client may not do this."""

    type = "permission_error"
    status = 403
    close_code = CloseCode.FORBIDDEN


class NotFound(RealtimeError):
    """There is no such thing, or it isn't the client's: the two look the same."""

    type = "not_found_error"
    status = 404
    close_code = CloseCode.NOT_FOUND


class ConflictError(RealtimeError):
    """It clashes with the state of the session."""

    type = "conflict_error"
    status = 409


class RateLimited(RealtimeError):
    """Too much, too often, or the server is full. `limits` is how much is left of what there was too much of."""

    type = "rate_limit_error"
    status = 429
    close_code = CloseCode.LIMITED
    limits: Sequence[RateLimit] = ()


class Unavailable(RateLimited):
    """This instance takes nothing more now; another, or a later try, may."""

    status = 503
    close_code = CloseCode.TRY_AGAIN_LATER


class BudgetError(RateLimited):
    """It would cost more than what is left of a budget."""

    type = "budget_error"


class UpstreamError(RealtimeError):
    """The model, or the way to it, failed. `answered` is the status of the provider's answer, `field` the place in it
    that could not be read: both, where they are known, for whoever runs the server."""

    type = "upstream_error"
    status = 502
    answered: int | None = None
    field: str | None = None


class StoreError(RealtimeError):
    """The store did not answer, or refused for a reason of its own."""

    type = "store_error"
    status = 503


class StoreUnreadable(StoreError):
    """What the store holds can't be read here, and trying again won't help."""

    def __init__(self) -> None:
        super().__init__("store_unreadable", "What the store holds can't be read.")


class ServerError(RealtimeError):
    """A fault of the server, or of the responder that its owner gave it."""


class TaskError(ServerError):
    """What a task raises to have clients told why it failed: any other error is told by its type alone."""


def session_not_found() -> NotFound:
    """No such session, an expired one, or not yours: one code path, so that they can't be told apart."""
    return NotFound("session_not_found", "There is no such session, or it has expired.", param="session_id")


def task_not_found() -> NotFound:
    """No such task, an expired one, or not yours: as above."""
    return NotFound("task_not_found", "There is no such task, or it has expired.", param="task_id")
