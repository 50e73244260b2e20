"""The usual way to put a model behind a WebSocket, as tutorials show it, for comparison.

One process, one shared client, `messages.stream()`, and a JSON text frame for every piece of text, under
uvicorn with its defaults (which means uvloop, where it is installed). One thing is kinder than usual: the
client's connection pool is large enough for every session. With the SDK's default of 1,000 connections a
benchmark would measure the pool, not the pattern.
"""

from __future__ import annotations

import json

import httpx2
from anthropic import AsyncAnthropic, DefaultAsyncHttpxClient
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

MODEL = "claude-haiku-4-5"
POOL = httpx2.Limits(max_connections=20_000, max_keepalive_connections=20_000)

client = AsyncAnthropic(http_client=DefaultAsyncHttpxClient(limits=POOL))


async def chat(websocket: WebSocket) -> None:
    """Answer each message `{"input": text}` with the model's words, one frame for each piece."""
    await websocket.accept()
    try:
        while True:
            await answer(websocket, json.loads(await websocket.receive_text()))
    except WebSocketDisconnect:
        return


async def answer(websocket: WebSocket, message: dict[str, str]) -> None:
    """Stream the model's answer to one message."""
    async with client.messages.stream(
        model=MODEL, max_tokens=4096, messages=[{"role": "user", "content": message["input"]}]
    ) as stream:
        async for text in stream.text_stream:
            await websocket.send_text(json.dumps({"type": "delta", "delta": text}))
    await websocket.send_text(json.dumps({"type": "done"}))


async def healthz(_request: Request) -> PlainTextResponse:
    """Answer that the server is up."""
    return PlainTextResponse("ok")


app = Starlette(routes=[WebSocketRoute("/ws", chat), Route("/healthz", healthz)])
