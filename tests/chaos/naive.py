"""The control: a server of the usual kind, in which the checks of a chaos run must find violations.

It speaks just enough of the protocol for the same readers and drivers, and does what many such servers do: state is
one value that is read, changed and written; who attaches is sent a snapshot and subscribes then; what is published is
taken for the truth; a response lives as long as the process that runs it. It is nobody's model.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import uvicorn
from redis.asyncio import Redis
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from realtime.log import format_positions, parse_positions

State = dict[str, Any]
HEADERS = {"x-api-key": "test", "anthropic-version": "2023-06-01"}


class Naive:
    """The server: its state is in Redis, its responses are tasks of this process."""

    def __init__(self, redis_url: str, model_url: str) -> None:
        self._redis = Redis.from_url(redis_url, decode_responses=True)
        self._http = httpx.AsyncClient(base_url=model_url, trust_env=False, timeout=60)
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def create(self, request: Request) -> Response:
        """A new session."""
        session_id = f"sess_{secrets.token_hex(8)}"
        await self._save({"id": session_id, "position": 0, "items": [], "responses": {}})
        return JSONResponse({"session": {"id": session_id}}, 201)

    async def show(self, request: Request) -> Response:
        """A session as it is stored."""
        state = await self._load(request.path_params["session_id"])
        positions = {"session": state["position"]}
        body = {"positions": positions, "items": state["items"], "responses": list(state["responses"].values())}
        return JSONResponse(body)

    async def command(self, request: Request) -> Response:
        """Carry a command out."""
        await self._execute(request.path_params["session_id"], await request.json())
        return JSONResponse({"accepted": True}, 202)

    async def stream(self, request: Request) -> Response:
        """A session's events, as server-sent events."""
        last = request.headers.get("last-event-id") or request.query_params.get("after", "")
        positions = parse_positions(last) if last else {"session": 0}
        events = self._events(request.path_params["session_id"], positions)
        return StreamingResponse(_encoded(events, positions), media_type="text/event-stream")

    async def attach(self, socket: WebSocket) -> None:
        """A session's events over a WebSocket, and commands."""
        await socket.accept(subprotocol="realtime.v1")
        session_id, after = socket.query_params["session_id"], socket.query_params.get("after", "")
        sending = asyncio.create_task(self._send(socket, session_id, parse_positions(after) if after else {}))
        try:
            while True:
                await self._execute(session_id, await socket.receive_json())
        except (WebSocketDisconnect, RuntimeError):
            sending.cancel()

    async def _send(self, socket: WebSocket, session_id: str, positions: dict[str, int]) -> None:
        async for event in self._events(session_id, positions):
            await socket.send_json(event)

    async def _events(self, session_id: str, positions: dict[str, int]) -> AsyncIterator[dict[str, Any]]:
        """First a snapshot, then what is published."""
        yield {"type": "session.resumed", "session": {"id": session_id}}
        state = await self._load(session_id)
        for event in _snapshot(state, positions):
            yield event
        async with self._redis.pubsub() as subscriber:
            await subscriber.subscribe(session_id)
            async for message in subscriber.listen():
                if message["type"] == "message":
                    yield json.loads(message["data"])

    async def _execute(self, session_id: str, command: dict[str, Any]) -> None:
        state = await self._load(session_id)
        event_id = command["event_id"]
        match command["type"]:
            case "conversation.item.create":
                await self._add_item(state, {**command["item"]}, event_id)
            case "response.create":
                response_id = command["response_id"]
                item = {"id": f"{response_id}-i", "role": "user", "content": command["input"]}
                await self._add_item(state, item, event_id)
                await self._respond(state, response_id, event_id)
            case "response.cancel":
                task = self._tasks.get(command["response_id"])
                if task is not None:
                    task.cancel()

    async def _add_item(self, state: State, item: dict[str, Any], event_id: str) -> None:
        state["items"].append(item)
        await self._append(state, {"type": "conversation.item.created", "item": item, "for_event_id": event_id})

    async def _respond(self, state: State, response_id: str, event_id: str) -> None:
        response = {"id": response_id, "status": "in_progress", "text": "", "position": 0}
        state["responses"][response_id] = response
        await self._append(state, {"type": "response.created", "response": response, "for_event_id": event_id})
        self._tasks[response_id] = asyncio.create_task(self._answer(state["id"], response_id))

    async def _append(self, state: State, event: dict[str, Any]) -> None:
        state["position"] += 1
        await self._save(state)
        await self._redis.publish(state["id"], json.dumps({**event, "seq": state["position"]}))

    async def _answer(self, session_id: str, response_id: str) -> None:
        status = "cancelled"
        try:
            async for text in self._ask(response_id):
                await self._change(session_id, response_id, "response.output_text.delta", delta=text)
            status = "completed"
        finally:
            await self._change(session_id, response_id, "response.done", status=status)

    async def _ask(self, model: str) -> AsyncIterator[str]:
        body = {"model": model, "max_tokens": 100, "stream": True, "messages": [{"role": "user", "content": "go"}]}
        async with self._http.stream("POST", "/v1/messages", json=body, headers=HEADERS) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data:") and '"text_delta"' in line:
                    yield json.loads(line[5:])["delta"]["text"]

    async def _change(self, session_id: str, response_id: str, kind: str, **fields: Any) -> None:
        """Read what is stored, change it, write it, tell of it."""
        state = await self._load(session_id)
        response = state["responses"][response_id]
        response["position"] += 1
        response["text"] += fields.get("delta", "")
        response["status"] = fields.get("status", response["status"])
        await self._save(state)
        event = {"type": kind, "response_id": response_id, "seq": response["position"], **fields}
        await self._redis.publish(session_id, json.dumps(event))

    async def _load(self, session_id: str) -> State:
        state: State = json.loads(await self._redis.get(session_id) or "null")
        return state

    async def _save(self, state: State) -> None:
        await self._redis.set(state["id"], json.dumps(state))


