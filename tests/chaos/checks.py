"""What must hold at the end of a chaos run: the readers, the store and the model tell the same story."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from realtime.protocol import utf16_length
from tests.chaos.fleet import Life
from tests.chaos.numbers import count_of, faults_of, text_of
from tests.chaos.readers import Reader, Reading
from tests.chaos.sessions import Sent, Session
from tests.chaos.site import Site
from tests.chaos.stored import ENDS, StoredResponse, StoredSession
from tests.support.model_server import ModelRequest

LOST = frozenset({"instance_lost", "store_lost"})
STOPPED = frozenset({"cancelled", "interrupted", "disconnected"})
BEATS_PER_LEASE = 3


class History(Struct, kw_only=True):
    """What was done in the run."""

    lives: Sequence[Life]
    redis_faults: Sequence[tuple[float, float]]
    redis_lost: bool
    """Whether Redis has come back without something that it had acknowledged."""
    lease_s: float

    def may_be_lost(self, instance: str | None) -> bool:
        """Whether an instance was killed, or paused for longer than its lease."""
        known = [life for life in self.lives if life.name == instance]
        if not known:  # it had not been asked for its name yet when it died
            return any(not life.name and (life.killed_at or life.terminated_at) for life in self.lives)
        return any(map(self._was_lost, known))

    def was_terminated(self, instance: str | None) -> bool:
        """Whether an instance was told to end."""
        return any(life.terminated_at is not None and life.name in {instance, ""} for life in self.lives)

    def _was_lost(self, life: Life) -> bool:
        if life.killed_at is not None:
            return True
        if life.terminated_at is not None and self._redis_failed_at(life.terminated_at):
            return True
        return any(self._unsigned_s(pause) >= self.lease_s for pause in life.pauses)

    def _unsigned_s(self, pause: tuple[float, float]) -> float:
        """The longest that a paused instance may have been without a sign of life, as far as its pause goes."""
        began, ended = pause
        beats = 1 + self._redis_failed_at(began) + self._redis_failed_at(ended)
        return ended - began + beats * self.lease_s / BEATS_PER_LEASE

    def _redis_failed_at(self, at: float) -> bool:
        margin_s = 2 * self.lease_s
        return any(began - margin_s <= at <= ended + margin_s for began, ended in self.redis_faults)


class Checks:
    """The checks of one run; what they find goes to the site."""

    def __init__(self, site: Site, history: History, calls: Sequence[ModelRequest]) -> None:
        self._site = site
        self._history = history
        self._calls: dict[str, list[ModelRequest]] = {}
        for call in calls:
            self._calls.setdefault(call.body["model"], []).append(call)

    def session(self, session: Session, stored: StoredSession, readers: Sequence[Reader]) -> None:
        """All that can be said of one session."""
        for response in stored.responses.values():
            self._response(session, response)
        for reader in readers:
            self._reader(reader, stored)
        if stored.for_event_ids is not None and not self._history.redis_lost:
            self._commands(session, stored.for_event_ids)

    def transcript(self, name: str, transcript: Reading, stored: StoredSession) -> None:
        """A reader's transcript is the stored one."""
        same_position = transcript.positions["session"] == stored.position
        self._check(same_position, "a session not read to its end", name, f"{transcript.positions} {stored.position}")
        items = [{"id": item["id"], "role": item["role"], "content": item["content"]} for item in transcript.items]
        self._check(items == _plain(stored.items), "other items", name, f"{len(items)} of {len(stored.items)}")
        extra = (transcript.positions.keys() | transcript.done.keys()) - stored.responses.keys() - {"session"}
        self._check(not extra, "a response that is not stored", name, str(extra))
        for response in stored.responses.values():
            self._same(name, response, transcript)

    def shown(self, session: Session, stored: StoredSession, shown: StoredSession | None) -> None:
        """What an instance shows is what is stored."""
        if shown is None:
            self._check(False, "a session that is not shown", session.name, session.id)
            return
        self._check(shown.position == stored.position, "another position is shown", session.name, str(shown.position))
        self._check(_plain(shown.items) == _plain(stored.items), "other items are shown", session.name, "")
        for response in stored.responses.values():
            other = shown.responses.get(response.id)
            same = other is not None and _told(other) == _told(response)
            self._check(same, "another response is shown", response.id, f"{other} instead of {response}")

    def _response(self, session: Session, response: StoredResponse) -> None:
        where = f"{response.id} of {response.instance}"
        for fault in response.faults:
            self._check(False, "a log out of order", where, fault)
        calls = [f"{call.tokens_sent} tokens, {call.ended}" for call in self._calls.get(response.id, [])]
        detail = f"{response.status}, {count_of(response.text)} tokens; calls of the model: {calls}"
        self._check(response.status in ENDS, "a response without an end", where, detail)
        for kind, count in faults_of(response.id, response.text).items():
            self._check(False, f"stored tokens {kind}", where, f"{count}: {_around(response.id, response.text)}")
        same_length = response.output_chars in {None, utf16_length(response.text)}
        self._check(same_length, "a wrong length", where, f"{response.output_chars}, {utf16_length(response.text)}")
        self._end(session, response, where)
        self._sent_by_model(response, where)
        self._site.counts[f"end: {_end_of(response)}"] += 1
        self._site.counts["tokens stored"] += count_of(response.text)

    def _end(self, session: Session, response: StoredResponse, where: str) -> None:
        match response:
            case StoredResponse(status="completed"):
                whole = response.text == text_of(response.id)
                self._check(whole, "completed and not whole", where, f"{count_of(response.text)} tokens")
            case StoredResponse(status="cancelled", stop_reason="disconnected"):
                alone = session.on_disconnect == "cancel" and bool(session.deserted)
                self._check(alone, "cancelled for want of viewers", where, session.on_disconnect)
            case StoredResponse(status="cancelled"):
                asked = response.stop_reason in STOPPED and self._was_stopped(session, response)
                self._check(asked, "cancelled by nobody", where, str(response.stop_reason))
            case StoredResponse(status="failed", error="instance_lost"):
                lost = self._history.may_be_lost(response.instance)
                self._check(lost, "a living instance was given up", where, "")
            case StoredResponse(status="failed", error="instance_shutdown"):
                ended = self._history.was_terminated(response.instance)
                self._check(ended, "a shutdown of an instance that was not told to", where, "")
            case StoredResponse(status="failed", error="store_lost"):
                self._check(self._history.redis_lost, "store_lost and nothing was lost", where, response.message)
            case StoredResponse(status="in_progress"):
                pass  # that is a violation already
            case _:
                self._check(False, "a strange end", where, _end_of(response))

    def _was_stopped(self, session: Session, response: StoredResponse) -> bool:
        commands = [sent.command for sent in session.sent.values() if sent.may_have_effect]
        if response.stop_reason == "interrupted":
            return any(command.get("multitask_strategy") == "interrupt" for command in commands)
        return any(
            command["type"] == "response.cancel" and command["response_id"] == response.id for command in commands
        )

    def _sent_by_model(self, response: StoredResponse, where: str) -> None:
        calls = self._calls.get(response.id, [])
        self._check(len(calls) <= 1 or self._history.redis_lost, "model calls doubled", where, str(len(calls)))
        sent = max((call.tokens_sent + 1 for call in calls), default=0)
        stored = count_of(response.text)
        self._check(stored <= sent, "tokens that the model has not sent", where, f"{stored} stored, {sent} sent")

    def _reader(self, reader: Reader, stored: StoredSession) -> None:
        if reader.broken:
            return  # it is a violation already
        self._check(not reader.gone, "a session was gone", reader.name, reader.gone)
        self.transcript(reader.name, reader.transcript, stored)
        for response_id in reader.transcript.resets:
            response = stored.responses.get(response_id)
            justified = response is not None and response.error in LOST
            self._check(justified, "a reset without a loss", reader.name, str(response)[:300])

    def _same(self, name: str, response: StoredResponse, transcript: Reading) -> None:
        where = f"{name}, {response.id}"
        text = transcript.texts.get(response.id, "")
        if text != response.text:
            kinds = faults_of(response.id, text) or Counter({"too few or too many": 1})
            for kind in kinds:
                detail = f"{len(text)} characters instead of {len(response.text)} ({_end_of(response)})"
                self._check(False, f"read tokens {kind}", where, detail)
        done = transcript.done.get(response.id)
        end = _end_of_event(done) if done else "none"
        self._check(end == _end_of(response), "another end", where, f"{end} instead of {_end_of(response)}")

    def _commands(self, session: Session, events: Sequence[tuple[str, str | None]]) -> None:
        for sent in session.sent.values():
            self._command(sent, [kind for kind, event_id in events if event_id == sent.event_id])
        for kind, event_id in events:
            self._check(event_id in session.sent, "an event of no command", session.name, f"{kind} {event_id}")

    def _command(self, sent: Sent, effects: list[str]) -> None:
        where = f"{sent.event_id} ({sent.command['type']}, sent {sent.times} times from {sent.sent_at:.1f})"
        expected = {"response.create": ["ItemCreated", "ResponseCreated"], "conversation.item.create": ["ItemCreated"]}
        wanted = expected.get(sent.command["type"], [])
        if sent.accepted:
            self._check(effects == wanted, "an accepted command without its one effect", where, str(effects))
        elif sent.may_have_effect:
            self._check(effects in ([], wanted), "half an effect", where, str(effects))
        else:
            self._check(not effects, "a refused command with an effect", where, f"{sent.refused} {effects}")
        known = sent.accepted or bool(sent.refused)
        self._check(known, "a command whose fate nobody knows", where, "")
        lost = sent.refused in {"session_not_found", "store_lost"}
        self._check(not lost, "a command refused for a session that should be there", where, sent.refused)
        self._site.counts[f"commands {'accepted' if sent.accepted else 'refused: ' + sent.refused}"] += 1

    def _check(self, holds: bool, kind: str, where: str, detail: str) -> None:
        if not holds:
            self._site.violated(kind, where, detail)


def _plain(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"id": item["id"], "role": item["role"], "content": item["content"]} for item in items]


def _told(response: StoredResponse) -> tuple[Any, ...]:
    return response.status, response.text, response.stop_reason, response.error, response.output_chars


def _end_of(response: StoredResponse) -> str:
    return " ".join(filter(None, [response.status, response.error or response.stop_reason]))


def _end_of_event(done: dict[str, Any]) -> str:
    reason = (done.get("error") or {}).get("code") or done.get("stop_reason")
    return " ".join(filter(None, [done["status"], reason]))


def _around(response_id: str, text: str) -> str:
    """Where a text leaves its answer."""
    whole = text_of(response_id)
    at = next((at for at, (one, other) in enumerate(zip(text, whole, strict=False)) if one != other), len(whole))
    return f"at {at}: {text[max(0, at - 40) : at + 60]!r}"
