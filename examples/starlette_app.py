"""A Starlette application with a session server under /ai, run as `realtime serve` runs it: with limits, and draining.

python -m examples.starlette_app
"""

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from realtime.app import create_app, mount
from realtime.server import run
from realtime.settings import load_settings


async def home(_request: Request) -> PlainTextResponse:
    """The application goes on being what it is."""
    return PlainTextResponse("The assistant is at /ai/")


settings = load_settings()
app = Starlette(routes=[Route("/", home)])
mount(app, create_app(settings=settings), "/ai")

if __name__ == "__main__":
    run(app, settings)
