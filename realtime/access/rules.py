"""Who may do what: scopes, owners and guests. Pure.

A session belongs to the user who made it. A token with a `session_id` is a guest of that session and of nothing else,
whoever it names. What somebody may not see answers exactly like what does not exist.
"""

from __future__ import annotations

from realtime.access.principal import TASK, Principal
from realtime.errors import PermissionDenied, session_not_found
from realtime.protocol import (
    Command,
    ItemCreate,
    ItemTruncate,
    ResponseCancel,
    ResponseCreate,
    Session,
    SessionClose,
    SessionUpdate,
    TaskCancel,
    TaskCreate,
)
from realtime.session import SessionState


def check_may_see(session: Session, principal: Principal) -> None:
    """Raise `NotFound` if the session is not there for this principal: the same as for one that is nowhere."""
    is_theirs = principal.user == session.owner if principal.session_id is None else principal.session_id == session.id
    if not is_theirs:
        raise session_not_found()


def check_scope(principal: Principal, scope: str, *others: str) -> None:
    """Raise `PermissionDenied` if the principal's token does not have the scope, nor one of the others that will do."""
    if principal.scopes.isdisjoint({scope, *others}):
        raise PermissionDenied("scope_missing", f"The token does not have the scope {scope}.")


def check_no_guest(principal: Principal) -> None:
    """Raise `PermissionDenied` for a guest of some session, who may do nothing outside of it."""
    if principal.session_id is not None:
        raise PermissionDenied("guest", "A guest of a session may do nothing else.")


def check_owner(session: Session, principal: Principal) -> None:
    """Raise `PermissionDenied` for a guest: that is the owner's to do."""
    if principal.session_id is not None or principal.user != session.owner:
        raise PermissionDenied("owner_only", "Only the owner of the session may do that.")


def permit(state: SessionState, command: Command, principal: Principal) -> None:
    """Raise `PermissionDenied` if the principal, who may see the session, may not do that in it."""
    if isinstance(command, TaskCreate | TaskCancel):
        check_scope(principal, TASK)
    if principal.session_id is not None:
        _permit_guest(state, command, principal)


def _permit_guest(state: SessionState, command: Command, guest: Principal) -> None:
    """A guest adds what they say, asks, and stops what they have asked for; all else is the owner's."""
    match command:
        case SessionUpdate() | SessionClose() | TaskCreate() | TaskCancel():
            check_owner(state.session, guest)
        case ItemCreate(item=item) if item.role != "user":
            raise PermissionDenied("owner_only", "A guest speaks as a user.", param="item.role")
        case ResponseCreate(instructions=instructions, model=model) if instructions is not None or model is not None:
            param = "model" if instructions is None else "instructions"
            raise PermissionDenied("owner_only", "A guest takes the session's instructions and model.", param=param)
        case ResponseCreate() if (command.multitask_strategy or state.session.multitask_strategy) == "interrupt":
            for response in state.unfinished.values():
                _check_own(response.user, guest)
        case ResponseCancel(response_id=response_id) | ItemTruncate(response_id=response_id):
            if response_id in state.responses:
                _check_own(state.responses[response_id].user, guest)
        case _:
            pass


def _check_own(user: str, guest: Principal) -> None:
    if user != guest.user:
        raise PermissionDenied("owner_only", "A guest stops only what they have asked for.", param="response_id")
