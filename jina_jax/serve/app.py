"""The HTTP application: which path does what. What a client says is read in `schema`, what it means in `dialects`."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, RedirectResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from jina_jax._version import __version__
from jina_jax.config import Config
from jina_jax.serve import dialects, errors, openapi, schema, wire
from jina_jax.serve.batcher import Batcher
from jina_jax.serve.errors import ApiError
from jina_jax.serve.gate import Gate, read_body, while_connected
from jina_jax.serve.metrics import Metrics
from jina_jax.serve.prepare import Ask, Served
from jina_jax.serve.service import Answer, Service
from jina_jax.serve.settings import Settings
from jina_jax.serve.supervisor import Supervisor
from jina_jax.serve.worker import Ready, Spec
from jina_jax.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger("jina_jax.serve")

LARGE_BODY = 1 << 16  # bytes; a larger body is parsed in a thread
Body = TypeVar("Body", bound=BaseModel)


@dataclass
class Server:
    """All parts of a running server.

    Attributes:
        app: The application for uvicorn.
        gate: What requests pass first.
        service: What the routes use.
        supervisor: What holds the model's process.
        started: When, in seconds since 1970.
    """

    app: FastAPI
    gate: Gate
    service: Service
    supervisor: Supervisor
    started: int

    @property
    def is_ready(self) -> bool:
        """Whether requests can be answered."""
        return self.supervisor.state == "ready" and bool(self.service.models) and not self.gate.draining


def build(
    settings: Settings,
    spec: Spec,
    names: dict[str, tuple[str, ...]],
    keys: tuple[str, ...] = (),
    failed: Callable[[], None] = lambda: None,
) -> Server:
    """Put a server together; it starts its worker when the application starts.

    Args:
        settings: The settings.
        spec: What the worker loads.
        names: Of each model of `spec` all names that requests may give, its own first.
        keys: API keys; none lets everybody in.
        failed: Called when the worker could not be brought back.

    Returns:
        The server.
    """
    metrics = Metrics()
    supervisor = Supervisor(spec, restarts=settings.worker_restarts, job_timeout=settings.request_timeout or 86_400.0)
    batcher = Batcher(
        supervisor.compute,
        batch_tokens=settings.batch_tokens or 1024,
        latency_target=settings.latency_target,
        max_tokens=settings.max_queue_tokens,
        observe=metrics.computed,
    )
    service = Service(settings, batcher, metrics)

    def changed() -> None:
        """The worker came or went."""
        ready = supervisor.ready
        if supervisor.state == "ready" and ready is not None:
            batcher.batch_tokens = ready.batch_tokens
            service.models = _models(ready, names, tokenizers)
        batcher.set_open(supervisor.state == "ready")
        if supervisor.state == "failed":
            log.error("gave_up", extra={"reason": supervisor.message})
            failed()

    supervisor.changed = changed
    tokenizers: dict[str, Tokenizer] = {}

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # They are read once, before the worker, which reads the same files: it takes far longer.
        batcher.set_open(False)
        for one in spec.models:
            tokenizers[one.name] = await asyncio.to_thread(load_tokenizer, Path(one.directory))
        supervisor.start()
        yield
        await supervisor.stop()
        service.threads.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="jina-jax", version=__version__, lifespan=lifespan, redoc_url=None, description=openapi.ABOUT)
    if settings.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origin),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    gate = Gate(app, settings, keys, metrics)
    gate.retry_after = batcher.retry_after
    server = Server(app, gate, service, supervisor, int(time.time()))
    app.state.server = server
    _add_errors(app)
    _add_state_routes(app, server)
    _add_embedding_routes(app, server)
    openapi.install(app)
    gate.endpoints = {getattr(route, "path", "") for route in app.routes}
    return server


def _models(ready: Ready, names: dict[str, tuple[str, ...]], tokenizers: dict[str, Tokenizer]) -> dict[str, Served]:
    """Every model by each of its names."""
    found: dict[str, Served] = {}
    for own, of_it in names.items():
        config: Config = ready.configs[own]
        served = Served((own, *of_it), config, tokenizers[own], ready.dimensions[own])
        found |= dict.fromkeys((own, *of_it), served)
    return found


# ---- Errors ----------------------------------------------------------------------------------------------------


def _add_errors(app: FastAPI) -> None:
    """Every error leaves in the one form."""

    @app.exception_handler(ApiError)
    async def told(request: Request, error: ApiError) -> Response:
        return errors.response(error, request.state.request_id)

    @app.exception_handler(HTTPException)
    async def routed(request: Request, error: HTTPException) -> Response:
        detail = {404: f"there is no {request.url.path[:200]} here; /docs lists what there is"}.get(error.status_code)
        found = ApiError(error.status_code, detail or str(error.detail), headers=dict(error.headers or {}))
        return errors.response(found, request.state.request_id)


# ---- Routes ----------------------------------------------------------------------------------------------------


def _add_state_routes(app: FastAPI, server: Server) -> None:
    """Routes about the server itself."""
    service, metrics = server.service, server.service.metrics

    def health() -> Response:
        state = "draining" if server.gate.draining else server.supervisor.state
        return JSONResponse({"status": state, "ready": server.is_ready}, 200 if server.is_ready else 503)

    for path in ("/health", "/ready", "/ping"):
        openapi.get(app, path, health, "Whether requests are answered: 503 before and after", schema.Health, 503)

    async def live() -> Response:
        return JSONResponse({"status": "live", "ready": server.is_ready})

    openapi.get(app, "/live", live, "Whether the server runs", schema.Health)

    async def prometheus() -> Response:
        batcher = service.batcher
        metrics.running.set(server.gate.running)
        metrics.queue_size.set(batcher.requests)
        metrics.queue_tokens.set(batcher.waiting_tokens)
        metrics.batch_budget.set(batcher.budget())
        metrics.ready.set(server.is_ready)
        metrics.restarts.set(server.supervisor.restarts)
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    openapi.get(app, "/metrics", prometheus, "Metrics for Prometheus", None)

    async def models() -> Response:
        service.find(None)
        return JSONResponse(dialects.cards(service.models, server.started))

    openapi.get(app, "/v1/models", models, "The models", schema.ModelList, 503)

    async def info() -> Response:
        return JSONResponse(dialects.info(service.find(None), service.settings, service.batcher.batch_tokens))

    openapi.get(app, "/info", info, "The first model, as text-embeddings-inference tells it", dict[str, Any], 503)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return RedirectResponse("docs")


def _add_embedding_routes(app: FastAPI, server: Server) -> None:
    """Routes that compute."""
    service = server.service

    async def read(request: Request, model: type[Body]) -> Body:
        if not server.is_ready and not server.gate.draining:
            raise errors.unavailable("the model is being loaded; try again")
        service.check_room()
        body = await read_body(request.scope, request.receive, service.settings)
        if len(body) < LARGE_BODY:
            return schema.parse(model, body)
        return await service.thread(schema.parse, model, body)

    async def embed(request: Request, ask: Ask, write: Callable[[Answer], bytes]) -> Response:
        async def work() -> bytes:
            answer = await service.embed(ask, request.state.note)
            return await service.thread(write, answer)

        return wire.json_response(await while_connected(request.receive, work(), service.settings.request_timeout))

    async def answer_jina(request: Request, body: schema.EmbeddingRequest) -> Response:
        name = body.model or service.find(None).names[0]
        types = body.embedding_type
        return await embed(
            request,
            dialects.from_jina(body),
            lambda answer: wire.embedding_list(answer.vectors, types, name, answer.tokens),
        )

    async def embeddings(request: Request) -> Response:
        return await answer_jina(request, await read(request, schema.EmbeddingRequest))

    async def invocations(request: Request) -> Response:
        body = await read(request, schema.AnyInvocation)
        found = body.root
        return await answer_jina(
            request, found if isinstance(found, schema.EmbeddingRequest) else dialects.from_sagemaker(found)
        )

    async def tei(request: Request) -> Response:
        body = await read(request, schema.TeiRequest)
        return await embed(request, dialects.from_tei(body), lambda answer: wire.dumps(answer.vectors))

    async def cohere(request: Request) -> Response:
        body = await read(request, schema.CohereRequest)
        return await embed(request, dialects.from_cohere(body), lambda answer: dialects.to_cohere(answer, body))

    async def similarity(request: Request) -> Response:
        body = await read(request, schema.SimilarityRequest)
        texts = [body.inputs.source_sentence, *body.inputs.sentences]
        ask = Ask(texts, body.model, body.task, truncate=body.truncate)
        return await embed(request, ask, lambda answer: wire.dumps(dialects.similarities(answer)))

    async def tokenize(request: Request) -> Response:
        body = await read(request, schema.TokenizeRequest)
        served = service.find(body.model)
        dialects.check_texts(body, service.settings)
        return wire.json_response(await service.thread(dialects.tokens_of, body, served))

    handlers: dict[str, tuple[Callable[[Request], Coroutine[Any, Any, Response]], Any, Any, str]] = {
        "/v1/embeddings": (embeddings, schema.EmbeddingRequest, schema.EmbeddingResponse, "Embed texts"),
        "/embeddings": (embeddings, schema.EmbeddingRequest, schema.EmbeddingResponse, "The same as /v1/embeddings"),
        "/embed": (tei, schema.TeiRequest, list[list[float]], "Embed texts for clients of text-embeddings-inference"),
        "/": (tei, schema.TeiRequest, list[list[float]], "The same as /embed"),
        "/v2/embed": (cohere, schema.CohereRequest, schema.CohereResponse, "Embed texts for clients of Cohere"),
        "/invocations": (invocations, schema.AnyInvocation, schema.EmbeddingResponse, "Embed texts for SageMaker"),
        "/similarity": (similarity, schema.SimilarityRequest, list[float], "Compare a text with others"),
        "/tokenize": (tokenize, schema.TokenizeRequest, list[list[schema.Token]], "Cut texts into tokens"),
    }
    for path, (handler, body, answer, summary) in handlers.items():
        openapi.post(app, path, handler, summary, body, answer)
