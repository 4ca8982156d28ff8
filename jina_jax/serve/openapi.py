"""The OpenAPI document. Bodies are read by hand, within limits, so they are described by hand, too."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, TypeAdapter

from jina_jax.serve.errors import ErrorBody

ABOUT = """Text embeddings with jina-embeddings-v3 in JAX: the hosted API on hardware of one's own."""
REFERENCE = "#/components/schemas/{model}"
ERRORS = {
    400: "The request is valid, but not possible",
    401: "No API key, or a wrong one",
    408: "The body came too slowly",
    413: "The body is too large",
    422: "The request is not valid",
    429: "Too many requests at a time",
    500: "The server failed",
    503: "The model is not ready",
    504: "It took too long",
}


def _error(status: int, retry: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = {"description": ERRORS.get(status, "Error"), "model": ErrorBody}
    if retry:
        found["headers"] = {"Retry-After": {"description": "Seconds", "schema": {"type": "integer"}}}
    return found


def get(app: FastAPI, path: str, handler: Callable, summary: str, answer: Any, *more: int) -> None:
    """Add a route that reads nothing.

    Args:
        app: The application.
        path: Its path.
        handler: What answers.
        summary: What it is for.
        answer: Type of the answer; None for text.
        *more: Further statuses, with an answer of the same type where it is about health, else an error.
    """
    health = path in ("/health", "/ready", "/ping")
    responses: dict[int | str, dict[str, Any]] = {401: _error(401)}
    if answer is None:
        responses[200] = {"description": "Text", "content": {"text/plain": {"schema": {"type": "string"}}}}
    else:
        responses[200] = {"description": "Done", "model": answer}
    for status in more:
        responses[status] = {"description": "Not ready", "model": answer} if health else _error(status)
    app.add_api_route(
        path,
        handler,
        methods=["GET"],
        summary=summary,
        responses=responses,
        operation_id="get_" + path.strip("/").replace("/", "_"),
        response_model=None,
    )


def post(app: FastAPI, path: str, handler: Callable, summary: str, body: type[BaseModel], answer: Any) -> None:
    """Add a route with a body.

    Args:
        app: The application.
        path: Its path.
        handler: What answers.
        summary: What it is for.
        body: Type of the body.
        answer: Type of the answer.
    """
    content = {"application/json": {"schema": {"$ref": REFERENCE.format(model=body.__name__)}}}
    responses: dict[int | str, dict[str, Any]] = {200: {"description": "Done", "model": answer}}
    for status in ERRORS:
        responses[status] = _error(status, status in (429, 503))
    app.add_api_route(
        path,
        handler,
        methods=["POST"],
        summary=summary,
        responses=responses,
        openapi_extra={"requestBody": {"required": True, "content": content}, "x-body": body},
        operation_id="post_" + (path.strip("/").replace("/", "_") or "root"),
        response_model=None,
    )


def install(app: FastAPI) -> None:
    """Have the application describe the bodies as well.

    Args:
        app: The application, with all its routes.
    """
    bodies: list[type[BaseModel]] = []
    for route in app.routes:
        extra = getattr(route, "openapi_extra", None) or {}
        if "x-body" in extra:
            bodies.append(extra.pop("x-body"))

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            parts = found.setdefault("components", {}).setdefault("schemas", {})
            inputs = [(body, "validation", TypeAdapter(body)) for body in dict.fromkeys(bodies)]
            _, more = TypeAdapter.json_schemas(inputs, ref_template=REFERENCE)  # type: ignore[arg-type]
            parts |= more["$defs"]
            found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            found["security"] = [{"key": []}, {}]
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
