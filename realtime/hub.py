"""The live sessions of this process: each is opened by its first user and closed after its last."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from contextvars import Context

from msgspec import Struct

from realtime.live import Ears, LiveSession
from realtime.observe import metrics
from realtime.store.base import Store


class Hub:
    """The live sessions of this process, each opened by its first user and closed after its last."""

    def __init__(self, store: Store, ears: Ears) -> None:
        self._store = store
        self._ears = ears
        self._sessions: dict[str, _Use] = {}

    def sessions(self) -> Iterator[LiveSession]:
        """The sessions that are open now."""
        return (use.live for use in list(self._sessions.values()) if use.opening is None and not use.live.gone)

    @asynccontextmanager
    async def use(self, session_id: str) -> AsyncIterator[LiveSession]:
        """Use a session; raises `NotFound` if the store does not have it."""
        use = self._sessions.get(session_id)
        if use is None:
            metrics.SESSIONS.inc()
        if use is None or use.live.gone:
            use = self._sessions[session_id] = self._open(session_id)
        self.retain(use.live)
        try:
            if use.opening is not None:
                await asyncio.shield(use.opening)
                use.opening = None
            yield use.live
        finally:
            self.release(use.live)

    def retain(self, live: LiveSession) -> None:
        """Keep a session open until `release`."""
        live.users += 1

    def release(self, live: LiveSession) -> None:
        """The opposite of `retain`: the last one closes the session."""
        live.users -= 1
        if live.users > 0:
            return
        live.close()
        use = self._sessions.get(live.id)
        if use is not None and use.live is live:
            if use.opening is not None:
                use.opening.cancel()
            del self._sessions[live.id]
            metrics.SESSIONS.dec()

    def _open(self, session_id: str) -> _Use:
        live = LiveSession(session_id, self._store, self._ears)
        return _Use(live, asyncio.create_task(live.open(), context=Context()))


class _Use(Struct):
    """A live session, and what reads it, until it has been read."""

    live: LiveSession
    opening: asyncio.Task[None] | None
