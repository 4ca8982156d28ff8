"""One body for every error, which the clients of every dialect can read.

`detail` is what the Jina clients look for, `error.message` what OpenAI's do, `message` Cohere's and `error_type` TEI's.
"""

from typing import Any

import orjson
from pydantic import BaseModel, Field
from starlette.responses import Response

# Error codes of the hosted API, and the type that OpenAI gives such errors.
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
}
CODES = {
    400: "INPUT_INVALID",
    404: "RESOURCE_NOT_FOUND",
    405: "METHOD_NOT_ALLOWED",
    408: "REQUEST_TIMEOUT",
    413: "REQUEST_TOO_LARGE",
    422: "VALIDATION_ERROR",
    429: "RATE_CONCURRENCY_LIMIT_EXCEEDED",
    500: "INTERNAL_ERROR",
    503: "SERVICE_UNAVAILABLE",
    504: "SERVICE_TIMEOUT",
}


class FieldProblem(BaseModel):
    """What is wrong with one field."""

    field: str
    message: str
    type: str
    input: Any = None


class OpenAIError(BaseModel):
    """The error as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error."""

    detail: str
    code: str
    request_id: str
    message: str
    error: OpenAIError
    errors: list[FieldProblem] = Field(default_factory=list)


class ApiError(Exception):
    """An error to be told to the client.

    Attributes:
        status: HTTP status.
        detail: What is wrong, and what to do about it.
        code: A name for programs.
        param: Field of the request that is wrong, if one is.
        errors: All fields that are.
        headers: Further headers.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        code: str | None = None,
        *,
        param: str | None = None,
        errors: list[dict[str, Any]] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.detail, self.param = status, detail, param
        self.code = code or CODES.get(status, "INTERNAL_ERROR" if status >= 500 else "INPUT_INVALID")
        self.errors, self.headers = errors, headers or {}


def unavailable(detail: str) -> ApiError:
    """The error while there is no model to compute with."""
    return ApiError(503, detail, headers={"retry-after": "2"})


def overloaded(retry_after: int) -> ApiError:
    """The error while there is more to do than is good."""
    detail = f"the server has as many requests as it takes; try again in {retry_after} s"
    return ApiError(429, detail, headers={"retry-after": str(retry_after)})


def response(error: ApiError, request_id: str) -> Response:
    """An error as a response.

    Args:
        error: The error.
        request_id: Id of the request.

    Returns:
        The response.
    """
    kind = TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    body: dict[str, Any] = {
        "detail": error.detail,
        "code": error.code,
        "request_id": request_id,
        "message": error.detail,
        "error": {"message": error.detail, "type": kind, "param": error.param, "code": error.code},
    }
    if error.errors is not None:
        body["errors"] = error.errors
    return Response(orjson.dumps(body), error.status, error.headers, "application/json")
