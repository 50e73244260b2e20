"""What stands in Redis and is published there, as bytes: sealed, where there are keys for that."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from realtime.errors import StoreUnreadable
from realtime.log import Entry
from realtime.protocol import Session
from realtime.store.base import Appended, CommandRecord, Gone, Missed, Notice, Viewer, ViewerJoined, ViewerLeft
from realtime.store.elements import decode_entries, encode_entries
from realtime.store.sealing import Sealer


class Values:
    """Writes and reads all that is content; what else is stored are ids, positions, numbers and times. What can't be
    opened raises `StoreUnreadable`."""

    def __init__(self, sealer: Sealer) -> None:
        self._sealer = sealer

    def session(self, session: Session) -> bytes:
        """A session as it was made."""
        return self._sealer.seal(msgspec.json.encode(session), session_id=session.id, place="session")

    def read_session(self, value: bytes, session_id: str) -> Session:
        """The same, read."""
        plain = self._sealer.open(value, session_id=session_id, place="session")
        return msgspec.json.decode(plain, type=Session)

    def viewer(self, viewer: Viewer, session_id: str) -> bytes:
        """Who looks at a session."""
        return self._sealer.seal(msgspec.json.encode(viewer), session_id=session_id, place="viewer")

    def read_viewer(self, value: bytes, session_id: str) -> Viewer:
        """The same, read."""
        return msgspec.json.decode(self._sealer.open(value, session_id=session_id, place="viewer"), type=Viewer)

    def entries(self, entries: Sequence[Entry], session_id: str, channel: str) -> bytes:
        """The element of what is appended in one step."""
        return self._sealer.seal(encode_entries(entries), session_id=session_id, place=f"log:{channel}")

    def read_entries(self, value: bytes, session_id: str, channel: str) -> list[Entry]:
        """The same, read."""
        return decode_entries(self._sealer.open(value, session_id=session_id, place=f"log:{channel}"), channel)

    def record(self, record: CommandRecord, session_id: str) -> bytes:
        """What is kept of a command."""
        place = _command_place(record.user, record.event_id)
        return self._sealer.seal(msgspec.msgpack.encode(record), session_id=session_id, place=place)

    def read_record(self, value: bytes, session_id: str, user: str, event_id: str) -> CommandRecord:
        """The same, read."""
        plain = self._sealer.open(value, session_id=session_id, place=_command_place(user, event_id))
        return msgspec.msgpack.decode(plain, type=CommandRecord)

    def record_names(self, session_id: str, user: str, event_id: str) -> list[bytes]:
        """The names under which the record of a command may stand; under the first it is written. While keys are
        changed, one instance may write under one name and another under another: who looks asks for all."""
        return self._sealer.names(msgspec.json.encode([user, event_id]), session_id=session_id)

    def notice(self, message: bytes, session_id: str) -> Notice:
        """What was published of a session, as the scripts put it together. What can't be opened counts as missed:
        who reads then learns why."""
        try:
            return self._notice(message, session_id)
        except StoreUnreadable:
            return Missed()

    def _notice(self, message: bytes, session_id: str) -> Notice:
        match message[:1]:
            case b"A":
                _, name, first, value = message.split(b"\0", 3)
                channel = name.decode()
                return Appended(channel, int(first), self.read_entries(value, session_id, channel))
            case b"J":
                return ViewerJoined(self.read_viewer(message.partition(b"\0")[2], session_id))
            case b"L":
                _, floor_s, value = message.split(b"\0", 2)
                return ViewerLeft(self.read_viewer(value, session_id).participant, float(floor_s))
            case _:
                return Gone("deleted")


def _command_place(user: str, event_id: str) -> str:
    return f"command:{msgspec.json.encode([user, event_id]).decode()}"
