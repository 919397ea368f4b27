"""The HTTP server: OpenAI's endpoints over a `Service`."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from ..version import __version__
from .answers import ChatForm, Choice, Form, TextForm, event
from .doors import Doors
from .errors import ApiError, not_valid, of
from .running import Running, Wanted
from .schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    LoadRequest,
    StreamOptions,
    TokenizeRequest,
    UnloadRequest,
)
from .service import Service

Found = TypeVar("Found")
BODIES = (ChatRequest, CompletionRequest, EmbeddingRequest, TokenizeRequest, DetokenizeRequest, LoadRequest, UnloadRequest)
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    for status, text in {
        400: "The request cannot be served as it is", 401: "A key is missing", 404: "There is no such model",
        413: "The body is too large", 422: "Not used", 429: "Too much waits already", 503: "Loading, or shutting down",
    }.items()
}  # fmt: skip


def create_app(service: Service) -> FastAPI:
    """The app over a service, which starts and stops with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.stop)

    app = FastAPI(title="GraftLM", version=__version__, lifespan=lifespan, responses=ERRORS)
    app.state.service = service
    _add_errors(app)
    _add_generation(app, service)
    _add_models(app, service)
    _add_tokens(app, service)
    _add_health(app, service)
    _add_admin(app, service)
    s = service.settings
    app.add_middleware(Doors, keys=s.api_keys, admin_key=s.admin_key, max_body=s.max_body)
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        made = plain()
        made["components"]["schemas"]["Error"] = {
            "type": "object", "required": ["error"],
            "properties": {"error": {"type": "object", "required": ["message", "type"]}},
        }  # fmt: skip
        return made

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def told(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        fields = {name for body in BODIES for name in body.model_fields}
        return not_valid(list(error.errors()), sorted(fields)).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        text = str(error.detail)
        if error.status_code in (404, 405):
            text = f"There is no {request.method} {request.url.path} here; GET /openapi.json has all that there is."
        made = ApiError(error.status_code, text).response()
        made.headers.update(error.headers or {})
        return made

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return of(error).response()


# -- generation ------------------------------------------------------------------------------------------------------------
def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        with service.errors("chat"):
            wanted = await asyncio.to_thread(service.of_chat, body)
            tools = [] if body.tool_choice == "none" else [tool.function.name for tool in body.tools or ()]
            form = ChatForm(body.model, bool(body.logprobs), tools, body.calls)
            return await respond(service, request, wanted, form, body)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        with service.errors("completions"):
            wanted = await asyncio.to_thread(service.of_completion, body)
            echoed = [service.prompts.text(ids) for ids in wanted.prompts] if body.echo else []
            form = TextForm(body.model, body.logprobs is not None, echoed, body.n or 1)
            return await respond(service, request, wanted, form, body)

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        with service.errors("embeddings"):
            vectors, tokens = await while_there(request, service.embed(body))
            data = [
                {"object": "embedding", "index": i, "embedding": _packed(v) if body.encoding_format == "base64" else v}
                for i, v in enumerate(vectors)
            ]
            usage = {"prompt_tokens": tokens, "total_tokens": tokens}
            return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": usage})


async def respond(service: Service, request: Request, wanted: Wanted, form: Form, body: Any) -> Response:
    """Generate, and answer whole or in pieces; a client that leaves ends what was begun for it."""
    running = await service.begin(wanted)
    streams = None
    try:
        if body.stream:
            first = await while_there(request, running.first())  # what goes wrong before it has its own status
            running.streams = True
            streams = Streams(running, stream(running, form, first, body.streaming))
            return streams
        choices = await while_there(request, running.whole())
        return JSONResponse(form.whole(best(choices, wanted), running.usage))
    finally:
        if streams is None:
            running.close()


class Streams(StreamingResponse):
    """Server-sent events of a request that ends with them, also where a client leaves before the first was sent."""

    def __init__(self, running: Running, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.running = running

    async def __call__(self, *asgi: Any) -> None:
        try:
            await super().__call__(*asgi)
        finally:
            self.running.close()


async def while_there(request: Request, work: Coroutine[Any, Any, Found]) -> Found:
    """What some work gives; it ends when the client leaves before.

    Raises:
        ApiError: the client left.
    """
    leaves, works = asyncio.ensure_future(left(request)), asyncio.ensure_future(work)
    try:
        await asyncio.wait({leaves, works}, return_when=asyncio.FIRST_COMPLETED)
        if not works.done():
            raise ApiError(499, "The client left.", code="cancelled")
        return works.result()
    finally:
        leaves.cancel()
        works.cancel()


async def left(request: Request) -> None:
    """Until the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def stream(running: Running, form: Form, first: Any, options: StreamOptions) -> AsyncIterator[bytes]:
    """Server-sent events, [DONE] last; an error in their midst is an event, too."""
    choices = [Choice() for _ in range(running.count)]

    def chunk(made: dict[str, Any]) -> bytes:
        if options.include_usage:
            made["usage"] = running.usage.to_dict() if options.continuous_usage_stats else None
        return event(made)

    try:
        for made in form.begin(running.count):
            yield chunk(made)
        async for index, piece in running.after(first):
            choices[index].add(piece)
            for made in form.delta(index, choices[index], piece):
                yield chunk(made)
        if options.include_usage:
            yield event(form.usage(running.usage))
        yield event("[DONE]")
    except Exception as error:
        yield event(running.failed(error).body)
        yield event("[DONE]")


def best(choices: list[Choice], wanted: Wanted) -> list[Choice]:
    """Of each prompt's choices the likeliest `keep`, best first where there are more."""
    if wanted.keep == wanted.n:
        return choices
    groups = [choices[i : i + wanted.n] for i in range(0, len(choices), wanted.n)]
    return [c for g in groups for c in sorted(g, key=lambda c: -c.mean_logprob)[: wanted.keep]]


def _packed(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


# -- what there is ------------------------------------------------------------------------------------------------------
def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": await asyncio.to_thread(service.models)})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JSONResponse(await asyncio.to_thread(service.model, name))


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        with service.errors("tokenize"):
            return JSONResponse(await asyncio.to_thread(service.tokenize, body))

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        with service.errors("detokenize"):
            ids = service.prompts.of_text(body.tokens) if body.tokens else []
            return JSONResponse({"prompt": service.prompts.text(ids)})


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        wrong = service.wrong
        return JSONResponse({"status": wrong or "ok"}, 503 if wrong else 200)

    @app.get("/ready")
    async def ready() -> Response:
        why = service.wrong or ("shutting down" if service.draining else None)
        return JSONResponse({"status": why or "ready"}, 503 if why else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/version")
    async def version() -> Response:
        return JSONResponse({"version": __version__})


def _add_admin(app: FastAPI, service: Service) -> None:
    @app.post("/v1/load_lora_adapter")
    async def load(body: LoadRequest) -> Response:
        with service.errors("load"):
            await service.load(body)
            return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadRequest) -> Response:
        with service.errors("unload"):
            await service.unload(body.lora_name)
            return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
