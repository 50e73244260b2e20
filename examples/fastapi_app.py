"""A FastAPI application with a session server under /ai: uvicorn examples.fastapi_app:app --ws websockets-sansio"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from realtime.app import create_app, mount


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """What the application itself needs: the session server runs already here, and still runs afterwards."""
    app.state.visits = {"1": "Anna, 9:30"}
    yield
    app.state.visits.clear()


app = FastAPI(lifespan=lifespan)
mount(app, create_app(), "/ai")


@app.get("/visits")
async def visits() -> dict[str, str]:
    """The application goes on being what it is."""
    found: dict[str, str] = app.state.visits
    return found