def _snapshot(state: State, positions: dict[str, int]) -> list[dict[str, Any]]:
    """What a client at `positions` does not have, as far as it is stored."""
    events: list[dict[str, Any]] = []
    seq = positions.get("session", 0)
    if state["position"] > seq:
        events += [{"type": "conversation.item.created", "item": item} for item in state["items"]]
        events += [{"type": "response.created", "response": one} for one in state["responses"].values()]
        events = [{**event, "seq": at} for at, event in enumerate(events, 1) if at > seq]
    for response_id, response in state["responses"].items():
        at = positions.get(response_id, 0)
        if response["position"] > at and (at or response_id in positions or not seq):
            is_done = int(response["status"] != "in_progress")
            last = response["position"] - is_done
            if last > at:
                delta = response["text"] if not at else ""
                name = "response.output_text.delta"
                events.append(
                    {"type": name, "response_id": response_id, "delta": delta, "seq": last, "merged": last - at}
                )
            if is_done:
                status = response["status"]
                events.append({"type": "response.done", "response_id": response_id, "status": status, "seq": last + 1})
    return events


async def _encoded(events: AsyncIterator[dict[str, Any]], positions: dict[str, int]) -> AsyncIterator[str]:
    async for event in events:
        if "seq" in event:
            positions[event.get("response_id", "session")] = event["seq"]
        if event["type"] == "response.created":
            positions.setdefault(event["response"]["id"], 0)
        if event["type"] == "response.done":
            positions.pop(event["response_id"], None)
        yield f"event: {event['type']}\nid: {format_positions(positions)}\ndata: {json.dumps(event)}\n\n"


def main() -> None:
    """`python -m tests.chaos.naive PORT REDIS_URL MODEL_URL`."""
    port, redis_url, model_url = sys.argv[1:]
    naive = Naive(redis_url, model_url)
    session = "/v1/sessions/{session_id}"
    app = Starlette(
        routes=[
            WebSocketRoute("/v1/realtime", naive.attach),
            Route("/v1/sessions", naive.create, methods=["POST"]),
            Route(session, naive.show, methods=["GET"]),
            Route(f"{session}/events", naive.command, methods=["POST"]),
            Route(f"{session}/events", naive.stream, methods=["GET"]),
        ]
    )
    print(f"realtime naive on http://127.0.0.1:{port}", file=sys.stderr, flush=True)
    uvicorn.run(app, port=int(port), log_level="critical")


if __name__ == "__main__":
    main()
