"""The demo page: static files, with what a page may do."""

from __future__ import annotations

from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

_HERE = Path(__file__).parent
STATIC = next(folder for folder in (_HERE / "static", _HERE.parent / "static") if folder.is_dir())
"""The page: inside the package where it was installed, beside it in a checkout."""

HEADERS = {
    b"content-security-policy": b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    b"img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    b"permissions-policy": b"camera=(), display-capture=(), geolocation=(), microphone=(self), payment=(), usb=()",
    b"cache-control": b"no-cache",
}


class Page:
    """The page as an ASGI application."""

    def __init__(self) -> None:
        self._files = StaticFiles(directory=STATIC, html=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with a file. Raises `HTTPException`."""
        if scope["type"] != "http":
            raise HTTPException(404)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS.items()]
            await send(message)

        await self._files(scope, receive, send_with_headers)
