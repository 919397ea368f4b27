"""The app: the pages behind the doors, refusals as pages, and what goes on beside them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from . import words
from .doors import Doors
from .errors import PageError
from .studio import HERE, Studio
from .views import ROUTERS

log = logging.getLogger("graftlm.studio")


def create_app(studio: Studio) -> FastAPI:
    """The app over a studio."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(studio.recover)
        await studio.worker.warm()
        watching = asyncio.create_task(studio.watch())
        try:
            yield
        finally:
            watching.cancel()
            await studio.worker.end()
            await studio.server.end()

    app = FastAPI(title="GraftLM Studio", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    for router in ROUTERS:
        app.include_router(router(studio))
    app.mount("/static", StaticFiles(directory=HERE / "static"))
    add_errors(app, studio)
    s = studio.settings
    app.add_middleware(
        Doors, port=s.port, token=s.token, key=studio.workspace.key(), max_body=s.max_upload + 2**20
    )  # fmt: skip
    return app


def add_errors(app: FastAPI, studio: Studio) -> None:
    """Refusals as pages; as lines where a part of a page was asked for."""

    def told(request: Request, status: int, text: str, /, **values: Any) -> Response:
        if "hx-request" in request.headers:
            return PlainTextResponse(words.translator(studio.language(request))(text, **values), status)
        return studio.page(request, "error.html", status, text=text, values=values, status_=status)

    @app.exception_handler(PageError)
    async def refused(request: Request, error: PageError) -> Response:
        return told(request, error.status, error.message, **error.values)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return told(request, error.status_code, "There is no such page." if error.status_code == 404 else str(error.detail))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        log.exception("%s failed", request.url.path)
        return told(request, 500, f"{type(error).__name__}: {error}")
