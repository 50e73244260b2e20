"""Drivers: each has one session answer, over and over, and asks again until it knows what became of what it asked."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from websockets.exceptions import ConnectionClosed

from tests.chaos.readers import Reader
from tests.chaos.sessions import Sent, Session
from tests.chaos.site import Site

MOST_WAITING = 3
"""Responses that a driver lets wait at once."""
PATIENCE_S = 2.5
POST_S = 8.0
LAST_S = 20.0
"""How long after the last fault a command may be sent again."""


class Driver:
    """Sends the commands of one session. `run` is its life."""

    def __init__(self, site: Site, session: Session, readers: list[Reader]) -> None:
        self._site = site
        self._session = session
        self._readers = readers
        self._chance = site.chance(f"driver of {session.name}")
        self._count = 0

    async def run(self) -> None:
        """Send commands until there is calm; returns once it is known what became of the last one."""
        await asyncio.sleep(self._chance.uniform(0, 3))
        while not self._site.calm and not self._session.gone:
            await self._execute(self._next())
            await asyncio.sleep(self._chance.uniform(0.2, 3))
            while self._session.waiting >= MOST_WAITING and not self._site.calm:  # noqa: ASYNC110
                await asyncio.sleep(0.2)

    def _next(self) -> dict[str, Any]:
        self._count += 1
        event_id = f"{self._session.name}-c{self._count}"
        draw = self._chance.random()
        if draw < 0.15 and self._session.responses:
            target = self._chance.choice(self._session.responses[-2:])
            return {"type": "response.cancel", "event_id": event_id, "response_id": target}
        if draw < 0.25:
            item = {"id": f"{self._session.name}-i{self._count}", "role": "user", "content": f"note {self._count}"}
            return {"type": "conversation.item.create", "event_id": event_id, "item": item}
        return self._create(event_id)

    def _create(self, event_id: str) -> dict[str, Any]:
        response_id = f"{self._session.name}-r{self._count}"
        self._session.responses.append(response_id)
        strategy = self._chance.choices(("enqueue", "interrupt", "reject"), (5, 2, 3))[0]
        return {
            "type": "response.create",
            "event_id": event_id,
            "response_id": response_id,
            "model": response_id,
            "input": f"question {self._count}",
            "multitask_strategy": strategy,
        }

    async def _execute(self, command: dict[str, Any]) -> None:
        sent = self._session.sent[command["event_id"]] = Sent(command, sent_at=self._site.now())
        while not sent.accepted and not sent.refused and not self._session.gone and not self._is_late:
            sent.times += 1
            self._site.counts["commands sent"] += 1
            sockets = [reader for reader in self._readers if reader.socket is not None]
            if sockets and self._chance.random() < 0.5:
                await self._send(sent, self._chance.choice(sockets))
            else:
                await self._post(sent)

    @property
    def _is_late(self) -> bool:
        """Whether it should have been known long ago what became of a command."""
        return self._site.now() > self._site.calm_since + LAST_S

    async def _send(self, sent: Sent, reader: Reader) -> None:
        """Over a reader's WebSocket: what becomes of it any reader is told, or nobody."""
        try:
            await reader.send(sent.command)
            async with asyncio.timeout(PATIENCE_S):
                await sent.told.wait()
        except (ConnectionClosed, TimeoutError, OSError):
            return

    async def _post(self, sent: Sent) -> None:
        url = f"{self._site.proxy.url}/v1/sessions/{self._session.id}/events"
        try:
            answer = await self._site.http.post(url, json=sent.command, timeout=POST_S)
            body = answer.json()
        except (httpx.HTTPError, ValueError):  # an instance that is gone, or nginx's own page
            body, answer = {}, None
        if answer is not None and answer.status_code == 202:
            sent.accepted = True
        elif "error" in body:
            self._session.refuse(sent.event_id, body["error"])
        if not (sent.accepted or sent.refused):
            await asyncio.sleep(self._chance.uniform(0.2, 0.8))
